import random

import pytest

from pydllm.demo import task


def _chain(problem):
    """The abstract chain behind a problem, read back from its solution."""
    words = problem.solution.split()[:-2]
    signs = {word: kind for kind, spellings in task.SIGNS.items() for word in spellings}
    return tuple(
        (int(words[i + 1]), signs[words[i + 2]], int(words[i + 3])) for i in range(0, len(words), 6)
    )


@pytest.fixture(scope="module")
def problems():
    rng = random.Random(1)
    return [task.draw_problem(rng, held_out=False) for _ in range(2000)]


def test_solutions_are_right_and_end_in_the_answer(problems):
    apply = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "div": lambda a, b: a / b,
    }
    for problem in problems:
        value = None
        for start, kind, operand in _chain(problem):
            assert value is None or value == start
            value = apply[kind](start, operand)
            assert 1 <= value < task.LIMIT
        assert value == problem.answer == task.read_answer(problem.solution)


def test_everything_is_in_the_vocabulary_and_fits(problems):
    words = set(task.vocabulary())
    assert len(words) == len(task.vocabulary())
    for problem in problems:
        assert set(problem.prompt.split()) <= words
        assert set(problem.solution.split()) <= words
        assert len(problem.solution.split()) < task.ANSWER_LENGTH


def test_training_and_held_out_chains_are_disjoint(problems):
    held_out = {_chain(problem) for problem in task.held_out_problems(500)}
    assert len(held_out) > 450
    assert not held_out & {_chain(problem) for problem in problems}


def test_wording_is_free(problems):
    connectives = {problem.solution.split()[0] for problem in problems}
    assert connectives == set(task.CONNECTIVES)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("first 1 + 2 = 3 answer 3", 3),
        ("answer 4 then answer 5", 5),
        ("answer", None),
        ("answer 3 3", None),
        ("answer x", None),
        ("", None),
    ],
)
def test_read_answer(text, number):
    assert task.read_answer(text) == number
