"""Wrong arguments are answered by one sentence that says what was expected and what was got.

``CASES`` is a table: a public function, and arguments that it accepts. Every argument is replaced
by values of a wrong type, dtype or shape, one at a time. The error is raised by pydllm and not
inside torch, before anything was written. Add a function by adding a row.
"""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import pydllm
from pydllm import ops

PACKAGE = str(Path(pydllm.__file__).parent)
INT32 = torch.int32


class Case(NamedTuple):
    function: Callable
    arguments: Callable[[], dict[str, Any]]  # valid ones, made anew
    optional: str = ""  # those that may be None
    extra: tuple[tuple[str, Any], ...] = ()  # further wrong values
    free: str = ""  # those that may have any number of dimensions


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


def at(*values):
    return torch.tensor(values, dtype=INT32)


def window(**more):
    def make():
        usual = {"x": torch.zeros(2, 6, dtype=torch.int64), "mask_id": 0, "start": at(1, 1)}
        usual |= {"length": at(3, 3), "token": torch.ones(2, 4, dtype=torch.int64)}
        usual |= {"score": torch.rand(2, 4)}
        return usual | {name: value() for name, value in more.items()}

    return make


def written():
    return {"step_map": lambda: torch.full((2, 6), -1).int(), "nfe": lambda: at(0, 0)}


def attention(heads=True):
    def make():
        k = torch.randn(2, 4, 1, 8)
        usual = {"k": k, "v": k.clone(), "start": at(1, 1), "commit": at(2, 2)}
        usual |= {name: torch.zeros(2, 8, 1, 8) for name in ("k_cache", "v_cache")}
        usual |= {"cos": torch.ones(8, 4), "sin": torch.zeros(8, 4), "eps": 1e-6, "branches": 2}
        if not heads:
            return usual | {"branch": at(1, 1)}
        usual |= {"q": k.clone(), "length": at(2, 2), "kv_len": at(5, 5), "causal": False}
        return usual | {"block_size": 2, "window": 3, "softcap": 5.0, "scale": 0.5}

    return make


def row_statistics(**more):
    def make():
        usual = {"rows": at(0, 1), "banned": at(1), "counter": torch.zeros(2, 3, dtype=INT32)}
        usual |= {"temperature": 1.0, "seed": 1, "softcap": 5.0, "tempered": True}
        return usual | {name: value() for name, value in more.items()}

    return make


def mixture():
    logits = torch.randn(4, 5)
    usual = {"logits": logits, "verifier_logits": logits.clone(), "length": at(2, 2)}
    usual |= {"token": torch.ones(4, dtype=torch.int64), "mixture": 0.5, "temperature": 1.0}
    usual |= {"counter": torch.zeros(4, 3, dtype=INT32), "critical": True, "emit": "draft"}
    return usual | {"rule": "paper", "shared_vocab": 4, "threshold": torch.zeros(4), "seed": 1}


def multiblock():
    x = torch.zeros(2, 10, dtype=torch.int64)
    usual = {"x": x, "step_map": torch.full((2, 10), -1).int(), "mask_id": 0, "threshold": 0.5}
    usual |= {"state": ops.MultiBlockState.make(x, 4, 2), "prompt_length": at(2, 2)}
    usual |= {"token": torch.ones(2, 3, dtype=torch.int64), "entropy": torch.rand(2, 3)}
    usual |= {"max_new_tokens": 4, "block_length": 2, "add_at": 0.1, "full_at": 0.9}
    usual |= {"eos_ids": torch.tensor([1]), "early_stop": True, "cached": True, "delay": 2}
    return usual | {"refresh": 3, "tail": 2, "shifted": False}


MATRIX = {"hidden": lambda: torch.randn(4, 8), "weight": lambda: torch.randn(5, 8)}
ROW = "rows banned softcap top_k top_p bias"
CASES = (
    Case(
        ops.rms_norm,
        lambda: {
            "x": torch.randn(2, 4),
            "weight": torch.ones(4),
            "eps": 1e-6,
            "residual": torch.randn(2, 4),
        },
        "residual",
        (("eps", -1.0), ("eps", float("inf")), ("residual", torch.zeros(1, 4).expand(2, 4))),
    ),
    Case(ops.swiglu, lambda: {"gate_up": torch.randn(2, 4)}, free="gate_up"),
    Case(
        ops.vocab_stats,
        row_statistics(logits=lambda: torch.randn(4, 5), top_k=lambda: 2, top_p=lambda: 0.9),
        ROW,
        (("temperature", 1e300), ("temperature", 1e-9), ("top_k", 0), ("seed", -1)),
    ),
    Case(ops.head_stats, row_statistics(**MATRIX, bias=lambda: torch.randn(5)), ROW),
    Case(
        ops.head_stats_partial,
        row_statistics(**MATRIX, bias=lambda: torch.randn(5), vocab_offset=lambda: 4),
        ROW,
        (("vocab_offset", 3), ("vocab_offset", -4)),
    ),
    Case(
        ops.unmask,
        window(rule=lambda: "quota", quota=lambda: at(1, 1), seed=lambda: 1, **written()),
        "",
        (
            ("ending", 3),
            ("min_tokens", 2),
            ("x", torch.zeros(1, 6, dtype=torch.int64).expand(2, 6)),
        ),
    ),
    Case(ops.draft, window(branches=lambda: 3, block_size=lambda: 2), "block_size"),
    Case(
        ops.verify,
        window(
            candidates=lambda: torch.zeros(2, 3, 6, dtype=torch.int64),
            token=lambda: torch.ones(2, 3, 4, dtype=torch.int64),
            score=lambda: torch.rand(2, 3, 4),
            drafts=lambda: 3,
            block_size=lambda: 2,
            **written(),
        ),
        "block_size",
        (("nfe", torch.zeros(1, dtype=INT32).expand(2)),),
    ),
    Case(
        ops.window_attention,
        attention(),
        "block_size window softcap scale",
        (
            ("block_size", 0),
            ("softcap", -1.0),
            ("k_cache", torch.zeros(1, 8, 1, 8).expand(2, -1, -1, -1)),
        ),
    ),
    Case(ops.commit_branch, attention(heads=False)),
    Case(
        ops.mixture_draft,
        lambda: {
            "logits": torch.randn(4, 5),
            "temperature": 1.0,
            "seed": 1,
            "counter": torch.zeros(2, 3, dtype=INT32),
            "rows": at(0, 1),
            "banned": at(1),
            "top_p": 0.9,
            "capacity": 4,
            "rule": "paper",
            "shared_vocab": 4,
        },
        "rows banned top_p shared_vocab",
        (("capacity", -1), ("shared_vocab", 6)),
    ),
    Case(ops.mixture_accept, mixture, "shared_vocab threshold", (("mixture", 1.5),)),
    Case(ops.multiblock_step, multiblock, "eos_ids refresh tail", (("add_at", 2.0),)),
    Case(
        ops.certainty_loss,
        lambda: {
            "logits": torch.randn(4, 5),
            "target": torch.ones(4, dtype=torch.int64),
            "temperature": 0.5,
        },
        "",
        (("temperature", 0.0), ("temperature", float("inf"))),
    ),
    Case(
        ops.round_counter,
        lambda: {"start": at(1, 2), "request": at(0, 0), "rows": 2, "emit": "draft"},
    ),
)


def inputs(case):
    """(argument, wrong value) of a case."""
    for name, value in case.arguments().items():
        for wrong in wrong_values(value, name in case.optional.split()):
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
    except (TypeError, ValueError) as error:
        message = str(error)
        frame = traceback.extract_tb(error.__traceback__)[-1]
        if not frame.filename.startswith(PACKAGE):
            return f"raised in {frame.filename}: {message}"
        if "expected" not in message or "got" not in message or "\n" in message:
            return message
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    else:
        return "accepted"
    after = [t for value in arguments.values() for t in tensors(value)]
    unchanged = all(map(torch.equal, before, after))
    return None if unchanged else "it had written before it refused"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.function.__name__)
def test_wrong_values_are_answered_by_a_sentence(case):
    found = [
        f"{name}={wrong!r:.60}: {said}"
        for name, wrong in inputs(case)
        if (said := complaint(case, name, wrong)) is not None
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.function.__name__)
def test_the_arguments_of_a_row_are_valid(case):
    case.function(**case.arguments())


def test_how_many_there_are():
    assert sum(1 for case in CASES for _ in inputs(case)) >= 300
