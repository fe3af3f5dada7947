"""Launches csrc/vocab_stats.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydllm._backend.cuda import DTYPES, call
from pydllm._backend.cuda.head_stats import MAX_PIECES, empty_stats

PIECE = 8192  # kVocabPiece in csrc/vocab_stats.h
CUT_DIGITS = 16  # kCutDigits there


def supports(
    logits: Tensor,
    temperature: float,
    seed: int,
    counter: Tensor | None,
    suppress_ids: Tensor | None,
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
    lists = {"suppress_ids": suppress_ids, "temperature": temperatures, "rows": rows}
    lists |= {"top_k": top_ks, "top_p": top_ps}
    for name, tensor in lists.items():
        if tensor is not None and not tensor.is_contiguous():
            return f"{name} must be contiguous, got strides {tensor.stride()}"
    return None


def vocab_stats(
    logits: Tensor,
    temperature: float,
    seed: int,
    counter: Tensor | None,
    suppress_ids: Tensor | None,
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

    ``temperatures``, ``top_ks`` and ``top_ps`` are tensors that may stand for the numbers.
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
    shared = {
        "logits": logits,
        "row_list": rows,
        "temperatures": temperatures,
        "suppress_ids": suppress_ids,
        "dtype": logits.dtype,
        "rows": count,
        "sources": sources,
        "vocab": vocab,
        "suppress_count": 0 if suppress_ids is None else suppress_ids.shape[0],
        "long_row_list": rows is not None and rows.dtype == torch.int64,
        "inverse_temperature": 1 / temperature if temperature else 1.0,
        "softcap": softcap,
        "stride_logits_row": logits.stride(0),
    }
    filters = (top_k, top_p, top_ks, top_ps)
    is_filtered = any(value is not None for value in filters)
    call(
        "vocab_stats",
        device,
        **statistics,
        **shared,
        values=values,
        ids=ids,
        cut=_smallest_kept(shared, pieces, *filters) if is_filtered else None,
        counter=noise,
        tempered=tempered,
        seed=seed,
        stride_counter_row=0 if noise is None else noise.stride(0),
        stride_counter_word=0 if noise is None else noise.stride(1),
    )
    return tuple(statistics.values())


def _smallest_kept(
    shared: dict[str, Any],
    pieces: int,
    top_k: int | None,
    top_p: float | None,
    top_ks: Tensor | None,
    top_ps: Tensor | None,
) -> Tensor:
    """The smallest logit that both filters keep in each row: ``(rows,)`` fp32."""
    rows, vocab, device = shared["rows"], shared["vocab"], shared["logits"].device

    def room(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    cut = room(rows, dtype=torch.float32)
    call(
        "vocab_cut",
        device,
        **shared,
        cut=cut,
        keys=room(2, rows, 2, dtype=torch.int32),
        counts=room(2, rows, pieces, CUT_DIGITS, dtype=torch.int32),
        masses=room(2, rows, pieces, CUT_DIGITS, dtype=torch.float32),
        best=room(rows, pieces, dtype=torch.float32),
        top_ks=top_ks,
        top_ps=top_ps,
        has_top_k=top_k is not None or top_ks is not None,
        has_top_p=top_p is not None or top_ps is not None,
        top_k=1 if top_k is None else min(top_k, vocab),
        top_p=1.0 if top_p is None else top_p,
    )
    return cut
