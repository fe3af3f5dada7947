"""Launches csrc/draft.cu."""

from __future__ import annotations

from torch import Tensor

from pydllm._backend.cuda import DTYPES, call

MAX_ROWS = 1024  # kDraftRows in csrc/draft.h


def supports(
    x: Tensor,
    token: Tensor,
    score: Tensor,
    mask_id: int,
    start: Tensor,
    length: Tensor,
    branches: int,
    block_size: int | None,
) -> str | None:
    """None if the kernel can run this call, otherwise why not."""
    if score.dtype not in DTYPES:
        return f"the kernel takes fp32, fp16 and bf16 scores, got {score.dtype}"
    if token.shape[-1] > MAX_ROWS:
        return f"the kernel takes windows of up to {MAX_ROWS} positions, got {token.shape[-1]}"
    named = {"x": x, "token": token, "score": score, "start": start, "length": length}
    for name, tensor in named.items():
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return f"{name} must have contiguous rows, got strides {tensor.stride()}"
    return None


def draft(
    x: Tensor,
    token: Tensor,
    score: Tensor,
    mask_id: int,
    start: Tensor,
    length: Tensor,
    branches: int,
    block_size: int | None,
) -> Tensor:
    """Launch the kernel; arguments as in ``pydllm.reference.draft``."""
    batch, slots = x.shape
    candidates = x.new_empty(batch, branches, slots)
    call(
        "draft",
        x.device,
        candidates=candidates,
        x=x,
        token=token,
        score=score,
        start=start,
        length=length,
        dtype=score.dtype,
        batch=batch,
        slots=slots,
        rows=token.shape[1],
        branches=branches,
        mask_id=mask_id,
        block_size=block_size or 0,
        stride_x_row=x.stride(0),
        stride_token_row=token.stride(0),
        stride_score_row=score.stride(0),
    )
    return candidates
