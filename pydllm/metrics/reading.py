"""The rows of a masked diffusion model that predict chosen positions, as decoding reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pydllm.models import Model


def masked_rows(
    model: Model,
    sequences: Sequence[Tensor],
    positions: Sequence[Tensor],
    origins: Sequence[int],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Hidden rows that predict masks, in one forward of all sequences, each by itself.

    A model whose context is causal takes two forwards: a causal one of what stands before a block,
    and one of the block. The first token of a block of a seeded one is predicted by the former.

    Args:
        sequences: ids, 1-D int64, masks included.
        positions: of each sequence the positions to predict, ascending 1-D int64.
        origins: of each sequence the prompt's length, where blocks may begin.
        backend: as in ``pydllm.ops``.

    Returns:
        ``(N, hidden)``, and the index of the sequence of each row, ``(N,)`` int64 on the CPU.
    """
    spec, device = model.spec, model.device
    counts = torch.tensor([len(position) for position in positions])
    index, place = torch.arange(len(sequences)).repeat_interleave(counts), torch.cat([*positions])
    if spec.context == "causal":
        origin = torch.tensor(origins)[index]
        return _after_causal_context(model, sequences, index, place, origin, backend), index
    options: dict[str, Any] = {}
    if spec.block_origin == "prompt" and spec.block_size is not None:
        offset = torch.tensor(origins, dtype=torch.int32).neg().remainder(spec.block_size)
        options["block_offset"] = offset.to(device)
    hidden = _forward(model, sequences, backend, **options)
    return hidden[index.to(device), (place - int(spec.shift_logits)).to(device)], index


def causal_rows(model: Model, sequence: Tensor, first: int, backend: str | None = None) -> Tensor:
    """Hidden rows ``(len(sequence) - first, hidden)`` that predict the tokens from ``first`` on,
    each given those before it, for models whose causal row i predicts token i + 1.
    """
    return _forward(model, [sequence], backend, attention="causal")[0, first - 1 : -1]


def _after_causal_context(
    model: Model,
    sequences: Sequence[Tensor],
    index: Tensor,
    place: Tensor,
    origin: Tensor,
    backend: str | None,
) -> Tensor:
    """Rows for positions ``place (N,)`` of sequences ``index (N,)``."""
    spec, device = model.spec, model.device
    size = spec.block_size or 1
    start = (place - (place - origin).remainder(size)).clamp(min=0)
    blocks, block = torch.stack((index, start)).unique(dim=1, return_inverse=True)
    owners, starts = (part.tolist() for part in blocks)
    before = [sequences[owner][:first] for owner, first in zip(owners, starts, strict=True)]
    inside = [
        sequences[owner][first : first + size] for owner, first in zip(owners, starts, strict=True)
    ]
    cache = model.new_cache(len(owners), max(starts) + size)
    seeds = (
        _forward(model, before, backend, cache=cache, attention="causal") if any(starts) else None
    )
    hidden = _forward(model, inside, backend, cache=cache, start=blocks[1], attention="full")
    rows = hidden[block.to(device), (place - start).to(device)]
    if not spec.seeded or seeds is None:
        return rows
    seeded = ((place == start) & (start > 0)).to(device)
    last = (start - 1).clamp(min=0).to(device)
    return torch.where(seeded[:, None], seeds[block.to(device), last], rows)


def _forward(
    model: Model,
    sequences: Sequence[Tensor],
    backend: str | None,
    *,
    cache: Any = None,
    start: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Hidden states of ragged windows at ``start (B,)``; those at 0 are stored in a cache."""
    device, batch = model.device, len(sequences)
    lengths = [len(sequence) for sequence in sequences]
    ids = torch.zeros(batch, max(lengths), dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : lengths[row]] = sequence
    zero = torch.zeros(batch, dtype=torch.int32, device=device)
    length = torch.tensor(lengths, dtype=torch.int32, device=device)
    first = zero if start is None else start.to(device, torch.int32)
    return model.forward(
        ids.to(device),
        first,
        model.new_cache(batch, 0) if cache is None else cache,
        length=length,
        kv_len=first + length,
        commit=length if cache is not None and start is None else zero,
        backend=backend,
        **options,
    )
