"""Launches csrc/vocab_stats.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from pydllm._backend.cuda import DTYPES, call


def supports(
    logits: Tensor,
    banned: Tensor | None,
    temperatures: Tensor | None = None,
    rows: Tensor | None = None,
) -> str | None:
    """None if the kernel can run this call, otherwise why not."""
    if logits.dtype not in DTYPES:
        return f"the kernel takes fp32, fp16 and bf16, got {logits.dtype}"
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        return f"logits must be rows of contiguous elements, got strides {logits.stride()}"
    if banned is not None and not banned.is_contiguous():
        return f"banned must be contiguous, got strides {banned.stride()}"
    return None


def vocab_stats(
    logits: Tensor,
    temperature: float,
    seed: int,
    counter: Tensor | None,
    banned: Tensor | None,
    tempered: bool,
    softcap: float | None,
    temperatures: Tensor | None = None,
    rows: Tensor | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, ...]:
    """Launch the kernel; arguments as in ``pydllm.ops.vocab_stats``."""
    count, vocab = logits.shape
    token = torch.empty(count, dtype=torch.int64, device=logits.device)
    logsumexp, prob, entropy, margin = (
        torch.empty(count, dtype=torch.float32, device=logits.device) for _ in range(4)
    )
    call(
        "vocab_stats",
        logits.device,
        token=token,
        logsumexp=logsumexp,
        prob=prob,
        entropy=entropy,
        margin=margin,
        logits=logits,
        banned=banned,
        dtype=logits.dtype,
        rows=count,
        vocab=vocab,
        banned_count=0 if banned is None else banned.numel(),
        stride_logits_row=logits.stride(0),
    )
    return token, prob, entropy, margin, logsumexp
