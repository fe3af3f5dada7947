"""The experts of a mixture: order the pairs of row and slot by expert, expand, contract, combine.

Grids follow from shapes, nothing is read on the host, and no sum is shared: a pair is a row of one
tile whatever the others are, and tiles are the same for any number of rows. An expert that no row
chose ends after two loads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _tiles

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit(do_not_specialize=["pairs"])
def _experts_order_kernel(
    # pointers
    order_ptr,  # (pairs,) int32, written: pairs by expert, ascending within one
    starts_ptr,  # (experts + 1,) int32, written: where each expert's pairs begin
    ids_ptr,  # (pairs,) int32
    # sizes
    pairs,
    # constexprs
    BLOCK: tl.constexpr,
):
    expert = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    begin = 0
    for first in range(0, pairs, BLOCK):
        mask = offs + first < pairs
        ids = tl.load(ids_ptr + first + offs, mask=mask, other=2**30)
        begin += tl.sum((ids < expert).to(tl.int32), 0)
    tl.store(starts_ptr + expert, begin)
    for first in range(0, pairs, BLOCK):
        mask = offs + first < pairs
        hit = (tl.load(ids_ptr + first + offs, mask=mask, other=-1) == expert).to(tl.int32)
        tl.store(order_ptr + begin + tl.cumsum(hit, 0) - hit, offs + first, mask=hit > 0)
        begin += tl.sum(hit, 0)
    tl.store(starts_ptr + expert + 1, begin, mask=expert == tl.num_programs(0) - 1)


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


@triton.jit(do_not_specialize=["rows", "experts"])
def _experts_expand_kernel(
    # pointers
    act_ptr,  # (pairs, inner), written
    hidden_ptr,  # (rows, width)
    gate_up_ptr,  # (experts, 2 inner, width)
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
            gate_weight = tl.load(gate_ptrs + start, mask=mask_weight, other=0.0)
            up_weight = tl.load(up_ptrs + start, mask=mask_weight, other=0.0)
            gate = tl.dot(hidden, gate_weight, gate, input_precision="ieee")
            up = tl.dot(hidden, up_weight, up, input_precision="ieee")
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
            weight = tl.load(weight_ptrs + start, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
            acc = tl.dot(act, weight, acc, input_precision="ieee")
        out_ptrs = y_ptr + pair[:, None] * width + offs_n[None, :]
        tl.store(out_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["rows", "experts"])
def _experts_combine_kernel(
    # pointers
    out_ptr,  # (rows, width), written
    y_ptr,  # (rows, TOP_K, width)
    shared_ptr,  # (rows, width) or None
    ids_ptr,  # (rows, TOP_K)
    weights_ptr,  # (rows, TOP_K) fp32
    # sizes
    rows,
    experts,
    width,
    # constexprs
    TOP_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_r, mask_n = offs_r < rows, offs_n < width
    acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    live = offs_r < 0
    for slot in tl.static_range(TOP_K):
        pair = offs_r * TOP_K + slot
        chosen = tl.load(ids_ptr + pair, mask=mask_r, other=0)
        routed = mask_r & (chosen >= 0) & (chosen < experts)
        weight = tl.load(weights_ptr + pair, mask=routed, other=0.0)
        # [BLOCK_R, BLOCK_N]
        y_ptrs = y_ptr + pair[:, None] * width + offs_n[None, :]
        y = tl.load(y_ptrs, mask=routed[:, None] & mask_n[None, :], other=0.0).to(tl.float32)
        acc += y * weight[:, None]
        live = live | routed
    out = acc.to(out_ptr.dtype.element_ty)
    at = offs_r[:, None] * width + offs_n[None, :]
    if shared_ptr is not None:
        shared = tl.load(shared_ptr + at, mask=live[:, None] & mask_n[None, :], other=0.0)
        out = (out.to(tl.float32) + shared.to(tl.float32)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, out, mask=mask_r[:, None] & mask_n[None, :])


def supports(
    hidden: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    shared_gate_up: torch.Tensor | None,
    shared_down: torch.Tensor | None,
    activation: str,
) -> str | None:
    """None if the kernels can run this call, otherwise why not."""
    if hidden.dtype not in _DTYPES:
        return f"the kernel takes fp32, fp16 and bf16, got {hidden.dtype}"
    named = {"hidden": hidden, "gate_up": gate_up, "down": down, "ids": ids, "weights": weights}
    named |= {"shared_gate_up": shared_gate_up, "shared_down": shared_down}
    for name, tensor in named.items():
        if tensor is not None and not tensor.is_contiguous():
            return f"{name} must be contiguous, got strides {tensor.stride()}"
    if ids.numel() + hidden.numel() // max(hidden.shape[-1], 1) >= 2**31:
        return f"the kernel takes fewer than 2^31 pairs of row and expert, got {ids.numel()}"
    halves = (down, shared_down)
    widest = max(size for half in halves if half is not None for size in half.shape[-2:])
    block = _tiles.experts_tile(hidden.device, hidden.element_size()).block_n
    return _tiles.exceeds_grid("columns", widest, block)


def experts(
    hidden: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    shared_gate_up: torch.Tensor | None,
    shared_down: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """Launch the kernels; arguments as in ``pydllm.ops.experts``."""
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    count, width, inner = down.shape
    top_k = ids.shape[-1]
    rows = hidden.numel() // width if width else 0
    if out.numel() == 0:
        return out
    order = torch.empty(max(rows * top_k, 1), dtype=torch.int32, device=hidden.device)
    starts = torch.empty(count + 1, dtype=torch.int32, device=hidden.device)
    _experts_order_kernel[(count,)](
        order_ptr=order,
        starts_ptr=starts,
        ids_ptr=ids,
        pairs=rows * top_k,
        BLOCK=_tiles.EXPERTS_ORDER,
        num_warps=4,
    )
    gelu = activation == "gelu_tanh"
    routes = {"order_ptr": order, "starts_ptr": starts, "rows": rows, "TOP_K": top_k}
    shared_y = None
    if shared_gate_up is not None and shared_down is not None and shared_down.shape[1] == inner:
        # One launch for both: the shared expert's pairs follow the others.
        pairs = rows * (top_k + 1)
        y = _mlp(hidden, gate_up, down, shared_gate_up, shared_down, routes, gelu, pairs)
        shared_y = y[rows * top_k :]
    else:
        y = _mlp(hidden, gate_up, down, None, None, routes, gelu, rows * top_k)
        if shared_gate_up is not None and shared_down is not None:
            alone = routes | {"TOP_K": 0}
            none, halves = gate_up[:0], (shared_gate_up, shared_down)
            shared_y = _mlp(hidden, none, shared_down[None][:0], *halves, alone, gelu, rows)
    height, block, warps = _tiles.experts_combine_tile(hidden.device)
    _experts_combine_kernel[(triton.cdiv(rows, height), triton.cdiv(width, block))](
        out_ptr=out,
        y_ptr=y,
        shared_ptr=shared_y,
        ids_ptr=ids,
        weights_ptr=weights,
        rows=rows,
        experts=count,
        width=width,
        TOP_K=top_k,
        BLOCK_R=height,
        BLOCK_N=block,
        num_warps=warps,
        # Products and sums are rounded one by one, as in the definition.
        enable_fp_fusion=False,
    )
    return out


def _mlp(
    hidden: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    shared_gate_up: torch.Tensor | None,
    shared_down: torch.Tensor | None,
    routes: dict,
    gelu: bool,
    pairs: int,
) -> torch.Tensor:
    """``(pairs, width)``: each expert's output on its rows, and that of the shared one on all."""
    count, width, inner = down.shape
    tile = _tiles.experts_tile(hidden.device, hidden.element_size())
    programs = count + (0 if shared_down is None else triton.cdiv(routes["rows"], tile.block_m))
    warps = tile.num_warps if width % 16 == inner % 16 == 0 else tile.unaligned_warps
    act = torch.empty(pairs, inner, dtype=hidden.dtype, device=hidden.device)
    y = torch.empty(pairs, width, dtype=hidden.dtype, device=hidden.device)
    shared = routes | {"experts": count, "width": width, "inner": inner, "BLOCK_M": tile.block_m}
    _experts_expand_kernel[(programs, triton.cdiv(inner, tile.block_n))](
        **shared,
        act_ptr=act,
        hidden_ptr=hidden,
        gate_up_ptr=gate_up,
        shared_ptr=shared_gate_up,
        GELU=gelu,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        num_warps=warps,
        num_stages=tile.num_stages,
    )
    _experts_contract_kernel[(programs, triton.cdiv(width, tile.block_n))](
        **shared,
        y_ptr=y,
        act_ptr=act,
        down_ptr=down,
        shared_ptr=shared_down,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        num_warps=warps,
        num_stages=tile.num_stages,
    )
    return y
