"""Accept rules of published code: which masks become tokens, ``(B, S)`` bool, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def top(score: Tensor, masked: Tensor, count: int, *, front: int = 0, width: int = 0) -> Tensor:
    """The ``count`` best masks per sequence.

    Of equal scores the ones that ``torch.topk`` takes, which depends on the row it looks at:
    ``width`` positions, ``front`` of them before the first of these.
    """
    size = score.shape[1]
    wide = score.masked_fill(~masked, -torch.inf)
    wide = F.pad(wide, (front, max(0, width - size - front)), value=-torch.inf)
    index = wide.topk(min(count, wide.shape[1])).indices
    chosen = torch.zeros_like(wide, dtype=torch.bool).scatter(1, index, True)
    return chosen[:, front : front + size]


def first(score: Tensor, masked: Tensor, count: Tensor | int) -> Tensor:
    """The ``count``, an int or ``(B, 1)``, best masks; of equal scores the first positions."""
    worst = torch.where(masked & ~score.isnan(), score, -torch.inf)
    rank = worst.argsort(dim=1, descending=True, stable=True).argsort(1)
    return masked & (rank < count)


def by_threshold(
    score: Tensor,
    masked: Tensor,
    threshold: float,
    counts: list[int] | None = None,
    width: int = 0,
) -> Tensor:
    """All that reach the threshold, and the best: of equal scores the first.

    With ``counts``, masks of each sequence, the best is the one that ``torch.topk`` of that number,
    among ``width`` positions, puts first.
    """
    reached = masked & (score >= threshold)
    if counts is None:
        return reached | first(score, masked, 1)
    wide = score.masked_fill(~masked, -torch.inf)
    wide = F.pad(wide, (0, max(0, width - score.shape[1])), value=-torch.inf)
    for row, count in enumerate(counts):
        if count:
            reached[row, wide[row].topk(count).indices[0]] = True
    return reached


def near_best(score: Tensor, masked: Tensor, threshold: float) -> Tensor:
    """All that reach ``min(threshold, best - 1e-5)`` (dInfer)."""
    best = score.masked_fill(~masked, -torch.inf).amax(1, keepdim=True)
    return masked & (score >= (best - 1e-5).clamp(max=threshold))


def by_factor(score: Tensor, masked: Tensor, factor: float) -> Tensor:
    """Rank r while its score is at least ``1 - factor / (r + 1)``, and the best; where all but the
    last of the masks are taken, that one is too (Fast-dLLM)."""
    ranked = score.masked_fill(~masked, -torch.inf).sort(1, descending=True).values
    rank = torch.arange(1, score.shape[1] + 1, device=score.device)
    passes = ranked >= 1 - factor / (rank + 1)
    passes[:, :1] = True
    count = passes.cumprod(1).sum(1, keepdim=True)
    masks = masked.sum(1, keepdim=True)
    return first(score, masked, torch.where(count == masks - 1, masks, count))


def above(score: Tensor, masked: Tensor, threshold: float, least: int | Tensor) -> Tensor:
    """All that exceed the threshold; where fewer than ``least`` do, the ``least`` best.

    Args:
        least: a ``(B, 1)`` tensor, and of equal scores the first positions are taken; or an int,
            and those that ``torch.topk`` takes, which are other positions, too, where there are
            fewer masks.
    """
    sure = masked & (score > threshold)
    best = top(score, masked, least) if isinstance(least, int) else first(score, masked, least)
    return torch.where(sure.sum(1, keepdim=True) >= least, sure, best)


def within(entropy: Tensor, bound: float) -> Tensor:
    """The lowest entropies while the sum of those before is at most the bound, of all positions."""
    ordered, order = entropy.sort(dim=1, stable=True)
    passes = ordered.cumsum(1) - ordered <= bound
    return torch.zeros_like(passes).scatter(1, order, passes)


def by_entropies(entropy: Tensor, masked: Tensor, bound: float) -> Tensor:
    """The lowest entropies while their sum stays below the bound, and the lowest."""
    spent = entropy.masked_fill(~masked, torch.inf).sort(1).values.cumsum(1)
    count = (spent < bound).sum(1, keepdim=True).clamp(min=1)
    return first(-entropy, masked, count)


def span(masked: Tensor, count: int) -> Tensor:
    """``count`` positions from the first mask on, masks or not."""
    place = torch.arange(masked.shape[1], device=masked.device)
    begin = masked.int().argmax(1, keepdim=True)
    return (place >= begin) & (place < begin + count)


def drawn(
    score: Tensor, masked: Tensor, count: int, temperature: float, *, width: int = 0
) -> Tensor:
    """``count`` masks drawn by softmax(score / temperature) without replacement, by torch's
    generator over ``width`` positions."""
    wide = score.masked_fill(~masked, -torch.inf)
    wide = F.pad(wide, (0, max(0, width - score.shape[1])), value=-torch.inf)
    chosen = torch.zeros_like(wide, dtype=torch.bool)
    if count:
        index = torch.multinomial((wide / temperature).softmax(-1), count)
        chosen.scatter_(1, index, True)
    return chosen[:, : score.shape[1]] & masked
