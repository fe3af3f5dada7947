"""The definition of ``multiblock_step``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FINISHED, FULL, CACHED, COMMIT, REFRESH = range(5)


def multiblock_step(
    x: Tensor,
    step_map: Tensor,
    numbers: Tensor,
    blocks: Tensor,
    eligible: Tensor,
    token: Tensor,
    entropy: Tensor,
    mask_id: int,
    prompt: Tensor,
    eos: Tensor | None,
    new: int,
    size: int,
    limit: float,
    add: int,
    full_at: int,
    delay: int,
    refresh: int,
    early_stop: bool,
    cached: bool,
    tail: int,
    shifted: bool,
) -> None:
    """Accept tokens of the last forward, then plan the next: section by section as the op says.

    ``add`` and ``full_at`` are numbers of decoded tokens, ``refresh`` 0 is never. Everything is in
    coordinates of the generation region, ``(B, new)`` and ``(B, K)``.
    """
    prompt = prompt.clamp(0, x.shape[1] - new)  # any other would be written elsewhere
    nfe, decoded, created, prefix, mode, _, _, _, _, first, _ = numbers.clone()
    masks, full, done, kept = blocks.clone()
    count = masks.shape[1]
    created = created.clamp(1, count)
    live = mode != FINISHED
    offset, k = torch.arange(new, device=x.device), torch.arange(count, device=x.device)
    block, ends = offset // size, ((k + 1) * size).clamp(max=new)
    at = (prompt[:, None] + offset).long()
    ids, steps, candidates = x.gather(1, at), step_map.gather(1, at), eligible.gather(1, at)

    def per_block(mask: Tensor) -> Tensor:
        padded = F.pad(mask, (0, count * size - new)).view(-1, count, size)
        return padded.sum(-1, dtype=torch.int32)

    # Accept.
    column = at - first[:, None]
    candidates &= (column >= 0) & (column < token.shape[1])
    column = column.clamp(0, token.shape[1])
    cost = F.pad(entropy, (0, 1)).gather(1, column).nan_to_num(nan=torch.inf, posinf=torch.inf)
    bound = torch.full((), limit, dtype=torch.float64, device=x.device).to(cost.dtype)
    accept = candidates & ((cost < bound) if shifted else (cost <= bound)) & (cost < torch.inf)
    if not shifted:
        accept |= _best(candidates, cost)
    wanting = (full > 0) & (masks > 0) & (k < created[:, None])
    chosen = (wanting & (wanting.cumsum(1) == 1))[:, block]
    forced = _best(candidates & chosen, cost)
    accept |= forced & ~(accept & chosen).any(1, keepdim=True)
    ids = torch.where(accept, F.pad(token, (0, 1)).gather(1, column), ids)
    steps = torch.where(accept, nfe[:, None] - 1, steps)
    decoded = decoded + accept.sum(1, dtype=torch.int32)

    # What follows an end of the sequence: filled at once with early_stop, otherwise at the end.
    is_eos = torch.zeros_like(accept) if eos is None else torch.isin(ids, eos)
    is_eos &= early_stop | ~(ids == mask_id).any(1, keepdim=True)
    after_eos, ended = is_eos.cumsum(1) - is_eos.int() > 0, is_eos.any(1)
    if eos is not None:
        ids = torch.where(after_eos, eos[0], ids)
        steps = steps.masked_fill(after_eos, -1)
    masked = ids == mask_id
    masks, over = per_block(masked), ~masked.any(1)
    nfe = nfe + ~over

    # Blocks: at most one is created, those after a nearly decoded one are promoted.
    got = size - masks
    newest = got.gather(1, (created[:, None] - 1).clamp(min=0).long()).squeeze(1)
    opens = (newest >= add) | (newest == size)
    created = created + (opens & (created < count) & ~ended)
    exists = k < created[:, None]
    full = full | (exists & (F.pad(got[:, :-1], (1, 0), value=size) >= full_at))
    candidates = masked & (offset < (created * size)[:, None])

    # The cache: commit a finished prefix that has waited, refresh while one waits.
    total, start = prompt + new, torch.zeros_like(nfe)
    commit, mode = start, torch.full_like(nfe, FULL)
    stop = torch.minimum(total, prompt + created * size + tail)
    if cached:
        at_end = prompt[:, None] + ends
        pending = exists & (at_end > prefix[:, None])
        reached = pending & ((pending & (masks > 0)).cumsum(1) == 0)
        waiting = prompt > prefix  # the prompt, finished before the first forward
        done = torch.where(reached & (done < 0), nfe[:, None], done)
        ready = reached & (nfe[:, None] - done >= delay) & (kept == 0)
        kept = kept | ready
        upto = torch.where(waiting & (nfe >= delay), prompt, prefix)
        upto = torch.maximum(upto, torch.where(ready, at_end, 0).amax(1))
        stable = exists & (masks == 0) & (done >= 0) & (kept == 0)
        due = stable.any(1) | (nfe % max(refresh, 1) == (0 if refresh else -1))
        grows, some = upto > prefix, prefix > 0
        fresh = some & due
        mode = torch.where(fresh, REFRESH, torch.where(grows, COMMIT, mode + some))
        lead = prefix - (prefix > 0).int() if shifted else prefix
        start = torch.where(mode == REFRESH, 0, lead)
        commit = torch.where((mode == COMMIT) | (mode == REFRESH), upto - start, 0)
        prefix = upto
        candidates &= at >= start[:, None]

    candidates &= ~over[:, None]
    low = torch.where(candidates, offset, new).amin(1)
    rows = (torch.where(candidates, offset + 1, 0).amax(1) - low).clamp(min=0)
    length = (stop - start).masked_fill(over, 0)
    mode = mode.masked_fill(over, FINISHED)
    window = (start, length, stop, commit.masked_fill(over, 0))
    planned = (nfe, decoded, created, prefix, mode, *window, prompt + low, rows)
    for target, result in ((numbers, planned), (blocks, (masks, full, done, kept))):
        for old, value in zip(target, result, strict=True):
            old.copy_(torch.where(live if old.ndim == 1 else live[:, None], value, old))
    for target, value in ((x, ids), (step_map, steps), (eligible, candidates)):
        target.scatter_(1, at, torch.where(live[:, None], value, target.gather(1, at)))


def _best(mask: Tensor, cost: Tensor) -> Tensor:
    """The first of the cheapest."""
    low = torch.where(mask, cost, torch.inf).amin(1, keepdim=True)
    tied = mask & (cost <= low)
    return tied & (tied.cumsum(1) == 1)
