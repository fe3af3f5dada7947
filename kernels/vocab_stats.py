"""Statistics of rows of logits, and a sampled token: one read of the logits in tiles, then a merge.

With top-k or top-p a kernel before that finds the smallest logit that is kept, one program per row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _tiles
from ._primitives import sort_key, sort_value
from ._row_stats import (
    MAX_TILES,
    cap,
    contiguous,
    empty_partial,
    inverse_of,
    is_sampled,
    merge,
    options,
    source_rows,
    tile_statistics,
)

# The highest bits of an fp32 number that a number of the dtype can have set, sign included.
KEY_BITS = {torch.float32: 32, torch.float16: 20, torch.bfloat16: 16}


@triton.jit
def load_keys(row_ptr, banned_ptr, start, vocab, N_BANNED: tl.constexpr, BLOCK_V: tl.constexpr):
    """A piece of a row, banned ids -inf, and unsigned integers that sort like its numbers."""
    offs_v = start + tl.arange(0, BLOCK_V)
    x = tl.load(row_ptr + offs_v, mask=offs_v < vocab, other=float("-inf")).to(tl.float32)
    for i in tl.static_range(N_BANNED):
        x = tl.where(offs_v == tl.load(banned_ptr + i), float("-inf"), x)
    x += 0.0  # a negative zero becomes a zero
    return x, sort_key(x), offs_v < vocab


@triton.jit(do_not_specialize=["rows", "sources", "top_k"])
def _vocab_stats_cut_kernel(
    # pointers
    cut_ptr,  # (rows,) fp32: the smallest logit kept
    logits_ptr,  # (sources, vocab)
    rows_ptr,  # (rows,)
    temperature_ptr,  # (rows,)
    banned_ptr,  # (N_BANNED,)
    top_k_ptr,  # (rows,) int32, or None
    top_p_ptr,  # (rows,) fp32, or None
    # sizes
    rows,
    sources,
    vocab,
    top_k,
    top_p,
    inverse_temperature,
    softcap,
    # strides
    stride_logits_row,
    # constexprs
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    N_BANNED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURES: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BITS: tl.constexpr,  # of the key that tell numbers of this dtype apart, the highest ones
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source, exists = source_rows(rows_ptr, row, rows, sources, HAS_ROWS)
    if exists:
        row_ptr = logits_ptr + source * stride_logits_row
        inverse = inverse_temperature
        if HAS_TEMPERATURES:
            inverse, noisy = inverse_of(tl.load(temperature_ptr + row))
        if top_k_ptr is not None:
            top_k = tl.load(top_k_ptr + row)
        if top_p_ptr is not None:
            top_p = tl.load(top_p_ptr + row)
        if HAS_TOP_K:
            top_k = tl.minimum(tl.maximum(top_k, 1), vocab)
        filters_mass = (top_p > 0) & (top_p < 1)
        best = tl.full((BLOCK_V,), float("-inf"), tl.float32)
        for start in range(0, vocab, BLOCK_V):
            x, key, inside = load_keys(row_ptr, banned_ptr, start, vocab, N_BANNED, BLOCK_V)
            best = tl.maximum(best, x)
        best = tl.max(best, 0)
        if HAS_SOFTCAP:
            best = cap(best, softcap)
        best = tl.where(best == float("-inf"), 0.0, best)

        # The largest key that a filter keeps: k ids or more are at it or above, or the mass above
        # it is still more than p. Found two bits a read.
        by_count = tl.full((), 0, tl.uint32)
        by_mass = tl.full((), 0, tl.uint32)
        for turn in range((BITS + 1) // 2):
            unit = tl.full((), 0x40000000, tl.uint32) >> (2 * turn)
            counts_1 = tl.zeros((BLOCK_V,), tl.int32)
            counts_2 = tl.zeros((BLOCK_V,), tl.int32)
            counts_3 = tl.zeros((BLOCK_V,), tl.int32)
            mass = tl.zeros((BLOCK_V,), tl.float32)
            mass_1 = tl.zeros((BLOCK_V,), tl.float32)
            mass_2 = tl.zeros((BLOCK_V,), tl.float32)
            mass_3 = tl.zeros((BLOCK_V,), tl.float32)
            for start in range(0, vocab, BLOCK_V):
                x, key, inside = load_keys(row_ptr, banned_ptr, start, vocab, N_BANNED, BLOCK_V)
                if HAS_TOP_K:
                    counts_1 += (inside & (key >= by_count + unit)).to(tl.int32)
                    counts_2 += (inside & (key >= by_count + unit * 2)).to(tl.int32)
                    counts_3 += (inside & (key >= by_count + unit * 3)).to(tl.int32)
                if HAS_TOP_P:
                    if HAS_SOFTCAP:
                        x = cap(x, softcap)
                    term = tl.exp((x - best) * inverse)
                    mass += term
                    mass_1 += tl.where(key >= by_mass + unit, term, 0.0)
                    mass_2 += tl.where(key >= by_mass + unit * 2, term, 0.0)
                    mass_3 += tl.where(key >= by_mass + unit * 3, term, 0.0)
            if HAS_TOP_K:
                # Each further step that leaves k ids is taken: the counts fall.
                step = (tl.sum(counts_1, 0) >= top_k).to(tl.uint32)
                step += (tl.sum(counts_2, 0) >= top_k).to(tl.uint32)
                step += (tl.sum(counts_3, 0) >= top_k).to(tl.uint32)
                by_count += step * unit
            if HAS_TOP_P:
                limit = tl.where(filters_mass, tl.sum(mass, 0) * top_p, float("inf"))
                step = (tl.sum(mass_1, 0) > limit).to(tl.uint32)
                step += (tl.sum(mass_2, 0) > limit).to(tl.uint32)
                step += (tl.sum(mass_3, 0) > limit).to(tl.uint32)
                by_mass += step * unit
        key = tl.maximum(by_count, by_mass)
        # Key 0, of no filter, is not that of a number.
        tl.store(cut_ptr + row, tl.where(key == 0, float("-inf"), sort_value(key)))


# A new batch size or seed must not compile the kernel again.
@triton.jit(do_not_specialize=["rows", "sources", "tiles", "seed_lo", "seed_hi"])
def _vocab_stats_tile_kernel(
    # pointers, those of tile_statistics first
    values_ptr,
    ids_ptr,
    counter_ptr,
    temperature_ptr,
    banned_ptr,
    logits_ptr,  # (sources, vocab)
    rows_ptr,  # (rows,)
    cut_ptr,  # (rows,)
    # sizes
    rows,
    sources,
    vocab,
    tiles,
    inverse_temperature,
    softcap,
    seed_lo,
    seed_hi,
    # strides
    stride_logits_row,
    stride_counter_row,
    stride_counter_word,
    # constexprs
    N_BANNED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SAMPLED: tl.constexpr,
    HAS_TEMPERATURES: tl.constexpr,
    TEMPERED: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_CUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    tile = tl.program_id(0) % tiles
    offs_r = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_v = tile * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    source, mask_source = source_rows(rows_ptr, offs_r, rows, sources, HAS_ROWS)
    # [BLOCK_R, BLOCK_V]
    x = tl.load(
        logits_ptr + source[:, None] * stride_logits_row + offs_v,
        mask=mask_source[:, None] & (offs_v < vocab),
        other=float("-inf"),
    ).to(tl.float32)
    if HAS_CUT:
        cut = tl.load(cut_ptr + offs_r, mask=offs_r < rows, other=0.0)
        x = tl.where(x < cut[:, None], float("-inf"), x)
    tile_statistics(
        values_ptr,
        ids_ptr,
        counter_ptr,
        temperature_ptr,
        banned_ptr,
        x,
        tile * BLOCK_V,
        offs_r,
        tile,
        rows,
        tiles,
        inverse_temperature,
        softcap,
        seed_lo,
        seed_hi,
        stride_counter_row,
        stride_counter_word,
        N_BANNED,
        HAS_SOFTCAP,
        SAMPLED,
        HAS_TEMPERATURES,
        TEMPERED,
        BLOCK_V,
    )


def supports(
    logits: torch.Tensor,
    temperature: float,
    seed: int,
    counter: torch.Tensor | None,
    banned: torch.Tensor | None,
    tempered: bool,
    softcap: float | None,
    temperatures: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    top_ks: torch.Tensor | None = None,
    top_ps: torch.Tensor | None = None,
) -> str | None:
    """None if the kernel can run this call, otherwise why not."""
    vocab = logits.shape[1]
    if logits.dtype not in KEY_BITS:
        return f"the kernel takes fp32, fp16 and bf16, got {logits.dtype}"
    if vocab > 1 and logits.stride(1) != 1:
        return f"logits must be rows of contiguous elements, got strides {logits.stride()}"
    largest = MAX_TILES * _tiles.vocab_stats_tile(logits.device, vocab).block_v
    if vocab > largest:
        return f"the kernel takes up to {largest} ids, got {vocab}"
    return contiguous(
        banned=banned, temperature=temperatures, rows=rows, top_k=top_ks, top_p=top_ps
    )


def vocab_stats(
    logits: torch.Tensor,
    temperature: float,
    seed: int,
    counter: torch.Tensor | None,
    banned: torch.Tensor | None,
    tempered: bool,
    softcap: float | None,
    temperatures: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    top_ks: torch.Tensor | None = None,
    top_ps: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Launch the kernels; arguments as in ``pydllm.ops.vocab_stats``, ``seed`` a 64-bit integer.

    ``temperatures``, ``top_ks`` and ``top_ps`` are tensors that may stand for the numbers.
    """
    sources, vocab = logits.shape
    count = sources if rows is None else rows.shape[0]
    tile = _tiles.vocab_stats_tile(logits.device, vocab)
    tiles = triton.cdiv(vocab, tile.block_v)
    sampled = is_sampled(counter, temperature, temperatures)
    values, ids = empty_partial(count, tiles, sampled, logits.device)
    if count:
        shared = options(
            ids, temperature, seed, counter, banned, tempered, softcap, temperatures, sampled
        )
        common = {
            **shared,
            "logits_ptr": logits,
            "rows_ptr": ids if rows is None else rows,
            "rows": count,
            "sources": sources,
            "vocab": vocab,
            "stride_logits_row": logits.stride(0),
            "HAS_ROWS": rows is not None,
        }
        cut = None
        if any(value is not None for value in (top_k, top_p, top_ks, top_ps)):
            cut = _launch_cut(common, top_k, top_p, top_ks, top_ps)
        _vocab_stats_tile_kernel[(triton.cdiv(count, tile.block_r) * tiles,)](
            **common,
            values_ptr=values,
            ids_ptr=ids,
            cut_ptr=values if cut is None else cut,
            tiles=tiles,
            HAS_CUT=cut is not None,
            BLOCK_R=tile.block_r,
            BLOCK_V=tile.block_v,
            num_warps=tile.num_warps,
            # The noise must have the bits of the definition, and so must the score.
            enable_fp_fusion=not sampled,
        )
    return merge(values, ids, tile.block_r)


def _launch_cut(
    common: dict,
    top_k: int | None,
    top_p: float | None,
    top_ks: torch.Tensor | None,
    top_ps: torch.Tensor | None,
) -> torch.Tensor:
    """Launch the kernel that finds the smallest logit kept in each row: ``(rows,)`` fp32."""
    logits = common["logits_ptr"]
    cut = torch.empty(common["rows"], dtype=torch.float32, device=logits.device)
    tile = _tiles.vocab_stats_cut_tile(logits.device)
    unwanted = ("counter", "seed", "SAMPLED", "TEMPERED", "stride_counter")
    arguments = {name: value for name, value in common.items() if not name.startswith(unwanted)}
    _vocab_stats_cut_kernel[(common["rows"],)](
        **arguments,
        cut_ptr=cut,
        top_k_ptr=top_ks,
        top_p_ptr=top_ps,
        top_k=1 if top_k is None else min(top_k, common["vocab"]),
        top_p=1.0 if top_p is None else top_p,
        HAS_TOP_K=top_k is not None or top_ks is not None,
        HAS_TOP_P=top_p is not None or top_ps is not None,
        BITS=KEY_BITS[logits.dtype],
        BLOCK_V=tile.block_v,
        num_warps=tile.num_warps,
        maxnreg=128,  # left to itself, ptxas spills for a sixth program on a multiprocessor
        enable_fp_fusion=True,
    )
    return cut
