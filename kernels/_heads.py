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


def cache_arguments(
    k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor | None
) -> dict[str, object]:
    """What a kernel is given of the cache: one piece per sequence, or pages and their table."""
    pages, page = k_cache.shape[:2]
    is_paged = block_table is not None
    return {
        "k_cache_ptr": k_cache,
        "v_cache_ptr": v_cache,
        "table_ptr": block_table,
        "slots": page * (block_table.shape[1] if is_paged else 1),
        "pages": pages if is_paged else 0,
        "PAGE": page if is_paged else 0,
        **strides(k_cache=k_cache, v_cache=v_cache),
    }


def alignment(*tensors: torch.Tensor) -> int:
    """Bytes, at most 16, that every head begins at a multiple of."""
    size = tensors[0].itemsize
    offsets = 0  # their bits, or-ed: those below 16 are of one that is no multiple of it
    for tensor in tensors:
        offsets |= tensor.data_ptr()
        for stride in tensor.stride()[:-1]:
            offsets |= stride * size
    return size if offsets % 16 else 16
