"""Skinny batch-invariant matrix product with weights in the dtype of ``x``, in e4m3 or in int8.

Width, depth of a step and number of splits of a tile come from the weight's shape, the dtypes and
the architecture. A tile's height is a multiple of the matrix instruction's rows, in the same order
of steps, and rows that are not there are zeros. So the bits of a row do not depend on the number of
rows. Splits leave fp32 sums, which a second launch adds in ascending order.

Eight-bit weights are converted exactly to the dtype of ``x`` in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _tiles
from ._primitives import are_rows, fetch_to_l2, wait_for_previous
from ._weights import SCALE_BLOCK, decoding, load_weight, stored

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PREFETCH_STEPS = tl.constexpr(4)  # of the depth, whose weights are fetched before x is there


# A new batch size must not compile the kernel again.
@triton.jit(do_not_specialize=["rows", "row_blocks"])
def _linear_tile_kernel(
    # pointers
    y_ptr,  # (rows, width), or (SPLITS, rows, width) fp32
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
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < rows
    mask_n = offs_n < width
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
        scale_ptrs = scale_ptr + (tile * BLOCK_N // SCALE_BLOCK).to(tl.int64) * stride_scale_row
        scale = tl.load(scale_ptrs + first // SCALE_BLOCK, mask=first < last, other=0.0)
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
            upcoming = tl.load(
                scale_ptrs + following // SCALE_BLOCK, mask=following < last, other=0.0
            )
            acc += scale * tl.dot(x, w, input_precision="ieee")
            scale = upcoming
        else:
            acc = tl.dot(x, w, acc, input_precision="ieee")

    offs = offs_m[:, None] * width + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if SPLITS == 1:
        if scale_ptr is not None and not BLOCK_SCALED:
            acc *= tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        tl.store(y_ptr + offs, acc.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(y_ptr + split * tl.cast(rows, tl.int64) * width + offs, acc, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _linear_join_kernel(
    # pointers
    y_ptr,  # (rows, width)
    partial_ptr,  # (SPLITS, rows, width) fp32
    scale_ptr,  # (width,) or None
    bias_ptr,  # (width,) or None
    # sizes
    rows,
    width,
    # constexprs
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr = False,
):
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs_n < width
    partial_ptrs = partial_ptr + row * width + offs_n
    stride_split = tl.cast(rows, tl.int64) * width
    total = tl.load(partial_ptrs, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(partial_ptrs + split * stride_split, mask=mask, other=0.0)
    if scale_ptr is not None:
        total *= tl.load(scale_ptr + offs_n, mask=mask, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + offs_n, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * width + offs_n, total.to(y_ptr.dtype.element_ty), mask=mask)


def supports(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None
) -> str | None:
    """None if the kernel can run this call, otherwise why not."""
    if x.dtype not in _DTYPES:
        return f"the kernel takes fp32, fp16 and bf16, got {x.dtype}"
    for name, tensor in (("x", x), ("weight", weight), ("scale", scale), ("bias", bias)):
        if tensor is not None and not are_rows(tensor):
            return f"{name} must be rows of contiguous elements, got strides {tensor.stride()}"
    return _tiles.exceeds_grid("outputs", weight.shape[0], _tiles.LINEAR_JOIN[0])


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
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    (width, depth), sizes = weight.shape, (weight.element_size(), x.element_size())
    rows = y.numel() // width
    if rows == 0:
        return y
    tile = _tiles.linear_tile(x.device, width, depth, *sizes) if tile is None else tile
    height = _tiles.linear_height(x.device, rows, *sizes) if height is None else height
    sums = y if tile.splits == 1 else y.new_empty(tile.splits, rows, width, dtype=torch.float32)
    decode, per_block = decoding(x, weight), scale is not None and scale.ndim == 2
    row_blocks, launch = triton.cdiv(rows, height), _tiles.pdl(x.device, pdl)
    _linear_tile_kernel[(triton.cdiv(width, tile.block_n) * tile.splits * row_blocks,)](
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
        BLOCK_M=height,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        num_warps=min(tile.num_warps * height // 64, 8),
        num_stages=tile.num_stages if height == 64 else min(tile.num_stages, 3),
        enable_fp_fusion=True,
        **launch,
    )
    if tile.splits > 1:
        block, warps = _tiles.LINEAR_JOIN
        _linear_join_kernel[(rows, triton.cdiv(width, block))](
            y_ptr=y,
            partial_ptr=sums,
            scale_ptr=None if per_block else scale,
            bias_ptr=bias,
            rows=rows,
            width=width,
            SPLITS=tile.splits,
            BLOCK_N=block,
            num_warps=warps,
            enable_fp_fusion=True,
            **launch,
        )
    return y
