"""The definition of ``unmask``."""

from __future__ import annotations

import torch
from torch import Tensor

from pydllm.reference.philox import philox

ORDER = 0xFFFFFFFF  # the first counter word of a random order: no vocabulary id is there
UNIT = 2.0**-40  # entropies are summed in these, nats
LARGEST = 128.0  # and count as at most this much
_COUNTED = ("quota", "left_to_right", "random")  # rules that take a given number


def unmask(
    x: Tensor,
    step_map: Tensor,
    nfe: Tensor,
    token: Tensor,
    score: Tensor,
    mask_id: int,
    start: Tensor,
    length: Tensor,
    rule: str,
    quota: Tensor | None,
    min_tokens: int,
    limit: float,
    seed: int,
    request: Tensor | None,
    done: Tensor | None = None,
    end: Tensor | None = None,
    eos_ids: Tensor | None = None,
    ends_from: Tensor | None = None,
    last: bool = False,
) -> tuple[Tensor, Tensor]:
    """Order what each window may take, best first; the first ``n`` become tokens.

    ``quota``, or else ``min_tokens``, is how many are taken or, by a rule with a limit,
    at least taken. From ``done`` on, the fields of the op's ``Ending``.
    """
    slots, rows = x.shape[1], token.shape[1]
    if done is not None:
        length = length.masked_fill(done, 0)
    row = torch.arange(rows, device=x.device)
    position = start[:, None] + row
    inside = (row < length[:, None]) & (position >= 0) & (position < slots)
    slot = position % slots  # those of one sequence are distinct: rows <= slots
    before = x.gather(1, slot)
    masked = inside & (before == mask_id)
    dtype, wide = score.dtype, torch.promote_types(score.dtype, torch.float32)
    score = score.to(wide)

    if rule == "left_to_right":
        value = torch.zeros_like(score)
    elif request is not None:  # random
        first = torch.full_like(position, ORDER)
        words = philox(first, position, request[:, None], nfe[:, None], seed)
        value = words[..., 0].to(torch.float64)
    else:
        value = -score if rule in ("entropy", "entropy_bound") else score
        value = value.masked_fill(value.isnan(), -torch.inf)
    # Ascending and stable: ties stay in order of position; NaN, here what is not masked, is last.
    cost, order = torch.where(masked, 0 - value, torch.nan).sort(dim=1, stable=True)
    n = torch.full_like(nfe, min_tokens)[:, None] if quota is None else quota[:, None]
    if rule not in _COUNTED:
        # Limits are rounded to the dtype of the scores.
        bound = score.new_full((), limit, dtype=torch.float64).to(dtype).to(wide)
        n = torch.maximum(_count(rule, cost, bound), n)
    keep = masked & torch.zeros_like(masked).scatter(1, order, row < n)

    new = torch.where(keep, token, before)
    x.scatter_(1, slot, new)
    step_map.scatter_(1, slot, torch.where(keep, nfe[:, None], step_map.gather(1, slot)))
    nfe += masked.any(1)
    left = inside & (new == mask_id)
    if done is not None and end is not None:
        # Of the positions that may hold an end.
        open_ = left if ends_from is None else left & (position >= ends_from[:, None])
        complete = (length > 0) if last else (length > 0) & ~open_.any(1)
        stop = start + length.clamp(max=rows)
        done |= complete & (stop >= end)
        if eos_ids is not None:
            first = start if ends_from is None else torch.maximum(start, ends_from)
            _fill(x, step_map, first, stop, complete, done, end, eos_ids)
    remaining = left.sum(1, dtype=torch.int32)
    if done is not None:
        remaining.masked_fill_(done, -1)
    return remaining, keep.sum(1, dtype=torch.int32)


def _fill(
    x: Tensor,
    step_map: Tensor,
    first: Tensor,
    stop: Tensor,
    complete: Tensor,
    done: Tensor,
    end: Tensor,
    eos_ids: Tensor,
) -> None:
    """Fill after the first end in ``[first, stop)`` of a complete window; it is done then."""
    position = torch.arange(x.shape[1], device=x.device)
    inside = (position >= first[:, None]) & (position < stop[:, None])
    before = position < end[:, None]
    ends = inside & before & complete[:, None] & torch.isin(x, eos_ids)
    after_end = before & (ends.cumsum(1) - ends.int() > 0)
    x.copy_(torch.where(after_end, eos_ids[0], x))
    step_map.masked_fill_(after_end, -1)
    done |= ends.any(1)


def _count(rule: str, cost: Tensor, limit: Tensor) -> Tensor:
    """How many of the ordered rows pass, ``(B, 1)``.

    No rule lets a row pass after one that failed, so they are simply counted.
    """
    if rule == "threshold":
        good = -cost >= limit
    elif rule == "entropy":
        good = cost <= limit
    elif rule == "factor":
        rank = torch.arange(1, cost.shape[1] + 1, device=cost.device)
        good = -cost >= 1 - limit.expand_as(cost) / (rank + 1)
    else:
        # In integers, so that the sum is exact whatever the order of the additions.
        units = (cost.clamp(0, LARGEST).nan_to_num() / UNIT).to(torch.int64)
        good = (units.cumsum(1) - units).to(cost.dtype) * UNIT <= limit
    return (good & (cost < torch.inf)).sum(1, keepdim=True, dtype=torch.int32)
