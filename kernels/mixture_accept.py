"""Targets of a mixture and the leading run of drafts that they equal.

A program takes a piece of a row (ids of the vocabulary, or entries of a list of candidates) and
stores its best; ``_mixture_scan.py`` merges the pieces.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _tiles
from ._mixture_accept_sparse import _mixture_accept_sparse_kernel
from ._mixture_round import critical_weight, mix, store_best, weight_of
from ._mixture_scan import NO_ID, Pieces
from ._primitives import id_gumbel, quad_gumbel
from ._row_stats import MAX_TILES, inverse_of, signed_word

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
        weight = weight_of(mixture_ptr, sequence, mixture, HAS_MIXTURES)
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
            scores = mix(x, y, weight) * inverse + noise
            store_best(score_ptr, id_ptr, offset, scores, offs_v, inside)
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
                least = critical_weight(
                    x, y, noise, x_token, y_token, noise_token, inverse, compared
                )
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
