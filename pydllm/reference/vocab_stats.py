"""The definition of ``vocab_stats``."""

from __future__ import annotations

import torch
from torch import Tensor

from pydllm.reference.philox import vocab_gumbel

# e to this power is 0 in fp32 and fp64, and times 0 it is not NaN, as -inf would be.
_NEGLIGIBLE = -1e4


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Token, probability, entropy, margin and log-sum-exp of ``(R, V)`` logits; fp32 or fp64."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    x = logits.to(dtype, copy=True) if rows is None else take_rows(logits, rows, -torch.inf)
    x = suppress(x.to(dtype), suppress_ids, 0)
    noise = counter if temperatures is not None or temperature > 0 else None
    inverse, noisy = inverse_temperature(temperature, temperatures, dtype)
    if top_ks is None and top_k is not None:
        top_ks = torch.full_like(x[:, 0], top_k, dtype=torch.int32)
    if top_ps is None and top_p is not None:
        top_ps = torch.full_like(x[:, 0], top_p, dtype=torch.float64)
    if top_ks is not None or top_ps is not None:
        x.masked_fill_(x < _cut(x, top_ks, top_ps, inverse, softcap), -torch.inf)
    x = apply_softcap(x, softcap)
    scores = x
    if noise is not None:
        scores = x * inverse
        if tempered:
            x = scores
        scores = scores + vocab_gumbel(x.shape[1], noise, seed, noisy=noisy)

    best, first = x.max(-1, keepdim=True)
    token = first if scores is x else scores.max(-1, keepdim=True).indices
    best = best.masked_fill(best == torch.inf, torch.nan)  # +inf has no distribution either
    none = best == -torch.inf
    shift = x.sub_(best.masked_fill(none, 0))
    chosen = shift.gather(1, token).exp()
    # The largest term, e^0, is kept apart: the second is then a maximum, the rest stays precise.
    shift.scatter_(1, first, best - torch.inf)  # -inf, or NaN as the maximum
    second = shift.amax(-1, keepdim=True)
    terms = shift.clamp_(min=_NEGLIGIBLE).exp()
    rest = row_sums(terms)
    entropy = torch.log1p(rest) - row_sums(shift.mul_(terms)) / (1 + rest)
    margin = (-torch.expm1(second) / (1 + rest)).masked_fill(none, 0)
    token = token.masked_fill(best.isnan(), 0)
    statistics = (token, chosen / (1 + rest), entropy, margin, best + torch.log1p(rest))
    return tuple(each.squeeze(-1) for each in statistics)  # type: ignore[return-value]


def take_rows(x: Tensor, rows: Tensor, fill: float) -> Tensor:
    """Copies of the rows of ``x (R, n)`` that ``rows`` names; ``fill`` for those not in [0, R)."""
    outside = (rows < 0) | (rows >= x.shape[0])
    return x[rows.clamp(0, x.shape[0] - 1).long()].masked_fill_(outside[:, None], fill)


def suppress(x: Tensor, suppress_ids: Tensor | None, first: int) -> Tensor:
    """Write -inf into the columns of ``x`` whose id, ``first`` for column 0, is suppressed."""
    if suppress_ids is not None and x.shape[1]:
        columns = suppress_ids.long()
        if first:
            columns = columns - first
        ids = columns.clamp(0, x.shape[1] - 1)
        # Those outside of x suppress nothing; a column that is not is suppressed all the same.
        outside = ids != columns if len(ids) == 1 else (ids[:, None] != columns).all(1)
        x.index_copy_(1, ids, torch.where(outside, x[:, ids], -torch.inf))
    return x


def apply_softcap(x: Tensor, softcap: float | None) -> Tensor:
    if softcap is None:
        return x
    return torch.where(x.isinf(), x, softcap * torch.tanh(x / softcap))


def inverse_temperature(
    temperature: float, temperatures: Tensor | None, dtype: torch.dtype
) -> tuple[float | Tensor, Tensor | None]:
    """``1 / temperature``, and, with one for each row, which rows draw noise at all: ``(R, 1)``."""
    if temperatures is None:
        return 1 / (temperature or 1), None
    noisy = (temperatures >= 1e-6) & (temperatures < torch.inf)
    inverse = 1 / temperatures.masked_fill(~noisy, 1)
    return inverse[:, None].to(dtype), noisy[:, None]


def _cut(
    x: Tensor,
    top_ks: Tensor | None,
    top_ps: Tensor | None,
    inverse: float | Tensor,
    softcap: float | None,
) -> Tensor:
    """The smallest logit that both filters of each row keep, ``(R, 1)``."""
    ordered, vocab = x.sort(-1, descending=True).values, x.shape[1]
    cut = ordered[:, -1:]
    if top_ks is not None:
        cut = ordered.gather(1, top_ks.clamp(1, vocab).long()[:, None] - 1)
    if top_ps is not None:
        limit = top_ps[:, None].double()
        mass = torch.softmax(apply_softcap(ordered, softcap).double() * inverse, -1)
        kept = (mass.cumsum(-1) - mass <= limit).sum(-1, keepdim=True).clamp_(min=1)
        kept = kept.masked_fill(~((limit > 0) & (limit < 1)), vocab)
        cut = torch.maximum(cut, ordered.gather(1, kept - 1))
    return cut


def row_sums(x: Tensor) -> Tensor:
    """``x.sum(-1, keepdim=True)`` whose bits are the same whether a row is alone or in a batch."""
    # A reduction to a single number is split between threads, one to several numbers by number.
    half = x.shape[1] // 2
    halves = x[:, : 2 * half].unflatten(1, (2, half)).sum(-1).sum(-1, keepdim=True)
    return halves + x[:, 2 * half :].sum(-1, keepdim=True)
