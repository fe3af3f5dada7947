"""Keys of a window rotated once, and the commit: a pass of ``window_attention``, and all of
``commit_branch``.

A short window is read by few programs, which rotate its keys as they need them. A long one is read
once for each tile of queries: its keys are rotated here, and read back like cached ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _tiles
from ._attention import (
    RopeParams,
    load_rotated,
    padding,
    rotary_offsets,
    sequence_cache,
    write_rows,
)
from ._heads import cache_arguments, strides


@triton.jit
def _window_attention_rotate_kernel(
    # pointers
    out_ptr,  # (B, window, Hkv, D) contiguous: keys after RoPE, or None
    k_cache_ptr,  # (B, L, Hkv, D) or (pages, PAGE, Hkv, D); rows below `commit` are written
    v_cache_ptr,
    k_ptr,  # (B, T, Hkv, D)
    v_ptr,
    branch_ptr,  # (B,) int32, or None: the first
    start_ptr,  # (B,) int32, as the next three
    length_ptr,  # or None
    commit_ptr,
    pad_ptr,  # or None
    cos_ptr,  # (positions, HALF) fp32
    sin_ptr,
    k_norm_ptr,  # (D,) or None
    table_ptr,  # (B, slots / PAGE) int32 or None
    # sizes
    window,  # rows of a branch
    branches,
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
    length = tl.minimum(slots - start, window)
    if length_ptr is not None:
        length = tl.minimum(length, tl.load(length_ptr + batch))
    commit = tl.minimum(tl.load(commit_ptr + batch), length)
    branch = start * 0
    if branch_ptr is not None:
        branch = tl.load(branch_ptr + batch)
        commit = tl.where((branch >= 0) & (branch < branches), commit, 0)
    pad = padding(pad_ptr, batch, start)
    strides_k = stride_k_cache_batch, stride_k_cache_row, stride_k_cache_head
    strides_v = stride_v_cache_batch, stride_v_cache_row, stride_v_cache_head
    cache = sequence_cache(
        k_cache_ptr, v_cache_ptr, table_ptr, slots, pages, strides_k, strides_v, batch, head, PAGE
    )
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    slot = start + offs_n.to(tl.int32)
    kept = (offs_n < commit) & (slot >= pad)
    mask = kept
    if out_ptr is not None:
        mask = (offs_n < length) & (slot >= pad)
    row = branch.to(tl.int64) * window + offs_n
    k_rows = k_ptr + batch * stride_k_batch + head * stride_k_head + row * stride_k_row
    v_rows = v_ptr + batch * stride_v_batch + head * stride_v_head + row * stride_v_row
    rope = RopeParams(cos_ptr, sin_ptr, k_norm_ptr, eps)
    k_a, k_b = load_rotated(k_rows, mask, mask, slot - pad, rope, HEAD_DIM, HALF, BLOCK_D)
    if out_ptr is not None:
        first, second, mask_h = rotary_offsets(HEAD_DIM, HALF, BLOCK_D)
        out_rows = (batch * window + offs_n) * tl.num_programs(1) + head
        out_ptrs = out_ptr + out_rows[:, None] * HEAD_DIM
        tl.store(out_ptrs + first, k_a, mask=mask[:, None] & mask_h)
        tl.store(out_ptrs + second, k_b, mask=mask[:, None] & mask_h)
    write_rows(cache, k_a, k_b, v_rows, kept, slot, PAGE, HEAD_DIM, HALF, BLOCK_D)


def rotate_and_commit(
    out: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    branch: torch.Tensor | None,
    start: torch.Tensor,
    length: torch.Tensor | None,
    commit: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pad: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    block_table: torch.Tensor | None,
    branches: int,
    eps: float,
) -> None:
    """Commit rows of a branch; write to ``out`` the window's keys after RoPE, if it is there.

    Rows of ``out (B, T, Hkv, D)`` that are not in use are not written.
    """
    batch, rows, kv_heads, head_dim = k.shape
    window = rows // branches
    size, num_warps = _tiles.ATTENTION_ROTATE if out is not None else _tiles.COMMIT_BRANCH
    block_d = max(_tiles.next_power_of_2(head_dim), 32)
    block_rows = max(size // (block_d * k.itemsize), 1)
    _window_attention_rotate_kernel[(_tiles.cdiv(window, block_rows), kv_heads, batch)](
        out_ptr=out,
        k_ptr=k,
        v_ptr=v,
        branch_ptr=branch,
        start_ptr=start,
        length_ptr=length,
        commit_ptr=commit,
        pad_ptr=pad,
        cos_ptr=cos,
        sin_ptr=sin,
        k_norm_ptr=k_norm,
        window=window,
        branches=branches,
        eps=eps,
        **cache_arguments(k_cache, v_cache, block_table),
        **strides(k=k, v=v),
        HEAD_DIM=head_dim,
        HALF=cos.shape[1],
        BLOCK_D=block_d,
        BLOCK_ROWS=block_rows,
        num_warps=num_warps,
    )
