"""Top-k and top-p of ``vocab_stats`` without a sort: the smallest logit of each row that is kept.

A row is split over programs. A search over its sort keys fixes four bits per launch: each program
counts what its piece has at each of fifteen keys and above; the next launch adds up the pieces of a
row, in their order, and continues with the digit that follows. The result depends on the row alone,
not on the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _tiles
from ._primitives import sort_key, sort_value
from ._row_stats import cap, inverse_of, source_rows

# The highest bits of an fp32 number that a number of the dtype can have set, sign included.
KEY_BITS = {torch.float32: 32, torch.float16: 20, torch.bfloat16: 16}
DIGIT_BITS = 4  # in the kernel: 16 keys


@triton.jit
def load_keys(
    row_ptr, suppress_ids_ptr, start, vocab, SUPPRESS_COUNT: tl.constexpr, BLOCK_V: tl.constexpr
):
    """A piece of a row, suppressed ids -inf, and unsigned integers that sort like its numbers."""
    offs_v = start + tl.arange(0, BLOCK_V)
    x = tl.load(row_ptr + offs_v, mask=offs_v < vocab, other=float("-inf")).to(tl.float32)
    for i in tl.static_range(SUPPRESS_COUNT):
        x = tl.where(offs_v == tl.load(suppress_ids_ptr + i), float("-inf"), x)
    x += 0.0  # a negative zero becomes a zero
    return x, sort_key(x), offs_v < vocab


# A new batch size or another digit must not compile the kernel again.
@triton.jit(do_not_specialize=["rows", "sources", "top_k", "radix_pass", "programs"])
def _vocab_stats_cut_kernel(
    # pointers
    cut_ptr,  # (rows,) fp32: the smallest logit kept, written in the last pass
    keys_ptr,  # (2, rows, 2) int32: bits of the key found so far, by count and by mass
    counts_ptr,  # (2, rows, splits, 16) int32: ids at a key or above
    masses_ptr,  # (2, rows, splits, 16) fp32: their mass, relative to the piece's largest logit
    best_ptr,  # (rows, splits) fp32: that logit
    logits_ptr,  # (sources, vocab)
    rows_ptr,  # (rows,)
    temperature_ptr,  # (rows,)
    suppress_ids_ptr,  # (SUPPRESS_COUNT,)
    top_k_ptr,  # (rows,) int32, or None
    top_p_ptr,  # (rows,) fp32, or None
    # sizes
    rows,
    sources,
    vocab,
    splits,  # of a row
    programs,  # of a row: splits, in the last pass 1
    radix_pass,  # digits known before this launch, not counting that of the launch before
    radix_passes,
    top_k,
    top_p,
    inverse_temperature,
    softcap,
    # strides
    stride_logits_row,
    # constexprs
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    SUPPRESS_COUNT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURES: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = (tl.program_id(0) // programs).to(tl.int64)
    split = tl.program_id(0) % programs
    source, exists = source_rows(rows_ptr, row, rows, sources, HAS_ROWS)
    if exists:
        inverse = inverse_temperature
        if HAS_TEMPERATURES:
            inverse, noisy = inverse_of(tl.load(temperature_ptr + row))
        offs_j = tl.arange(0, 16)
        now, before = radix_pass % 2, (radix_pass + 1) % 2
        by_count = tl.full((), 0, tl.uint32)
        by_mass = tl.full((), 0, tl.uint32)
        if radix_pass > 0:
            # The digit of the launch before: the largest key that a filter keeps has k ids or more
            # at it or above, or the mass above it is still more than p. Both fall from key to key.
            unit = tl.full((), 0x10000000, tl.uint32) >> (4 * (radix_pass - 1))
            offs_s = tl.arange(0, BLOCK_S)
            mask_s = offs_s < splits
            at = ((before * rows + row) * splits + offs_s[:, None]) * 16 + offs_j[None, :]
            found = keys_ptr + (before * rows + row) * 2
            if HAS_TOP_K:
                if top_k_ptr is not None:
                    top_k = tl.load(top_k_ptr + row)
                top_k = tl.minimum(tl.maximum(top_k, 1), vocab)
                sums = tl.sum(tl.load(counts_ptr + at, mask=mask_s[:, None], other=0), 0)
                digit = tl.sum(((offs_j > 0) & (sums >= top_k)).to(tl.int32), 0)
                by_count = tl.load(found).to(tl.uint32, bitcast=True) + digit.to(tl.uint32) * unit
            if HAS_TOP_P:
                if top_p_ptr is not None:
                    top_p = tl.load(top_p_ptr + row)
                bests = tl.load(best_ptr + row * splits + offs_s, mask=mask_s, other=float("-inf"))
                best = tl.max(bests, 0)
                best = tl.where(best == float("-inf"), 0.0, best)
                masses = tl.load(masses_ptr + at, mask=mask_s[:, None], other=0.0)
                masses = tl.sum(masses * tl.exp((bests - best) * inverse)[:, None], 0)
                total = tl.sum(tl.where(offs_j == 0, masses, 0.0), 0)
                filters = (top_p > 0) & (top_p < 1)
                limit = tl.where(filters, total * top_p, float("inf"))
                digit = tl.sum(((offs_j > 0) & (masses > limit)).to(tl.int32), 0)
                known = tl.load(found + 1).to(tl.uint32, bitcast=True)
                by_mass = known + digit.to(tl.uint32) * unit
        if radix_pass == radix_passes:
            last = tl.maximum(by_count, by_mass)
            # Key 0, of no filter, is not that of a number.
            tl.store(cut_ptr + row, tl.where(last == 0, float("-inf"), sort_value(last)))
        else:
            if split == 0:
                found = keys_ptr + (now * rows + row) * 2
                tl.store(found, by_count.to(tl.int32, bitcast=True))
                tl.store(found + 1, by_mass.to(tl.int32, bitcast=True))
            row_ptr = logits_ptr + source * stride_logits_row
            x, key, inside = load_keys(
                row_ptr, suppress_ids_ptr, split * BLOCK_V, vocab, SUPPRESS_COUNT, BLOCK_V
            )
            if HAS_SOFTCAP:
                x = cap(x, softcap)
            best = tl.max(x, 0)
            terms = tl.exp((x - tl.where(best == float("-inf"), 0.0, best)) * inverse)
            unit = tl.full((), 0x10000000, tl.uint32) >> (4 * radix_pass)
            counts = tl.zeros((16,), tl.int32)
            masses = tl.where(offs_j == 0, tl.sum(terms, 0), 0.0)
            for j in tl.static_range(1, 16):
                if HAS_TOP_K:
                    above = tl.sum((inside & (key >= by_count + unit * j)).to(tl.int32), 0)
                    counts = tl.where(offs_j == j, above, counts)
                if HAS_TOP_P:
                    mass = tl.sum(tl.where(key >= by_mass + unit * j, terms, 0.0), 0)
                    masses = tl.where(offs_j == j, mass, masses)
            at = ((now * rows + row) * splits + split) * 16 + offs_j
            if HAS_TOP_K:
                tl.store(counts_ptr + at, counts)
            if HAS_TOP_P:
                tl.store(masses_ptr + at, masses)
                tl.store(best_ptr + row * splits + split, best)


def smallest_kept(
    arguments: dict[str, object],
    top_k: int | None,
    top_p: float | None,
    top_ks: torch.Tensor | None,
    top_ps: torch.Tensor | None,
) -> torch.Tensor:
    """The smallest logit that both filters keep in each row: ``(rows,)`` fp32.

    Args:
        arguments: those of the kernel that say what the rows are.
        top_k, top_p, top_ks, top_ps: as of the launcher of ``vocab_stats``.
    """
    logits, rows, vocab = (arguments[name] for name in ("logits_ptr", "rows", "vocab"))
    tile = _tiles.vocab_stats_cut_tile(logits.device, vocab)
    splits = _tiles.cdiv(vocab, tile.block_v)
    radix_passes = KEY_BITS[logits.dtype] // DIGIT_BITS

    def room(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    has_top_k = top_k is not None or top_ks is not None
    has_top_p = top_p is not None or top_ps is not None
    cut = room(rows, dtype=torch.float32)
    memory = {
        "cut_ptr": cut,
        "keys_ptr": room(2, rows, 2, dtype=torch.int32),
        "counts_ptr": room(2, rows if has_top_k else 0, splits, 16, dtype=torch.int32),
        "masses_ptr": room(2, rows if has_top_p else 0, splits, 16, dtype=torch.float32),
        "best_ptr": room(rows, splits, dtype=torch.float32),
    }
    for radix_pass in range(radix_passes + 1):
        programs = splits if radix_pass < radix_passes else 1
        _vocab_stats_cut_kernel[(rows * programs,)](
            **memory,
            **arguments,
            top_k_ptr=top_ks,
            top_p_ptr=top_ps,
            splits=splits,
            programs=programs,
            radix_pass=radix_pass,
            radix_passes=radix_passes,
            top_k=1 if top_k is None else min(top_k, vocab),
            top_p=1.0 if top_p is None else top_p,
            HAS_TOP_K=has_top_k,
            HAS_TOP_P=has_top_p,
            BLOCK_S=_tiles.next_power_of_2(splits),
            BLOCK_V=tile.block_v,
            num_warps=tile.num_warps,
            enable_fp_fusion=True,
        )
    return cut
