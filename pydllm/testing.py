"""Inputs and error budgets shared by the tests and the benchmarks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def random_normal(
    *shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Tensor:
    """Standard normal numbers, the same on every device for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def error_budget(exact: Tensor, same_dtype: Tensor) -> float:
    """The largest error allowed against ``exact`` (fp64).

    Twice the error of plain torch in the dtype under test, plus one rounding of the largest value:
    a kernel may not be worse than the code it replaces by more than the order of its sums.
    """
    finite = exact[torch.isfinite(exact)]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    return 2 * max_error(same_dtype, exact) + torch.finfo(same_dtype.dtype).eps * largest


def max_error(got: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; infinite where the non-finite entries do not agree."""
    got = got.double().to(exact.device)
    special = ~torch.isfinite(exact)
    if not torch.equal(got[special].nan_to_num(), exact[special].nan_to_num()):
        return float("inf")
    if not torch.isfinite(got[~special]).all():
        return float("inf")
    return (got - exact)[~special].abs().max().item() if (~special).any() else 0.0


def assert_within_budget(got: Tensor, compute: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Check ``got`` against ``compute`` run in fp64 on the same inputs.

    ``compute`` is run twice, on the inputs as they are and on them in fp64; it must not write them.
    """
    exact = compute(*(t.double() if t.is_floating_point() else t for t in inputs))
    same_dtype = compute(*inputs)
    error, budget = max_error(got, exact), error_budget(exact, same_dtype)
    if not error <= budget:
        raise AssertionError(f"error against fp64: expected at most {budget:.3e}, got {error:.3e}")
