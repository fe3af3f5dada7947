"""The two matrix products of the experts: expand to gate and up, contract what is between them.

A program has one expert's columns and walks its pairs in tiles; a tile is the same for any number
of rows. Weights of one byte per element are converted exactly; the sum over 128 columns, or the
whole sum, is multiplied by its scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _tiles
from ._weights import SCALE_BLOCK, decoding, load_weight, stored


@triton.jit
def _pairs_of(
    starts_ptr,
    weight_ptr,
    shared_ptr,
    rows,
    experts,
    size,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_SHARED: tl.constexpr,
):
    """A program's weight, and its pairs: those of an expert, or a tile of the shared one's."""
    expert = tl.program_id(0)
    if HAS_SHARED:
        if expert < experts:
            first, last = tl.load(starts_ptr + expert), tl.load(starts_ptr + expert + 1)
            weight_ptr += expert.to(tl.int64) * size
        else:  # its pairs follow those of the rows' slots
            weight_ptr = shared_ptr
            first = rows * TOP_K + (expert - experts) * BLOCK_M
            last = tl.minimum(first + BLOCK_M, rows * (TOP_K + 1))
    else:
        first, last = tl.load(starts_ptr + expert), tl.load(starts_ptr + expert + 1)
        weight_ptr += expert.to(tl.int64) * size
    return weight_ptr, first, last


@triton.jit
def _tile_pairs(order_ptr, at, mask, rows, TOP_K: tl.constexpr, HAS_SHARED: tl.constexpr):
    """The pairs at some places of the order, and the row of each."""
    if TOP_K == 0:  # the shared expert alone
        pair, row = at, at
    else:
        routed = rows * TOP_K
        pair = tl.load(order_ptr + at, mask=mask & (at < routed), other=0)
        row = pair // TOP_K
        if HAS_SHARED:
            own = at >= routed
            pair, row = tl.where(own, at, pair), tl.where(own, at - routed, row)
    return pair.to(tl.int64), row.to(tl.int64)


@triton.jit
def _scale_rows(scale_ptr, offs_n, first, height, depth, IS_BLOCK: tl.constexpr):
    """[N] where the scales of an expert's rows ``first + offs_n`` are; ``height`` rows has each."""
    expert = tl.program_id(0).to(tl.int64)
    if IS_BLOCK:
        columns = tl.cdiv(depth, SCALE_BLOCK)
        rows = expert * tl.cdiv(height, SCALE_BLOCK) + (first + offs_n) // SCALE_BLOCK
        return scale_ptr + rows * columns
    else:
        return scale_ptr + expert * height + first + offs_n


@triton.jit
def _add_product(acc, x, w, scale_ptrs, start, mask_n, IS_BLOCK: tl.constexpr):
    """``acc + x w``, the product times its block's scales."""
    if IS_BLOCK:
        scale = tl.load(scale_ptrs + start // SCALE_BLOCK, mask=mask_n, other=0.0)
        acc += scale[None, :] * tl.dot(x, w, input_precision="ieee")
    else:
        acc = tl.dot(x, w, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["rows", "experts"])
def _experts_expand_kernel(
    # pointers
    act_ptr,  # (pairs, inner), written
    hidden_ptr,  # (rows, width)
    gate_up_ptr,  # (experts, 2 inner, width)
    scale_ptr,  # (experts, 2 inner), or per block of 128 x 128, or None
    shared_ptr,  # (2 inner, width) or None
    order_ptr,  # (rows TOP_K,)
    starts_ptr,  # (experts + 1,)
    # sizes
    rows,
    experts,
    width,
    inner,
    # constexprs
    TOP_K: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_SCALED: tl.constexpr,
    DECODE: tl.constexpr,  # as decoding() says
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    HAS_SHARED: tl.constexpr = shared_ptr is not None
    size = 2 * tl.cast(inner, tl.int64) * width
    weight_ptr, first, last = _pairs_of(
        starts_ptr,
        gate_up_ptr,
        shared_ptr,
        rows,
        experts,
        size,
        TOP_K,
        BLOCK_M,
        HAS_SHARED,
    )
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < inner
    gate_ptrs = weight_ptr + offs_n.to(tl.int64)[None, :] * width + offs_k[:, None]
    up_ptrs = gate_ptrs + tl.cast(inner, tl.int64) * width
    dtype: tl.constexpr = act_ptr.dtype.element_ty
    gate_scales, up_scales = None, None
    if scale_ptr is not None:
        gate_scales = _scale_rows(scale_ptr, offs_n, 0, 2 * inner, width, BLOCK_SCALED)
        up_scales = _scale_rows(scale_ptr, offs_n, inner, 2 * inner, width, BLOCK_SCALED)
    for tile in range(first, last, BLOCK_M):
        at = tile + tl.arange(0, BLOCK_M)
        mask_m = at < last
        pair, row = _tile_pairs(order_ptr, at, mask_m, rows, TOP_K, HAS_SHARED)
        hidden_ptrs = hidden_ptr + row[:, None] * width + offs_k[None, :]
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, width, BLOCK_K):
            mask_k = offs_k < width - start
            mask_weight = mask_k[:, None] & mask_n[None, :]
            # [BLOCK_M, BLOCK_K], [BLOCK_K, BLOCK_N] twice
            hidden = tl.load(hidden_ptrs + start, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            gate_weight = load_weight(gate_ptrs + start, mask_weight, dtype, DECODE)
            up_weight = load_weight(up_ptrs + start, mask_weight, dtype, DECODE)
            gate = _add_product(gate, hidden, gate_weight, gate_scales, start, mask_n, BLOCK_SCALED)
            up = _add_product(up, hidden, up_weight, up_scales, start, mask_n, BLOCK_SCALED)
        if scale_ptr is not None and not BLOCK_SCALED:
            gate *= tl.load(gate_scales, mask=mask_n, other=0.0)[None, :]
            up *= tl.load(up_scales, mask=mask_n, other=0.0)[None, :]
        gate = gate.to(dtype).to(tl.float32)
        if GELU:  # tanh(u) = 1 - 2 / (1 + exp(2 u)), u = sqrt(2 / pi) (g + 0.044715 g^3)
            twice = 1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate)
            gate = gate * (1.0 - 1.0 / (1.0 + tl.exp(twice)))
        else:
            gate = gate / (1.0 + tl.exp(-gate))
        act = gate.to(dtype).to(tl.float32) * up.to(dtype).to(tl.float32)
        out_ptrs = act_ptr + pair[:, None] * inner + offs_n[None, :]
        tl.store(out_ptrs, act.to(dtype), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["rows", "experts"])
def _experts_contract_kernel(
    # pointers
    y_ptr,  # (pairs, width), written
    act_ptr,  # (pairs, inner)
    down_ptr,  # (experts, width, inner)
    scale_ptr,  # (experts, width), or per block of 128 x 128, or None
    shared_ptr,  # (width, inner) or None
    order_ptr,  # (rows TOP_K,)
    starts_ptr,  # (experts + 1,)
    # sizes
    rows,
    experts,
    width,
    inner,
    # constexprs
    TOP_K: tl.constexpr,
    BLOCK_SCALED: tl.constexpr,
    DECODE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    HAS_SHARED: tl.constexpr = shared_ptr is not None
    size = tl.cast(inner, tl.int64) * width
    weight_ptr, first, last = _pairs_of(
        starts_ptr, down_ptr, shared_ptr, rows, experts, size, TOP_K, BLOCK_M, HAS_SHARED
    )
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < width
    weight_ptrs = weight_ptr + offs_n.to(tl.int64)[None, :] * inner + offs_k[:, None]
    scales = None
    if scale_ptr is not None:
        scales = _scale_rows(scale_ptr, offs_n, 0, width, inner, BLOCK_SCALED)
    for tile in range(first, last, BLOCK_M):
        at = tile + tl.arange(0, BLOCK_M)
        mask_m = at < last
        pair, _ = _tile_pairs(order_ptr, at, mask_m, rows, TOP_K, HAS_SHARED)
        act_ptrs = act_ptr + pair[:, None] * inner + offs_k[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, inner, BLOCK_K):
            mask_k = offs_k < inner - start
            # [BLOCK_M, BLOCK_K], [BLOCK_K, BLOCK_N]
            act = tl.load(act_ptrs + start, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            mask_weight = mask_k[:, None] & mask_n[None, :]
            weight = load_weight(weight_ptrs + start, mask_weight, act.dtype, DECODE)
            acc = _add_product(acc, act, weight, scales, start, mask_n, BLOCK_SCALED)
        if scale_ptr is not None and not BLOCK_SCALED:
            acc *= tl.load(scales, mask=mask_n, other=0.0)[None, :]
        out_ptrs = y_ptr + pair[:, None] * width + offs_n[None, :]
        tl.store(out_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def experts_mlp(
    hidden: torch.Tensor,
    halves: tuple[torch.Tensor, torch.Tensor],
    scales: tuple[torch.Tensor | None, torch.Tensor | None],
    shared_halves: tuple[torch.Tensor | None, torch.Tensor | None],
    routes: dict,
    gelu: bool,
    pairs: int,
) -> torch.Tensor:
    """``(pairs, width)``: each expert's output on its rows, and that of the shared one on all.

    ``halves`` are gate_up and down, in each of the pairs.
    """
    (gate_up, down), rows = halves, routes["rows"]
    count, width, inner = down.shape
    quantised = scales[0] is not None
    tile = _tiles.experts_tile(hidden.device, hidden.element_size(), quantised=quantised)
    programs = count + (0 if shared_halves[1] is None else _tiles.cdiv(rows, tile.block_m))
    warps = tile.num_warps if width % 16 == inner % 16 == 0 else tile.unaligned_warps
    act = torch.empty(pairs, inner, dtype=hidden.dtype, device=hidden.device)
    y = torch.empty(pairs, width, dtype=hidden.dtype, device=hidden.device)
    decode = decoding(hidden, gate_up)
    shared = routes | {
        "experts": count,
        "width": width,
        "inner": inner,
        "BLOCK_SCALED": quantised and scales[0].ndim == 3,
        "DECODE": decode,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "num_warps": warps,
        "num_stages": tile.num_stages,
    }
    _experts_expand_kernel[(programs, _tiles.cdiv(inner, tile.block_n))](
        **shared,
        act_ptr=act,
        hidden_ptr=hidden,
        gate_up_ptr=stored(gate_up, decode),
        scale_ptr=scales[0],
        shared_ptr=shared_halves[0],
        GELU=gelu,
    )
    _experts_contract_kernel[(programs, _tiles.cdiv(width, tile.block_n))](
        **shared,
        y_ptr=y,
        act_ptr=act,
        down_ptr=stored(down, decode),
        scale_ptr=scales[1],
        shared_ptr=shared_halves[1],
    )
    return y
