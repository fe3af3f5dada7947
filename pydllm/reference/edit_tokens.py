"""The definition of ``edit_tokens``."""

from __future__ import annotations

import torch
from torch import Tensor


def edit_tokens(
    x: Tensor,
    step_map: Tensor,
    nfe: Tensor,
    post_steps: Tensor,
    complete: Tensor,
    token: Tensor,
    score: Tensor,
    mask_id: int,
    start: Tensor,
    length: Tensor,
    editable_from: Tensor,
    threshold: float,
    edit_threshold: float,
    min_tokens: int,
    max_post_steps: int,
    confirm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill masks whose score exceeds ``threshold``, and at least the ``min_tokens`` best; replace
    tokens whose score exceeds ``edit_threshold``; say which windows are complete.
    """
    slots, rows = x.shape[1], token.shape[1]
    row = torch.arange(rows, device=x.device)
    position = start[:, None] + row
    inside = (row < length[:, None]) & (position >= 0) & (position < slots) & ~complete[:, None]
    slot = position % slots  # those of one sequence are distinct: rows <= slots
    before = x.gather(1, slot)
    own = inside & (position >= editable_from[:, None])
    masked = own & (before == mask_id)
    had_mask, takes_part = masked.any(1), inside.any(1)
    wide = torch.promote_types(score.dtype, torch.float32)
    # Limits are rounded to the dtype of the scores.
    limit, edit_limit = (
        score.new_full((), value, dtype=torch.float64).to(score.dtype).to(wide)
        for value in (threshold, edit_threshold)
    )
    score = score.to(wide)
    score = score.masked_fill(score.isnan(), -torch.inf)

    post_steps += takes_part & ~had_mask
    closing = confirm & ~had_mask & (post_steps > max_post_steps)  # with a step that writes nothing
    # Ascending and stable: ties stay in order of position; NaN, here what is not masked, is last.
    order = torch.where(masked, 0 - score, torch.nan).sort(dim=1, stable=True).indices
    best = torch.zeros_like(masked).scatter(1, order, (row < min_tokens).expand_as(masked))
    fill = masked & ((score > limit) | best)
    changes = (token != before) & (token != mask_id) & (before != mask_id)
    edit = own & changes & (score > edit_limit) & ~closing[:, None]
    written = fill | edit
    new = torch.where(written, token, before)
    x.scatter_(1, slot, torch.where(inside, new, before))
    step_map.scatter_(1, slot, torch.where(written, nfe[:, None], step_map.gather(1, slot)))
    nfe += takes_part
    remaining = (own & (new == mask_id)).sum(1, dtype=torch.int32)
    spent = ~closing if confirm else (remaining > 0) | (post_steps < max_post_steps)
    complete |= takes_part & (~spent | (~had_mask & ~edit.any(1)))
    return remaining, fill.sum(1, dtype=torch.int32), edit.sum(1, dtype=torch.int32)
