"""Wrong arguments are answered by one sentence that says what was expected and what was got.

``tests/bad_inputs`` holds tables of public functions and of arguments that they accept. Every
argument is replaced by values of a wrong type, dtype or shape, one at a time. The error is raised
by pydllm and not inside torch, before anything was written. Add a function by adding a row.
"""

import traceback
from pathlib import Path

import pytest
import torch

import pydllm
from tests.bad_inputs import calls, ops

PACKAGE = str(Path(pydllm.__file__).parent)


CASES = (*ops.CASES, *calls.CASES)


def wrong_values(value, optional):
    """Values of a wrong type, dtype or shape."""
    if isinstance(value, torch.Tensor):
        values = [3, "x", [1.0], object()]
        values += [value.to(torch.complex64), value[None, None, None]]
    elif isinstance(value, bool):
        values = ["False", 1, [True]]
    elif isinstance(value, int):
        values = ["1", 1.5, [1], True, 2**70, torch.zeros(())]
    elif isinstance(value, float):
        values = ["0.5", [0.5], float("nan"), True, {}]
    elif isinstance(value, str):
        values = [3, "nonsense", ["x"]]
    else:
        values = [3, "x", {}]
    return values if optional else [None, *values]


def inputs(case):
    """(argument, wrong value) of a case."""
    for name, value in case.arguments().items():
        usual = wrong_values(value, name in case.optional.split())
        for wrong in case.instead.get(name, usual):
            if not (isinstance(wrong, torch.Tensor) and wrong.ndim > 3 and name in case.free):
                yield name, wrong
    yield from case.extra


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors(part)


def complaint(case, name, wrong):
    """What is wrong with the answer to one wrong value; None if nothing."""
    arguments = case.arguments()
    changed = arguments | {name: wrong}
    before = [t.clone() for value in arguments.values() for t in tensors(value)]
    try:
        case.function(**changed)
    except (TypeError, ValueError, pydllm.PydllmError) as error:
        message = str(error)
        frame = traceback.extract_tb(error.__traceback__)[-1]
        if not frame.filename.startswith(PACKAGE):
            return f"raised in {frame.filename}: {message}"
        said = "expected" in message and ("got" in message or "found" in message)
        if not said or "\n" in message:
            return message
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    else:
        return "accepted"
    after = [t for value in arguments.values() for t in tensors(value)]
    unchanged = all(map(torch.equal, before, after))
    return None if unchanged else "it had written before it refused"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_wrong_values_are_answered_by_a_sentence(case):
    found = [
        f"{name}={wrong!r:.60}: {said}"
        for name, wrong in inputs(case)
        if (said := complaint(case, name, wrong)) is not None
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_the_arguments_of_a_row_are_valid(case):
    case.function(**case.arguments())


@pytest.mark.parametrize("table", [ops, calls], ids=["ops", "calls"])
def test_how_many_there_are(table):
    assert sum(1 for case in table.CASES for _ in inputs(case)) >= 300
