"""The first pass of ``mixture_accept_sparse``: one program per piece of a row's list."""

from __future__ import annotations

import triton
import triton.language as tl

from ._mixture_round import critical_weight, mix, store_best, weight_of
from ._mixture_scan import NO_ID
from ._row_stats import cap, inverse_of


@triton.jit(do_not_specialize=["rows", "tiles"])
def _mixture_accept_sparse_kernel(
    # pointers
    score_ptr,  # (R, tiles) fp32
    id_ptr,  # (R, tiles) int32
    critical_ptr,  # (R, tiles) fp32
    ids_ptr,  # (R, CAPACITY) int32
    values_ptr,  # (R, CAPACITY) fp32
    noise_ptr,  # (R, CAPACITY) fp32
    size_ptr,  # (R,)
    hidden_ptr,  # (R, width)
    head_ptr,  # (vocab, width)
    bias_ptr,  # (vocab,)
    token_ptr,  # (R,) int64
    length_ptr,  # (R / rows,)
    mixture_ptr,  # (R / rows,)
    temperature_ptr,  # (R,)
    # sizes
    rows,  # of a sequence
    vocab,  # rows of the head
    width,
    tiles,
    mixture,
    inverse_temperature,
    softcap,
    # strides
    stride_hidden_row,
    stride_head_row,
    # constexprs
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_MIXTURES: tl.constexpr,
    HAS_TEMPERATURES: tl.constexpr,
    CRITICAL: tl.constexpr,
    CAPACITY: tl.constexpr,
    CAPACITY_BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    sequence = row // rows
    if row % rows < tl.load(length_ptr + sequence):
        weight = weight_of(mixture_ptr, sequence, mixture, HAS_MIXTURES)
        size = tl.minimum(tl.load(size_ptr + row), CAPACITY)
        offset = row * tiles + tile
        offs_c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = offs_c < size
        if tile * BLOCK_C >= size:
            tl.store(score_ptr + offset, float("-inf"))
            tl.store(id_ptr + offset, NO_ID)
            if CRITICAL:
                tl.store(critical_ptr + offset, tl.where(size == 0, float("inf"), 0.0))
        else:
            ids = tl.load(ids_ptr + row * CAPACITY + offs_c, mask=inside, other=0)
            x = tl.load(values_ptr + row * CAPACITY + offs_c, mask=inside, other=float("-inf"))
            noise = tl.load(noise_ptr + row * CAPACITY + offs_c, mask=inside, other=0.0)
            hidden_ptr += row * stride_hidden_row
            # An id that is not a row of the head would be read elsewhere.
            head_rows = tl.minimum(tl.maximum(ids, 0), vocab - 1)
            head_ptrs = head_ptr + head_rows.to(tl.int64)[:, None] * stride_head_row
            token = tl.load(token_ptr + row)
            token_row = token * 0
            if CRITICAL:
                all_c = tl.arange(0, CAPACITY_BLOCK)
                all_ids = tl.load(ids_ptr + row * CAPACITY + all_c, mask=all_c < size, other=-1)
                listed = (all_c < size) & (all_ids == token)
                # The first candidate stands for a token that is not in the list.
                missing = tl.max(listed.to(tl.int32), 0) == 0
                listed = tl.where(missing, all_c == 0, listed)
                token = tl.sum(tl.where(listed, all_ids, 0), 0).to(tl.int64)
                token_row = tl.minimum(tl.maximum(token, 0), vocab - 1)
            token_ptrs = head_ptr + token_row * stride_head_row
            sums = tl.zeros((BLOCK_C, BLOCK_H), tl.float32)
            token_sums = tl.zeros((BLOCK_H,), tl.float32)
            for start in range(0, width, BLOCK_H):
                offs_h = start + tl.arange(0, BLOCK_H)
                mask_h = offs_h < width
                h = tl.load(hidden_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32)
                # [BLOCK_C, BLOCK_H]
                w = tl.load(
                    head_ptrs + offs_h[None, :], mask=inside[:, None] & mask_h[None, :], other=0.0
                )
                sums += w.to(tl.float32) * h[None, :]
                if CRITICAL:
                    w = tl.load(token_ptrs + offs_h, mask=mask_h, other=0.0)
                    token_sums += w.to(tl.float32) * h
            y = tl.sum(sums, 1)
            if HAS_BIAS:
                y += tl.load(bias_ptr + head_rows, mask=inside, other=0.0).to(tl.float32)
            if HAS_SOFTCAP:
                y = cap(y, softcap)
            inverse = inverse_temperature
            if HAS_TEMPERATURES:
                inverse, _ = inverse_of(tl.load(temperature_ptr + row))
            scores = mix(x, y, weight) * inverse + noise
            # A mixture of 0 looks at ids that are in no list.
            counts = offs_c < tl.where(weight == 0.0, 0, size)
            store_best(score_ptr, id_ptr, offset, scores, ids, counts)
            if CRITICAL:
                y_token = tl.sum(token_sums, 0)
                if HAS_BIAS:
                    y_token += tl.load(bias_ptr + token_row).to(tl.float32)
                if HAS_SOFTCAP:
                    y_token = cap(y_token, softcap)
                all_x = tl.load(values_ptr + row * CAPACITY + all_c, mask=listed, other=0.0)
                all_noise = tl.load(noise_ptr + row * CAPACITY + all_c, mask=listed, other=0.0)
                x_token, noise_token = tl.sum(all_x, 0), tl.sum(all_noise, 0)
                compared = inside & (ids != token)
                least = critical_weight(
                    x, y, noise, x_token, y_token, noise_token, inverse, compared
                )
                tl.store(critical_ptr + offset, least)
