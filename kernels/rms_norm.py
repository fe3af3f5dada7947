"""Residual addition and root-mean-square normalisation: one program per row, one read of it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _tiles
from ._primitives import are_rows, wait_for_previous

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _rms_norm_kernel(
    # pointers
    y_ptr,  # (rows, D) contiguous
    x_ptr,  # (rows, D)
    residual_ptr,  # (rows, D), read and written
    weight_ptr,  # (D,)
    # sizes
    width,
    eps,
    # strides
    stride_x_row,
    stride_residual_row,
    # constexprs
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr = False,
):
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < width
    x = tl.load(x_ptr + row * stride_x_row + offs_d, mask=mask_d, other=0.0)  # [BLOCK_D]
    # Before the sum, whose barrier a load does not pass: one latency of memory instead of two.
    weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0)
    if HAS_RESIDUAL:
        residual_ptrs = residual_ptr + row * stride_residual_row + offs_d
        residual = tl.load(residual_ptrs, mask=mask_d, other=0.0)
        # Rounded to the stored dtype first: the norm sees the residual stream that is kept.
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(residual_ptrs, x, mask=mask_d)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    normed = (wide * scale).to(x.dtype).to(tl.float32)
    y = (normed * weight.to(tl.float32)).to(x.dtype)
    tl.store(y_ptr + row * width + offs_d, y, mask=mask_d)


def supports(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> str | None:
    """None if the kernel can run this call, otherwise why not."""
    if x.dtype not in _DTYPES:
        return f"the kernel takes fp32, fp16 and bf16, got {x.dtype}"
    largest = _tiles.RMS_NORM[-1][0]
    if x.shape[-1] > largest:
        return f"the kernel takes rows of up to {largest} elements, got {x.shape[-1]}"
    for name, tensor in (("x", x), ("weight", weight), ("residual", residual)):
        if tensor is not None and not are_rows(tensor):
            return f"{name} must be rows of contiguous elements, got strides {tensor.stride()}"
    return None


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    *,
    pdl: bool = False,
) -> torch.Tensor:
    """Launch the kernel; arguments as in ``pydllm.ops.rms_norm``."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    width = x.shape[-1]
    rows = x.numel() // width if width else 0
    if rows == 0:
        return y
    _rms_norm_kernel[(rows,)](
        y_ptr=y,
        x_ptr=x,
        residual_ptr=x if residual is None else residual,
        weight_ptr=weight,
        width=width,
        eps=eps,
        stride_x_row=x.stride(-2) if x.ndim > 1 else width,
        stride_residual_row=residual.stride(-2) if residual is not None and x.ndim > 1 else width,
        HAS_RESIDUAL=residual is not None,
        BLOCK_D=triton.next_power_of_2(width),
        num_warps=next(warps for limit, warps in _tiles.RMS_NORM if width <= limit),
        **_tiles.pdl(x.device, pdl),
    )
    return y
