"""Weights of one byte per element, converted exactly to the dtype that they are multiplied in."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _tiles

SCALE_BLOCK = tl.constexpr(128)  # rows and columns of a weight that share one scale


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
def widen(w, dtype: tl.constexpr, DECODE: tl.constexpr):
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


@triton.jit
def load_weight(ptrs, mask, dtype: tl.constexpr, DECODE: tl.constexpr):
    """A tile of weights as ``dtype``; zeros outside the mask."""
    if ptrs.dtype.element_ty.is_floating():
        w = tl.load(ptrs, mask=mask, other=0.0)
    else:
        w = tl.load(ptrs, mask=mask, other=0)
    return widen(w, dtype, DECODE)


def decoding(x: torch.Tensor, weight: torch.Tensor) -> str:
    """How a weight becomes the dtype of ``x``: below sm_89 no instruction converts e4m3."""
    old = 0 < _tiles.arch(x.device) < 89
    if old and weight.dtype == torch.float8_e4m3fn:
        return "e4m3"
    return "int8" if old and (weight.dtype, x.dtype) == (torch.int8, torch.bfloat16) else "plain"


def stored(weight: torch.Tensor, decode: str) -> torch.Tensor:
    """What a kernel is given of a weight."""
    return weight.view(torch.uint8) if decode == "e4m3" else weight
