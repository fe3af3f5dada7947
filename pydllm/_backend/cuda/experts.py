"""Launches csrc/experts.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from pydllm._backend.cuda import call
from pydllm._backend.cuda.linear import STORED

_DTYPES = (torch.float16, torch.bfloat16)


def supports(
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    shared_gate_up: Tensor | None,
    shared_down: Tensor | None,
    activation: str,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
) -> str | None:
    """None if the kernels can run this call, otherwise why not."""
    if hidden.dtype not in _DTYPES:
        return f"the kernel takes fp16 and bf16, got {hidden.dtype}"
    sizes = {"width": down.shape[1], "inner width": down.shape[2]}
    if shared_down is not None:
        sizes["inner width of the shared expert"] = shared_down.shape[1]
    for name, size in sizes.items():
        if size % 16:
            return f"the kernel takes a multiple of 16 for the {name}, got {size}"
    if gate_up_scale is not None and gate_up_scale.ndim == 3 and down.shape[2] % 32:
        return (
            "the kernel takes scales per block with an inner width of a multiple of 32, "
            f"got {down.shape[2]}"
        )
    if ids.numel() + hidden.numel() // max(hidden.shape[-1], 1) >= 2**31:
        return f"the kernel takes fewer than 2^31 pairs of row and expert, got {ids.numel()}"
    named: dict[str, Tensor | None] = {"hidden": hidden, "gate_up": gate_up, "down": down}
    named |= {"ids": ids, "weights": weights}
    named |= {"shared_gate_up": shared_gate_up, "shared_down": shared_down}
    named |= {"scale of gate_up": gate_up_scale, "scale of down": down_scale}
    for name, tensor in named.items():
        if tensor is None:
            continue
        if not tensor.is_contiguous():
            return f"{name} must be contiguous, got strides {tensor.stride()}"
        begins = tensor.storage_offset() * tensor.element_size()
        if tensor.element_size() < 4 and not torch.compiler.is_compiling() and begins % 16:
            return f"{name} must begin at a multiple of 16 bytes"
    return None


def experts(
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    shared_gate_up: Tensor | None,
    shared_down: Tensor | None,
    activation: str,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
) -> Tensor:
    """Launch the kernels; arguments as in ``pydllm.ops.experts``, quantised weights in parts."""
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    count, width, inner = down.shape
    rows, top_k, device = hidden.numel() // width, ids.shape[-1], hidden.device
    if rows == 0:
        return out
    pairs = rows * top_k
    shared_inner = 0 if shared_down is None else shared_down.shape[1]
    # One launch for both, where the weights are of one kind and size.
    apart = shared_down is not None and (shared_inner != inner or gate_up_scale is not None)
    shared_rows = 0 if shared_down is None else rows
    call(
        "experts",
        device,
        out=out,
        act=hidden.new_empty(pairs if apart else pairs + shared_rows, inner),
        y=hidden.new_empty(pairs + shared_rows, width),
        shared_act=hidden.new_empty(rows, shared_inner) if apart else None,
        order=torch.empty(pairs, dtype=torch.int32, device=device),
        starts=torch.empty(count + 1, dtype=torch.int32, device=device),
        hidden=hidden,
        gate_up=gate_up,
        down=down,
        gate_up_scale=gate_up_scale,
        down_scale=down_scale,
        ids=ids,
        weights=weights,
        shared_gate_up=shared_gate_up,
        shared_down=shared_down,
        dtype=hidden.dtype,
        stored=STORED.get(gate_up.dtype, 0),
        per_block=gate_up_scale is not None and gate_up_scale.ndim == 3,
        gelu=activation == "gelu_tanh",
        rows=rows,
        width=width,
        inner=inner,
        experts=count,
        top_k=top_k,
        shared_inner=shared_inner,
    )
    return out
