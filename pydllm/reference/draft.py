"""The definition of ``draft``."""

from __future__ import annotations

import torch
from torch import Tensor

_NONE = 1 << 30


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
    """Candidate j, of ``(B, branches, L)``, is ``x`` with the window's j first masks filled."""
    rank, slot = ranks(x, score, mask_id, start, length, block_size)
    wide = slot[:, None].expand(-1, branches, -1)
    candidates = x[:, None].repeat(1, branches, 1)
    number = torch.arange(branches, device=x.device)[:, None]
    filled = torch.where(rank[:, None] < number, token[:, None], candidates.gather(2, wide))
    return candidates.scatter_(2, wide, filled)


def ranks(
    x: Tensor, score: Tensor, mask_id: int, start: Tensor, length: Tensor, block_size: int | None
) -> tuple[Tensor, Tensor]:
    """Which of the masks to be filled each window row is, ``(B, T)``, and the slots of the rows.

    Ordered by block, then score, best first, then position; rows that are no masks rank above all.
    """
    row = torch.arange(score.shape[1], device=x.device)
    position = start[:, None] + row
    inside = (row < length[:, None]) & (position >= 0) & (position < x.shape[1])
    slot = position % x.shape[1]  # those of one sequence are distinct: rows <= slots
    masked = inside & (x.gather(1, slot) == mask_id)
    value = score.to(torch.promote_types(score.dtype, torch.float32))
    cost = (0 - value.masked_fill(value.isnan(), -torch.inf)).masked_fill(~masked, torch.inf)
    order = cost.sort(dim=1, stable=True).indices
    block = torch.zeros_like(position) if block_size is None else position // block_size
    block = block.masked_fill(~masked, torch.iinfo(block.dtype).max)
    order = order.gather(1, block.gather(1, order).sort(dim=1, stable=True).indices)
    return order.argsort(1).masked_fill(~masked, _NONE), slot
