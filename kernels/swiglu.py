"""SiLU of the gate times the up-projection: one read of both, one write."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _tiles
from ._primitives import wait_for_previous

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def silu_times(gate, up):
    """``silu(gate) * up``, both in one dtype; the first factor is rounded to it."""
    wide = gate.to(tl.float32)
    activated = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    return (activated * up.to(tl.float32)).to(gate.dtype)


@triton.jit
def _swiglu_kernel(
    # pointers
    y_ptr,  # (rows, H) contiguous
    gate_up_ptr,  # (rows, 2H) contiguous: gate, then up
    # sizes
    width,
    # constexprs
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr = False,
):
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < width
    gate_ptrs = gate_up_ptr + row * 2 * width + offs_h  # [BLOCK_H]
    gate = tl.load(gate_ptrs, mask=mask_h, other=0.0)
    up = tl.load(gate_ptrs + width, mask=mask_h, other=0.0)
    tl.store(y_ptr + row * width + offs_h, silu_times(gate, up), mask=mask_h)


def supports(gate_up: torch.Tensor) -> str | None:
    """None if the kernel can run this call, otherwise why not."""
    if gate_up.dtype not in _DTYPES:
        return f"the kernel takes fp32, fp16 and bf16, got {gate_up.dtype}"
    if not gate_up.is_contiguous():
        return f"gate_up must be contiguous, got strides {gate_up.stride()}"
    return _tiles.exceeds_grid("columns", gate_up.shape[-1] // 2, _tiles.SWIGLU[0])


def swiglu(gate_up: torch.Tensor, *, pdl: bool = False) -> torch.Tensor:
    """Launch the kernel; arguments as in ``pydllm.ops.swiglu``."""
    width = gate_up.shape[-1] // 2
    y = gate_up.new_empty((*gate_up.shape[:-1], width))
    if y.numel() == 0:
        return y
    block, warps = _tiles.SWIGLU
    _swiglu_kernel[(y.numel() // width, _tiles.cdiv(width, block))](
        y_ptr=y,
        gate_up_ptr=gate_up,
        width=width,
        BLOCK_H=block,
        num_warps=warps,
        enable_fp_fusion=True,
        **_tiles.pdl(gate_up.device, pdl),
    )
    return y
