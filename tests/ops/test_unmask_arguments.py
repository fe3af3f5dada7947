"""What ``unmask`` refuses, and that nothing was written by then."""

import math

import pytest
import torch

from pydllm import ops
from tests.ops.test_unmask import MASK, copied, numbers

QUOTA = numbers([1, 1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rule": "best"}, ValueError, "rule: expected one of quota, .*, got 'best'"),
        ({"semantics": "llada"}, TypeError, "unmask: semantics is no argument any more, use the"),
        (
            {"threshold": None},
            ValueError,
            "rule 'threshold': expected the option threshold and no other, got none",
        ),
        (
            {"factor": 1.0, "quota": QUOTA},
            ValueError,
            "expected the option threshold and no other, got quota, threshold, factor",
        ),
        ({"threshold": 1.5}, ValueError, r"threshold: expected a number in \[0, 1\], got 1.5"),
        ({"threshold": math.nan}, ValueError, r"expected a number in \[0, 1\], got nan"),
        ({"threshold": torch.ones(2)}, ValueError, "threshold: expected a number in"),
        (
            {"rule": "entropy", "threshold": -0.1},
            ValueError,
            r"threshold: expected a number in \[0, inf\], got -0.1",
        ),
        (
            {"rule": "factor", "threshold": None, "factor": -1.0},
            ValueError,
            "factor: expected a number in",
        ),
        (
            {"rule": "entropy_bound", "threshold": None, "bound": -1.0},
            ValueError,
            "bound: expected a number in",
        ),
        (
            {"rule": "random", "threshold": None, "quota": QUOTA},
            ValueError,
            "request: expected a .B,. int32 tensor for rule 'random', got None",
        ),
        (
            {"rule": "quota", "threshold": None, "quota": QUOTA.long()},
            TypeError,
            "quota: expected dtype torch.int32, got torch.int64",
        ),
        (
            {"rule": "quota", "threshold": None, "quota": QUOTA[:1]},
            ValueError,
            r"quota: expected shape \(2\), got \(1,\)",
        ),
        ({"min_tokens": -1}, ValueError, r"min_tokens: expected an int in \[0, 2\^31\), got -1"),
        ({"min_tokens": QUOTA.long()}, TypeError, "min_tokens: expected dtype torch.int32"),
        (
            {"rule": "quota", "threshold": None, "quota": QUOTA, "min_tokens": 1},
            ValueError,
            "min_tokens: expected None for rule 'quota', got",
        ),
        ({"seed": -1}, ValueError, r"seed: expected an int in \[0, 2\^64\), got -1"),
        ({"x": torch.ones(2, 8).int()}, TypeError, "x: expected dtype torch.int64, got"),
        ({"x": torch.ones(8).long()}, ValueError, r"x: expected shape \(B, L\), got \(8,\)"),
        ({"x": torch.ones(2, 2).long()}, ValueError, r"step_map: expected shape \(2, 2\), got"),
        ({"step_map": torch.ones(2, 8).long()}, TypeError, "step_map: expected dtype torch.int32"),
        ({"nfe": torch.ones(2)}, TypeError, "nfe: expected dtype torch.int32"),
        ({"start": torch.ones(2)}, TypeError, "start: expected dtype torch.int32"),
        ({"length": numbers([1])}, ValueError, r"length: expected shape \(2\), got \(1,\)"),
        ({"token": torch.ones(3, 4).long()}, ValueError, r"token: expected shape \(2, T\), got"),
        ({"token": torch.ones(2, 4)}, TypeError, "token: expected dtype torch.int64"),
        ({"score": torch.ones(2, 5)}, ValueError, r"score: expected shape \(2, 4\), got \(2, 5\)"),
        ({"score": torch.ones(2, 4).long()}, TypeError, "score: expected dtype torch.float32, tor"),
        (
            {"score": torch.ones(2, 4, requires_grad=True)},
            ValueError,
            "got score with requires_grad=True",
        ),
        (
            {"token": torch.ones(2, 9).long(), "score": torch.ones(2, 9)},
            ValueError,
            "token: expected at most the 8 positions of x, got 9",
        ),
        ({"mask_id": None}, TypeError, "mask_id: expected an int in .*, got None"),
        ({"backend": "cuda"}, RuntimeError, "CUDA kernels need a CUDA tensor, got one on cpu"),
        ({"backend": "gpu"}, ValueError, "backend: expected one of auto, cuda, triton, torch"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(change, error, message):
    refused(change, error, message)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_what_a_kernel_does_not_take(backend):
    for change, message in (
        ({"score": torch.ones(2, 4).double()}, "takes fp32, fp16 and bf16 scores"),
        ({"x": torch.ones(8, 2).long().t()}, "x must have contiguous rows"),
    ):
        refused(change | {"backend": backend}, RuntimeError, message)


def refused(change, error, message):
    arguments = {
        "x": torch.full((2, 8), MASK),
        "step_map": torch.full((2, 8), -1, dtype=torch.int32),
        "nfe": numbers([0, 0]),
        "token": torch.ones(2, 4, dtype=torch.int64),
        "score": torch.ones(2, 4),
        "mask_id": MASK,
        "start": numbers([0, 0]),
        "length": numbers([4, 4]),
        "rule": "threshold",
        "threshold": 0.5,
    } | change
    before = copied(arguments)
    with pytest.raises(error, match=message):
        ops.unmask(**arguments)
    for name in ("x", "step_map", "nfe"):
        assert torch.equal(arguments[name], before[name])
