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
from ._primitives import are_rows

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SCALE_BLOCK = tl.constexpr(128)


@triton.jit
def _e4m3_bytes_to_bf16(w):
    """Bytes of e4m3fn as bf16, exactly, where no instruction does it; NaN becomes 480."""
    # Sign and seven bits, moved to where bf16 has its own, are the number times 2**-120.
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 a, b, m, z;
        mov.b32 m, 0x7B807B80;
        mov.b32 z, 0x80008000;
        prmt.b32 a, $2, $2, 0x9180;
        prmt.b32 b, $2, $2, 0xB3A2;
        shl.b32 a, a, 4;
        shl.b32 b, b, 4;
        and.b32 a, a, 0x87F087F0;
        and.b32 b, b, 0x87F087F0;
        fma.rn.bf16x2 $0, a, m, z;
        fma.rn.bf16x2 $1, b, m, z;
        }""",
        "=r,=r,r",
        [w],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _int8_to_bf16(w):
    """INT8 as bf16, exactly, where the instruction that does it is slow."""
    # 128 plus the low seven bits, less 128 or 256: bf16 numbers of one exponent.
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 a, b, c, d, m;
        mov.b32 m, 0xBF80BF80;
        prmt.b32 a, $2, 0x43434343, 0x4140;
        prmt.b32 b, $2, 0x43434343, 0x4342;
        and.b32 c, a, 0xFF80FF80;
        and.b32 d, b, 0xFF80FF80;
        and.b32 a, a, 0xFF7FFF7F;
        and.b32 b, b, 0xFF7FFF7F;
        fma.rn.bf16x2 $0, c, m, a;
        fma.rn.bf16x2 $1, d, m, b;
        }""",
        "=r,=r,r",
        [w],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _widen(w, dtype: tl.constexpr, DECODE: tl.constexpr):
    """A tile of weights in the dtype of ``x``, exactly."""
    if DECODE == "e4m3":
        wide = _e4m3_bytes_to_bf16(w)
        return wide if dtype == tl.bfloat16 else wide.to(tl.float32).to(dtype)
    if DECODE == "int8":
        return _int8_to_bf16(w)
    if w.dtype == dtype:
        return w
    if dtype == tl.bfloat16:
        # e4m3 straight to bf16 is F2F.BF16.F16 on sm_90, at a quarter of the rate of this.
        return w.to(tl.float32).to(dtype)
    return w.to(dtype)


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
    if BLOCK_SCALED:
        scale_ptrs = scale_ptr + (tile * BLOCK_N // _SCALE_BLOCK).to(tl.int64) * stride_scale_row
        scale = tl.load(scale_ptrs + first // _SCALE_BLOCK, mask=first < last, other=0.0)
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
        if weight_ptr.dtype.element_ty.is_floating():
            w = tl.load(weight_ptrs + start, mask=mask_w, other=0.0)
        else:
            w = tl.load(weight_ptrs + start, mask=mask_w, other=0)
        w = _widen(w, x.dtype, DECODE)
        if BLOCK_SCALED:
            following = start + BLOCK_K  # its scale is loaded a step ahead
            upcoming = tl.load(
                scale_ptrs + following // _SCALE_BLOCK, mask=following < last, other=0.0
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
):
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


def _decode(x: torch.Tensor, weight: torch.Tensor) -> str:
    """How a weight becomes the dtype of ``x``: below sm_89 no instruction converts e4m3."""
    old = 0 < _tiles.arch(x.device) < 89
    if old and weight.dtype == torch.float8_e4m3fn:
        return "e4m3"
    return "int8" if old and (weight.dtype, x.dtype) == (torch.int8, torch.bfloat16) else "plain"


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    tile: _tiles.LinearTile | None = None,
    height: int | None = None,
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
    decode, per_block = _decode(x, weight), scale is not None and scale.ndim == 2
    row_blocks = triton.cdiv(rows, height)
    _linear_tile_kernel[(triton.cdiv(width, tile.block_n) * tile.splits * row_blocks,)](
        y_ptr=sums,
        x_ptr=x,
        weight_ptr=weight.view(torch.uint8) if decode == "e4m3" else weight,
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
        )
    return y
