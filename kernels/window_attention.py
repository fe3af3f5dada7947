"""Attention of a window over cached and fresh keys; RoPE and the commit are in the same launch.

A program owns BLOCK_M query rows of one KV head: window rows with the heads of the group packed
beside them, branch after branch, so that short windows fill a tile. It walks the keys in order of
position, in tiles of BLOCK_N positions counted from ``pad``: tiles before the window, on it (once
for every branch that it has rows of), behind it. On the window a key row is read from the fresh K/V
or from the cache through one pointer. Window slots of the cache are never read, so the commit needs
no order between programs. Where a key sits in its tile depends on its position alone: a row's bits
do not depend on the batch, on other branches, on padding, or on which keys are cached.

Short windows over long caches are split (``_tiles.attention_splits``): a program walks the tiles of
one split, always the same positions, and a second kernel joins them in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _tiles
from ._attention import LOG2_E, attend_cached, attend_window, commit_rows, load_turned
from ._attention_merge import merge, scratch

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_HEAD_DIM = 512


@triton.jit
def _window_attention_kernel(
    # pointers
    out_ptr,  # (B, T, Hq, D) contiguous; where SPLIT_TILES (splits, B, T, Hq, D) fp32
    state_ptr,  # (2, splits, B, T, Hq) fp32: maximum and sum of each row, where SPLIT_TILES
    k_cache_ptr,  # (B, L, Hkv, D) or (pages, PAGE, Hkv, D); rows below `commit` are written
    v_cache_ptr,
    q_ptr,  # (B, T, Hq, D)
    k_ptr,  # (B, T, Hkv, D)
    v_ptr,
    start_ptr,  # (B,) int32, as the next four
    length_ptr,
    kv_len_ptr,
    commit_ptr,
    pad_ptr,
    cos_ptr,  # (positions, HALF) fp32
    sin_ptr,
    q_norm_ptr,  # (D,)
    k_norm_ptr,
    table_ptr,  # (B, slots / PAGE) int32
    block_offset_ptr,  # (B,) int32 or None
    # sizes
    window,  # rows of a branch, T / branches
    branches,
    slots,
    block_size,  # of the block-causal mask, where HAS_BLOCKS
    span,  # of the sliding window, where HAS_SPAN
    eps,
    qk_scale,  # scale * log2(e), or scale / softcap
    softcap,  # softcap * log2(e)
    splits,
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
    HAS_PAD: tl.constexpr,
    HAS_BRANCHES: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    HAS_SPAN: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_NORM: tl.constexpr,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_COMMIT: tl.constexpr,
    SPLIT_TILES: tl.constexpr,  # key tiles of a program, 0 for all of them
):
    HAS_LIMITS: tl.constexpr = IS_CAUSAL or HAS_BLOCKS or HAS_SPAN
    tile_m = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    start = tl.load(start_ptr + batch)
    length = tl.minimum(tl.minimum(tl.load(length_ptr + batch), window), slots - start)
    kv_len = tl.minimum(tl.load(kv_len_ptr + batch), slots)
    commit = tl.where(split == 0, tl.minimum(tl.load(commit_ptr + batch), length), 0)
    pad = tl.maximum(tl.load(pad_ptr + batch), 0) if HAS_PAD else start * 0
    k_ptr += batch * stride_k_batch + head * stride_k_head
    v_ptr += batch * stride_v_batch + head * stride_v_head
    k_cache_ptr += head * stride_k_cache_head
    v_cache_ptr += head * stride_v_cache_head
    if PAGE == 0:
        k_cache_ptr += batch * stride_k_cache_batch
        v_cache_ptr += batch * stride_v_cache_batch
    else:
        table_ptr += batch * (slots // PAGE)

    # Rows of branch 0 whose first query row lies in this tile are its share of the commit.
    offs_c = tl.cdiv(tile_m * BLOCK_M, GROUP) + tl.arange(0, BLOCK_COMMIT)
    mask_c = (offs_c * GROUP < (tile_m + 1) * BLOCK_M) & (offs_c < commit)
    commit_rows(
        k_cache_ptr,
        v_cache_ptr,
        table_ptr,
        k_ptr + offs_c.to(tl.int64) * stride_k_row,
        v_ptr + offs_c.to(tl.int64) * stride_v_row,
        mask_c,
        start + offs_c,
        start + offs_c - pad,
        k_norm_ptr,
        eps,
        cos_ptr,
        sin_ptr,
        stride_k_cache_batch,
        stride_k_cache_row,
        stride_v_cache_batch,
        stride_v_cache_row,
        HAS_NORM,
        PAGE,
        HEAD_DIM,
        HALF,
        BLOCK_D,
    )

    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_t = offs_m // GROUP
    offs_head = head * GROUP + offs_m % GROUP
    branch_m = offs_t // window
    row_m = offs_t - branch_m * window
    position_m = start + row_m - pad
    mask_m = (branch_m < branches) & (row_m < length) & (position_m >= 0)
    q_rows = q_ptr + batch * stride_q_batch + offs_t.to(tl.int64) * stride_q_row
    q_rows += offs_head * stride_q_head
    q_a, q_b = load_turned(
        q_rows,
        mask_m,
        mask_m,
        position_m,
        q_norm_ptr,
        eps,
        cos_ptr,
        sin_ptr,
        HAS_NORM,
        HEAD_DIM,
        HALF,
        BLOCK_D,
    )

    visible_end = kv_len - pad
    window_end = tl.maximum(start + length - pad, 0)
    begin_m = position_m * 0
    end_m = begin_m + tl.maximum(visible_end, window_end)
    if IS_CAUSAL:
        end_m = tl.minimum(end_m, position_m + 1)
    if HAS_BLOCKS:
        offset = 0
        if block_offset_ptr is not None:
            offset = tl.load(block_offset_ptr + batch) % block_size
            offset = tl.where(offset < 0, offset + block_size, offset)
        block_end = ((position_m + offset) // block_size + 1) * block_size - offset
        end_m = tl.minimum(end_m, block_end)
    if HAS_SPAN:
        end_m = tl.minimum(end_m, position_m + span)
        begin_m = tl.maximum(position_m - span + 1, 0)
    last = tl.cdiv(tl.max(tl.where(mask_m, end_m, 0), 0), BLOCK_N)
    first = tl.min(tl.where(mask_m, begin_m, slots), 0) // BLOCK_N if HAS_SPAN else last * 0
    if SPLIT_TILES:
        first = tl.maximum(first, split * SPLIT_TILES)
        last = tl.minimum(last, (split + 1) * SPLIT_TILES)
    before = tl.maximum(tl.minimum(tl.maximum(start - pad, 0) // BLOCK_N, last), first)
    behind = tl.maximum(tl.minimum(tl.cdiv(window_end, BLOCK_N), last), before)
    first_branch = tile_m * BLOCK_M // (GROUP * window)
    last_branch = ((tile_m + 1) * BLOCK_M - 1) // (GROUP * window)
    last_branch = tl.minimum(last_branch, branches - 1)

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    for segment in tl.static_range(3):
        if segment == 1:
            acc, m_i, l_i = attend_window(
                q_a,
                q_b,
                acc,
                m_i,
                l_i,
                begin_m,
                end_m,
                branch_m,
                first_branch,
                last_branch,
                k_cache_ptr,
                v_cache_ptr,
                table_ptr,
                k_ptr,
                v_ptr,
                k_norm_ptr,
                eps,
                cos_ptr,
                sin_ptr,
                stride_k_cache_batch,
                stride_k_cache_row,
                stride_v_cache_batch,
                stride_v_cache_row,
                stride_k_row,
                stride_v_row,
                before,
                behind,
                visible_end,
                pad,
                start,
                length,
                window,
                qk_scale,
                softcap,
                HAS_BRANCHES,
                HAS_LIMITS,
                HAS_CAP,
                HAS_NORM,
                PAGE,
                HEAD_DIM,
                HALF,
                BLOCK_N,
                BLOCK_D,
            )
        else:
            acc, m_i, l_i = attend_cached(
                q_a,
                q_b,
                acc,
                m_i,
                l_i,
                begin_m,
                end_m,
                k_cache_ptr,
                v_cache_ptr,
                table_ptr,
                stride_k_cache_batch,
                stride_k_cache_row,
                stride_v_cache_batch,
                stride_v_cache_row,
                first if segment == 0 else behind,
                before if segment == 0 else last,
                visible_end,
                pad,
                qk_scale,
                softcap,
                HAS_LIMITS,
                HAS_CAP,
                PAGE,
                HEAD_DIM,
                HALF,
                BLOCK_N,
                BLOCK_D,
            )

    offs_d = tl.arange(0, BLOCK_D)[None, :]
    heads = tl.num_programs(1) * GROUP
    out_row = (batch * branches * window + offs_t) * heads + offs_head
    mask_row = branch_m < branches
    width = tl.where((last > first) | (SPLIT_TILES == 0), HEAD_DIM, 0)
    if SPLIT_TILES:
        rows = tl.num_programs(2).to(tl.int64) * branches * window * heads
        out_row += split * rows
        tl.store(state_ptr + out_row, m_i, mask=mask_row)
        tl.store(state_ptr + splits * rows + out_row, tl.where(mask_m, l_i, 0.0), mask=mask_row)
    else:
        acc = tl.where(mask_m[:, None], acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None], 0.0)
    out_ptrs = out_ptr + out_row[:, None] * HEAD_DIM + offs_d
    mask_out = mask_row[:, None] & (offs_d < width)
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_out)


def supports(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *dense: torch.Tensor | None,
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
    for name, tensor in zip(names, dense, strict=True):
        if tensor is not None and not tensor.is_contiguous():
            return f"{name} must be contiguous, got strides {tensor.stride()}"
    return None


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
    *,
    scale: float,
    branches: int = 1,
    causal: bool = False,
    block_size: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Launch the kernel; arguments as in ``pydllm.ops.window_attention``."""
    batch, rows, heads, head_dim = q.shape
    length_of_page, kv_heads = k_cache.shape[1:3]
    slots = length_of_page * (1 if block_table is None else block_table.shape[1])
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    group = heads // kv_heads
    tile = _tiles.attention_tile(q.device, q.element_size(), head_dim)
    head_bytes = head_dim * q.itemsize
    splits, split_tiles = _tiles.attention_splits(tile, rows // branches, slots, head_bytes)
    part, state = scratch(q, splits) if split_tiles else (out, out)
    if out.numel() == 0:
        return out
    grid = (triton.cdiv(rows * group, tile.block_m) * splits, kv_heads, batch)
    strides = {
        f"stride_{name}_{axis}": stride
        for name, tensor in {"q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache}.items()
        for axis, stride in zip(("batch", "row", "head"), tensor.stride(), strict=False)
    }
    _window_attention_kernel[grid](
        out_ptr=part,
        state_ptr=state,
        k_cache_ptr=k_cache,
        v_cache_ptr=v_cache,
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        start_ptr=start,
        length_ptr=length,
        kv_len_ptr=kv_len,
        commit_ptr=commit,
        pad_ptr=start if pad is None else pad,
        cos_ptr=cos,
        sin_ptr=sin,
        q_norm_ptr=cos if q_norm is None else q_norm,
        k_norm_ptr=cos if k_norm is None else k_norm,
        table_ptr=start if block_table is None else block_table,
        block_offset_ptr=block_offset,
        window=rows // branches,
        branches=branches,
        slots=slots,
        block_size=block_size or 0,
        span=window or 0,
        eps=eps,
        qk_scale=scale * LOG2_E if softcap is None else scale / softcap,
        softcap=0.0 if softcap is None else softcap * LOG2_E,
        splits=splits,
        **strides,
        HAS_PAD=pad is not None,
        HAS_BRANCHES=branches > 1,
        IS_CAUSAL=causal,
        HAS_BLOCKS=block_size is not None,
        HAS_SPAN=window is not None,
        HAS_CAP=softcap is not None,
        HAS_NORM=q_norm is not None,
        PAGE=0 if block_table is None else length_of_page,
        GROUP=group,
        HEAD_DIM=head_dim,
        HALF=cos.shape[1],
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_D=max(triton.next_power_of_2(head_dim), 32),
        BLOCK_COMMIT=triton.next_power_of_2(triton.cdiv(tile.block_m, group)),
        SPLIT_TILES=split_tiles,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=tile.registers,
    )
    if split_tiles:
        merge(out, part, state)
    return out
