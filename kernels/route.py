"""The router of a mixture of experts: logits in fixed splits, block pools, and the choice.

A logit is the sum of fixed splits of the hidden dimension in ascending order, whatever the number
of rows. Choices are compared as integers that hold the number of the expert: no two are equal.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _tiles

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_EXPERTS = 1024


@triton.jit(do_not_specialize=["rows"])
def _route_logits_kernel(
    # pointers
    partial_ptr,  # (splits, rows, experts) fp32
    hidden_ptr,  # (rows, width)
    router_ptr,  # (experts, width)
    # sizes
    rows,
    experts,
    width,
    # strides
    stride_hidden_row,
    # constexprs
    PRECISE: tl.constexpr,  # operands are widened to fp32
    SPLIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    offs_e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    offs_r = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    offs_h = split * SPLIT + tl.arange(0, BLOCK_H)
    mask_r, mask_e = offs_r < rows, offs_e < experts
    acc = tl.zeros((BLOCK_R, BLOCK_E), tl.float32)
    for first in tl.static_range(0, SPLIT, BLOCK_H):
        mask_h = offs_h + first < width
        # [BLOCK_R, BLOCK_H]
        hidden = tl.load(
            hidden_ptr + offs_r[:, None] * stride_hidden_row + (offs_h + first)[None, :],
            mask=mask_r[:, None] & mask_h[None, :],
            other=0.0,
        )
        # [BLOCK_H, BLOCK_E]
        router = tl.load(
            router_ptr + offs_e.to(tl.int64)[None, :] * width + (offs_h + first)[:, None],
            mask=mask_e[None, :] & mask_h[:, None],
            other=0.0,
        )
        if PRECISE:
            hidden = hidden.to(tl.float32)
            router = router.to(tl.float32)
        acc = tl.dot(hidden, router, acc, input_precision="ieee")
    out_ptrs = partial_ptr + (split * rows + offs_r)[:, None] * experts + offs_e[None, :]
    tl.store(out_ptrs, acc, mask=mask_r[:, None] & mask_e[None, :])


@triton.jit
def _logits(partial_ptr, offs_r, mask_r, rows, experts, splits, offs_e, mask_e):
    """The logits of rows: the sum of their splits in ascending order, [BLOCK_R, BLOCK_E]."""
    mask = mask_r[:, None] & mask_e[None, :]
    acc = tl.zeros((offs_r.shape[0], offs_e.shape[0]), tl.float32)
    for split in range(0, splits):
        at = (split * rows + offs_r)[:, None] * experts + offs_e[None, :]
        acc += tl.load(partial_ptr + at, mask=mask, other=0.0)
    return acc


@triton.jit
def _choices(logits, bias_ptr, offs_e, mask_e):
    """Sigmoid scores, and what experts are compared by: ``-inf`` for a NaN or no expert."""
    scores = 1.0 / (1.0 + tl.exp(-logits))
    choice = scores
    if bias_ptr is not None:
        choice += tl.load(bias_ptr + offs_e, mask=mask_e, other=0.0)[None, :]
    return scores, tl.where((choice == choice) & mask_e[None, :], choice, float("-inf"))


@triton.jit
def _keys(values, index):
    """int64 keys that sort by value, which is not NaN, then to the lower index first."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit(do_not_specialize=["rows", "window_rows"])
def _route_pool_kernel(
    # pointers
    pool_ptr,  # (windows, blocks, experts) int8, written: 1 for admitted
    partial_ptr,  # (splits, rows, experts) fp32
    bias_ptr,  # (experts,) fp32 or None
    start_ptr,  # (batch,)
    length_ptr,  # (batch,) or None
    # sizes
    rows,
    window_rows,
    branches,
    experts,
    splits,
    block_size,
    capacity,
    # constexprs
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    window, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sequence = window // branches
    start = tl.load(start_ptr + sequence)
    live = window_rows
    if length_ptr is not None:
        live = tl.minimum(live, tl.load(length_ptr + sequence))
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < experts
    # Window rows of the block that are live and at a position.
    number = tl.maximum(start, 0) // block_size + block
    first = tl.maximum(tl.maximum(number * block_size - start, -start), 0)
    last = tl.minimum((number + 1) * block_size - start, live)
    best = tl.full((BLOCK_E,), float("-inf"), tl.float32)
    for at in range(first, last, BLOCK_R):
        offs_r = at + tl.arange(0, BLOCK_R)
        mask_r = offs_r < last
        logits = _logits(
            partial_ptr,
            window * window_rows + offs_r,
            mask_r,
            rows,
            experts,
            splits,
            offs_e,
            mask_e,
        )
        _, choice = _choices(logits, bias_ptr, offs_e, mask_e)
        best = tl.maximum(best, tl.max(tl.where(mask_r[:, None], choice, float("-inf")), 0))
    keys = tl.where(mask_e, _keys(best, offs_e), -(2**63))
    admitted = tl.zeros((BLOCK_E,), tl.int32)
    for _ in range(0, capacity):
        hit = keys == tl.max(keys, 0)
        admitted = tl.where(hit, 1, admitted)
        keys = tl.where(hit, -(2**63), keys)
    out_ptrs = pool_ptr + (window * tl.num_programs(1) + block) * experts + offs_e
    tl.store(out_ptrs, admitted.to(tl.int8), mask=mask_e)


@triton.jit
def _best_groups(choice, offs_e, GROUPS: tl.constexpr, TOPK_GROUPS: tl.constexpr):
    """``choice`` with ``-inf`` outside of the groups whose two best have the highest sums."""
    ROWS: tl.constexpr = choice.shape[0]
    SIZE: tl.constexpr = choice.shape[1] // GROUPS
    grouped = tl.reshape(choice, (ROWS, GROUPS, SIZE))
    keys = tl.reshape(_keys(choice, offs_e[None, :]), (ROWS, GROUPS, SIZE))
    first = keys == tl.max(keys, 2)[:, :, None]
    second = tl.max(tl.where(first, float("-inf"), grouped), 2)
    left = _keys(tl.max(grouped, 2) + second, tl.arange(0, GROUPS)[None, :])
    kept = tl.zeros((ROWS, GROUPS), tl.int32)
    for _ in tl.static_range(TOPK_GROUPS):
        hit = left == tl.max(left, 1)[:, None]
        kept = tl.where(hit, 1, kept)
        left = tl.where(hit, -(2**63), left)
    kept = tl.where(kept[:, :, None] > 0, grouped, float("-inf"))
    return tl.reshape(kept, (ROWS, GROUPS * SIZE))


@triton.jit(do_not_specialize=["rows", "window_rows", "blocks"])
def _route_select_kernel(
    # pointers
    ids_ptr,  # (rows, TOP_K) int32, written
    weights_ptr,  # (rows, TOP_K) fp32, written
    partial_ptr,  # (splits, rows, experts) fp32
    bias_ptr,  # (experts,) fp32 or None
    pool_ptr,  # (windows, blocks, experts) int8 or None
    start_ptr,  # (batch,) or None
    length_ptr,  # (batch,) or None
    hidden_ptr,  # its dtype is what softmax logits are rounded to
    # sizes
    rows,
    window_rows,
    branches,
    experts,
    splits,
    blocks,
    block_size,
    scale,
    # constexprs
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < rows
    window = offs_r // window_rows
    sequence = window // branches
    at = (offs_r % window_rows).to(tl.int32)
    alive = mask_r
    if length_ptr is not None:
        alive = alive & (at < tl.load(length_ptr + sequence, mask=mask_r, other=0))
    start = tl.zeros((BLOCK_R,), tl.int32)
    if start_ptr is not None:
        start = tl.load(start_ptr + sequence, mask=mask_r, other=0)
        alive = alive & (start + at >= 0)
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < experts
    # [BLOCK_R, BLOCK_E]
    logits = _logits(partial_ptr, offs_r, mask_r, rows, experts, splits, offs_e, mask_e)
    if SIGMOID:
        scores, choice = _choices(logits, bias_ptr, offs_e, mask_e)
    else:
        logits = logits.to(hidden_ptr.dtype.element_ty).to(tl.float32)
        choice = tl.where((logits == logits) & mask_e[None, :], logits, float("-inf"))
        scores = tl.where(mask_e[None, :], tl.exp(logits - tl.max(choice, 1)[:, None]), 0.0)
        scores = scores / tl.sum(scores, 1)[:, None]
    if pool_ptr is not None:
        block = tl.maximum(start + at, 0) // block_size - tl.maximum(start, 0) // block_size
        pool_ptrs = pool_ptr + (window * blocks + block)[:, None] * experts + offs_e[None, :]
        admitted = tl.load(pool_ptrs, mask=alive[:, None] & mask_e[None, :], other=0)
        choice = tl.where(admitted > 0, choice, float("-inf"))
    elif GROUPS > 1:
        choice = _best_groups(choice, offs_e, GROUPS, TOPK_GROUPS)
    keys = _keys(choice, offs_e[None, :])
    slot = tl.arange(0, BLOCK_K)[None, :]
    ids = tl.zeros((BLOCK_R, BLOCK_K), tl.int32)
    weights = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for k in tl.static_range(TOP_K):
        hit = keys == tl.max(keys, 1)[:, None]
        own = tl.sum(tl.where(hit, scores, 0.0), 1)
        total += own
        ids = tl.where(slot == k, tl.sum(tl.where(hit, offs_e[None, :], 0), 1)[:, None], ids)
        weights = tl.where(slot == k, own[:, None], weights)
        keys = tl.where(hit, -(2**63), keys)
    if RENORMALIZE:
        if SIGMOID:
            total += 1e-20
        weights = weights / total[:, None]
    mask = mask_r[:, None] & (slot < TOP_K)
    out = offs_r[:, None] * TOP_K + slot
    tl.store(ids_ptr + out, tl.where(alive[:, None], ids, experts), mask=mask)
    tl.store(weights_ptr + out, tl.where(alive[:, None], weights * scale, 0.0), mask=mask)


def supports(
    hidden: torch.Tensor,
    router: torch.Tensor,
    bias: torch.Tensor | None,
    length: torch.Tensor | None,
    start: torch.Tensor | None,
    top_k: int,
    score: str,
    renormalize: bool,
    scale: float,
    groups: int,
    topk_groups: int,
    capacity: int | None,
    block_size: int | None,
    branches: int,
) -> str | None:
    """None if the kernel can run this call, otherwise why not."""
    if hidden.dtype not in _DTYPES:
        return f"the kernel takes fp32, fp16 and bf16, got {hidden.dtype}"
    named = {"hidden": hidden, "router": router, "bias": bias, "length": length, "start": start}
    for name, tensor in named.items():
        if tensor is not None and not tensor.is_contiguous():
            return f"{name} must be contiguous, got strides {tensor.stride()}"
    experts = router.shape[0]
    if experts > MAX_EXPERTS:
        return f"the kernel takes up to {MAX_EXPERTS} experts, got {experts}"
    if groups > 1 and (experts & (experts - 1) or groups & (groups - 1)):
        return (
            f"the kernel takes groups where experts and groups are powers of two, got {experts} "
            f"experts in {groups} groups"
        )
    batch, rows, width = hidden.shape
    exceeds, tile = _tiles.exceeds_grid, _tiles.route_tile(hidden.device)
    reason = exceeds("rows", batch * rows, tile.block_r) or exceeds("columns", width, tile.split)
    if reason is None and capacity is not None:
        reason = exceeds("blocks in a window", rows // branches // (block_size or 1) + 2)
    return reason


def route(
    hidden: torch.Tensor,
    router: torch.Tensor,
    bias: torch.Tensor | None,
    length: torch.Tensor | None,
    start: torch.Tensor | None,
    top_k: int,
    score: str,
    renormalize: bool,
    scale: float,
    groups: int,
    topk_groups: int,
    capacity: int | None,
    block_size: int | None,
    branches: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernels; arguments as in ``pydllm.ops.route``."""
    batch, height, width = hidden.shape
    experts, rows, window_rows = router.shape[0], batch * height, height // branches
    ids = torch.empty(batch, height, top_k, dtype=torch.int32, device=hidden.device)
    weights = torch.empty(batch, height, top_k, dtype=torch.float32, device=hidden.device)
    if rows == 0:
        return ids, weights
    is_precise = score == "sigmoid"
    tensor_cores = hidden.element_size() == 2 and not is_precise
    tile = _tiles.route_tile(hidden.device, tensor_cores=tensor_cores)
    splits = _tiles.cdiv(width, tile.split)
    partial = torch.empty(splits, rows, experts, dtype=torch.float32, device=hidden.device)
    grid = (_tiles.cdiv(experts, tile.block_e), _tiles.cdiv(rows, tile.block_r), splits)
    _route_logits_kernel[grid](
        partial_ptr=partial,
        hidden_ptr=hidden,
        router_ptr=router,
        rows=rows,
        experts=experts,
        width=width,
        stride_hidden_row=width,
        PRECISE=is_precise,
        SPLIT=tile.split,
        BLOCK_R=tile.block_r,
        BLOCK_E=tile.block_e,
        BLOCK_H=tile.block_h,
        num_warps=tile.num_warps,
    )
    shared = {
        "partial_ptr": partial,
        "bias_ptr": bias,
        "start_ptr": start,
        "length_ptr": length,
        "rows": rows,
        "window_rows": window_rows,
        "branches": branches,
        "experts": experts,
        "splits": splits,
        "block_size": block_size or 1,
        "BLOCK_E": _tiles.next_power_of_2(experts),
        # A sigmoid must have the same bits in both.
        "enable_fp_fusion": False,
    }
    pool, blocks = None, 0
    if capacity is not None:
        blocks = window_rows // block_size + 2
        pool = torch.empty(
            batch * branches, blocks, experts, dtype=torch.int8, device=hidden.device
        )
        _route_pool_kernel[(batch * branches, blocks)](
            **shared,
            pool_ptr=pool,
            capacity=capacity,
            BLOCK_R=tile.pool_rows,
            num_warps=tile.pool_warps,
        )
    _route_select_kernel[(_tiles.cdiv(rows, tile.select_rows),)](
        **shared,
        ids_ptr=ids,
        weights_ptr=weights,
        pool_ptr=pool,
        hidden_ptr=hidden,
        blocks=blocks,
        scale=scale,
        SIGMOID=score == "sigmoid",
        RENORMALIZE=renormalize,
        GROUPS=groups,
        TOPK_GROUPS=topk_groups,
        TOP_K=top_k,
        BLOCK_R=tile.select_rows,
        BLOCK_K=_tiles.next_power_of_2(top_k),
        num_warps=tile.select_warps,
    )
    return ids, weights
