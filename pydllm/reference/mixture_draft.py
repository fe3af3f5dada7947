"""The definition of ``mixture_draft``."""

from __future__ import annotations

import torch
from torch import Tensor

from pydllm.reference.philox import vocab_gumbel
from pydllm.reference.vocab_stats import inverse_temperature, row_sums, suppress, take_rows


def mixture_draft(
    logits: Tensor,
    temperature: float,
    seed: int,
    counter: Tensor,
    suppress_ids: Tensor | None,
    temperatures: Tensor | None,
    rows: Tensor | None,
    shared: int,
    top_p: float,
    top_ps: Tensor | None,
    capacity: int,
) -> tuple[Tensor, ...]:
    """Draft, log-sum-exp and threshold, then ids, logits, noise, size and overflow of a list.

    The nucleus of a row is the smallest set of its largest logits x whose mass, of
    ``softmax(x / temperature)``, exceeds top_p, with what ties with the smallest of them. The draft
    is the arg-max over it of ``x / temperature + noise``. At temperature 0, and with a top_p that
    is not in (0, 1), all ids are in it.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logits = logits[:, :shared]
    x = logits.to(dtype, copy=True) if rows is None else take_rows(logits, rows, -torch.inf)
    x = suppress(x.to(dtype), suppress_ids, 0)
    inverse, noisy = inverse_temperature(temperature, temperatures, dtype)
    best = x.amax(-1, keepdim=True)
    poisoned = best.isnan() | (best == torch.inf)
    usable = ~poisoned & (best > -torch.inf)
    terms = ((x - best.masked_fill(~usable, 0)) * inverse).exp()
    logsumexp = (best * inverse + row_sums(terms).log()).masked_fill(poisoned, torch.nan)

    limit = top_p if top_ps is None else top_ps.double()[:, None]
    ordered = x.sort(-1, descending=True).values
    mass = torch.softmax(ordered.double() * inverse, -1)
    kept = (mass.cumsum(-1) - mass <= limit).sum(-1, keepdim=True)
    cut = ordered.gather(1, kept.clamp_(min=1) - 1)
    filtered = usable if noisy is None else usable & noisy
    if top_ps is not None:
        filtered = filtered & (top_ps > 0)[:, None] & (top_ps < 1)[:, None]
    threshold = cut.where(filtered, -torch.inf).masked_fill(poisoned, torch.nan)

    noise = vocab_gumbel(x.shape[1], counter, seed, noisy=noisy)
    scores = x * inverse + noise
    token = scores.masked_fill(x < cut.where(filtered, -torch.inf), -torch.inf).max(-1).indices
    token = token.masked_fill(~usable[:, 0], 0)

    inside = (x >= threshold) & (x > -torch.inf) & filtered
    size = inside.sum(-1)
    overflow = ~filtered[:, 0] | (size > capacity)
    slots = torch.arange(capacity, device=x.device)
    used = (slots < size[:, None]) & ~overflow[:, None]
    ids = torch.where(used, _first_ids(inside, capacity), 0)
    values = x.gather(1, ids).where(used, -torch.inf)
    return (
        token,
        logsumexp.squeeze(-1),
        threshold.squeeze(-1),
        ids.int(),
        values,
        noise.to(dtype).gather(1, ids).where(used, 0),
        size.masked_fill(overflow, 0).int(),
        overflow,
    )


def _first_ids(inside: Tensor, capacity: int) -> Tensor:
    """The first ``capacity`` columns that are True in each row, ascending; then any: ``(R, C)``."""
    rank = torch.where(inside, inside.cumsum(-1), capacity + 1).clamp_(max=capacity + 1) - 1
    columns = torch.arange(inside.shape[1], device=inside.device).expand_as(rank)
    return rank.new_zeros(rank.shape[0], capacity + 1).scatter_(1, rank, columns)[:, :capacity]
