"""The bits of a row, or of a sequence, alone, among many, and in another order: every kernel."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bench.ops.cases import CASES

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Case(NamedTuple):
    """Inputs of ``bench/ops/cases`` with ``count`` rows or sequences.

    ``count``, and ``count * each``, is the size of no dimension but theirs.
    """

    op: str
    count: int
    shape: dict[str, object]
    backends: tuple[str, ...] = ("triton", "cuda")
    each: int = 1  # rows of a sequence that lie in one dimension with it
    dtype: torch.dtype = torch.float32


ROWS, SEQUENCES = 256, 19
WINDOW = {"batch": SEQUENCES, "rows": 12}
TRITON = ("triton",)
TABLE = [
    Case("certainty_loss", 67, {"rows": 67, "vocab": 92}, TRITON),
    Case("head_stats", ROWS, {"rows": ROWS, "vocab": 300, "width": 40}, TRITON),
    Case("head_stats", 67, {"rows": 67, "vocab": 300, "width": 40, "temperature": 0.7}, TRITON),
    Case("linear", ROWS, {"rows": ROWS, "width": 80, "depth": 128}, dtype=torch.float16),
    Case(
        "linear",
        ROWS,
        {"rows": ROWS, "width": 80, "depth": 128, "swiglu": True},
        dtype=torch.float16,
    ),
    Case("mixture_draft", 11, {"rows": 11, "temperature": 0.7, "vocab": 500}),
    Case("rms_norm", ROWS, {"rows": ROWS, "width": 100}),
    Case("route", 67, {"router": "sdar-30b", "rows": 67}, TRITON),
    Case("route", 35, {"router": "llada2-mini", "rows": 35}),
    Case("swiglu", ROWS, {"rows": ROWS, "width": 100}),
    Case("vocab_stats", ROWS, {"rows": ROWS, "vocab": 500}),
    Case("vocab_stats", ROWS, {"rows": ROWS, "vocab": 500, "temperature": 0.7}),
    # Sequences.
    Case("commit_branch", 5, {"batch": 5, "branches": 3, "rows": 8, "kv_heads": 2, "head_dim": 64}),
    Case("draft", SEQUENCES, WINDOW | {"branches": 4}),
    Case("edit_block", 7, {"batch": 7, "rows": 12, "vocab": 1000}, TRITON),
    Case("edit_tokens", SEQUENCES, WINDOW),
    Case("mixture_accept", 5, {"form": "full", "batch": 5, "rows": 3, "vocab": 500}, each=3),
    Case("mixture_accept", 5, {"form": "sparse", "batch": 5, "rows": 3, "vocab": 500}, each=3),
    Case("multiblock_step", SEQUENCES, {"batch": SEQUENCES, "new": 256, "cached": True}),
    Case("renoise", SEQUENCES, WINDOW, TRITON),
    Case("unmask", SEQUENCES, WINDOW | {"rule": "quota"}),
    Case("unmask", SEQUENCES, WINDOW | {"rule": "threshold"}),
    Case("verify", SEQUENCES, WINDOW | {"branches": 4}),
    Case(
        "window_attention",
        7,
        {"batch": 7, "rows": 5, "slots": 300, "heads": 4, "kv_heads": 2, "head_dim": 64},
        dtype=torch.float16,
    ),
]


def chosen(value: object, case: Case, index: Tensor) -> object:
    """A tensor's rows of ``index``; a copy of anything else that an op may write to."""
    if not isinstance(value, Tensor):
        return value
    for each in (case.each, 1):
        axes = [axis for axis, size in enumerate(value.shape) if size == case.count * each]
        if axes:
            (axis,) = axes
            rows = (index[:, None] * each + torch.arange(each)).flatten()
            return value.index_select(axis, rows)
    return value.clone()


def run(case: Case, inputs: dict[str, object], index: Tensor, backend: str) -> list[Tensor]:
    found = CASES[case.op].call({n: chosen(t, case, index) for n, t in inputs.items()}, backend)
    found = (found,) if isinstance(found, Tensor) else found
    return [t.contiguous().view(INTEGERS[t.element_size()]) for t in found]


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        pytest.param(case, backend, id=f"{case.op}-{number}-{backend}")
        for number, case in enumerate(TABLE)
        for backend in case.backends
    ],
)
def test_bits_alone_among_many_and_permuted(case, backend):
    inputs = CASES[case.op].make(case.dtype, "cpu", **case.shape)
    every = torch.arange(case.count)
    order = torch.randperm(case.count, generator=torch.Generator().manual_seed(1))
    together, permuted = (run(case, inputs, index, backend) for index in (every, order))
    assert all(t.numel() for t in together)
    for one, other in zip(together, permuted, strict=True):
        assert torch.equal(chosen(one, case, order), other)
    for row in (0, case.count // 2, case.count - 1):
        index = torch.tensor([row])
        for one, other in zip(together, run(case, inputs, index, backend), strict=True):
            assert torch.equal(chosen(one, case, index), other)


def test_no_op_is_missing():
    """Experts are as large as a model's in bench; tests/ops/test_experts.py has the same of few."""
    assert {case.op for case in TABLE} == set(CASES) - {"experts"}


def test_rows_that_know_of_each_other_are_noticed():
    case = Case("swiglu", 4, {})
    inputs = {"gate_up": torch.rand(4, 6)}
    order = torch.tensor([2, 0, 1, 3])
    together = inputs["gate_up"].cumsum(0)
    permuted = chosen(inputs["gate_up"], case, order).cumsum(0)
    assert not torch.equal(chosen(together, case, order), permuted)
