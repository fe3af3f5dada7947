"""Launches csrc/unmask.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from pydllm._backend.cuda import DTYPES, call

MAX_WINDOW = 4096  # kMaxWindow in csrc/unmask.h
# Rule in csrc/unmask.h
RULES = {
    "quota": 0,
    "left_to_right": 1,
    "random": 2,
    "threshold": 3,
    "factor": 4,
    "entropy": 5,
    "entropy_bound": 6,
}


def supports(
    x: Tensor,
    step_map: Tensor,
    nfe: Tensor,
    token: Tensor,
    score: Tensor,
    mask_id: int,
    start: Tensor,
    length: Tensor,
    rule: str,
    quota: Tensor | None,
    min_tokens: int,
    limit: float,
    seed: int,
    request: Tensor | None,
    done: Tensor | None,
    end: Tensor | None,
    eos_ids: Tensor | None,
    ends_from: Tensor | None,
    last: bool,
) -> str | None:
    """None if the kernel can run this call, otherwise why not."""
    if score.dtype not in DTYPES:
        return f"the kernel takes fp32, fp16 and bf16 scores, got {score.dtype}"
    if token.shape[1] > MAX_WINDOW:
        return f"the kernel takes windows of up to {MAX_WINDOW} positions, got {token.shape[1]}"
    numbers = {"nfe": nfe, "start": start, "length": length, "quota": quota, "request": request}
    numbers |= {"done": done, "end": end, "ends_from": ends_from}
    rows = {"x": x, "step_map": step_map, "token": token, "score": score}
    for name, tensor in (rows | numbers).items():
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return f"{name} must have contiguous rows, got strides {tensor.stride()}"
    return None


def unmask(
    x: Tensor,
    step_map: Tensor,
    nfe: Tensor,
    token: Tensor,
    score: Tensor,
    mask_id: int,
    start: Tensor,
    length: Tensor,
    rule: str,
    quota: Tensor | None,
    min_tokens: int,
    limit: float,
    seed: int,
    request: Tensor | None,
    done: Tensor | None,
    end: Tensor | None,
    eos_ids: Tensor | None,
    ends_from: Tensor | None,
    last: bool,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; arguments as in ``pydllm.reference.unmask``."""
    batch, rows = token.shape
    remaining, accepted = torch.empty_like(nfe), torch.empty_like(nfe)
    if batch == 0 or rows == 0:
        return remaining.zero_(), accepted.zero_()
    call(
        "unmask",
        x.device,
        remaining=remaining,
        accepted=accepted,
        x=x,
        step_map=step_map,
        nfe=nfe,
        token=token,
        score=score,
        start=start,
        length=length,
        quota=quota,
        request=request,
        done=done,
        end=end,
        eos_ids=eos_ids,
        ends_from=ends_from,
        dtype=score.dtype,
        batch=batch,
        slots=x.shape[1],
        rows=rows,
        mask_id=mask_id,
        rule=RULES[rule],
        min_tokens=min_tokens,
        limit=limit,
        seed=seed,
        ends=0 if eos_ids is None else eos_ids.shape[0],
        last=last,
        stride_x_row=x.stride(0),
        stride_step_map_row=step_map.stride(0),
        stride_token_row=token.stride(0),
        stride_score_row=score.stride(0),
    )
    return remaining, accepted
