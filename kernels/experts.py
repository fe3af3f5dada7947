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
from ._experts_mlp import experts_mlp

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
    gate_up_scale: torch.Tensor | None = None,
    down_scale: torch.Tensor | None = None,
) -> str | None:
    """None if the kernels can run this call, otherwise why not."""
    if hidden.dtype not in _DTYPES:
        return f"the kernel takes fp32, fp16 and bf16, got {hidden.dtype}"
    named = {"hidden": hidden, "gate_up": gate_up, "down": down, "ids": ids, "weights": weights}
    named |= {"shared_gate_up": shared_gate_up, "shared_down": shared_down}
    named |= {"scale of gate_up": gate_up_scale, "scale of down": down_scale}
    for name, tensor in named.items():
        if tensor is not None and not tensor.is_contiguous():
            return f"{name} must be contiguous, got strides {tensor.stride()}"
    if ids.numel() + hidden.numel() // max(hidden.shape[-1], 1) >= 2**31:
        return f"the kernel takes fewer than 2^31 pairs of row and expert, got {ids.numel()}"
    halves = (down, shared_down)
    widest = max(size for half in halves if half is not None for size in half.shape[-2:])
    quantised = gate_up_scale is not None
    tile = _tiles.experts_tile(hidden.device, hidden.element_size(), quantised=quantised)
    return _tiles.exceeds_grid("columns", widest, tile.block_n)


def experts(
    hidden: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    shared_gate_up: torch.Tensor | None,
    shared_down: torch.Tensor | None,
    activation: str,
    gate_up_scale: torch.Tensor | None = None,
    down_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launch the kernels; arguments as in ``pydllm.ops.experts``, quantised weights in parts."""
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
    halves, shared_y = (gate_up, down), None
    scales = gate_up_scale, down_scale
    has_shared = shared_gate_up is not None and shared_down is not None
    if has_shared and shared_down.shape[1] == inner and gate_up_scale is None:
        # One launch for both: the shared expert's pairs follow the others.
        pairs = rows * (top_k + 1)
        y = experts_mlp(hidden, halves, scales, (shared_gate_up, shared_down), routes, gelu, pairs)
        shared_y = y[rows * top_k :]
    else:
        y = experts_mlp(hidden, halves, scales, (None, None), routes, gelu, rows * top_k)
        if has_shared:
            alone, none = routes | {"TOP_K": 0}, (shared_gate_up[None][:0], shared_down[None][:0])
            shared = shared_gate_up, shared_down
            shared_y = experts_mlp(hidden, none, (None, None), shared, alone, gelu, rows)
    height, block, warps = _tiles.experts_combine_tile(hidden.device)
    _experts_combine_kernel[(_tiles.cdiv(rows, height), _tiles.cdiv(width, block))](
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
