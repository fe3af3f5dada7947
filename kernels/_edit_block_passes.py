"""The first two passes of ``edit_block``: whether a block was there before, and what each of its
rows could become."""

from __future__ import annotations

import triton
import triton.language as tl

NO_ID = tl.constexpr(2**31 - 1)  # the id where there is none


@triton.jit
def better(value, token, other_value, other):
    """The larger logit and its id; of equals the lower id; an id of NO_ID is no candidate."""
    larger = (other_value > value) | ((other_value == value) & (other < token))
    take = (other != NO_ID) & ((token == NO_ID) | larger)
    return tl.where(take, other_value, value), tl.where(take, other, token)


@triton.jit
def _largest(value, ids, allowed):
    """The largest of the allowed logits along the vocabulary, and the lowest id that has it."""
    among = tl.where(allowed, value, -float("inf"))
    best = tl.max(among, 1, keep_dims=True)
    at_best = allowed & (among == best)
    return best, tl.min(tl.where(at_best, ids, NO_ID), 1, keep_dims=True)


@triton.jit
def number(value):
    """The logit, and -inf for a NaN."""
    return tl.where(value == value, value, -float("inf"))


@triton.jit
def block_of(start_ptr, length_ptr, complete_ptr, offs_b, mask_b, rows, slots):
    """Where blocks begin and their lengths, 0 where one is not to be touched."""
    start = tl.load(start_ptr + offs_b, mask=mask_b, other=0).to(tl.int64)
    length = tl.load(length_ptr + offs_b, mask=mask_b, other=0)
    complete = tl.load(complete_ptr + offs_b, mask=mask_b, other=1)
    fits = (start >= 0) & (length <= rows) & (start + length <= slots)
    return start, tl.where(fits & (complete == 0), length, 0)


@triton.jit(do_not_specialize=["batch"])
def _edit_block_repeats_kernel(
    # pointers
    tried_ptr,  # (B,), steps before this one, 0 where none of them began with the same block
    x_ptr,  # (B, L)
    updates_ptr,  # (B,)
    seen_ptr,  # (B, S, T)
    complete_ptr,  # (B,)
    start_ptr,  # (B,)
    length_ptr,  # (B,)
    # sizes
    batch,
    slots,
    rows,
    kept,
    # strides
    stride_x_row,
    stride_seen_block,
    # constexprs
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None, None]
    mask_b = offs_b < batch
    start, length = block_of(start_ptr, length_ptr, complete_ptr, offs_b, mask_b, rows, slots)
    updates = tl.load(updates_ptr + offs_b, mask=mask_b, other=0)
    count = tl.minimum(tl.maximum(updates, 0), kept)
    offs_t = tl.arange(0, BLOCK_T)[None, None, :]
    inside = offs_t < length
    # [BLOCK_B, 1, BLOCK_T]
    before = tl.load(x_ptr + offs_b * stride_x_row + start + offs_t, mask=inside, other=0)
    found = tl.zeros((BLOCK_B, 1, 1), tl.int32)
    for first in range(0, tl.max(count), BLOCK_U):
        offs_u = first + tl.arange(0, BLOCK_U).to(tl.int64)[None, :, None]
        used = inside & (offs_u < count)
        # [BLOCK_B, BLOCK_U, BLOCK_T]
        entry_ptr = seen_ptr + offs_b * stride_seen_block + offs_u * rows + offs_t
        entry = tl.load(entry_ptr, mask=used, other=0)
        differs = used & (entry != before)
        same = 1 - tl.max(differs.to(tl.int32), 2, keep_dims=True)
        same = tl.where(offs_u < count, same, 0)
        found = tl.maximum(found, tl.max(same, 1, keep_dims=True))
    tl.store(tried_ptr + offs_b, found * count, mask=mask_b)


@triton.jit(do_not_specialize=["count"])
def _edit_block_candidates_kernel(
    # pointers
    value_ptr,  # (B, T, SPLITS, 4): largest logit, sum, largest ordinary, largest unwritten
    token_ptr,  # (B, T, SPLITS, 2): the best ordinary id, the best unwritten id
    tried_ptr,  # (B,)
    logits_ptr,  # (B, T, V)
    x_ptr,  # (B, L)
    original_ptr,  # (B, T)
    written_ptr,  # (B, S, T)
    complete_ptr,  # (B,)
    start_ptr,  # (B,)
    length_ptr,  # (B,)
    editable_from_ptr,  # (B,)
    # sizes
    count,  # B * T
    slots,
    rows,
    vocab,
    mask_id,
    delete_id,
    split_id,
    # strides
    stride_logits_block,
    stride_logits_row,
    stride_x_row,
    stride_original_row,
    stride_written_block,
    # constexprs
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    split = tl.program_id(1)
    mask_r = offs < count
    offs_b, offs_t = offs // rows, offs % rows
    # [BLOCK_R, 1]
    start, length = block_of(start_ptr, length_ptr, complete_ptr, offs_b, mask_r, rows, slots)
    editable_from = tl.load(editable_from_ptr + offs_b, mask=mask_r, other=0)
    position = start + offs_t
    own = mask_r & (offs_t < length) & (position >= editable_from)
    tried = tl.load(tried_ptr + offs_b, mask=own, other=0)
    before = tl.load(x_ptr + offs_b * stride_x_row + position, mask=own, other=0)
    original_ptrs = original_ptr + offs_b * stride_original_row + offs_t
    original = tl.load(original_ptrs, mask=own & (tried > 0), other=0) != 0
    keeps_mask = (before != mask_id) | (original == 0)
    written_ptrs = written_ptr + offs_b * stride_written_block + offs_t
    logits_ptrs = logits_ptr + offs_b * stride_logits_block + offs_t * stride_logits_row
    end = tl.max(tl.where(own, vocab, 0))
    most = tl.max(tried)

    peak = tl.full((BLOCK_R, 1), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_R, 1), tl.float32)
    ordinary, unwritten = peak, peak
    token = tl.full((BLOCK_R, 1), NO_ID, tl.int32)
    new_token = token
    for first in range(split * BLOCK_V, end, SPLITS * BLOCK_V):
        # [BLOCK_R, BLOCK_V]
        ids = first + tl.arange(0, BLOCK_V)[None, :]
        there = own & (ids < vocab)
        logit = tl.load(logits_ptrs + ids, mask=there, other=-float("inf")).to(tl.float32)
        value = number(logit)
        largest = tl.maximum(peak, tl.max(value, 1, keep_dims=True))
        base = tl.where(largest == -float("inf"), 0.0, largest)
        part = tl.sum(tl.where(there, tl.exp(logit - base), 0.0), 1, keep_dims=True)
        total = total * tl.exp(peak - base) + part
        peak = largest
        allowed = there & (ids != mask_id) & (ids != delete_id) & (ids != split_id)
        best, best_id = _largest(value, ids, allowed)
        ordinary, token = better(ordinary, token, best, best_id)
        if most > 0:
            allowed = there & (keeps_mask | (ids != mask_id))
            for u in range(0, most):
                past_ptrs = written_ptrs + tl.cast(u, tl.int64) * rows
                past = tl.load(past_ptrs, mask=own & (u < tried), other=-1)
                allowed = allowed & (ids != past)
            best, best_id = _largest(value, ids, allowed)
            unwritten, new_token = better(unwritten, new_token, best, best_id)

    place = offs * SPLITS + split
    tl.store(value_ptr + place * 4, peak, mask=mask_r)
    tl.store(value_ptr + place * 4 + 1, total, mask=mask_r)
    tl.store(value_ptr + place * 4 + 2, ordinary, mask=mask_r)
    tl.store(value_ptr + place * 4 + 3, unwritten, mask=mask_r)
    tl.store(token_ptr + place * 2, token, mask=mask_r)
    tl.store(token_ptr + place * 2 + 1, new_token, mask=mask_r)
