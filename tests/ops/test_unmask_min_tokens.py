"""``min_tokens``, and scores in half precision."""

import pytest
import torch

from pydllm import ops
from tests.ops.test_unmask import (
    BACKENDS,
    KERNELS,
    MASK,
    copied,
    integers,
    make_case,
    numbers,
)

F32, F64 = torch.float32, torch.float64


def grid_case(batch, rows, seed, dtype, lower_is_better):
    """Windows of masks and tokens; every third row smooth, of ties, or close to a tie."""
    case = make_case(batch, rows, rows + 9, seed)
    generator = torch.Generator().manual_seed(seed)
    # On a grid, so that sums of entropies and of what is added below are exact.
    smooth = (torch.rand(batch, rows, generator=generator, dtype=F64) ** 0.3 * 2**14).round()
    smooth /= 2**14
    ties = integers(batch, rows, low=0, high=5, seed=seed).double() / 4
    close = ties.clamp(max=0.75) + 2**-17 * integers(batch, rows, low=-2, high=3, seed=seed + 1)
    kind = torch.arange(batch)[:, None] % 3
    score = torch.where(kind == 0, smooth, torch.where(kind == 1, ties, close)).clamp(0, 1)
    case["score"] = (1 - score if lower_is_better else score).to(dtype)
    case["start"] = integers(batch, low=0, high=10, seed=seed + 3).int()
    return case


def call(case, rule, option, backend, **extra):
    case = copied(case)
    counts = ops.unmask(**case, rule=rule, backend=backend, **option, **extra)
    return case["x"], case["step_map"], case["nfe"], *counts


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("least", [0, 1, 3, 100])
def test_at_least_min_tokens(least, backend):
    """A rule with a limit takes what it takes, or the best ``min_tokens``, whichever is more."""
    rules = {
        "threshold": {"threshold": 0.75},
        "factor": {"factor": 1.0},
        "entropy": {"threshold": 0.25},
        "entropy_bound": {"bound": 0.5},
    }
    for rule, option in rules.items():
        case = grid_case(200, 12, 7, F32, rule.startswith("entropy"))
        case["token"] = case["token"].clamp(max=MASK - 1)
        inside = (case["x"] == MASK).gather(1, case["start"][:, None] + torch.arange(12))
        inside &= torch.arange(12) < case["length"][:, None]
        *_, none = call(case, rule, option, backend, min_tokens=0)
        many = torch.full_like(none, least)
        for value in (least, many):
            x, *_, got = call(case, rule, option, backend, min_tokens=value)
            masks = inside.sum(1)
            assert torch.equal(got.long(), torch.minimum(torch.maximum(none, many), masks))
        best = -case["score"] if rule.startswith("entropy") else case["score"]
        *_, expected = call(case | {"score": best}, "quota", {"quota": got}, backend)
        top, *_ = call(case | {"score": best}, "quota", {"quota": got}, backend)
        assert torch.equal(expected, got) and torch.equal(x, top)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", ["threshold", "quota"])
def test_half_precision_scores_on_a_gpu(rule, dtype, backend):
    case = grid_case(200, 32, 3, dtype, False)
    on_gpu = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in case.items()}
    quota = numbers([3] * 200)
    option = {"threshold": 0.9} if rule == "threshold" else {"quota": quota}
    expected = call(case, rule, option, "torch")
    option = {"threshold": 0.9} if rule == "threshold" else {"quota": quota.cuda()}
    for one, other in zip(call(on_gpu, rule, option, backend), expected, strict=True):
        assert torch.equal(one.cpu(), other)
