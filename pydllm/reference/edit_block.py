"""The definition of ``edit_block``."""

from __future__ import annotations

import torch
from torch import Tensor

from pydllm.reference.vocab_stats import row_sums


def edit_block(
    x: Tensor,
    step_map: Tensor,
    nfe: Tensor,
    original: Tensor,
    post_steps: Tensor,
    updates: Tensor,
    seen: Tensor,
    written: Tensor,
    complete: Tensor,
    logits: Tensor,
    mask_id: int,
    delete_id: int,
    split_id: int,
    start: Tensor,
    length: Tensor,
    editable_from: Tensor,
    threshold: float,
    edit_threshold: float,
    max_post_steps: int,
) -> tuple[Tensor, Tensor]:
    """Fill masks, replace tokens, delete and insert: one step of each sequence's block."""
    slots, (rows, vocab), kept = x.shape[1], logits.shape[1:], seen.shape[1]
    if rows == 0:
        return torch.zeros_like(nfe), torch.zeros_like(nfe)
    row = torch.arange(rows, device=x.device)
    fits = (length <= rows) & (start >= 0) & (start.long() + length <= slots)
    takes_part = ~complete & (length > 0) & fits
    inside = takes_part[:, None] & (row < length[:, None])
    slot = (start.long()[:, None] + row) % slots  # those of one sequence are distinct
    x_old = x.gather(1, slot)
    own = inside & (slot >= editable_from[:, None])
    masked = own & (x_old == mask_id)
    first = torch.where((updates == 0)[:, None], masked, original)
    old = masked & first

    # The choice of each row, and its alternatives.
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    value = wide.masked_fill(wide.isnan(), -torch.inf)
    peak = value.amax(-1, keepdim=True)
    total = row_sums((wide - peak).exp().flatten(0, 1)).view_as(peak)
    ids = torch.arange(vocab, device=x.device)
    ordinary = (ids != mask_id) & (ids != delete_id) & (ids != split_id)
    earlier = (torch.arange(kept, device=x.device) < updates[:, None])[..., None]
    past = torch.where(earlier & (written >= 0) & (written < vocab), written, vocab).mT
    unwritten = ids.new_ones(*past.shape[:2], vocab + 1, dtype=torch.bool)
    unwritten = unwritten.scatter_(2, past.long(), False)[..., :vocab]
    unwritten &= ~(old[..., None] & (ids == mask_id))

    def best(allowed: Tensor) -> Tensor:
        among = value.masked_fill(~allowed, -torch.inf)
        at_best = allowed & (among == among.amax(-1, keepdim=True))
        return torch.where(at_best, ids, vocab).amin(-1) % vocab  # 0 where none is allowed

    def probability(token: Tensor) -> Tensor:
        share = (value.gather(2, token[..., None]) - peak).exp() / total
        return share.squeeze(2).masked_fill(share.squeeze(2).isnan(), -torch.inf)

    # Limits are rounded to the dtype of the scores.
    limit, edit_limit = (wide.new_tensor(each) for each in (threshold, edit_threshold))
    token = best(torch.ones_like(ordinary))
    score = probability(token)

    n_old = old.sum(1)
    new_updates = updates + 1
    new_post = post_steps + (n_old == 0)
    spent = new_post >= max_post_steps if max_post_steps > 0 else n_old == 0
    last = spent | (new_updates > length + max_post_steps)
    other = best(ids != mask_id)
    evades = old & (token == mask_id) & ~last[:, None]
    token, score = (
        torch.where(evades, *pair) for pair in ((other, token), (probability(other), score))
    )
    need = 1 + masked.sum(1) - n_old
    above = masked & (score > limit)
    # Ascending and stable: ties stay in order of position; NaN, here what is not masked, is last.
    order = torch.where(masked, 0 - score, torch.nan).sort(dim=1, stable=True).indices
    ranked = torch.zeros_like(masked).scatter(1, order, row < need[:, None]) & masked
    fill = torch.where((above.sum(1) >= need)[:, None], above, ranked)
    fill = torch.where((last | (n_old == 0))[:, None], masked, fill)
    if max_post_steps == 0:
        last = last | ~(old & ~fill).any(1)
        fill = torch.where(last[:, None], masked, fill)
    edit = own & ~masked & (score > edit_limit) & (token != x_old)
    write = fill | edit
    takes_steps = write.any(1)
    token = torch.where(write & last[:, None] & ~ordinary[token], best(ordinary), token)

    # A block that was there before: another token where the least sure one changes.
    repeats = ((seen == x_old[:, None]) | ~inside[:, None]).all(2) & earlier.squeeze(2)
    changing = write & (token != x_old) & (repeats.any(1) & ~last)[:, None]
    weakest = score.masked_fill(~changing, torch.inf)
    weakest = changing & (weakest == weakest.amin(1, keepdim=True))
    weakest = weakest & (weakest.cumsum(1) == 1)
    token = torch.where(weakest, best(unwritten), token)
    entry = torch.arange(kept, device=x.device) == updates[:, None]
    entry = (entry & (takes_part & takes_steps & ~last)[:, None])[..., None] & inside[:, None]
    seen.copy_(torch.where(entry, x_old[:, None], seen))
    written.copy_(torch.where(entry, torch.where(write, token, -1)[:, None], written))

    # A split opens a gap before the token that was there; a deletion leaves nothing.
    delete, split = write & (token == delete_id), write & (token == split_id)
    kept_token = torch.where(write & ~split, token, x_old)
    pairs = torch.stack((torch.full_like(x_old, mask_id), kept_token), 2).flatten(1)
    flags = torch.stack((torch.zeros_like(first), first), 2).flatten(1)
    present = torch.stack((split, ~delete), 2).flatten(1) & inside.repeat_interleave(2, 1)
    order = (~present).to(torch.uint8).sort(dim=1, stable=True).indices[:, :rows]
    there = present.gather(1, order)
    x_new = torch.where(there, pairs.gather(1, order), mask_id)
    x_new = torch.where(inside, x_new, x_old)
    flags = there & flags.gather(1, order)
    changed = inside & (x_new != x_old)

    x.scatter_(1, slot, x_new)
    step = torch.where(x_new == mask_id, -1, nfe[:, None])
    step_map.scatter_(1, slot, torch.where(changed, step, step_map.gather(1, slot)))
    original.copy_(torch.where(inside, flags, original))
    nfe += takes_part
    updates.copy_(torch.where(takes_part, new_updates, updates))
    post_steps.copy_(torch.where(takes_part, new_post, post_steps))
    complete |= takes_part & (last | ~takes_steps)
    left = own & (x_new == mask_id)
    return left.sum(1, dtype=torch.int32), changed.sum(1, dtype=torch.int32)
