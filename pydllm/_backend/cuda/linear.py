"""Launches csrc/linear.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from pydllm._backend.cuda import call, may_overlap, rms_norm

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


def supports_rms_norm(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    norm: Tensor,
    eps: float,
    residual: Tensor,
) -> str | None:
    """None if the kernels can run this call, otherwise why not."""
    return supports(x, weight, scale, bias) or rms_norm.supports(residual, norm, eps, None)


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    *,
    pdl: bool = False,
) -> Tensor:
    """Launch the kernel; arguments as in ``pydllm.ops.linear``, a quantised weight in its parts."""
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    partial = _partial(x, weight, splits(*weight.shape))
    _launch(y, partial, x, weight, scale, bias, pdl=pdl)
    return y


def linear_swiglu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    *,
    pdl: bool = False,
) -> Tensor:
    """Launch the kernel of ``pydllm.ops.linear_swiglu``; arguments as of ``linear``."""
    inner, count = weight.shape[0] // 2, splits(*weight.shape)
    y = x.new_empty((*x.shape[:-1], inner))
    # Eight columns of gate or up have one scale, if each half's rows begin with such eight.
    straddles = scale is not None and scale.ndim == 2 and inner % 8 != 0
    partial = _partial(x, weight, count, needed=straddles)
    _launch(y, partial, x, weight, scale, bias, swiglu=True, pdl=pdl)
    return y


def linear_rms_norm(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    norm: Tensor,
    eps: float,
    residual: Tensor,
    *,
    pdl: bool = False,
) -> Tensor:
    """Launch the kernels of ``pydllm.ops.linear_rms_norm``; arguments as of ``linear``."""
    if splits(*weight.shape) == 1 or weight.shape[0] > rms_norm.MAX_MERGED_WIDTH:
        y = linear(x, weight, scale, bias, pdl=pdl)
        return rms_norm.rms_norm(y, norm, eps, residual, pdl=pdl)
    partial = _partial(x, weight, splits(*weight.shape))
    _launch(None, partial, x, weight, scale, bias, pdl=pdl)
    per_channel = None if scale is None or scale.ndim == 2 else scale
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    rms_norm.launch(y, norm, eps, residual, pdl, partial=partial, scale=per_channel, bias=bias)
    return y


def _partial(x: Tensor, weight: Tensor, count: int, *, needed: bool = False) -> Tensor | None:
    """Room for the sums of the splits, where there are any."""
    if count == 1 and not needed:
        return None
    rows = x.numel() // x.shape[-1]
    return torch.empty(count, rows, weight.shape[0], dtype=torch.float32, device=x.device)


def _launch(
    y: Tensor | None,
    partial: Tensor | None,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    *,
    swiglu: bool = False,
    pdl: bool,
) -> None:
    """Without ``y`` the splits stay in ``partial``."""
    width, depth = weight.shape
    rows = x.numel() // depth
    if rows == 0:
        return
    per_block = scale is not None and scale.ndim == 2
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
        splits=1 if partial is None else partial.shape[0],
        stride_x_row=x.stride(-2) if x.ndim > 1 else depth,
        stride_weight_row=weight.stride(0),
        stride_scale_row=0 if scale is None or not per_block else scale.stride(0),
        pdl=may_overlap(x.device, pdl),
    )
