"""Launches csrc/swiglu.cu."""

from __future__ import annotations

from torch import Tensor

from pydllm._backend.cuda import DTYPES, call, may_overlap


def supports(gate_up: Tensor) -> str | None:
    """None if the kernel can run this call, otherwise why not."""
    if gate_up.dtype not in DTYPES:
        return f"the kernel takes fp32, fp16 and bf16, got {gate_up.dtype}"
    if not gate_up.is_contiguous():
        return f"gate_up must be contiguous, got strides {gate_up.stride()}"
    return None


def swiglu(gate_up: Tensor, *, pdl: bool = False) -> Tensor:
    """Launch the kernel; arguments as in ``pydllm.ops.swiglu``."""
    width = gate_up.shape[-1] // 2
    y = gate_up.new_empty((*gate_up.shape[:-1], width))
    call(
        "swiglu",
        gate_up.device,
        y=y,
        gate_up=gate_up,
        dtype=gate_up.dtype,
        rows=y.numel() // width if width else 0,
        width=width,
        pdl=may_overlap(gate_up.device, pdl),
    )
    return y
