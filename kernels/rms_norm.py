"""Residual addition and root-mean-square normalisation: one program per row, one read of it.

The row may be the splits of a product, which are then merged as ``linear`` merges them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _tiles
from ._linear_merge import load_merged
from ._primitives import are_rows, wait_for_previous

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# A new batch size must not compile the kernel again.
@triton.jit(do_not_specialize=["rows"])
def _rms_norm_kernel(
    # pointers
    y_ptr,  # (rows, D) contiguous
    x_ptr,  # (rows, D), or (SPLITS, rows, D) fp32
    residual_ptr,  # (rows, D), read and written
    weight_ptr,  # (D,)
    scale_ptr,  # (D,) or None: of the splits
    bias_ptr,  # (D,) or None: of the splits
    # sizes
    rows,
    width,
    eps,
    # strides
    stride_x_row,
    stride_residual_row,
    # constexprs
    HAS_RESIDUAL: tl.constexpr,
    SPLITS: tl.constexpr,  # 0: x is a row
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr = False,
):
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < width
    # [BLOCK_D]
    if SPLITS == 0:
        x = tl.load(x_ptr + row * stride_x_row + offs_d, mask=mask_d, other=0.0)
    else:
        x = load_merged(x_ptr, scale_ptr, bias_ptr, row, offs_d, mask_d, rows, width, SPLITS)
        x = x.to(y_ptr.dtype.element_ty)
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
    stride = x.stride(-2) if x.ndim > 1 else x.shape[-1]
    _launch(y, x, stride, weight, eps, residual, None, None, 0, pdl)
    return y


def rms_norm_merged(
    y: torch.Tensor,
    partial: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor,
    *,
    pdl: bool,
) -> None:
    """``y``: the norm of the sum of ``partial (splits, rows, D)`` and of ``residual``.

    ``scale``, one per column, and ``bias`` are those of the product.
    """
    splits, width = partial.shape[0], partial.shape[-1]
    _launch(y, partial, width, weight, eps, residual, scale, bias, splits, pdl)


def _launch(
    y: torch.Tensor,
    x: torch.Tensor,
    stride_x_row: int,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    splits: int,
    pdl: bool,
) -> None:
    width = y.shape[-1]
    rows = y.numel() // width if width else 0
    if rows == 0:
        return
    has_stride = residual is not None and residual.ndim > 1
    _rms_norm_kernel[(rows,)](
        y_ptr=y,
        x_ptr=x,
        residual_ptr=x if residual is None else residual,
        weight_ptr=weight,
        scale_ptr=scale,
        bias_ptr=bias,
        rows=rows,
        width=width,
        eps=eps,
        stride_x_row=stride_x_row,
        stride_residual_row=residual.stride(-2) if has_stride else width,
        HAS_RESIDUAL=residual is not None,
        SPLITS=splits,
        BLOCK_D=_tiles.next_power_of_2(width),
        enable_fp_fusion=True,
        num_warps=next(warps for limit, warps in _tiles.RMS_NORM if width <= limit),
        **_tiles.pdl(y.device, pdl),
    )
