"""The task's trade-off, proved on exact marginals: no network, so no question of training."""

import math

import pytest
import torch

from pydllm.demo.task import FRIENDS, held_out_problems, is_correct, vocabulary
from training import oracle

PROBLEMS = held_out_problems(24)
WORDS = vocabulary()


@pytest.fixture(scope="module")
def measured():
    return {
        name: oracle.measure(PROBLEMS, rule, drafts)
        for name, (rule, drafts) in oracle.DECODERS.items()
    }


def test_solutions_are_all_that_are_right():
    for problem in PROBLEMS[:8]:
        rows = oracle.solutions(problem)
        length = len(problem.solution.split()) // 6
        assert len(rows) == (1 if problem.in_order else math.perm(len(FRIENDS), length))
        texts = {" ".join(WORDS[i] for i in row if i != oracle.EOS) for row in rows.tolist()}
        assert len(texts) == len(rows) and problem.solution in texts
        assert all(is_correct(problem, text) for text in texts)


def test_one_token_at_a_time_is_always_right(measured):
    assert measured["Static(1)"][0] == 100
    assert measured["Threshold(0.9)"][0] == 100
    assert measured["Threshold(0.9)"][2] > 2.5


def test_several_tokens_at_a_time_are_not(measured):
    assert measured["Static(2)"][0] <= 95
    assert measured["Static(4)"][0] <= 85


def test_drafts_take_the_same_tokens_in_fewer_forwards(measured):
    assert measured["FreeDave(8)"][1] * 3 < measured["Static(1)"][1]
    for problem in PROBLEMS[:6]:
        one, other = (
            oracle.decode(
                oracle.Oracle(problem, 0.05, torch.Generator().manual_seed(1)), oracle.static(1), n
            )[0]
            for n in (0, 8)
        )
        assert torch.equal(one, other)


def test_marginals_are_exact():
    problem = next(p for p in PROBLEMS if not p.in_order)
    model = oracle.Oracle(problem, 0.0, torch.Generator())
    ids = torch.full((oracle.ANSWER_LENGTH,), oracle.MASK)
    _, confidence = model(ids)
    assert confidence[1] == pytest.approx(1, abs=1e-3)
    assert confidence[0] == pytest.approx(1 / 5, abs=1e-3)
    ids[0] = WORDS.index("tom")
    tokens, confidence = model(ids)
    assert confidence[6] == pytest.approx(1 / 4, abs=1e-3)
    assert tokens[6] != ids[0]
