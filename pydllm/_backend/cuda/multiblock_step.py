"""Launches csrc/multiblock_step.cu."""

from __future__ import annotations

from torch import Tensor

from pydllm._backend.cuda import DTYPES, call

MAX_POSITIONS = 8192  # kMaxPositions and kMaxBlocks in csrc/multiblock_step.h
MAX_BLOCKS = 1024


def supports(
    x: Tensor,
    step_map: Tensor,
    numbers: Tensor,
    blocks: Tensor,
    eligible: Tensor,
    token: Tensor,
    entropy: Tensor,
    mask_id: int,
    prompt: Tensor,
    eos: Tensor | None,
    new: int,
    size: int,
    limit: float,
    add: int,
    full_at: int,
    delay: int,
    refresh: int,
    early_stop: bool,
    cached: bool,
    tail: int,
    shifted: bool,
) -> str | None:
    """None if the kernel can run this call, otherwise why not."""
    if entropy.dtype not in DTYPES:
        return f"the kernel takes fp32, fp16 and bf16 entropies, got {entropy.dtype}"
    if new > MAX_POSITIONS or blocks.shape[2] > MAX_BLOCKS:
        return (
            f"the kernel takes up to {MAX_POSITIONS} positions in up to {MAX_BLOCKS} blocks, "
            f"got {new} in {blocks.shape[2]}"
        )
    tensors = {"x": x, "step_map": step_map, "numbers": numbers, "blocks": blocks}
    tensors |= {"eligible": eligible, "token": token, "entropy": entropy}
    for name, tensor in (tensors | {"prompt_length": prompt, "eos_ids": eos}).items():
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return f"{name} must have contiguous rows, got strides {tensor.stride()}"
    return None


def multiblock_step(
    x: Tensor,
    step_map: Tensor,
    numbers: Tensor,
    blocks: Tensor,
    eligible: Tensor,
    token: Tensor,
    entropy: Tensor,
    mask_id: int,
    prompt: Tensor,
    eos: Tensor | None,
    new: int,
    size: int,
    limit: float,
    add: int,
    full_at: int,
    delay: int,
    refresh: int,
    early_stop: bool,
    cached: bool,
    tail: int,
    shifted: bool,
) -> None:
    """Launch the kernel; arguments as in ``pydllm.reference.multiblock_step``."""
    call(
        "multiblock_step",
        x.device,
        x=x,
        step_map=step_map,
        numbers=numbers,
        blocks=blocks,
        eligible=eligible,
        token=token,
        entropy=entropy,
        prompt=prompt,
        eos=eos,
        dtype=entropy.dtype,
        batch=x.shape[0],
        slots=x.shape[1],
        columns=token.shape[1],
        count=blocks.shape[2],
        ends=0 if eos is None else eos.shape[0],
        mask_id=mask_id,
        generated=new,
        size=size,
        limit=limit,
        add=add,
        full_at=full_at,
        delay=delay,
        refresh=refresh,
        tail=tail,
        early_stop=early_stop,
        cached=cached,
        shifted=shifted,
        stride_x_row=x.stride(0),
        stride_step_map_row=step_map.stride(0),
        stride_numbers_row=numbers.stride(0),
        stride_blocks_plane=blocks.stride(0),
        stride_blocks_row=blocks.stride(1),
        stride_eligible_row=eligible.stride(0),
        stride_token_row=token.stride(0),
        stride_entropy_row=entropy.stride(0),
    )
