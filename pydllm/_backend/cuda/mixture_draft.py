"""Launches csrc/mixture_draft.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from pydllm._backend.cuda import DTYPES, call

MAX_SHARED_VOCAB = 2**23  # kMaxSharedVocab in csrc/mixture_draft.h
# What may be in a nucleus is noted; beyond this number of ids the row is read again instead.
NOTES = 8192


def supports(
    logits: Tensor,
    temperature: float,
    seed: int,
    counter: Tensor,
    suppress_ids: Tensor | None,
    temperatures: Tensor | None,
    rows: Tensor | None,
    shared: int,
    top_p: float,
    top_ps: Tensor | None,
    capacity: int,
) -> str | None:
    """None if the kernel can run this call, otherwise why not."""
    if logits.dtype not in DTYPES:
        return f"the kernel takes fp32, fp16 and bf16, got {logits.dtype}"
    if logits.shape[1] > MAX_SHARED_VOCAB:
        return f"the kernel takes up to {MAX_SHARED_VOCAB} ids, got {logits.shape[1]}"
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        return f"logits must be rows of contiguous elements, got strides {logits.stride()}"
    lists = {
        "suppress_ids": suppress_ids,
        "temperature": temperatures,
        "rows": rows,
        "top_p": top_ps,
    }
    for name, tensor in lists.items():
        if tensor is not None and not tensor.is_contiguous():
            return f"{name} must be contiguous, got strides {tensor.stride()}"
    return None


def mixture_draft(
    logits: Tensor,
    temperature: float,
    seed: int,
    counter: Tensor,
    suppress_ids: Tensor | None,
    temperatures: Tensor | None,
    rows: Tensor | None,
    shared: int,
    top_p: float,
    top_ps: Tensor | None,
    capacity: int,
) -> tuple[Tensor, ...]:
    """Launch the kernel; ``temperatures`` and ``top_ps`` are the tensors that may stand for one."""
    sources, vocab = logits.shape
    count = sources if rows is None else rows.shape[0]
    inverse = 1 / temperature if temperature else 1.0

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=logits.device)

    token, size = empty(count, dtype=torch.int64), empty(count, dtype=torch.int32)
    logsumexp, threshold = empty(count), empty(count)
    ids, values = empty(count, capacity, dtype=torch.int32), empty(count, capacity)
    noise, overflow = empty(count, capacity), empty(count, dtype=torch.bool)
    notes = min(NOTES, shared)
    call(
        "mixture_draft",
        logits.device,
        token=token,
        logsumexp=logsumexp,
        threshold=threshold,
        ids=ids,
        values=values,
        noise=noise,
        size=size,
        overflow=overflow,
        noted_ids=empty(count, notes, dtype=torch.int32),
        noted=empty(count, notes),
        logits=logits,
        rows=rows,
        counter=counter,
        temperatures=temperatures,
        top_ps=top_ps,
        suppress_ids=suppress_ids,
        dtype=logits.dtype,
        wide_rows=rows is not None and rows.dtype == torch.int64,
        count=count,
        sources=sources,
        vocab=vocab,
        shared=shared,
        suppress_count=0 if suppress_ids is None else suppress_ids.shape[0],
        capacity=capacity,
        notes=notes,
        inverse=inverse,
        top_p=top_p,
        seed=seed,
        stride_logits_row=logits.stride(0),
        stride_counter_row=counter.stride(0),
        stride_counter_word=counter.stride(1),
    )
    return token, logsumexp, threshold, ids, values, noise, size, overflow
