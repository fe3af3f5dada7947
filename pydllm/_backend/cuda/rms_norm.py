"""Launches csrc/rms_norm.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from pydllm._backend.cuda import DTYPES, call, may_overlap

# kRmsNormWidth and kRmsNormMergedWidth in csrc/rms_norm.h
MAX_WIDTH, MAX_MERGED_WIDTH = 32768, 8192


def supports(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> str | None:
    """None if the kernel can run this call, otherwise why not."""
    if x.dtype not in DTYPES:
        return f"the kernel takes fp32, fp16 and bf16, got {x.dtype}"
    if x.shape[-1] > MAX_WIDTH:
        return f"the kernel takes rows of up to {MAX_WIDTH} elements, got {x.shape[-1]}"
    for name, tensor in (("x", x), ("weight", weight), ("residual", residual)):
        if tensor is not None and not _is_rows(tensor):
            return f"{name} must be rows of contiguous elements, got strides {tensor.stride()}"
    return None


def _is_rows(tensor: Tensor) -> bool:
    """Whether the tensor is a list of dense rows at one row stride."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        return False
    if tensor.numel() == 0:
        return True
    strides = tensor.stride()
    return all(
        strides[i] == strides[i + 1] * tensor.shape[i + 1] or tensor.shape[i] == 1
        for i in range(tensor.ndim - 2)
    )


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, *, pdl: bool = False
) -> Tensor:
    """Launch the kernel; arguments as in ``pydllm.ops.rms_norm``."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    stride = x.stride(-2) if x.ndim > 1 else x.shape[-1]
    launch(y, weight, eps, residual, pdl, x=x, stride_x_row=stride)
    return y


def launch(
    y: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    pdl: bool,
    *,
    x: Tensor | None = None,
    stride_x_row: int = 0,
    partial: Tensor | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """Launch the kernel: on ``x``, or on ``partial (splits, rows, D)`` of a product."""
    width = y.shape[-1]
    call(
        "rms_norm",
        y.device,
        y=y,
        residual=residual,
        x=x,
        partial=partial,
        scale=scale,
        bias=bias,
        weight=weight,
        dtype=y.dtype,
        rows=y.numel() // width if width else 0,
        width=width,
        splits=0 if partial is None else partial.shape[0],
        eps=eps,
        stride_x_row=stride_x_row,
        stride_residual_row=residual.stride(-2) if residual is not None and y.ndim > 1 else width,
        pdl=may_overlap(y.device, pdl),
    )
