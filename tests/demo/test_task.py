import random

import pytest
import torch

import pydllm
from pydllm.demo import WEIGHTS, task


def _sentences(problem):
    """(name, value, sign, operand, equals, result) of every operation, read from the solution."""
    words = problem.solution.split()[:-2]
    return [words[i : i + 6] for i in range(0, len(words), 6)]


def _chain(problem):
    """The abstract chain of a problem."""
    return tuple((value, sign, operand) for _, value, sign, operand, *_ in _sentences(problem))


@pytest.fixture(scope="module")
def problems():
    rng = random.Random(1)
    return [task.draw_problem(rng, held_out=False) for _ in range(2000)]


def test_solutions_are_right_and_end_in_the_answer(problems):
    apply = {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "x": lambda a, b: a * b,
        "/": lambda a, b: a / b,
    }
    for problem in problems:
        last = problem.prompt.split()[2]
        for _, value, sign, operand, _, result in _sentences(problem):
            assert value == last
            assert apply[sign](int(value), int(operand)) == int(result)
            assert 1 <= int(result) < task.LIMIT
            last = result
        assert int(last) == problem.answer == task.read_answer(problem.solution)
        assert task.is_correct(problem, problem.solution)


def test_everything_is_in_the_vocabulary_and_fits(problems):
    words = task.vocabulary()
    assert len(set(words)) == len(words)
    for problem in problems:
        assert set(problem.prompt.split()) <= set(words)
        assert set(problem.solution.split()) <= set(words)
        assert len(problem.solution.split()) < task.ANSWER_LENGTH


def test_training_and_held_out_chains_are_disjoint(problems):
    held_out = {_chain(problem) for problem in task.held_out_problems(500)}
    assert len(held_out) > 450
    assert not held_out & {_chain(problem) for problem in problems}


def test_turns_follow_the_rule_of_the_prompt(problems):
    free = set()
    for problem in problems:
        names = tuple(name for name, *_ in _sentences(problem))
        if problem.in_order:
            assert problem.prompt.endswith("in order") and names == task.FRIENDS[: len(names)]
        else:
            assert problem.prompt.endswith("each once") and len(set(names)) == len(names)
            free.add(names[:2])
    assert len(free) == 5 * 4


def _with(problem, **changes):
    """The solution with word ``at`` replaced: ``_with(p, at6="tom")``."""
    words = problem.solution.split()
    for at, word in changes.items():
        words[int(at.removeprefix("at"))] = word
    return " ".join(words)


def test_is_correct_knows_a_right_solution_from_a_wrong_one(problems):
    short = [problem for problem in problems if len(_sentences(problem)) == 3]
    free, told = (next(p for p in short if p.in_order is in_order) for in_order in (False, True))
    first, second, *_ = (name for name, *_ in _sentences(free))
    absent = next(name for name in task.FRIENDS if name not in free.solution)
    assert task.is_correct(free, _with(free, at0=second, at6=first))
    assert task.is_correct(free, _with(free, at0=absent))
    assert not task.is_correct(free, _with(free, at6=first))  # a second turn
    assert not task.is_correct(free, _with(free, at0="answer"))
    assert not task.is_correct(told, _with(told, at0=task.FRIENDS[1], at6=task.FRIENDS[0]))
    for problem in (free, told):
        assert not task.is_correct(problem, _with(problem, at5="0"))
        assert not task.is_correct(problem, problem.solution + " .")
        assert not task.is_correct(problem, problem.solution.rsplit(" ", 1)[0])
        assert not task.is_correct(problem, "")


def test_mistakes_are_where_the_words_are_wrong(problems):
    free = next(p for p in problems if not p.in_order and len(_sentences(p)) == 3)
    first = free.solution.split()[0]
    assert task.mistakes(free, free.solution) == []
    assert task.mistakes(free, _with(free, at6=first, at12=first)) == [6, 12]
    assert task.mistakes(free, _with(free, at3="?", at19="0")) == [3, 19]
    assert task.mistakes(free, free.solution + " . .") == [20, 21]
    assert task.mistakes(free, " ".join(free.solution.split()[:7])) == [7]
    assert task.mistakes(free, "") == [0]


def test_two_most_probable_names_are_the_trap_and_one_at_a_time_is_not(problems):
    """Counted over what training draws: each turn alone is uniform, so its most probable name is
    nothing to go by; after one name, the others are uniform over the rest.
    """
    drawn = [[name for name, *_ in _sentences(p)][:2] for p in problems if not p.in_order]
    for place in (0, 1):
        share = [sum(t[place] == name for t in drawn) / len(drawn) for name in task.FRIENDS]
        assert max(share) < 1 / 5 + 0.05 and min(share) > 1 / 5 - 0.05
    assert all(first != second for first, second in drawn)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("tom 1 + 2 = 3 answer 3", 3),
        ("answer 4 tom answer 5", 5),
        ("answer", None),
        ("answer 3 3", None),
        ("answer x", None),
        ("", None),
    ],
)
def test_read_answer(text, number):
    assert task.read_answer(text) == number


def test_the_bundled_model_shows_the_trade_off():
    """One token per step is right; two are not, because they name somebody twice."""
    model, problems = pydllm.load(WEIGHTS, device="cpu"), task.held_out_problems(10)
    free = [problem for problem in problems if not problem.in_order]
    assert len(free) >= 3

    def decode(algorithm, count=None):
        prompts = [problem.prompt for problem in problems[:count]]
        return pydllm.generate(model, prompts, algorithm, max_new_tokens=task.ANSWER_LENGTH)

    def right(generation):
        return sum(map(task.is_correct, problems, generation.text))

    one = decode(pydllm.Static(block_length=24))
    assert right(one) >= 9
    assert (
        right(decode(pydllm.Static(block_length=24, tokens_per_step=2)))
        <= len(problems) - len(free) / 2
    )
    quick = decode(pydllm.Threshold(threshold=0.9, block_length=24))
    assert right(quick) >= right(one) - 1
    assert quick.tokens_per_forward.mean() > 2.5
    drafted = decode(pydllm.FreeDave(draft_steps=8, block_length=24), 3)
    assert all(map(torch.equal, drafted.sequences, one.sequences))
    assert drafted.nfe.sum() * 3 < one.nfe[:3].sum()
