"""What ``vocab_stats`` and ``head_stats`` share: the statistics of a tile of logits, their merge.

The bits of a row do not depend on the batch: a tile's size is given, and the merge goes over a
row's tiles at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _tiles
from ._primitives import quad_gumbel, wait_for_previous

MAX_TILES = 2048

# As in the reference: e to this power is 0, and times 0 it is not NaN, as -inf would be.
_NEGLIGIBLE = tl.constexpr(-1e4)
_NO_ID = tl.constexpr(2**31 - 1)


@triton.jit
def tile_statistics(
    # pointers
    values_ptr,  # (4 or 6, rows, tiles) fp32: best, second, sum, weighted; score, chosen
    ids_ptr,  # (1 or 2, rows, tiles) int32: id of the best; chosen id
    counter_ptr,  # (rows, 3)
    temperature_ptr,  # (rows,)
    suppress_ids_ptr,  # (SUPPRESS_COUNT,)
    # the tile
    x,  # [BLOCK_R, BLOCK_V] fp32, -inf outside the vocabulary
    first,  # its first id, a multiple of 4
    offs_r,  # [BLOCK_R]
    tile,
    # sizes
    rows,
    tiles,
    inverse_temperature,
    softcap,
    seed_lo,
    seed_hi,
    # strides
    stride_counter_row,
    stride_counter_word,
    # constexprs
    SUPPRESS_COUNT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SAMPLED: tl.constexpr,
    HAS_TEMPERATURES: tl.constexpr,
    TEMPERED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Store what the merge needs to know of one tile of logits."""
    mask_r = offs_r < rows
    offs_v = first + tl.arange(0, BLOCK_V)[None, :]
    if HAS_SOFTCAP:
        x = cap(x, softcap)
    for i in tl.static_range(SUPPRESS_COUNT):
        x = tl.where(offs_v == tl.load(suppress_ids_ptr + i), float("-inf"), x)
    if SAMPLED:
        if HAS_TEMPERATURES:
            inverse, noisy = inverse_of(tl.load(temperature_ptr + offs_r, mask=mask_r, other=0.0))
            scaled = x * inverse[:, None]
        else:
            scaled = x * inverse_temperature
        if TEMPERED:
            x = scaled

    # Relative to the maximum neither sum overflows, and the entropy does not cancel.
    best = tl.max(x, 1)  # [BLOCK_R]
    best_id = tl.min(tl.where(x == best[:, None], offs_v, _NO_ID), 1)
    second = tl.max(tl.where(offs_v == best_id[:, None], float("-inf"), x), 1)
    shift = x - tl.where(best == float("-inf"), 0.0, best)[:, None]
    shift = tl.where(shift < _NEGLIGIBLE, _NEGLIGIBLE, shift)  # a NaN comes through
    terms = tl.exp(shift)

    stride_field = tl.cast(rows, tl.int64) * tiles
    values_ptrs = values_ptr + offs_r * tiles + tile
    ids_ptrs = ids_ptr + offs_r * tiles + tile
    tl.store(values_ptrs, best, mask=mask_r)
    tl.store(values_ptrs + stride_field, second, mask=mask_r)
    tl.store(values_ptrs + 2 * stride_field, tl.sum(terms, 1), mask=mask_r)
    tl.store(values_ptrs + 3 * stride_field, tl.sum(terms * shift, 1), mask=mask_r)
    tl.store(ids_ptrs, best_id, mask=mask_r)
    if SAMPLED:
        counter_ptrs = counter_ptr + offs_r * stride_counter_row
        position = tl.load(counter_ptrs, mask=mask_r, other=0)
        counter_ptrs += stride_counter_word
        request = tl.load(counter_ptrs, mask=mask_r, other=0)
        draw = tl.load(counter_ptrs + stride_counter_word, mask=mask_r, other=0)
        quads = first // 4 + tl.arange(0, BLOCK_V // 4)[None, :]
        noise = quad_gumbel(
            quads, position[:, None], request[:, None], draw[:, None], seed_lo, seed_hi
        )
        if HAS_TEMPERATURES:
            noise = tl.where(noisy[:, None], noise, 0.0)
        scores = scaled + noise
        score = tl.max(scores, 1)
        chosen_id = tl.min(tl.where(scores == score[:, None], offs_v, _NO_ID), 1)
        chosen = tl.sum(tl.where(offs_v == chosen_id[:, None], x, 0.0), 1)
        tl.store(values_ptrs + 4 * stride_field, score, mask=mask_r)
        tl.store(values_ptrs + 5 * stride_field, chosen, mask=mask_r)
        tl.store(ids_ptrs + stride_field, chosen_id, mask=mask_r)


@triton.jit
def inverse_of(temperature):
    """``1 / temperature`` and whether to draw; the arg-max is taken outside [1e-6, inf)."""
    noisy = (temperature >= 1e-6) & (temperature < float("inf"))
    usable = tl.where(noisy, temperature, 1.0)
    return tl.div_rn(tl.full(usable.shape, 1.0, tl.float32), usable), noisy


@triton.jit
def source_rows(rows_ptr, offs_r, rows, sources, HAS_ROWS: tl.constexpr):
    """Which row of the input each row of the output is of, and whether there is such a row."""
    source = offs_r
    mask = offs_r < rows
    if HAS_ROWS:
        source = tl.load(rows_ptr + offs_r, mask=mask, other=-1).to(tl.int64)
        mask = (source >= 0) & (source < sources)
    return source, mask


@triton.jit
def cap(x, softcap):
    """``softcap * tanh(x / softcap)``; infinities and NaN stay."""
    decay = tl.exp(tl.abs(x) * (-2.0 / softcap))  # at most 1: no overflow
    size = softcap - softcap * (2.0 * decay / (1.0 + decay))
    capped = tl.where(x < 0, -size, size)
    return tl.where(tl.abs(x) == float("inf"), x, capped)


@triton.jit(do_not_specialize=["rows", "tiles"])
def _row_stats_merge_kernel(
    # pointers
    token_ptr,  # (rows,) int64
    prob_ptr,  # (rows,) fp32, and the next three
    entropy_ptr,
    margin_ptr,
    logsumexp_ptr,
    values_ptr,  # (4 or 6, rows, tiles)
    ids_ptr,  # (1 or 2, rows, tiles)
    # sizes
    rows,
    tiles,
    # constexprs
    SAMPLED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PDL: tl.constexpr = False,
):
    wait_for_previous(PDL)
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_t = tl.arange(0, BLOCK_T)[None, :]
    mask_r = offs_r < rows
    mask = mask_r[:, None] & (offs_t < tiles)
    stride_field = tl.cast(rows, tl.int64) * tiles
    values_ptrs = values_ptr + offs_r[:, None] * tiles + offs_t
    ids_ptrs = ids_ptr + offs_r[:, None] * tiles + offs_t
    # [BLOCK_R, BLOCK_T]
    tile_best = tl.load(values_ptrs, mask=mask, other=float("-inf"))
    tile_second = tl.load(values_ptrs + stride_field, mask=mask, other=float("-inf"))
    tile_sum = tl.load(values_ptrs + 2 * stride_field, mask=mask, other=0.0)
    tile_weighted = tl.load(values_ptrs + 3 * stride_field, mask=mask, other=0.0)
    tile_id = tl.load(ids_ptrs, mask=mask, other=_NO_ID)

    best = tl.max(tile_best, 1)  # [BLOCK_R]
    token = tl.min(tl.where(tile_best == best[:, None], tile_id, _NO_ID), 1)
    second = tl.max(tl.where(tile_id == token[:, None], tile_second, tile_best), 1)
    none = best == float("-inf")
    base = tl.where(none, 0.0, best)
    shift = tile_best - base[:, None]
    shift = tl.where(shift < _NEGLIGIBLE, _NEGLIGIBLE, shift)
    factor = tl.exp(shift)
    total = tl.sum(factor * tile_sum, 1)
    weighted = tl.sum(factor * (tile_weighted + shift * tile_sum), 1)
    # A NaN, or +inf less itself, went through every sum.
    poisoned = total != total

    chosen = best
    if SAMPLED:
        tile_score = tl.load(values_ptrs + 4 * stride_field, mask=mask, other=float("-inf"))
        tile_chosen = tl.load(values_ptrs + 5 * stride_field, mask=mask, other=float("-inf"))
        tile_id = tl.load(ids_ptrs + stride_field, mask=mask, other=_NO_ID)
        score = tl.max(tile_score, 1)
        token = tl.min(tl.where(tile_score == score[:, None], tile_id, _NO_ID), 1)
        chosen = tl.sum(tl.where(tile_id == token[:, None], tile_chosen, 0.0), 1)

    total = tl.where(none & (total == 0.0), 1.0, total)
    log_total = tl.log(total)
    nan = float("nan")
    prob = tl.exp(chosen - base) / total
    entropy = log_total - weighted / total
    margin = tl.where(none, 0.0, 1.0 - tl.exp(second - base)) / total
    tl.store(token_ptr + offs_r, tl.where(none | poisoned, 0, token).to(tl.int64), mask=mask_r)
    tl.store(prob_ptr + offs_r, tl.where(poisoned, nan, prob), mask=mask_r)
    tl.store(entropy_ptr + offs_r, tl.where(poisoned, nan, entropy), mask=mask_r)
    tl.store(margin_ptr + offs_r, tl.where(poisoned, nan, margin), mask=mask_r)
    tl.store(logsumexp_ptr + offs_r, tl.where(poisoned, nan, best + log_total), mask=mask_r)


def contiguous(**lists: torch.Tensor | None) -> str | None:
    """None if all that are given are contiguous, otherwise which is not."""
    for name, tensor in lists.items():
        if tensor is not None and not tensor.is_contiguous():
            return f"{name} must be contiguous, got strides {tensor.stride()}"
    return None


def is_sampled(
    counter: torch.Tensor | None, temperature: float, temperatures: torch.Tensor | None
) -> bool:
    """Whether a token is drawn in some rows."""
    return counter is not None and (temperatures is not None or temperature > 0)


def empty_partial(
    rows: int, tiles: int, sampled: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for what the tiles' kernels store: values and ids."""
    fields, ids = (6, 2) if sampled else (4, 1)
    return (
        torch.empty(fields, rows, tiles, dtype=torch.float32, device=device),
        torch.empty(ids, rows, tiles, dtype=torch.int32, device=device),
    )


def options(
    unused: torch.Tensor,
    temperature: float,
    seed: int,
    counter: torch.Tensor | None,
    suppress_ids: torch.Tensor | None,
    tempered: bool,
    softcap: float | None,
    temperatures: torch.Tensor | None,
    sampled: bool,
) -> dict[str, object]:
    """Arguments of ``tile_statistics`` that are the same for every kernel that calls it."""
    noise = counter if sampled else None
    return {
        "counter_ptr": unused if noise is None else noise,
        "temperature_ptr": unused if temperatures is None else temperatures,
        "suppress_ids_ptr": unused if suppress_ids is None else suppress_ids,
        "inverse_temperature": 1 / temperature if sampled and temperature else 1.0,
        "softcap": 1.0 if softcap is None else softcap,
        "seed_lo": signed_word(seed),
        "seed_hi": signed_word(seed >> 32),
        "stride_counter_row": 0 if noise is None else noise.stride(0),
        "stride_counter_word": 0 if noise is None else noise.stride(1),
        "SUPPRESS_COUNT": 0 if suppress_ids is None else suppress_ids.shape[0],
        "HAS_SOFTCAP": softcap is not None,
        "SAMPLED": sampled,
        "HAS_TEMPERATURES": sampled and temperatures is not None,
        "TEMPERED": tempered,
    }


def merge(
    values: torch.Tensor, ids: torch.Tensor, block_r: int, *, pdl: bool = False
) -> tuple[torch.Tensor, ...]:
    """Token, probability, entropy, margin and log-sum-exp from the partial results of the tiles."""
    _, rows, tiles = values.shape
    token = torch.empty(rows, dtype=torch.int64, device=values.device)
    statistics = [torch.empty(rows, dtype=torch.float32, device=values.device) for _ in range(4)]
    if rows:
        _row_stats_merge_kernel[(_tiles.cdiv(rows, block_r),)](
            token_ptr=token,
            prob_ptr=statistics[0],
            entropy_ptr=statistics[1],
            margin_ptr=statistics[2],
            logsumexp_ptr=statistics[3],
            values_ptr=values,
            ids_ptr=ids,
            rows=rows,
            tiles=tiles,
            SAMPLED=values.shape[0] == 6,
            BLOCK_R=block_r,
            BLOCK_T=_tiles.next_power_of_2(tiles),
            num_warps=1 if tiles <= 128 else 4,
            enable_fp_fusion=True,
            **_tiles.pdl(values.device, pdl),
        )
    return token, *statistics


def signed_word(number: int) -> int:
    """The low 32 bits as a signed number, which is what Triton passes as an int32."""
    return ((number & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000
