"""Launches csrc/edit_tokens.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from pydllm._backend.cuda import DTYPES, call

MAX_WINDOW = 4096  # kMaxEditedWindow in csrc/edit_tokens.h


def supports(
    x: Tensor,
    step_map: Tensor,
    nfe: Tensor,
    post_steps: Tensor,
    complete: Tensor,
    token: Tensor,
    score: Tensor,
    mask_id: int,
    start: Tensor,
    length: Tensor,
    editable_from: Tensor,
    threshold: float,
    edit_threshold: float,
    min_tokens: int,
    max_post_steps: int,
    confirm: bool,
) -> str | None:
    """None if the kernel can run this call, otherwise why not."""
    if score.dtype not in DTYPES:
        return f"the kernel takes fp32, fp16 and bf16 scores, got {score.dtype}"
    if token.shape[1] > MAX_WINDOW:
        return f"the kernel takes windows of up to {MAX_WINDOW} positions, got {token.shape[1]}"
    tensors = {"x": x, "step_map": step_map, "token": token, "score": score, "nfe": nfe}
    tensors |= {"post_steps": post_steps, "complete": complete, "start": start, "length": length}
    for name, tensor in (tensors | {"editable_from": editable_from}).items():
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return f"{name} must have contiguous rows, got strides {tensor.stride()}"
    return None


def edit_tokens(
    x: Tensor,
    step_map: Tensor,
    nfe: Tensor,
    post_steps: Tensor,
    complete: Tensor,
    token: Tensor,
    score: Tensor,
    mask_id: int,
    start: Tensor,
    length: Tensor,
    editable_from: Tensor,
    threshold: float,
    edit_threshold: float,
    min_tokens: int,
    max_post_steps: int,
    confirm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel; arguments as in ``pydllm.reference.edit_tokens``."""
    batch, rows = token.shape
    remaining, filled, edited = (torch.empty_like(nfe) for _ in range(3))
    if batch == 0 or rows == 0:
        return remaining.zero_(), filled.zero_(), edited.zero_()
    call(
        "edit_tokens",
        x.device,
        remaining=remaining,
        filled=filled,
        edited=edited,
        x=x,
        step_map=step_map,
        nfe=nfe,
        post_steps=post_steps,
        complete=complete,
        token=token,
        score=score,
        start=start,
        length=length,
        editable_from=editable_from,
        dtype=score.dtype,
        batch=batch,
        slots=x.shape[1],
        rows=rows,
        mask_id=mask_id,
        threshold=threshold,
        edit_threshold=edit_threshold,
        min_tokens=min_tokens,
        max_post_steps=max_post_steps,
        confirm=confirm,
        stride_x_row=x.stride(0),
        stride_step_map_row=step_map.stride(0),
        stride_token_row=token.stride(0),
        stride_score_row=score.stride(0),
    )
    return remaining, filled, edited
