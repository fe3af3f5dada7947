"""What the launchers of attention tell the kernels about tensors (..., rows, heads, D)."""

from __future__ import annotations

import torch


def strides(**tensors: torch.Tensor) -> dict[str, int]:
    """``stride_<name>_batch``, ``_row`` and ``_head`` ; batch is the page of a paged cache."""
    return {
        f"stride_{name}_{axis}": stride
        for name, tensor in tensors.items()
        for axis, stride in zip(("batch", "row", "head"), tensor.stride(), strict=False)
    }


def alignment(*tensors: torch.Tensor) -> int:
    """Bytes, at most 16, that every head begins at a multiple of."""
    aligned = all(
        tensor.data_ptr() % 16 == 0
        and all(stride * tensor.itemsize % 16 == 0 for stride in tensor.stride()[:-1])
        for tensor in tensors
    )
    return 16 if aligned else tensors[0].itemsize
