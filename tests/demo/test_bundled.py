"""The bundled mixture of experts and the model trained both ways, on ten problems."""

import json

import pytest
import torch
from click.testing import CliRunner

import pydllm
from pydllm.cli import main
from pydllm.demo import MODELS, task
from training.experts import distinct_experts


def _decode(model, problems, algorithm):
    prompts = [problem.prompt for problem in problems]
    return pydllm.generate(model, prompts, algorithm, max_new_tokens=task.ANSWER_LENGTH)


def _right(problems, generation):
    return sum(map(task.is_correct, problems, generation.text))


@pytest.mark.parametrize("mode", ["strict", "pipelined"])
def test_the_mixture_solves_problems_and_drafts_change_nothing(mode):
    model, problems = pydllm.load(MODELS["llada2-tiny"], device="cpu"), task.held_out_problems(10)
    one = _decode(model, problems, pydllm.Static(block_length=8))
    assert _right(problems, one) >= 9
    drafted = _decode(model, problems, pydllm.FreeDave(draft_steps=8, block_length=8, mode=mode))
    assert all(map(torch.equal, drafted.sequences, one.sequences))
    assert drafted.nfe.sum() * 2 < one.nfe.sum()


def test_the_mixture_has_learnt_to_route():
    """Rows of a block share experts, more than rows that chose at random would, and no expert is
    dead: the loads of training were balanced.
    """
    model, problems = pydllm.load(MODELS["llada2-tiny"], device="cpu"), task.held_out_problems(10)
    moe, model.routed = model.sizes.moe, []
    _decode(model, problems, pydllm.Threshold(threshold=0.9, block_length=8))
    assert moe.sparse == (False, True, True, True)
    # Of 16 experts, 8 rows with 4 each at random leave (3/4)^8 of them out.
    at_random = 16 * (1 - 0.75**8)
    for place in range(3):
        layer = model.routed[place::3]
        assert 8 < distinct_experts(layer, 16, 8).mean() < at_random - 0.5
        loads = torch.cat([ids.flatten() for ids in layer]).bincount(minlength=17)[:16].double()
        assert (loads / loads.sum()).min() > 0.1 / 16


def test_speculation_has_the_autoregressive_tokens_in_fewer_forwards():
    model, problems = pydllm.load(MODELS["dual-tiny"], device="cpu"), task.held_out_problems(10)
    one = _decode(model, problems, pydllm.Autoregressive())
    assert _right(problems, one) >= 9
    lengths = torch.tensor([len(new) for new in one.new_tokens])
    assert torch.equal(one.nfe, lengths)
    last = one.nfe
    for drafts, forwards in ((3, 2), (7, 2), (7, 1)):
        algorithm = pydllm.SelfSpeculative(drafts=drafts, forwards=forwards)
        got = _decode(model, problems, algorithm)
        assert all(map(torch.equal, got.sequences, one.sequences))
        assert (got.nfe <= 1 + forwards * got.rounds).all()
        assert (got.rounds * (drafts + 1) >= lengths - 1).all()
        assert got.nfe.sum() < 0.75 * last.sum()
        last = got.nfe
    blocks = _decode(model, problems, pydllm.Static(block_length=8, tokens_per_step=8))
    assert _right(problems, blocks) >= 8


def test_the_demo_shows_what_speculation_saves(tmp_path):
    only = (
        "--problems",
        "3",
        "--model",
        "dual-tiny",
        "--only",
        "autoregressive",
        "--only",
        "speculative, 7",
    )
    page = tmp_path / "page.html"
    options = ("--out", str(tmp_path), "--html", str(page), "--json")
    result = CliRunner().invoke(main, ["demo", *only, *options])
    assert result.exit_code == 0, result.output
    scores = json.loads(result.stdout.splitlines()[-1])["scores"]
    plain, speculative = scores
    assert plain["tokens_per_round"] is None and 2 < speculative["tokens_per_round"] <= 8
    assert speculative["equal_percent"] == 100
    assert speculative["forwards"] < plain["forwards"] / 1.5
    assert '"probability":[' in page.read_text()
