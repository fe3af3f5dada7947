"""The splits of a product, added in ascending order: what ``linear`` ends with."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _tiles
from ._primitives import wait_for_previous
from .swiglu import silu_times


@triton.jit
def load_merged(
    partial_ptr,  # (SPLITS, rows, width) fp32
    scale_ptr,  # (width,) or None
    bias_ptr,  # (width,) or None
    row,
    offs_n,
    mask,
    rows,
    width,
    SPLITS: tl.constexpr,
):
    """Columns of a row: the sum of its splits, scaled, with the bias, in fp32."""
    partial_ptrs = partial_ptr + row * width + offs_n
    stride_split = tl.cast(rows, tl.int64) * width
    total = tl.load(partial_ptrs, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(partial_ptrs + split * stride_split, mask=mask, other=0.0)
    if scale_ptr is not None:
        total *= tl.load(scale_ptr + offs_n, mask=mask, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + offs_n, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=["rows"])
def _linear_merge_kernel(
    # pointers
    y_ptr,  # (rows, width), or (rows, width / 2) with SWIGLU
    partial_ptr,  # (SPLITS, rows, width) fp32
    scale_ptr,  # (width,) or None
    bias_ptr,  # (width,) or None
    # sizes
    rows,
    width,
    # constexprs
    SPLITS: tl.constexpr,
    SWIGLU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr = False,
):
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = width // 2 if SWIGLU else width
    mask = offs_n < inner
    total = load_merged(partial_ptr, scale_ptr, bias_ptr, row, offs_n, mask, rows, width, SPLITS)
    y = total.to(y_ptr.dtype.element_ty)
    if SWIGLU:
        up = load_merged(
            partial_ptr, scale_ptr, bias_ptr, row, inner + offs_n, mask, rows, width, SPLITS
        )
        y = silu_times(y, up.to(y.dtype))
    tl.store(y_ptr + row * inner + offs_n, y, mask=mask)


def merge(
    y: torch.Tensor,
    partial: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    swiglu: bool,
    launch: dict[str, bool],
) -> None:
    """Launch the kernel; ``partial`` is ``(splits, rows, width)``, ``scale`` one per column."""
    splits, rows, width = partial.shape
    block, warps = _tiles.LINEAR_MERGE
    _linear_merge_kernel[(rows, _tiles.cdiv(y.shape[-1], block))](
        y_ptr=y,
        partial_ptr=partial,
        scale_ptr=scale,
        bias_ptr=bias,
        rows=rows,
        width=width,
        SPLITS=splits,
        SWIGLU=swiglu,
        BLOCK_N=block,
        num_warps=warps,
        enable_fp_fusion=True,
        **launch,
    )
