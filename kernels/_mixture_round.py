"""Device functions that the dense and the sparse form of ``mixture_accept`` share."""

from __future__ import annotations

import triton
import triton.language as tl

from ._mixture_scan import NO_ID


@triton.jit
def mix(x, y, weight):
    """``weight * x + (1 - weight) * y``, such that equal numbers give that number."""
    mix = y + weight * (x - y)
    mix = tl.where((x == float("-inf")) | (y == float("-inf")), float("-inf"), mix)
    return tl.where(weight == 1.0, x, tl.where(weight == 0.0, y, mix))


@triton.jit
def weight_of(mixture_ptr, sequence, mixture, HAS_MIXTURES: tl.constexpr):
    weight = tl.full((), mixture, tl.float32)
    if HAS_MIXTURES:
        weight = tl.load(mixture_ptr + sequence)
        weight = tl.where((weight >= 0.0) & (weight <= 1.0), weight, float("nan"))
    return weight


@triton.jit
def store_best(score_ptr, id_ptr, offset, scores, ids, inside):
    """The best of a piece, of the ids inside; a NaN for what has no distribution."""
    scores = tl.where(inside, scores, float("-inf"))
    best = tl.max(scores, 0)
    poisoned = tl.max((inside & ((scores < float("inf")) == 0)).to(tl.int32), 0)
    chosen = tl.min(tl.where(scores == best, ids, NO_ID), 0)
    tl.store(score_ptr + offset, tl.where(poisoned != 0, float("nan"), best))
    tl.store(id_ptr + offset, chosen)


@triton.jit
def critical_weight(x, y, noise, x_chosen, y_chosen, noise_chosen, inverse, compared):
    """The smallest weight at which none of the ids compared is ahead of the chosen one."""
    ahead = (x_chosen * inverse + noise_chosen) - (x * inverse + noise)
    need = (y * inverse + noise) - (y_chosen * inverse + noise_chosen)
    ratio = tl.where(compared & (need > 0.0), need / (ahead + need), 0.0)
    return tl.where(y_chosen == float("-inf"), 1.0, tl.max(ratio, 0))
