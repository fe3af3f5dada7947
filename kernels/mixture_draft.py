"""The draft from a row's nucleus: one program per row, and as a rule one read of the logits.

While it sums up the row, a program notes the ids that may be in the nucleus: those that are within
a factor (1 - top_p) / V of the mass so far, since what is below that of the whole mass cannot make
up 1 - top_p together. Cut, noise and list are then those few ids' business. A row that has more of
them than the scratch holds, or no nucleus, is read again instead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _tiles
from ._primitives import id_gumbel, quad_gumbel, sort_value
from ._row_stats import contiguous, inverse_of, signed_word, source_rows
from ._vocab_cut import KEY_BITS, load_keys

_NO_ID = tl.constexpr(2**31 - 1)
# The bound on what may be in the nucleus is loosened by this many nats: no rounding can matter.
_SLACK = tl.constexpr(1.0)


@triton.jit
def _nucleus_cut(
    row_ptr,
    suppress_ids_ptr,
    count,
    best,
    inverse,
    limit,
    SUPPRESS_COUNT: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The largest number at or above which the mass exceeds ``limit``; -inf if there is none."""
    cut_key = tl.full((), 0, tl.uint32)
    for radix_pass in range((BITS + 1) // 2):  # two bits per pass
        unit = tl.full((), 0x40000000, tl.uint32) >> (2 * radix_pass)
        mass_1 = tl.zeros((BLOCK_V,), tl.float32)
        mass_2 = tl.zeros((BLOCK_V,), tl.float32)
        mass_3 = tl.zeros((BLOCK_V,), tl.float32)
        for start in range(0, count, BLOCK_V):
            x, key, inside = load_keys(
                row_ptr, suppress_ids_ptr, start, count, SUPPRESS_COUNT, BLOCK_V
            )
            term = tl.exp((x - best) * inverse)
            mass_1 += tl.where(key >= cut_key + unit, term, 0.0)
            mass_2 += tl.where(key >= cut_key + unit * 2, term, 0.0)
            mass_3 += tl.where(key >= cut_key + unit * 3, term, 0.0)
        step = (tl.sum(mass_1, 0) > limit).to(tl.uint32)
        step += (tl.sum(mass_2, 0) > limit).to(tl.uint32)
        step += (tl.sum(mass_3, 0) > limit).to(tl.uint32)
        cut_key += step * unit
    # A negative number's key ends in ones where the number has zeros.
    low_bits = tl.full((), (1 << (32 - BITS)) - 1, tl.uint32)
    cut = sort_value(tl.where(cut_key < 0x80000000, cut_key | low_bits, cut_key))
    return tl.where(cut_key == 0, float("-inf"), cut)


@triton.jit
def _consider(
    x,  # [BLOCK_V] logits, -inf for what is not in the nucleus
    ids,
    noise,
    inverse,
    score,  # the best so far, its id, and the ids in the nucleus so far
    token,
    size,
    ids_ptr,
    values_ptr,
    noise_ptr,
    CAPACITY: tl.constexpr,
):
    """Take a piece of the row into account, and append its part of the nucleus to the list."""
    scores = x * inverse + noise
    piece = tl.max(scores, 0)
    chosen = tl.min(tl.where(scores == piece, ids, _NO_ID), 0)
    better = piece > score  # ids ascend: an earlier one keeps a tie
    inside = x > float("-inf")
    if CAPACITY > 0:
        slots = size + tl.cumsum(inside.to(tl.int32), 0) - 1
        listed = inside & (slots < CAPACITY)
        tl.store(ids_ptr + slots, ids, mask=listed)
        tl.store(values_ptr + slots, x, mask=listed)
        tl.store(noise_ptr + slots, noise, mask=listed)
    size += tl.sum(inside.to(tl.int32), 0)
    return tl.where(better, piece, score), tl.where(better, chosen, token), size


# A new batch size or seed must not compile the kernel again.
@triton.jit(do_not_specialize=["rows", "sources", "shared", "seed_lo", "seed_hi"])
def _mixture_draft_kernel(
    # pointers
    token_ptr,  # (rows,) int64
    logsumexp_ptr,  # (rows,) fp32
    threshold_ptr,  # (rows,) fp32
    ids_ptr,  # (rows, CAPACITY) int32
    values_ptr,  # (rows, CAPACITY) fp32
    noise_ptr,  # (rows, CAPACITY) fp32
    size_ptr,  # (rows,) int32
    overflow_ptr,  # (rows,) bool
    found_ids_ptr,  # (rows, SCRATCH) int32
    found_ptr,  # (rows, SCRATCH) fp32
    logits_ptr,  # (sources, vocab)
    rows_ptr,  # (rows,)
    counter_ptr,  # (rows, 3)
    temperature_ptr,  # (rows,)
    top_p_ptr,  # (rows,)
    suppress_ids_ptr,  # (SUPPRESS_COUNT,)
    # sizes
    rows,
    sources,
    vocab,
    shared,
    inverse_temperature,
    top_p,
    seed_lo,
    seed_hi,
    # strides
    stride_logits_row,
    stride_counter_row,
    stride_counter_word,
    # constexprs
    SUPPRESS_COUNT: tl.constexpr,
    HAS_TEMPERATURES: tl.constexpr,
    HAS_TOP_PS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    CAPACITY: tl.constexpr,
    CAPACITY_BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    SCRATCH: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source, exists = source_rows(rows_ptr, row, rows, sources, HAS_ROWS)
    row_ptr = logits_ptr + tl.where(exists, source, 0) * stride_logits_row
    shared = tl.where(exists, shared, 0)  # a row that is padding has no ids
    found_ids_ptr += row * SCRATCH
    found_ptr += row * SCRATCH
    ids_ptr += row * CAPACITY
    values_ptr += row * CAPACITY
    noise_ptr += row * CAPACITY
    inverse = tl.full((), inverse_temperature, tl.float32)
    noisy = inverse > 0.0
    if HAS_TEMPERATURES:
        inverse, noisy = inverse_of(tl.load(temperature_ptr + row))
    top_p = tl.full((), top_p, tl.float32)
    if HAS_TOP_PS:
        top_p = tl.load(top_p_ptr + row)
    filtered = noisy & (top_p > 0.0) & (top_p < 1.0)
    bound = tl.log(tl.where(filtered, 1.0 - top_p, 1.0) / tl.maximum(shared, 1)) - _SLACK

    best = tl.full((), float("-inf"), tl.float32)
    totals = tl.zeros((BLOCK_V,), tl.float32)
    found = tl.full((), 0, tl.int32)
    for start in range(0, shared, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        # The row's own end in the mask keeps loads wide where the shared ids end at any number.
        x = tl.load(row_ptr + offs_v, mask=offs_v < vocab, other=float("-inf")).to(tl.float32)
        x = tl.where(offs_v < shared, x, float("-inf"))
        for i in tl.static_range(SUPPRESS_COUNT):
            x = tl.where(offs_v == tl.load(suppress_ids_ptr + i), float("-inf"), x)
        piece = tl.max(x, 0)
        before, best = best, tl.maximum(best, piece)
        base = tl.where(best == float("-inf"), 0.0, best)
        totals = totals * tl.exp((before - base) * inverse) + tl.exp((x - base) * inverse)
        # What has been read bounds the mass from below: first by its largest term alone.
        near = filtered & (piece > float("-inf")) & ((piece - base) * inverse >= bound)
        if near & (found <= SCRATCH):
            inside = (x - base) * inverse >= bound + tl.log(tl.sum(totals, 0))
            inside &= x > float("-inf")
            slots = found + tl.cumsum(inside.to(tl.int32), 0) - 1
            tl.store(found_ids_ptr + slots, offs_v, mask=inside & (slots < SCRATCH))
            tl.store(found_ptr + slots, x, mask=inside & (slots < SCRATCH))
            found += tl.sum(inside.to(tl.int32), 0)
    total = tl.sum(totals, 0)  # NaN if there was a NaN or +inf
    poisoned = total != total
    usable = (total == total) & (best > float("-inf"))
    filtered = filtered & usable
    tl.debug_barrier()  # what was found is read by other threads

    threshold = tl.full((), float("-inf"), tl.float32)
    score = tl.full((), float("-inf"), tl.float32)
    token = tl.full((), 0, tl.int32)
    size = tl.full((), 0, tl.int32)
    counter_ptr += row * stride_counter_row
    position = tl.load(counter_ptr)
    counter_ptr += stride_counter_word
    request = tl.load(counter_ptr)
    draw = tl.load(counter_ptr + stride_counter_word)
    if filtered & (found <= SCRATCH):
        limit = total * top_p
        threshold = _nucleus_cut(
            found_ptr, suppress_ids_ptr, found, best, inverse, limit, 0, BITS, BLOCK_N
        )
        for start in range(0, found, BLOCK_N):
            offs = start + tl.arange(0, BLOCK_N)
            x = tl.load(found_ptr + offs, mask=offs < found, other=float("-inf"))
            ids = tl.load(found_ids_ptr + offs, mask=offs < found, other=0)
            x = tl.where(x < threshold, float("-inf"), x)
            noise = id_gumbel(ids, position, request, draw, seed_lo, seed_hi)
            score, token, size = _consider(
                x, ids, noise, inverse, score, token, size, ids_ptr, values_ptr, noise_ptr, CAPACITY
            )
    elif usable:
        if filtered:
            limit = total * top_p
            threshold = _nucleus_cut(
                row_ptr,
                suppress_ids_ptr,
                shared,
                best,
                inverse,
                limit,
                SUPPRESS_COUNT,
                BITS,
                BLOCK_N,
            )
        for start in range(0, shared, BLOCK_N):
            x, key, inside = load_keys(
                row_ptr, suppress_ids_ptr, start, shared, SUPPRESS_COUNT, BLOCK_N
            )
            x = tl.where(x < threshold, float("-inf"), x)
            quads = start // 4 + tl.arange(0, BLOCK_N // 4)
            noise = quad_gumbel(quads, position, request, draw, seed_lo, seed_hi)
            noise = tl.where(noisy, noise, 0.0)
            ids = start + tl.arange(0, BLOCK_N)
            score, token, size = _consider(
                x, ids, noise, inverse, score, token, size, ids_ptr, values_ptr, noise_ptr, CAPACITY
            )

    overflow = (size > CAPACITY) | (filtered == 0)
    size = tl.where(overflow, 0, size)
    if CAPACITY > 0:
        tl.debug_barrier()  # a list that was too long is wiped by other threads
        slots = tl.arange(0, CAPACITY_BLOCK)
        blank = (slots >= size) & (slots < CAPACITY)
        tl.store(ids_ptr + slots, tl.zeros((CAPACITY_BLOCK,), tl.int32), mask=blank)
        tl.store(values_ptr + slots, float("-inf"), mask=blank)
        tl.store(noise_ptr + slots, 0.0, mask=blank)
    log_total = tl.log(tl.where(usable, total, 1.0))
    logsumexp = tl.where(usable, best * inverse + log_total, float("-inf"))
    nan = float("nan")
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(logsumexp_ptr + row, tl.where(poisoned, nan, logsumexp))
    tl.store(threshold_ptr + row, tl.where(poisoned, nan, threshold))
    tl.store(size_ptr + row, size)
    tl.store(overflow_ptr + row, overflow)


def supports(
    logits: torch.Tensor,
    temperature: float,
    seed: int,
    counter: torch.Tensor,
    suppress_ids: torch.Tensor | None,
    temperatures: torch.Tensor | None,
    rows: torch.Tensor | None,
    shared: int,
    top_p: float,
    top_ps: torch.Tensor | None,
    capacity: int,
) -> str | None:
    """None if the kernel can run this call, otherwise why not."""
    if logits.dtype not in KEY_BITS:
        return f"the kernel takes fp32, fp16 and bf16, got {logits.dtype}"
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        return f"logits must be rows of contiguous elements, got strides {logits.stride()}"
    lists = {"suppress_ids": suppress_ids, "temperature": temperatures, "rows": rows}
    return contiguous(**lists, top_p=top_ps) or _tiles.exceeds_vocab(logits.shape[1])


def mixture_draft(
    logits: torch.Tensor,
    temperature: float,
    seed: int,
    counter: torch.Tensor,
    suppress_ids: torch.Tensor | None,
    temperatures: torch.Tensor | None,
    rows: torch.Tensor | None,
    shared: int,
    top_p: float,
    top_ps: torch.Tensor | None,
    capacity: int,
) -> tuple[torch.Tensor, ...]:
    """Launch the kernel; ``temperatures`` and ``top_ps`` are the tensors that may stand for one."""
    sources, vocab = logits.shape
    count = sources if rows is None else rows.shape[0]
    tile = _tiles.mixture_draft_tile(logits.device)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=logits.device)

    token, size = empty(count, dtype=torch.int64), empty(count, dtype=torch.int32)
    logsumexp, threshold = empty(count), empty(count)
    ids, values = empty(count, capacity, dtype=torch.int32), empty(count, capacity)
    noise, overflow = empty(count, capacity), empty(count, dtype=torch.bool)
    if count:
        _mixture_draft_kernel[(count,)](
            token_ptr=token,
            logsumexp_ptr=logsumexp,
            threshold_ptr=threshold,
            ids_ptr=ids,
            values_ptr=values,
            noise_ptr=noise,
            size_ptr=size,
            overflow_ptr=overflow,
            found_ids_ptr=empty(count, tile.scratch, dtype=torch.int32),
            found_ptr=empty(count, tile.scratch),
            logits_ptr=logits,
            rows_ptr=size if rows is None else rows,
            counter_ptr=counter,
            temperature_ptr=size if temperatures is None else temperatures,
            top_p_ptr=size if top_ps is None else top_ps,
            suppress_ids_ptr=size if suppress_ids is None else suppress_ids,
            rows=count,
            sources=sources,
            vocab=vocab,
            shared=shared,
            inverse_temperature=1 / temperature if temperature else 0.0,
            top_p=top_p,
            seed_lo=signed_word(seed),
            seed_hi=signed_word(seed >> 32),
            stride_logits_row=logits.stride(0),
            stride_counter_row=counter.stride(0),
            stride_counter_word=counter.stride(1),
            SUPPRESS_COUNT=0 if suppress_ids is None else suppress_ids.shape[0],
            HAS_TEMPERATURES=temperatures is not None,
            HAS_TOP_PS=top_ps is not None,
            HAS_ROWS=rows is not None,
            CAPACITY=capacity,
            CAPACITY_BLOCK=_tiles.next_power_of_2(max(capacity, 1)),
            BITS=KEY_BITS[logits.dtype],
            SCRATCH=tile.scratch,
            BLOCK_V=tile.block_v,
            BLOCK_N=tile.block_n,
            num_warps=tile.num_warps,
            enable_fp_fusion=False,  # the noise must have the bits of the definition
        )
    return token, logsumexp, threshold, ids, values, noise, size, overflow
