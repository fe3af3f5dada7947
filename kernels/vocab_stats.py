"""Statistics of rows of logits, and a sampled token: one read of the logits in tiles, then a merge.

With top-k or top-p the smallest logit that is kept is found before that (``_vocab_cut.py``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _tiles
from ._row_stats import (
    MAX_TILES,
    contiguous,
    empty_partial,
    is_sampled,
    merge,
    options,
    source_rows,
    tile_statistics,
)
from ._vocab_cut import KEY_BITS, smallest_kept


# A new batch size or seed must not compile the kernel again.
@triton.jit(do_not_specialize=["rows", "sources", "tiles", "seed_lo", "seed_hi"])
def _vocab_stats_tile_kernel(
    # pointers, those of tile_statistics first
    values_ptr,
    ids_ptr,
    counter_ptr,
    temperature_ptr,
    suppress_ids_ptr,
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
    SUPPRESS_COUNT: tl.constexpr,
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
        suppress_ids_ptr,
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
        SUPPRESS_COUNT,
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
    suppress_ids: torch.Tensor | None,
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
    lists = {"suppress_ids": suppress_ids, "temperature": temperatures, "rows": rows}
    return _tiles.exceeds_vocab(vocab, largest) or contiguous(**lists, top_k=top_ks, top_p=top_ps)


def vocab_stats(
    logits: torch.Tensor,
    temperature: float,
    seed: int,
    counter: torch.Tensor | None,
    suppress_ids: torch.Tensor | None,
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
    tiles = _tiles.cdiv(vocab, tile.block_v)
    sampled = is_sampled(counter, temperature, temperatures)
    values, ids = empty_partial(count, tiles, sampled, logits.device)
    if count:
        shared = options(
            ids, temperature, seed, counter, suppress_ids, tempered, softcap, temperatures, sampled
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
            unwanted = ("counter", "seed", "SAMPLED", "TEMPERED", "stride_counter")
            rest = {name: value for name, value in common.items() if not name.startswith(unwanted)}
            cut = smallest_kept(rest, top_k, top_p, top_ks, top_ps)
        _vocab_stats_tile_kernel[(_tiles.cdiv(count, tile.block_r) * tiles,)](
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
