"""Launches csrc/linear.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from pydllm._backend.cuda import call, may_overlap

_DTYPES = (torch.float16, torch.bfloat16)
STORED = {torch.float8_e4m3fn: 1, torch.int8: 2}  # Stored in csrc/linear.h; 0: as x
_COLUMNS, _STEP = 64, 64  # kColumns and kStep in csrc/linear.cu
# Splits are doubled up to this number of blocks while each keeps this number of steps.
_BLOCKS, _LEAST_STEPS = 256, 8


def supports(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> str | None:
    """None if the kernel can run this call, otherwise why not."""
    if x.dtype not in _DTYPES:
        return f"the kernel takes fp16 and bf16, got {x.dtype}"
    if weight.shape[1] % 16:
        return f"the kernel takes depths of a multiple of 16, got {weight.shape[1]}"
    if x.ndim > 2 and not x.is_contiguous():
        return f"x of more than two dimensions must be contiguous, got strides {x.stride()}"
    for name, matrix in (("x", x), ("weight", weight)):
        whole = 16 // matrix.element_size()
        strides = matrix.stride()
        if strides[-1] != 1 or any(stride % whole for stride in strides[:-1]):
            return f"{name} must be rows at multiples of 16 bytes, got strides {strides}"
        if not torch.compiler.is_compiling() and matrix.storage_offset() % whole:
            return f"{name} must begin at a multiple of 16 bytes"
    for name, tensor in (("scale", scale), ("bias", bias)):
        if tensor is not None and tensor.stride(-1) != 1:
            return f"{name} must be rows of contiguous elements, got strides {tensor.stride()}"
    return None


def splits(width: int, depth: int) -> int:
    """Parts of the depth; never by the number of rows."""
    tiles, steps, count = -(-width // _COLUMNS), -(-depth // _STEP), 1
    while tiles * count < _BLOCKS and steps >= 2 * count * _LEAST_STEPS:
        count *= 2
    return count


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    *,
    pdl: bool = False,
) -> Tensor:
    """Launch the kernel; arguments as in ``pydllm.ops.linear``, a quantised weight in its parts."""
    return _launch(x, weight, scale, bias, swiglu=False, pdl=pdl)


def linear_swiglu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    *,
    pdl: bool = False,
) -> Tensor:
    """Launch the kernel of ``pydllm.ops.linear_swiglu``; arguments as of ``linear``."""
    return _launch(x, weight, scale, bias, swiglu=True, pdl=pdl)


def _launch(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    *,
    swiglu: bool,
    pdl: bool,
) -> Tensor:
    width, depth = weight.shape
    y = x.new_empty((*x.shape[:-1], width // 2 if swiglu else width))
    rows, count = x.numel() // depth, splits(width, depth)
    if rows == 0:
        return y
    per_block, partial = scale is not None and scale.ndim == 2, None
    # Eight columns of gate or up have one scale, if each half's rows begin with such eight.
    if count > 1 or (swiglu and per_block and width // 2 % 8):
        partial = torch.empty(count, rows, width, dtype=torch.float32, device=x.device)
    call(
        "linear",
        x.device,
        y=y,
        partial=partial,
        x=x,
        weight=weight,
        scale=scale,
        bias=bias,
        dtype=x.dtype,
        stored=STORED.get(weight.dtype, 0),
        per_block=per_block,
        swiglu=swiglu,
        rows=rows,
        width=width,
        depth=depth,
        splits=count,
        stride_x_row=x.stride(-2) if x.ndim > 1 else depth,
        stride_weight_row=weight.stride(0),
        stride_scale_row=0 if scale is None or not per_block else scale.stride(0),
        pdl=may_overlap(x.device, pdl),
    )
    return y
