"""Attention of a window over cached and fresh keys; RoPE and the commit are in the same launch.

A program owns BLOCK_M query rows of one KV head: window rows with the heads of the group packed
beside them, branch after branch, so that short windows fill a tile. It walks the keys in order of
position, in tiles of BLOCK_N positions counted from ``pad``: tiles before the window, on it (each
once for every branch that it has rows of), after it. On the window a key row is read from the fresh
K/V or from the cache through one pointer. Window slots of the cache are never read, so the commit
needs no order between programs. Where a key sits in its tile depends on its position alone: a row's
bits do not depend on the batch, on other branches, on padding, or on which keys are cached.

Short windows sum their keys in splits, always the same positions, merged in order of position: by
one program that walks all of them, or by a second kernel after several programs. Both do the same
operations (``merge_split``), so that the bits do not depend on how many programs fill the device.
Long windows rotate their keys in a pass of their own (``_attention_rotate.py``). Leaves are
branches after the trunk, branch 0: on the window their keys are the trunk's as far as the root,
then theirs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import _tiles
from ._attention import Fresh, RopeParams, commit_rows, load_rotated, padding, sequence_cache
from ._attention_merge import merge, scratch
from ._attention_rotate import rotate_and_commit
from ._attention_tiles import (
    LOG2_E,
    Leaves,
    Limits,
    Parts,
    Scores,
    Span,
    attend_keys,
    merge_split,
    no_keys,
    store_split,
)
from ._heads import alignment, cache_arguments, strides
from ._primitives import wait_for_previous

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_HEAD_DIM = 512


@triton.jit
def _window_attention_kernel(
    # pointers
    out_ptr,  # (B, T, Hq, D) contiguous; where splits are stored (splits, B, T, Hq, D) fp32
    state_ptr,  # (2, splits, B, T, Hq) fp32: maximum and sum of each row, where splits are stored
    k_cache_ptr,  # (B, L, Hkv, D) or (pages, PAGE, Hkv, D); rows below `commit` are written
    v_cache_ptr,
    q_ptr,  # (B, T, Hq, D)
    k_ptr,  # (B, T, Hkv, D), rotated where IS_ROTATED
    v_ptr,
    start_ptr,  # (B,) int32, as the next four
    length_ptr,
    kv_len_ptr,
    commit_ptr,
    pad_ptr,  # or None
    cos_ptr,  # (positions, HALF) fp32
    sin_ptr,
    q_norm_ptr,  # (D,) or None
    k_norm_ptr,
    table_ptr,  # (B, slots / PAGE) int32 or None
    block_offset_ptr,  # (B,) int32 or None
    # sizes
    window,  # rows of a branch, or of the trunk
    branches,  # with leaves 1 more than there are
    leaf_rows,  # or None
    first_tile,  # of the rows that the launch computes, or None: all
    slots,
    pages,  # of the cache, where there is a table
    block_size,  # of the block-causal mask, or None
    sliding_window,  # or None
    eps,
    qk_scale,  # scale * log2(e), or scale / softcap
    softcap,  # softcap * log2(e), or None
    splits,  # of the keys
    groups,  # programs that share the splits
    # strides
    stride_q_batch,
    stride_q_row,
    stride_q_head,
    stride_k_batch,
    stride_k_row,
    stride_k_head,
    stride_v_batch,
    stride_v_row,
    stride_v_head,
    stride_k_cache_batch,
    stride_k_cache_row,
    stride_k_cache_head,
    stride_v_cache_batch,
    stride_v_cache_row,
    stride_v_cache_head,
    # constexprs
    HAS_BRANCHES: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    IS_ROTATED: tl.constexpr,  # and the commit is done
    WALK: tl.constexpr,  # see end_split
    ALIGN: tl.constexpr,  # bytes that every row of a head begins at a multiple of
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_COMMIT: tl.constexpr,
    SPLIT_TILES: tl.constexpr,  # key tiles of a split, 0: keys are not split
    PDL: tl.constexpr = False,
):
    wait_for_previous(PDL)
    tile_m = tl.program_id(0) // groups
    if first_tile is not None:
        tile_m += first_tile
    group = tl.program_id(0) % groups
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    start = tl.load(start_ptr + batch)
    length = tl.minimum(tl.minimum(tl.load(length_ptr + batch), window), slots - start)
    kv_len = tl.minimum(tl.load(kv_len_ptr + batch), slots)
    pad = padding(pad_ptr, batch, start)
    strides_k = stride_k_cache_batch, stride_k_cache_row, stride_k_cache_head
    strides_v = stride_v_cache_batch, stride_v_cache_row, stride_v_cache_head
    cache = sequence_cache(
        k_cache_ptr, v_cache_ptr, table_ptr, slots, pages, strides_k, strides_v, batch, head, PAGE
    )
    fresh = Fresh(
        k_ptr + batch * stride_k_batch + head * stride_k_head,
        v_ptr + batch * stride_v_batch + head * stride_v_head,
        stride_k_row,
        stride_v_row,
    )
    rope_k = RopeParams(cos_ptr, sin_ptr, k_norm_ptr, eps)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_t = offs_m // GROUP
    offs_head = head * GROUP + offs_m % GROUP
    leaves = None
    if leaf_rows is None:
        branch_m = offs_t // window
        row_m = offs_t - branch_m * window
        position_m = start + row_m - pad
        mask_row = branch_m < branches
        mask_m = mask_row & (row_m < length) & (position_m >= 0)
        visible_end = kv_len - pad
        window_end = tl.maximum(start + length - pad, 0)
    else:
        length = tl.maximum(length, 0)
        leaves = Leaves(length - branches + 1, leaf_rows)
        in_leaf = offs_t >= window
        leaf_m = (offs_t - window) // leaf_rows
        branch_m = tl.where(in_leaf, leaf_m + 1, 0)
        root_m = leaves.first_root + leaf_m
        row_m = offs_t - tl.where(in_leaf, window + leaf_m * leaf_rows - root_m - 1, 0)
        position_m = start + row_m - pad
        mask_row = branch_m < branches
        mask_m = mask_row & (position_m >= 0) & (tl.where(in_leaf, root_m, length - 1 - row_m) >= 0)
        visible_end = start - pad
        window_end = tl.maximum(start + length + leaf_rows - pad, 0)
    begin_m = position_m * 0
    end_m = begin_m + tl.maximum(visible_end, window_end)
    if leaf_rows is not None:
        end_m = start - pad + tl.where(in_leaf, root_m + leaf_rows, row_m) + 1
    elif IS_CAUSAL:
        end_m = tl.minimum(end_m, position_m + 1)
    if block_size is not None:
        offset = 0
        if block_offset_ptr is not None:
            offset = tl.load(block_offset_ptr + batch) % block_size
            offset = tl.where(offset < 0, offset + block_size, offset)
        end_m = tl.minimum(end_m, ((position_m + offset) // block_size + 1) * block_size - offset)
    if sliding_window is not None:
        end_m = tl.minimum(end_m, position_m + sliding_window)
        begin_m = tl.maximum(position_m - sliding_window + 1, 0)
    last = tl.cdiv(tl.max(tl.where(mask_m, end_m, 0), 0), BLOCK_N)
    first = last * 0
    if sliding_window is not None:
        first = tl.min(tl.where(mask_m, begin_m, slots), 0) // BLOCK_N
    first_split = group * tl.cdiv(splits, groups)
    last_split = tl.minimum(first_split + tl.cdiv(splits, groups), splits)
    if SPLIT_TILES:
        first = tl.maximum(first, first_split * SPLIT_TILES)
        last = tl.minimum(last, last_split * SPLIT_TILES)
    first_branch = tile_m * BLOCK_M // (GROUP * window)
    last_branch = ((tile_m + 1) * BLOCK_M - 1) // (GROUP * window)
    if leaf_rows is not None:
        first_branch = tl.min(branch_m, 0)
        last_branch = tl.max(branch_m, 0)
    last_branch = tl.minimum(last_branch, branches - 1)

    span = Span(start, length, pad, visible_end)
    limits = None
    if IS_CAUSAL or block_size is not None or sliding_window is not None:
        limits = Limits(begin_m, end_m)
    scores = Scores(qk_scale, softcap)
    heads = tl.num_programs(1) * GROUP
    if leaf_rows is None:
        rows = tl.num_programs(2).to(tl.int64) * branches * window * heads
        out_row = (batch * branches * window + offs_t) * heads + offs_head
    else:
        count = window + (branches - 1) * leaf_rows
        rows = tl.num_programs(2).to(tl.int64) * count * heads
        out_row = (batch * count + offs_t) * heads + offs_head
    parts = Parts(out_ptr, state_ptr, splits, rows, out_row, mask_row, mask_m)

    q_rows = q_ptr + batch * stride_q_batch + offs_t.to(tl.int64) * stride_q_row
    q_rows += offs_head * stride_q_head

    if leaf_rows is None:
        mask_q = mask_m & (row_m < tl.where(last > first, length, 0))  # without keys, no queries
    else:
        mask_q = mask_m & (offs_t < tl.where(last > first, window + (branches - 1) * leaf_rows, 0))
    q_a, q_b = load_rotated(
        q_rows,
        mask_q,
        mask_q,
        position_m,
        RopeParams(cos_ptr, sin_ptr, q_norm_ptr, eps),
        HEAD_DIM,
        HALF,
        BLOCK_D,
    )
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    window_range = start - pad, window_end, first_branch, last_branch, window
    total = no_keys(BLOCK_M, BLOCK_D)
    if WALK == "one":
        total = attend_keys(
            q_a,
            q_b,
            cache,
            fresh,
            rope_k,
            span,
            limits,
            scores,
            branch_m if HAS_BRANCHES else None,
            window_range,
            leaves,
            first,
            last,
            IS_ROTATED,
            PAGE,
            ALIGN,
            HEAD_DIM,
            HALF,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
        )
    else:
        for split in range(first_split, last_split):
            online = attend_keys(
                q_a,
                q_b,
                cache,
                fresh,
                rope_k,
                span,
                limits,
                scores,
                branch_m if HAS_BRANCHES else None,
                window_range,
                leaves,
                tl.maximum(first, split * SPLIT_TILES),
                tl.minimum(last, (split + 1) * SPLIT_TILES),
                IS_ROTATED,
                PAGE,
                ALIGN,
                HEAD_DIM,
                HALF,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
            )
            if WALK == "each":
                store_split(parts, online, split, HEAD_DIM, BLOCK_D)
            else:
                total = merge_split(total, online)

    if SPLIT_TILES and WALK == "one":
        store_split(parts, total, first_split, HEAD_DIM, BLOCK_D)
    elif WALK != "each":
        y = total.acc / tl.where(total.l_i == 0.0, 1.0, total.l_i)[:, None]
        y = tl.where(mask_m[:, None], y, 0.0)
        mask_out = mask_row[:, None] & (offs_d < HEAD_DIM)
        out_ptrs = out_ptr + out_row[:, None] * HEAD_DIM + offs_d
        tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask_out)

    if not IS_ROTATED:
        # Rows of branch 0 whose first query row lies in this tile are its share of the commit.
        commit = tl.minimum(tl.load(commit_ptr + batch), length)
        commit = tl.where(group == 0, commit, 0)
        offs_c = tl.cdiv(tile_m * BLOCK_M, GROUP) + tl.arange(0, BLOCK_COMMIT)
        mask_c = (offs_c * GROUP < (tile_m + 1) * BLOCK_M) & (offs_c < commit)
        row_c = offs_c.to(tl.int64)
        k_rows, v_rows = fresh.k_ptr + row_c * stride_k_row, fresh.v_ptr + row_c * stride_v_row
        slot_c = start + offs_c
        commit_rows(
            cache, rope_k, k_rows, v_rows, mask_c, slot_c, pad, PAGE, HEAD_DIM, HALF, BLOCK_D
        )


def supports(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *rest: Any,
) -> str | None:
    """None if the kernel can run this call, otherwise why not; arguments as of the launcher."""
    if q.dtype not in _DTYPES:
        return f"the kernel takes fp32, fp16 and bf16, got {q.dtype}"
    if q.shape[-1] > _MAX_HEAD_DIM or q.shape[-1] % 2:
        return f"the kernel takes even head sizes up to {_MAX_HEAD_DIM}, got {q.shape[-1]}"
    heads = {"q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache}
    for name, tensor in heads.items():
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"{name} must have contiguous heads, got strides {tensor.stride()}"
    names = "start length kv_len commit cos sin pad q_norm k_norm block_table block_offset".split()
    for name, tensor in zip(names, rest, strict=False):
        if tensor is not None and not tensor.is_contiguous():
            return f"{name} must be contiguous, got strides {tensor.stride()}"
    exceeds = _tiles.exceeds_grid
    return exceeds("sequences", q.shape[0]) or exceeds("heads of keys", k.shape[2])


def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    start: torch.Tensor,
    length: torch.Tensor,
    kv_len: torch.Tensor,
    commit: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pad: torch.Tensor | None,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    block_offset: torch.Tensor | None = None,
    scale: float = 1.0,
    branches: int = 1,
    causal: bool = False,
    block_size: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    eps: float = 1e-6,
    leaves: int = 0,
    leaf_rows: int = 1,
    *,
    pdl: bool = False,
) -> torch.Tensor:
    """Launch the kernel; arguments as in ``pydllm.ops.window_attention``."""
    batch, rows, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    cache = cache_arguments(k_cache, v_cache, block_table)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    group = heads // kv_heads
    width = rows // branches
    reach = cache["slots"]  # leaves may stand past the last slot
    if leaves:
        width, branches, reach = rows - leaves * leaf_rows, 1 + leaves, reach + leaf_rows
    plan = _tiles.attention_plan(
        q.device,
        q.element_size(),
        head_dim,
        batch * kv_heads,
        rows,
        group,
        branches,
        reach,
        width,
        is_normed=k_norm is not None,
    )
    tile = plan.tile
    first_tile, trunk = None, None
    if leaves and width > _tiles.ATTENTION_SPLIT_ROWS:
        # So long a trunk rotates its keys once, in a pass of its own. The leaves' programs follow.
        first_tile = width * group // tile.block_m
        own = (t[:, :width] for t in (q, k, v))
        tables = cos, sin, pad, q_norm, k_norm, block_table, None
        masks = scale, 1, True, None, window, softcap, eps
        numbers = start, length, start, commit
        trunk = window_attention(*own, k_cache, v_cache, *numbers, *tables, *masks, pdl=pdl)
    fresh_k = k
    if plan.is_rotated:
        fresh_k = torch.empty(k.shape, dtype=k.dtype, device=k.device)
        caches, rope = (k_cache, v_cache), (cos, sin, pad, k_norm, block_table)
        rotate_and_commit(fresh_k, k, v, *caches, None, start, length, commit, *rope, 1, eps)
    is_stored = plan.split_tiles > 0 and plan.walk != "all"
    part, state = scratch(q, plan.splits) if is_stored else (out, out)
    tiles = _tiles.cdiv(rows * group, tile.block_m) - (first_tile or 0)
    grid = (tiles * plan.groups, kv_heads, batch)
    _window_attention_kernel[grid](
        out_ptr=part,
        state_ptr=state,
        q_ptr=q,
        k_ptr=fresh_k,
        v_ptr=v,
        start_ptr=start,
        length_ptr=length,
        kv_len_ptr=kv_len,
        commit_ptr=commit,
        pad_ptr=pad,
        cos_ptr=cos,
        sin_ptr=sin,
        q_norm_ptr=q_norm,
        k_norm_ptr=k_norm,
        block_offset_ptr=block_offset,
        window=width,
        branches=branches,
        leaf_rows=leaf_rows if leaves else None,
        first_tile=first_tile,
        block_size=block_size,
        sliding_window=window,
        eps=eps,
        qk_scale=scale * LOG2_E if softcap is None else scale / softcap,
        softcap=None if softcap is None else softcap * LOG2_E,
        splits=plan.splits,
        groups=plan.groups,
        **cache,
        **strides(q=q, k=fresh_k, v=v),
        HAS_BRANCHES=branches > 1,
        IS_CAUSAL=causal,
        IS_ROTATED=plan.is_rotated,
        WALK=plan.walk,
        ALIGN=alignment(fresh_k, v, k_cache, v_cache),
        GROUP=group,
        HEAD_DIM=head_dim,
        HALF=cos.shape[1],
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_D=max(_tiles.next_power_of_2(head_dim), 32),
        BLOCK_COMMIT=_tiles.next_power_of_2(_tiles.cdiv(tile.block_m, group)),
        SPLIT_TILES=plan.split_tiles,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=tile.registers,
        **_tiles.pdl(q.device, pdl),
    )
    if is_stored:
        merge(out, part, state, pdl=pdl)
    if trunk is not None:
        out[:, :width] = trunk
    return out
