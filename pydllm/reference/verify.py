"""The definition of ``verify``."""

from __future__ import annotations

import torch
from torch import Tensor

from pydllm.reference.draft import draft, ranks


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
    """Take one step from every candidate; accept those that steps lead to, one after the other."""
    branches, rows = token.shape[1:]
    flat = candidates.flatten(0, 1)
    first_row, used = (t.repeat_interleave(branches) for t in (start, length))
    rank, slot = ranks(flat, score.flatten(0, 1), mask_id, first_row, used, block_size)
    before = flat.gather(1, slot)
    after = torch.where(rank == 0, token.flatten(0, 1), before)
    stepped = flat.scatter(1, slot, after).view_as(candidates)
    moves = (after != before).any(1).view(-1, branches)
    leads = moves[:, :-1] & (stepped[:, :-1] == candidates[:, 1:]).all(2)
    branch = leads.cumprod(1).sum(1)

    pick = torch.arange(len(x), device=x.device), branch
    takes_part = (rank < rows).any(1).view(-1, branches)[:, 0]
    first = torch.where(rank < rows, torch.arange(rows, device=x.device), rows).amin(1)
    first = torch.minimum(first.view(-1, branches)[pick], length.clamp(0, rows))
    size = block_size or 1
    complete = ((start + first) // size * size - start).clamp(min=0).to(torch.int32)

    changed = takes_part[:, None] & (stepped[pick] != x)
    step_map.copy_(torch.where(changed, nfe[:, None], step_map))
    x.copy_(torch.where(changed, stepped[pick], x))
    nfe += takes_part
    token, score = token[pick], score[pick]
    following = draft(x, token, score, mask_id, start, length, drafts, block_size)
    rank, _ = ranks(x, score, mask_id, start, length, block_size)
    accepted, remaining = (t.sum(1, dtype=torch.int32) for t in (changed, rank < rows))
    return following, branch.to(torch.int32), accepted, remaining, complete
