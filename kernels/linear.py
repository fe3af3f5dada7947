"""Skinny batch-invariant matrix product with weights in the dtype of ``x``, in e4m3 or in int8.

Width, depth of a step and number of splits of a tile come from the weight's shape, the dtypes and
the architecture. A tile's height is a multiple of the matrix instruction's rows, in the same order
of steps, and rows that are not there are zeros. So the bits of a row do not depend on the number of
rows. Splits leave fp32 sums, which a second launch adds in ascending order.

Eight-bit weights are converted exactly to the dtype of ``x`` in registers.

``linear_swiglu`` multiplies by the gate's and the up-projection's rows in turn: a thread then has
the two results that one output is made of, and neither is stored. ``linear_rms_norm`` leaves the
addition of the splits to the norm.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import _tiles
from ._linear_merge import merge
from ._primitives import are_rows, fetch_to_l2, wait_for_previous
from ._weights import SCALE_BLOCK, decoding, load_weight, stored
from .rms_norm import rms_norm, rms_norm_merged
from .rms_norm import supports as supports_norm
from .swiglu import silu_times

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PREFETCH_STEPS = tl.constexpr(4)  # of the depth, whose weights are fetched before x is there


@triton.jit
def _load_block_scale(scale_ptr, up_scale_ptr, is_up, step, mask, SWIGLU: tl.constexpr):
    """Scale of a step: one number, or one of two for each column of a tile of gate and up."""
    scale = tl.load(scale_ptr + step, mask=mask, other=0.0)
    if SWIGLU:
        scale = tl.where(is_up, tl.load(up_scale_ptr + step, mask=mask, other=0.0), scale)[None, :]
    return scale


# A new batch size must not compile the kernel again.
@triton.jit(do_not_specialize=["rows", "row_blocks"])
def _linear_tile_kernel(
    # pointers
    y_ptr,  # (rows, width), (rows, width / 2) with SWIGLU; or (SPLITS, rows, width) fp32
    x_ptr,  # (rows, depth)
    weight_ptr,  # (width, depth)
    scale_ptr,  # (width,), (width / 128, depth / 128) or None
    bias_ptr,  # (width,) or None
    # sizes
    rows,
    width,
    depth,
    row_blocks,
    # strides
    stride_x_row,
    stride_weight_row,
    stride_scale_row,
    # constexprs
    BLOCK_SCALED: tl.constexpr,
    DECODE: tl.constexpr,  # "plain", "e4m3" or "int8"
    EVEN_K: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTIAL: tl.constexpr,  # store fp32 sums of the splits
    SWIGLU: tl.constexpr,  # the tile's columns are gate and up in turn
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr = False,
):
    # Neighbouring programs read the same part of the weight.
    row_block = tl.program_id(0) % row_blocks
    split = (tl.program_id(0) // row_blocks) % SPLITS
    tile = tl.program_id(0) // row_blocks // SPLITS
    offs_m = row_block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    is_up = offs_n % 2 == 1
    inner = width // 2
    mask_n = offs_n < width
    if SWIGLU:
        offs_n = offs_n // 2 + tl.where(is_up, inner, 0)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < rows
    x_ptrs = x_ptr + offs_m[:, None] * stride_x_row + offs_k[None, :]
    weight_ptrs = weight_ptr + offs_n.to(tl.int64)[None, :] * stride_weight_row + offs_k[:, None]

    span = tl.cdiv(tl.cdiv(depth, BLOCK_K), SPLITS) * BLOCK_K
    first = split * span
    last = tl.minimum(first + span, depth)
    if PDL:
        # While the kernel before this one ends, the memory has nothing to do. Not loaded: a weight
        # may be what that kernel writes.
        column = tl.minimum(offs_n, width - 1).to(tl.int64) * stride_weight_row
        for step in tl.static_range(PREFETCH_STEPS):
            fetch_to_l2(weight_ptr + column + tl.minimum(first + step * BLOCK_K, depth - 1))
    wait_for_previous(PDL)
    if BLOCK_SCALED:
        first_n = tile * (BLOCK_N // 2 if SWIGLU else BLOCK_N)
        scale_ptrs = scale_ptr + (first_n // SCALE_BLOCK).to(tl.int64) * stride_scale_row
        up_ptrs = scale_ptr + ((inner + first_n) // SCALE_BLOCK).to(tl.int64) * stride_scale_row
        scale = _load_block_scale(
            scale_ptrs, up_ptrs, is_up, first // SCALE_BLOCK, first < last, SWIGLU
        )
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, last, BLOCK_K):
        mask_x = mask_m[:, None]
        mask_w = mask_n[None, :]
        if not EVEN_K:
            mask_x = mask_x & (offs_k < depth - start)[None, :]
            mask_w = mask_w & (offs_k < depth - start)[:, None]
        # [BLOCK_M, BLOCK_K]
        x = tl.load(x_ptrs + start, mask=mask_x, other=0.0)
        # [BLOCK_K, BLOCK_N]
        w = load_weight(weight_ptrs + start, mask_w, x.dtype, DECODE)
        if BLOCK_SCALED:
            following = start + BLOCK_K  # its scale is loaded a step ahead
            upcoming = _load_block_scale(
                scale_ptrs, up_ptrs, is_up, following // SCALE_BLOCK, following < last, SWIGLU
            )
            acc += scale * tl.dot(x, w, input_precision="ieee")
            scale = upcoming
        else:
            acc = tl.dot(x, w, acc, input_precision="ieee")

    mask = mask_m[:, None] & mask_n[None, :]
    if PARTIAL:
        offs = offs_m[:, None] * width + offs_n[None, :]
        tl.store(y_ptr + split * tl.cast(rows, tl.int64) * width + offs, acc, mask=mask)
    else:
        if scale_ptr is not None and not BLOCK_SCALED:
            acc *= tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        y = acc.to(y_ptr.dtype.element_ty)
        if SWIGLU:
            gate, up = tl.split(tl.reshape(y, (BLOCK_M, BLOCK_N // 2, 2)))
            y = silu_times(gate, up)  # [BLOCK_M, BLOCK_N / 2]
            offs_h = tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            offs = offs_m[:, None] * inner + offs_h[None, :]
            mask = mask_m[:, None] & (offs_h < inner)[None, :]
        else:
            offs = offs_m[:, None] * width + offs_n[None, :]
        tl.store(y_ptr + offs, y, mask=mask)


def supports(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None
) -> str | None:
    """None if the kernel can run this call, otherwise why not."""
    if x.dtype not in _DTYPES:
        return f"the kernel takes fp32, fp16 and bf16, got {x.dtype}"
    for name, tensor in (("x", x), ("weight", weight), ("scale", scale), ("bias", bias)):
        if tensor is not None and not are_rows(tensor):
            return f"{name} must be rows of contiguous elements, got strides {tensor.stride()}"
    return _tiles.exceeds_grid("outputs", weight.shape[0], _tiles.LINEAR_MERGE[0])


def supports_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm: torch.Tensor,
    eps: float,
    residual: torch.Tensor,
) -> str | None:
    """None if the kernels can run this call, otherwise why not."""
    return supports(x, weight, scale, bias) or supports_norm(residual, norm, eps, None)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    tile: _tiles.LinearTile | None = None,
    height: int | None = None,
    *,
    pdl: bool = False,
) -> torch.Tensor:
    """Launch the kernels; arguments as in ``pydllm.ops.linear``, a quantised weight in its parts.

    ``tile`` and ``height`` are those of ``_tiles`` if None.
    """
    return _merged(x, weight, scale, bias, tile, height, swiglu=False, pdl=pdl)


def linear_swiglu(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    tile: _tiles.LinearTile | None = None,
    height: int | None = None,
    *,
    pdl: bool = False,
) -> torch.Tensor:
    """Launch the kernels of ``pydllm.ops.linear_swiglu``; arguments as of ``linear``."""
    return _merged(x, weight, scale, bias, tile, height, swiglu=True, pdl=pdl)


def linear_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm: torch.Tensor,
    eps: float,
    residual: torch.Tensor,
    tile: _tiles.LinearTile | None = None,
    height: int | None = None,
    *,
    pdl: bool = False,
) -> torch.Tensor:
    """Launch the kernels of ``pydllm.ops.linear_rms_norm``; arguments as of ``linear``."""
    y, partial = _multiply(x, weight, scale, bias, tile, height, swiglu=False, pdl=pdl)
    if partial is None:
        return rms_norm(y, norm, eps, residual, pdl=pdl)
    rms_norm_merged(y, partial, per_channel(scale), bias, norm, eps, residual, pdl=pdl)
    return y


def per_channel(scale: torch.Tensor | None) -> torch.Tensor | None:
    """The scale, where it is one per output: those of blocks are in the sums already."""
    return None if scale is None or scale.ndim == 2 else scale


def _merged(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    *tiles: Any,
    swiglu: bool,
    pdl: bool,
) -> torch.Tensor:
    """The result, its splits merged if there are any."""
    y, partial = _multiply(x, weight, scale, bias, *tiles, swiglu=swiglu, pdl=pdl)
    if partial is not None:
        launch = _tiles.pdl(x.device, pdl)
        merge(y, partial, per_channel(scale), bias, swiglu=swiglu, launch=launch)
    return y


def _multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    tile: _tiles.LinearTile | None,
    height: int | None,
    *,
    swiglu: bool,
    pdl: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The result, and the fp32 sums of the splits that it has yet to be made of, if any."""
    (width, depth), sizes = weight.shape, (weight.element_size(), x.element_size())
    y = x.new_empty((*x.shape[:-1], width // 2 if swiglu else width))
    rows = x.numel() // depth
    if rows == 0:
        return y, None
    tile = _tiles.linear_tile(x.device, width, depth, *sizes) if tile is None else tile
    height = _tiles.linear_height(x.device, rows, *sizes) if height is None else height
    per_block, sums = scale is not None and scale.ndim == 2, y
    partial = tile.splits > 1
    if swiglu:
        # A tile of both halves has two scales, if each half's rows lie in one block. In fp32,
        # without tensor cores, the activation spills under Triton 3.7.
        straddles = per_block and width // 2 % (tile.block_n // 2) != 0
        partial = partial or straddles or x.dtype == torch.float32
    if partial:
        sums = y.new_empty(tile.splits, rows, width, dtype=torch.float32)
    decode, launch = decoding(x, weight), _tiles.pdl(x.device, pdl)
    row_blocks = _tiles.cdiv(rows, height)
    _linear_tile_kernel[(_tiles.cdiv(width, tile.block_n) * tile.splits * row_blocks,)](
        y_ptr=sums,
        x_ptr=x,
        weight_ptr=stored(weight, decode),
        scale_ptr=scale,
        bias_ptr=bias,
        rows=rows,
        width=width,
        depth=depth,
        row_blocks=row_blocks,
        stride_x_row=x.stride(-2) if x.ndim > 1 else depth,
        stride_weight_row=weight.stride(0),
        stride_scale_row=scale.stride(0) if per_block else 0,
        BLOCK_SCALED=per_block,
        DECODE=decode,
        EVEN_K=depth % tile.block_k == 0,
        SPLITS=tile.splits,
        PARTIAL=partial,
        SWIGLU=swiglu and not partial,
        BLOCK_M=height,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        num_warps=min(tile.num_warps * height // 64, 8),
        num_stages=tile.num_stages if height == 64 else min(tile.num_stages, 3),
        enable_fp_fusion=True,
        **launch,
    )
    return y, sums if partial else None
