"""Statistics of the rows of ``hidden @ weight.T``, whose elements are never stored.

A matmul with the statistics of ``vocab_stats`` as its epilogue, then the same merge.

A tile has the same ids and sums the width alike whatever the number of rows: the bits of a row do
not depend on the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _tiles
from ._primitives import wait_for_previous
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

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PARTIAL_BYTES = 48 * 2**20  # partial results of one launch, at most


# A new batch size or seed must not compile the kernel again.
@triton.jit(
    do_not_specialize=["rows", "sources", "tiles", "row_blocks", "offset", "seed_lo", "seed_hi"]
)
def _head_stats_tile_kernel(
    # pointers, those of tile_statistics first
    values_ptr,
    ids_ptr,
    counter_ptr,
    temperature_ptr,
    suppress_ids_ptr,
    hidden_ptr,  # (sources, width)
    weight_ptr,  # (vocab, width)
    bias_ptr,  # (vocab,)
    rows_ptr,  # (rows,)
    # sizes
    rows,
    sources,
    vocab,
    width,
    tiles,
    row_blocks,
    offset,
    inverse_temperature,
    softcap,
    seed_lo,
    seed_hi,
    # strides
    stride_hidden_row,
    stride_weight_row,
    stride_counter_row,
    stride_counter_word,
    # constexprs
    SUPPRESS_COUNT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SAMPLED: tl.constexpr,
    HAS_TEMPERATURES: tl.constexpr,
    TEMPERED: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr = False,
):
    wait_for_previous(PDL)
    # Neighbouring programs read the same part of the weight.
    tile = tl.program_id(0) // row_blocks
    offs_r = (tl.program_id(0) % row_blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_d = tl.arange(0, BLOCK_D)
    mask_v = offs_v < vocab
    source, mask_source = source_rows(rows_ptr, offs_r, rows, sources, HAS_ROWS)
    hidden_ptrs = hidden_ptr + source[:, None] * stride_hidden_row + offs_d[None, :]
    weight_ptrs = weight_ptr + offs_v.to(tl.int64)[None, :] * stride_weight_row + offs_d[:, None]
    acc = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    for start in range(0, width, BLOCK_D):
        mask_d = offs_d < width - start
        # [BLOCK_R, BLOCK_D]
        hidden = tl.load(
            hidden_ptrs + start, mask=mask_source[:, None] & mask_d[None, :], other=0.0
        )
        # [BLOCK_D, BLOCK_V]
        weight = tl.load(weight_ptrs + start, mask=mask_d[:, None] & mask_v[None, :], other=0.0)
        acc = tl.dot(hidden, weight, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)[None, :]
    acc = tl.where(mask_source[:, None] & mask_v[None, :], acc, float("-inf"))
    tile_statistics(
        values_ptr,
        ids_ptr,
        counter_ptr,
        temperature_ptr,
        suppress_ids_ptr,
        acc,
        offset + tile * BLOCK_V,
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
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    seed: int,
    counter: torch.Tensor | None,
    suppress_ids: torch.Tensor | None,
    tempered: bool,
    softcap: float | None,
    temperatures: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    vocab_offset: int = 0,
) -> str | None:
    """None if the kernel can run this call, otherwise why not."""
    if hidden.dtype not in _DTYPES:
        return f"the kernel takes fp32, fp16 and bf16, got {hidden.dtype}"
    for name, matrix in {"hidden": hidden, "weight": weight}.items():
        if matrix.shape[1] > 1 and matrix.stride(1) != 1:
            return f"{name} must be rows of contiguous elements, got strides {matrix.stride()}"
    largest = MAX_TILES * _tiles.head_stats_tile(hidden.device, hidden.element_size()).block_v
    lists = {"suppress_ids": suppress_ids, "temperature": temperatures, "rows": rows}
    return _tiles.exceeds_vocab(weight.shape[0], largest) or contiguous(bias=bias, **lists)


def tile_count(hidden: torch.Tensor, weight: torch.Tensor) -> int:
    """Pieces that the vocabulary is cut into."""
    tile = _tiles.head_stats_tile(hidden.device, hidden.element_size())
    return _tiles.cdiv(weight.shape[0], tile.block_v)


def head_stats_partial(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    seed: int,
    counter: torch.Tensor | None,
    suppress_ids: torch.Tensor | None,
    tempered: bool,
    softcap: float | None,
    temperatures: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    vocab_offset: int = 0,
    *,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the tiles; arguments as in ``pydllm.ops.head_stats_partial``, ``seed`` 64 bits."""
    sources, width = hidden.shape
    count = sources if rows is None else rows.shape[0]
    # Rows loaded by element, and tempered ones, would spill registers in a tile of many.
    is_plain = hidden.stride(0) % 16 == 0 and weight.stride(0) % 16 == 0 and not tempered
    tile = _tiles.head_stats_tile(hidden.device, hidden.element_size(), count if is_plain else 1)
    tiles = tile_count(hidden, weight)
    row_blocks = _tiles.cdiv(count, tile.block_r)
    sampled = is_sampled(counter, temperature, temperatures)
    values, ids = empty_partial(count, tiles, sampled, hidden.device)
    if count == 0:
        return values, ids
    shared = options(
        ids, temperature, seed, counter, suppress_ids, tempered, softcap, temperatures, sampled
    )
    _head_stats_tile_kernel[(row_blocks * tiles,)](
        **shared,
        values_ptr=values,
        ids_ptr=ids,
        hidden_ptr=hidden,
        weight_ptr=weight,
        bias_ptr=weight if bias is None else bias,
        rows_ptr=ids if rows is None else rows,
        rows=count,
        sources=sources,
        vocab=weight.shape[0],
        width=width,
        tiles=tiles,
        row_blocks=row_blocks,
        offset=vocab_offset,
        stride_hidden_row=hidden.stride(0),
        stride_weight_row=weight.stride(0),
        HAS_ROWS=rows is not None,
        HAS_BIAS=bias is not None,
        BLOCK_R=tile.block_r,
        BLOCK_V=tile.block_v,
        BLOCK_D=tile.block_d,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        # The noise must have the bits of the definition, and so must the score.
        enable_fp_fusion=not sampled,
        **_tiles.pdl(hidden.device, pdl),
    )
    return values, ids


def merge_supports(values: torch.Tensor, ids: torch.Tensor) -> str | None:
    """None if the merge can run this call, otherwise why not."""
    if values.dtype != torch.float32:
        return f"the kernel takes fp32 values, got {values.dtype}"
    if not (values.is_contiguous() and ids.is_contiguous()):
        return f"values and ids must be contiguous, got strides {values.stride()}, {ids.stride()}"
    if not 0 < values.shape[2] <= MAX_TILES:
        return f"the kernel takes 1 to {MAX_TILES} pieces, got {values.shape[2]}"
    return None


def merge_stats(
    values: torch.Tensor, ids: torch.Tensor, *, pdl: bool = False
) -> tuple[torch.Tensor, ...]:
    """Token, probability, entropy, margin and log-sum-exp of pieces ``(n, R, S)``."""
    return merge(values, ids, _tiles.merge_rows(values.device), pdl=pdl)


def head_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    seed: int,
    counter: torch.Tensor | None,
    suppress_ids: torch.Tensor | None,
    tempered: bool,
    softcap: float | None,
    temperatures: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    *,
    pdl: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Launch the kernels, many rows in parts: that bounds the memory of the partial results."""
    count = hidden.shape[0] if rows is None else rows.shape[0]
    block = _tiles.head_stats_tile(hidden.device, hidden.element_size()).block_r
    height = max(_PARTIAL_BYTES // (32 * tile_count(hidden, weight)) // block, 1) * block
    parts = []
    for start in range(0, max(count, 1), height):
        part = slice(start, min(start + height, count))
        partial = head_stats_partial(
            hidden[part] if rows is None else hidden,
            weight,
            bias,
            temperature,
            seed,
            None if counter is None else counter[part],
            suppress_ids,
            tempered,
            softcap,
            None if temperatures is None else temperatures[part],
            None if rows is None else rows[part],
            pdl=pdl,
        )
        parts.append(merge_stats(*partial, pdl=pdl))
    if len(parts) == 1:
        return parts[0]
    return tuple(torch.cat(fields) for fields in zip(*parts, strict=True))
