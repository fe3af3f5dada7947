"""The first pass of ``window_attention`` for long windows: keys rotated once, and the commit.

A short window is read by few programs, which rotate its keys as they need them. A long one is read
once for each tile of queries: its keys are rotated here, and read back like cached ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _tiles
from ._attention import Cache, RopeParams, load_rotated, rotary_offsets, write_rows
from ._heads import strides


@triton.jit
def _window_attention_rotate_kernel(
    # pointers
    out_ptr,  # (B, T, Hkv, D) contiguous: keys after RoPE
    k_cache_ptr,  # (B, L, Hkv, D) or (pages, PAGE, Hkv, D); rows below `commit` are written
    v_cache_ptr,
    k_ptr,  # (B, T, Hkv, D)
    v_ptr,
    start_ptr,  # (B,) int32, as the next three
    length_ptr,
    commit_ptr,
    pad_ptr,  # or None
    cos_ptr,  # (positions, HALF) fp32
    sin_ptr,
    k_norm_ptr,  # (D,) or None
    table_ptr,  # (B, slots / PAGE) int32 or None
    # sizes
    rows,  # T
    slots,
    pages,  # of the cache, where there is a table
    eps,
    # strides
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
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    start = tl.load(start_ptr + batch)
    length = tl.minimum(tl.minimum(tl.load(length_ptr + batch), rows), slots - start)
    commit = tl.minimum(tl.load(commit_ptr + batch), length)
    pad = start * 0
    if pad_ptr is not None:
        pad = tl.maximum(tl.load(pad_ptr + batch), 0)
    k_cache_ptr += head * stride_k_cache_head
    v_cache_ptr += head * stride_v_cache_head
    if PAGE == 0:
        k_cache_ptr += batch * stride_k_cache_batch
        v_cache_ptr += batch * stride_v_cache_batch
    else:
        table_ptr += batch * (slots // PAGE)
    cache = Cache(
        k_cache_ptr,
        v_cache_ptr,
        table_ptr,
        pages,
        stride_k_cache_batch,
        stride_k_cache_row,
        stride_v_cache_batch,
        stride_v_cache_row,
    )
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    slot = start + offs_n.to(tl.int32)
    mask = (offs_n < length) & (slot >= pad)
    k_rows = k_ptr + batch * stride_k_batch + head * stride_k_head + offs_n * stride_k_row
    v_rows = v_ptr + batch * stride_v_batch + head * stride_v_head + offs_n * stride_v_row
    rope = RopeParams(cos_ptr, sin_ptr, k_norm_ptr, eps)
    k_a, k_b = load_rotated(k_rows, mask, mask, slot - pad, rope, HEAD_DIM, HALF, BLOCK_D)
    first, second, mask_h = rotary_offsets(HEAD_DIM, HALF, BLOCK_D)
    out_rows = (batch * rows + offs_n) * tl.num_programs(1) + head
    out_ptrs = out_ptr + out_rows[:, None] * HEAD_DIM
    tl.store(out_ptrs + first, k_a, mask=mask[:, None] & mask_h)
    tl.store(out_ptrs + second, k_b, mask=mask[:, None] & mask_h)
    kept = mask & (offs_n < commit)
    write_rows(cache, k_a, k_b, v_rows, kept, slot, PAGE, HEAD_DIM, HALF, BLOCK_D)


def rotate_and_commit(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    start: torch.Tensor,
    length: torch.Tensor,
    commit: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pad: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    block_table: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """The keys of a window after RoPE, (B, T, Hkv, D); rows that are not in use are not written."""
    batch, rows, kv_heads, head_dim = k.shape
    page = k_cache.shape[1]
    out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    size, num_warps = _tiles.ATTENTION_ROTATE
    block_d = max(triton.next_power_of_2(head_dim), 32)
    block_rows = size // (block_d * k.itemsize)
    _window_attention_rotate_kernel[(triton.cdiv(rows, block_rows), kv_heads, batch)](
        out_ptr=out,
        k_cache_ptr=k_cache,
        v_cache_ptr=v_cache,
        k_ptr=k,
        v_ptr=v,
        start_ptr=start,
        length_ptr=length,
        commit_ptr=commit,
        pad_ptr=pad,
        cos_ptr=cos,
        sin_ptr=sin,
        k_norm_ptr=k_norm,
        table_ptr=block_table,
        rows=rows,
        slots=page * (1 if block_table is None else block_table.shape[1]),
        pages=0 if block_table is None else k_cache.shape[0],
        eps=eps,
        **strides(k=k, v=v, k_cache=k_cache, v_cache=v_cache),
        PAGE=0 if block_table is None else page,
        HEAD_DIM=head_dim,
        HALF=cos.shape[1],
        BLOCK_D=block_d,
        BLOCK_ROWS=block_rows,
        num_warps=num_warps,
    )
    return out
