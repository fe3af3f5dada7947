"""What is asked of a tensor before it is handed to an op, and the self-check of what came back."""

from __future__ import annotations

import torch
from torch import Tensor

from pydllm._backend.errors import PydllmError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # that the ops are tested in here


def wants_grad(*tensors: Tensor) -> bool:
    """Whether autograd would record: the ops have no backward pass."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class Check:
    """Compares the first result of a replacement with the original.

    Both are measured against the same thing in fp64: the replacement may be off by twice the
    original's own error and two roundings of the largest value.
    """

    def __init__(self, what: str) -> None:
        self.what, self.done = what, False

    def __call__(
        self, got: Tensor, original: Tensor, exact: Tensor, used: Tensor | None = None
    ) -> None:
        """Raise unless ``got`` is as good as ``original``.

        ``used`` are the rows that count; what the original has no finite number for does not.
        """
        counts = torch.isfinite(original) if used is None else torch.isfinite(original) & used
        if got.shape == original.shape:
            got, original, exact = (t.masked_fill(~counts, 0) for t in (got, original, exact))
        self.done = True
        error, allowed = difference(got, exact), band(original, exact)
        if not error <= allowed:
            self.done = False  # the next call is compared again
            raise PydllmError(
                f"self-check: {self.what}: expected to be within {allowed:.3e} of the same in "
                f"fp64, as twice the original's error is, got {error:.3e}"
            )


def difference(got: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; infinite where shapes or non-finite entries differ."""
    if got.shape != exact.shape:
        return float("inf")
    got = got.double()
    special = ~torch.isfinite(exact)
    if not torch.equal(special, ~torch.isfinite(got)):
        return float("inf")
    gap = (got - exact).abs().masked_fill(special, 0)
    return gap.max().item() if gap.numel() else 0.0


def band(original: Tensor, exact: Tensor) -> float:
    """Twice the original's error against fp64 and a rounding of the largest value.

    And some roundings in fp64, which is not exact either.
    """
    finite = exact[torch.isfinite(exact)]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    reference = 32 * torch.finfo(torch.float64).eps * largest
    return reference + 2 * (difference(original, exact) + torch.finfo(original.dtype).eps * largest)
