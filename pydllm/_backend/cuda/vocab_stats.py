"""Launches csrc/vocab_stats.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from pydllm._backend.cuda import DTYPES, call
from pydllm._backend.cuda.head_stats import MAX_PIECES, empty_stats

PIECE = 8192  # kVocabPiece in csrc/vocab_stats.h


def supports(
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
    top_ks: Tensor | None = None,
    top_ps: Tensor | None = None,
) -> str | None:
    """None if the kernel can run this call, otherwise why not."""
    if logits.dtype not in DTYPES:
        return f"the kernel takes fp32, fp16 and bf16, got {logits.dtype}"
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        return f"logits must be rows of contiguous elements, got strides {logits.stride()}"
    if logits.shape[1] > MAX_PIECES * PIECE:
        return f"the kernel takes up to {MAX_PIECES * PIECE} ids, got {logits.shape[1]}"
    lists = {"banned": banned, "temperature": temperatures, "rows": rows}
    for name, tensor in lists.items():
        if tensor is not None and not tensor.is_contiguous():
            return f"{name} must be contiguous, got strides {tensor.stride()}"
    if any(value is not None for value in (top_k, top_p, top_ks, top_ps)):
        return "the kernel takes no top_k or top_p (the Triton kernels and torch do)"
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
    top_ks: Tensor | None = None,
    top_ps: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Launch the kernels; arguments as in ``pydllm.ops.vocab_stats``, ``seed`` a signed 64 bits.

    ``temperatures`` is the tensor that may stand for ``temperature``; there is no top-k or top-p.
    """
    sources, vocab = logits.shape
    count = sources if rows is None else rows.shape[0]
    sampled = temperatures is not None or temperature > 0
    noise = counter if sampled else None
    pieces = -(-vocab // PIECE)
    device = logits.device
    statistics = empty_stats(count, device)
    values = torch.empty(6 if sampled else 4, count, pieces, dtype=torch.float32, device=device)
    ids = torch.empty(2 if sampled else 1, count, pieces, dtype=torch.int32, device=device)
    call(
        "vocab_stats",
        device,
        **statistics,
        values=values,
        ids=ids,
        logits=logits,
        row_list=rows,
        counter=noise,
        temperatures=temperatures,
        banned=banned,
        dtype=logits.dtype,
        rows=count,
        sources=sources,
        vocab=vocab,
        banned_count=0 if banned is None else banned.shape[0],
        long_row_list=rows is not None and rows.dtype == torch.int64,
        tempered=tempered,
        seed=seed,
        inverse_temperature=1 / temperature if temperature else 1.0,
        softcap=softcap,
        stride_logits_row=logits.stride(0),
        stride_counter_row=0 if noise is None else noise.stride(0),
        stride_counter_word=0 if noise is None else noise.stride(1),
    )
    return tuple(statistics.values())
