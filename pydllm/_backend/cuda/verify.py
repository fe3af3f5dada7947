"""Launches csrc/verify.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from pydllm._backend.cuda import call
from pydllm._backend.cuda import draft as _draft

MAX_BRANCHES = 32  # kVerifyBranches in csrc/verify.h


def supports(
    x: Tensor,
    step_map: Tensor,
    nfe: Tensor,
    candidates: Tensor,
    token: Tensor,
    score: Tensor,
    mask_id: int,
    start: Tensor,
    length: Tensor,
    drafts: int,
    block_size: int | None,
) -> str | None:
    """None if the kernel can run this call, otherwise why not."""
    named = {"nfe": nfe, "candidates": candidates, "token": token, "score": score}
    for name, tensor in named.items():
        if not tensor.is_contiguous():
            return f"{name} must be contiguous, got strides {tensor.stride()}"
    if token.shape[1] > MAX_BRANCHES:
        return f"the kernel takes up to {MAX_BRANCHES} candidates, got {token.shape[1]}"
    if step_map.shape[1] > 1 and step_map.stride(1) != 1:
        return f"step_map must have contiguous rows, got strides {step_map.stride()}"
    return _draft.supports(x, token, score, mask_id, start, length, drafts, block_size)


def verify(
    x: Tensor,
    step_map: Tensor,
    nfe: Tensor,
    candidates: Tensor,
    token: Tensor,
    score: Tensor,
    mask_id: int,
    start: Tensor,
    length: Tensor,
    drafts: int,
    block_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernel; arguments as in ``pydllm.reference.verify``."""
    batch, branches, rows = token.shape
    following = candidates.new_empty(batch, drafts, x.shape[1])
    branch, accepted, remaining, complete = (torch.empty_like(nfe) for _ in range(4))
    call(
        "verify",
        x.device,
        following=following,
        branch=branch,
        accepted=accepted,
        remaining=remaining,
        complete=complete,
        x=x,
        step_map=step_map,
        nfe=nfe,
        candidates=candidates,
        token=token,
        score=score,
        start=start,
        length=length,
        dtype=score.dtype,
        batch=batch,
        slots=x.shape[1],
        rows=rows,
        branches=branches,
        drafts=drafts,
        mask_id=mask_id,
        block_size=block_size or 0,
        stride_x_row=x.stride(0),
        stride_step_map_row=step_map.stride(0),
    )
    return following, branch, accepted, remaining, complete
