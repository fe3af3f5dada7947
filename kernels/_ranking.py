"""Ranks within one block, by a key and then by position, without a sort.

What a rule takes is a prefix of an order, so it is enough to find where the prefix ends: a binary
search over the 32 bits of the sort key, one count of the block a bit. Ties at the cut are taken in
order of position.
"""

from __future__ import annotations

import triton
import triton.language as tl

# As in the reference: entropies are summed in units of 2^-40 nats and count as at most 128 nats.
_PER_NAT = tl.constexpr(2.0**40)
_UNIT = tl.constexpr(2.0**-40)
_LARGEST = tl.constexpr(128.0)
RANDOM_ORDER = tl.constexpr(0xFFFFFFFF)  # the counter word of a random order: no id is there


@triton.jit
def count(mask):
    return tl.sum(mask.to(tl.int32), 1, keep_dims=True)


@triton.jit
def first_ranked(masked, key, n):
    """The first n, (B, 1), by key, then by position."""
    cut = tl.zeros_like(n).to(tl.uint32)  # the largest key with fewer than n before it
    for bit in range(32):
        trial = cut | (tl.full((), 0x80000000, tl.uint32) >> bit)
        cut = tl.where(count(masked & (key < trial)) < n, trial, cut)
    before = masked & (key < cut)
    tied = masked & (key == cut)
    return before | (tied & (tl.cumsum(tied.to(tl.int32), 1) <= n - count(before)))


@triton.jit
def within_bound(masked, key, cost, bound):
    """Those whose entropies before them, by key, then by position, sum to at most ``bound``."""
    units = tl.minimum(tl.maximum(cost, 0.0), _LARGEST) * _PER_NAT
    units = tl.where(masked, units, 0.0).to(tl.int64)
    cut = tl.zeros_like(tl.max(key, 1, keep_dims=True))  # the largest key below which all pass
    for bit in range(32):
        trial = cut | (tl.full((), 0x80000000, tl.uint32) >> bit)
        spent = tl.sum(tl.where(key < trial, units, 0), 1, keep_dims=True)
        cut = tl.where(spent.to(tl.float32) * _UNIT <= bound, trial, cut)
    before = masked & (key < cut)
    tied = masked & (key == cut)
    rank = tl.cumsum(tied.to(tl.int32), 1) - 1
    spent = tl.sum(tl.where(before, units, 0), 1, keep_dims=True) + rank * units
    return before | (tied & (spent.to(tl.float32) * _UNIT <= bound))
