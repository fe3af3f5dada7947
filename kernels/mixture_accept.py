"""Targets of a mixture and the leading run of drafts that they equal.

A program takes a piece of a row, of the vocabulary or of a list of candidates, and stores its best;
``_mixture_scan.py`` merges the pieces.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _tiles
from ._mixture_scan import NO_ID, Pieces
from ._primitives import id_gumbel, quad_gumbel
from ._row_stats import MAX_TILES, cap, inverse_of, signed_word

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _mix(x, y, weight):
    """``weight * x + (1 - weight) * y``, such that equal numbers give that number."""
    mix = y + weight * (x - y)
    mix = tl.where((x == float("-inf")) | (y == float("-inf")), float("-inf"), mix)
    return tl.where(weight == 1.0, x, tl.where(weight == 0.0, y, mix))


@triton.jit
def _weight_of(mixture_ptr, sequence, mixture, HAS_MIXTURES: tl.constexpr):
    weight = tl.full((), mixture, tl.float32)
    if HAS_MIXTURES:
        weight = tl.load(mixture_ptr + sequence)
        weight = tl.where((weight >= 0.0) & (weight <= 1.0), weight, float("nan"))
    return weight


@triton.jit
def _store_best(score_ptr, id_ptr, offset, scores, ids, inside):
    """The best of a piece, of the ids inside; a NaN for what has no distribution."""
    scores = tl.where(inside, scores, float("-inf"))
    best = tl.max(scores, 0)
    poisoned = tl.max((inside & ((scores < float("inf")) == 0)).to(tl.int32), 0)
    chosen = tl.min(tl.where(scores == best, ids, NO_ID), 0)
    tl.store(score_ptr + offset, tl.where(poisoned != 0, float("nan"), best))
    tl.store(id_ptr + offset, chosen)


@triton.jit
def _critical(x, y, noise, x_chosen, y_chosen, noise_chosen, inverse, compared):
    """The smallest weight at which none of the ids compared is ahead of the chosen one."""
    ahead = (x_chosen * inverse + noise_chosen) - (x * inverse + noise)
    need = (y * inverse + noise) - (y_chosen * inverse + noise_chosen)
    ratio = tl.where(compared & (need > 0.0), need / (ahead + need), 0.0)
    return tl.where(y_chosen == float("-inf"), 1.0, tl.max(ratio, 0))


# A new batch, seed or mixture must not compile the kernel again.
@triton.jit(do_not_specialize=["rows", "shared", "tiles", "seed_lo", "seed_hi"])
def _mixture_accept_tile_kernel(
    # pointers
    score_ptr,  # (R, tiles) fp32
    id_ptr,  # (R, tiles) int32
    critical_ptr,  # (R, tiles) fp32
    logits_ptr,  # (R, vocab)
    verifier_ptr,  # (R, verifier_vocab)
    token_ptr,  # (R,) int64
    length_ptr,  # (R / rows,)
    mixture_ptr,  # (R / rows,)
    threshold_ptr,  # (R,)
    temperature_ptr,  # (R,)
    counter_ptr,  # (R, 3)
    suppress_ids_ptr,  # (SUPPRESS_COUNT,)
    # sizes
    rows,  # of a sequence
    vocab,
    verifier_vocab,
    shared,
    tiles,
    mixture,
    inverse_temperature,
    seed_lo,
    seed_hi,
    # strides
    stride_logits_row,
    stride_verifier_row,
    stride_counter_row,
    stride_counter_word,
    # constexprs
    SUPPRESS_COUNT: tl.constexpr,
    HAS_MIXTURES: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    HAS_TEMPERATURES: tl.constexpr,
    SAMPLED: tl.constexpr,
    CRITICAL: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    sequence = row // rows
    if row % rows < tl.load(length_ptr + sequence):
        weight = _weight_of(mixture_ptr, sequence, mixture, HAS_MIXTURES)
        offs_v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        # The rows' own ends in the masks keep loads wide where the shared ids end at any number.
        ends = vocab, verifier_vocab
        if not CRITICAL:
            ends = tl.where(weight == 0.0, 0, vocab), tl.where(weight == 1.0, 0, verifier_vocab)
        mask_x, mask_y = offs_v < ends[0], offs_v < ends[1]
        logits_ptr += row * stride_logits_row
        x = tl.load(logits_ptr + offs_v, mask=mask_x, other=float("-inf")).to(tl.float32)
        inside = offs_v < shared
        for i in tl.static_range(SUPPRESS_COUNT):
            inside = inside & (offs_v != tl.load(suppress_ids_ptr + i))
        nucleus = inside
        if HAS_THRESHOLD:
            nucleus = inside & ((x < tl.load(threshold_ptr + row)) == 0)
            inside = tl.where(weight == 0.0, inside, nucleus)
        offset = row * tiles + tile
        if tl.max(inside.to(tl.int32), 0) == 0:
            tl.store(score_ptr + offset, float("-inf"))
            tl.store(id_ptr + offset, NO_ID)
            if CRITICAL:
                tl.store(critical_ptr + offset, 0.0)
        else:
            verifier_ptr += row * stride_verifier_row
            y = tl.load(verifier_ptr + offs_v, mask=mask_y, other=float("-inf")).to(tl.float32)
            inverse = inverse_temperature
            noise = tl.zeros((BLOCK_V,), tl.float32)
            if SAMPLED:
                counter_ptr += row * stride_counter_row
                position = tl.load(counter_ptr)
                counter_ptr += stride_counter_word
                request = tl.load(counter_ptr)
                draw = tl.load(counter_ptr + stride_counter_word)
                quads = tile * (BLOCK_V // 4) + tl.arange(0, BLOCK_V // 4)
                noise = quad_gumbel(quads, position, request, draw, seed_lo, seed_hi)
                if HAS_TEMPERATURES:
                    inverse, noisy = inverse_of(tl.load(temperature_ptr + row))
                    noise = tl.where(noisy, noise, 0.0)
            scores = _mix(x, y, weight) * inverse + noise
            _store_best(score_ptr, id_ptr, offset, scores, offs_v, inside)
            if CRITICAL:
                token = tl.load(token_ptr + row)
                known = (token >= 0) & (token < shared)
                token = tl.where(known, token, 0)
                x_token = tl.load(logits_ptr + token).to(tl.float32)
                y_token = tl.load(verifier_ptr + token).to(tl.float32)
                noise_token = 0.0
                if SAMPLED:
                    noise_token = id_gumbel(token, position, request, draw, seed_lo, seed_hi)
                    if HAS_TEMPERATURES:
                        noise_token = tl.where(noisy, noise_token, 0.0)
                compared = nucleus & (x > float("-inf")) & (offs_v != token)
                least = _critical(x, y, noise, x_token, y_token, noise_token, inverse, compared)
                tl.store(critical_ptr + offset, least)


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
        weight = _weight_of(mixture_ptr, sequence, mixture, HAS_MIXTURES)
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
            scores = _mix(x, y, weight) * inverse + noise
            # A mixture of 0 looks at ids that are in no list.
            counts = offs_c < tl.where(weight == 0.0, 0, size)
            _store_best(score_ptr, id_ptr, offset, scores, ids, counts)
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
                least = _critical(x, y, noise, x_token, y_token, noise_token, inverse, compared)
                tl.store(critical_ptr + offset, least)


def supports(
    logits: torch.Tensor,
    verifier: torch.Tensor,
    token: torch.Tensor,
    length: torch.Tensor,
    mixture: float,
    mixtures: torch.Tensor | None,
    threshold: torch.Tensor | None,
    temperature: float,
    temperatures: torch.Tensor | None,
    seed: int,
    counter: torch.Tensor | None,
    suppress_ids: torch.Tensor | None,
    shared: int,
    first_free: bool,
    critical: bool,
) -> str | None:
    """None if the kernel can run this call, otherwise why not."""
    lists = (token, length, mixtures, threshold, temperatures, suppress_ids)
    most = MAX_TILES * _tiles.mixture_accept_tile(logits.device).block_v
    return _why_not(logits, verifier, lists) or _tiles.exceeds_vocab(shared, most)


def sparse_supports(
    ids: torch.Tensor,
    logits: torch.Tensor,
    noise: torch.Tensor,
    size: torch.Tensor,
    hidden: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    token: torch.Tensor,
    length: torch.Tensor,
    mixture: float,
    mixtures: torch.Tensor | None,
    temperature: float,
    temperatures: torch.Tensor | None,
    softcap: float | None,
    first_free: bool,
    critical: bool,
) -> str | None:
    """None if the kernel can run this call, otherwise why not."""
    lists = (ids, logits, noise, size, bias, token, length, mixtures, temperatures)
    return _why_not(hidden, head, lists)


def _why_not(
    logits: torch.Tensor, verifier: torch.Tensor, lists: tuple[torch.Tensor | None, ...]
) -> str | None:
    if logits.dtype not in _DTYPES:
        return f"the kernel takes fp32, fp16 and bf16, got {logits.dtype}"
    for matrix in (logits, verifier):
        if matrix.shape[1] > 1 and matrix.stride(1) != 1:
            return f"matrices must be rows of contiguous elements, got strides {matrix.stride()}"
    for tensor in lists:
        if tensor is not None and not tensor.is_contiguous():
            return f"what is one entry per row must be contiguous, got strides {tensor.stride()}"
    return None


def mixture_accept(
    logits: torch.Tensor,
    verifier: torch.Tensor,
    token: torch.Tensor,
    length: torch.Tensor,
    mixture: float,
    mixtures: torch.Tensor | None,
    threshold: torch.Tensor | None,
    temperature: float,
    temperatures: torch.Tensor | None,
    seed: int,
    counter: torch.Tensor | None,
    suppress_ids: torch.Tensor | None,
    shared: int,
    first_free: bool,
    critical: bool,
) -> tuple[torch.Tensor, ...]:
    """Launch the kernels; ``mixtures`` and ``temperatures`` are tensors that may stand for one."""
    tile = _tiles.mixture_accept_tile(logits.device)
    tiles = _tiles.cdiv(shared, tile.block_v)
    sampled = counter is not None and (temperatures is not None or temperature > 0)
    pieces = Pieces(token, length, tiles, critical)
    if token.shape[0]:
        _mixture_accept_tile_kernel[(token.shape[0] * tiles,)](
            **pieces.arguments(mixture, mixtures, temperature, temperatures, sampled),
            logits_ptr=logits,
            verifier_ptr=verifier,
            threshold_ptr=pieces.scores if threshold is None else threshold,
            counter_ptr=counter if sampled else length,
            suppress_ids_ptr=length if suppress_ids is None else suppress_ids,
            vocab=logits.shape[1],
            verifier_vocab=verifier.shape[1],
            shared=shared,
            seed_lo=signed_word(seed),
            seed_hi=signed_word(seed >> 32),
            stride_logits_row=logits.stride(0),
            stride_verifier_row=verifier.stride(0),
            stride_counter_row=counter.stride(0) if sampled else 0,
            stride_counter_word=counter.stride(1) if sampled else 0,
            SUPPRESS_COUNT=0 if suppress_ids is None else suppress_ids.shape[0],
            HAS_THRESHOLD=threshold is not None,
            SAMPLED=sampled,
            BLOCK_V=tile.block_v,
            num_warps=tile.num_warps * (2 if critical else 1),  # else it spills
            # Noise, mixture and score must have the bits of the definition.
            enable_fp_fusion=False,
        )
    return pieces.scan(first_free)


def mixture_accept_sparse(
    ids: torch.Tensor,
    logits: torch.Tensor,
    noise: torch.Tensor,
    size: torch.Tensor,
    hidden: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    token: torch.Tensor,
    length: torch.Tensor,
    mixture: float,
    mixtures: torch.Tensor | None,
    temperature: float,
    temperatures: torch.Tensor | None,
    softcap: float | None,
    first_free: bool,
    critical: bool,
) -> tuple[torch.Tensor, ...]:
    """Launch the kernels on lists of candidates."""
    tile = _tiles.mixture_accept_tile(hidden.device)
    capacity = ids.shape[1]
    tiles = _tiles.cdiv(capacity, tile.block_c)
    pieces = Pieces(token, length, tiles, critical)
    if token.shape[0]:
        _mixture_accept_sparse_kernel[(token.shape[0] * tiles,)](
            **pieces.arguments(mixture, mixtures, temperature, temperatures, True),
            ids_ptr=ids,
            values_ptr=logits,
            noise_ptr=noise,
            size_ptr=size,
            hidden_ptr=hidden,
            head_ptr=head,
            bias_ptr=head if bias is None else bias,
            vocab=head.shape[0],
            width=hidden.shape[1],
            softcap=1.0 if softcap is None else softcap,
            stride_hidden_row=hidden.stride(0),
            stride_head_row=head.stride(0),
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            CAPACITY=capacity,
            CAPACITY_BLOCK=_tiles.next_power_of_2(capacity),
            BLOCK_C=tile.block_c,
            BLOCK_H=tile.block_h,
            num_warps=tile.num_warps,
            enable_fp_fusion=False,
        )
    return pieces.scan(first_free)
