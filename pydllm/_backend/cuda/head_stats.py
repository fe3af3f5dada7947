"""Launches csrc/head_stats.cu, which merges partial results into statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from pydllm._backend.cuda import call

MAX_PIECES = 2048  # kMaxPieces in csrc/head_stats.h


def merge_supports(values: Tensor, ids: Tensor) -> str | None:
    """None if the merge can run this call, otherwise why not."""
    if values.dtype != torch.float32:
        return f"the kernel takes fp32 values, got {values.dtype}"
    if not (values.is_contiguous() and ids.is_contiguous()):
        return f"values and ids must be contiguous, got strides {values.stride()}, {ids.stride()}"
    if not 0 < values.shape[2] <= MAX_PIECES:
        return f"the kernel takes 1 to {MAX_PIECES} pieces, got {values.shape[2]}"
    return None


def empty_stats(rows: int, device: torch.device) -> dict[str, Tensor]:
    """Room for token, probability, entropy, margin and log-sum-exp of rows, in that order."""
    statistics = {"token": torch.empty(rows, dtype=torch.int64, device=device)}
    for name in ("prob", "entropy", "margin", "logsumexp"):
        statistics[name] = torch.empty(rows, dtype=torch.float32, device=device)
    return statistics


def merge_stats(values: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    """Token, probability, entropy, margin and log-sum-exp of pieces ``(n, R, S)``."""
    fields, rows, pieces = values.shape
    statistics = empty_stats(rows, values.device)
    call(
        "merge_stats",
        values.device,
        **statistics,
        values=values,
        ids=ids,
        rows=rows,
        pieces=pieces,
        sampled=fields == 6,
    )
    return tuple(statistics.values())
