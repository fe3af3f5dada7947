"""Write the fresh keys and values of one branch of a window into the cache, keys after RoPE.

A program takes BLOCK_ROWS window rows of a KV head, with the code by which ``window_attention``
commits, so that the stored bits are the ones it attended to.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import _tiles, window_attention
from ._attention import Cache, RopeParams, commit_rows
from ._heads import strides


@triton.jit
def _commit_branch_kernel(
    # pointers
    k_cache_ptr,  # (B, L, Hkv, D) or (pages, PAGE, Hkv, D), written
    v_cache_ptr,
    k_ptr,  # (B, T, Hkv, D)
    v_ptr,
    branch_ptr,  # (B,) int32, as the next three
    start_ptr,
    commit_ptr,
    pad_ptr,  # or None
    cos_ptr,  # (positions, HALF) fp32
    sin_ptr,
    k_norm_ptr,  # (D,) or None
    table_ptr,  # (B, slots / PAGE) int32 or None
    # sizes
    window,  # rows of a branch, T / branches
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
    branch = tl.load(branch_ptr + batch)
    commit = tl.minimum(tl.minimum(tl.load(commit_ptr + batch), window), slots - start)
    commit = tl.where((branch >= 0) & (branch < branches), commit, 0)
    pad = start * 0
    if pad_ptr is not None:
        pad = tl.maximum(tl.load(pad_ptr + batch), 0)
    k_ptr += batch * stride_k_batch + head * stride_k_head
    v_ptr += batch * stride_v_batch + head * stride_v_head
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
    offs_c = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row = (branch * window + offs_c).to(tl.int64)
    rope = RopeParams(cos_ptr, sin_ptr, k_norm_ptr, eps)
    k_rows, v_rows = k_ptr + row * stride_k_row, v_ptr + row * stride_v_row
    mask, slot = offs_c < commit, start + offs_c
    commit_rows(cache, rope, k_rows, v_rows, mask, slot, pad, PAGE, HEAD_DIM, HALF, BLOCK_D)


def supports(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    branch: torch.Tensor,
    start: torch.Tensor,
    commit: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *options: Any,
) -> str | None:
    """None if the kernel can run this call, otherwise why not; arguments as of the launcher."""
    if not branch.is_contiguous():
        return f"branch must be contiguous, got strides {branch.stride()}"
    pad, k_norm, block_table, *_ = options
    rest = (cos, sin, pad, k_norm, k_norm, block_table)
    return window_attention.supports(k, k, v, k_cache, v_cache, start, start, start, commit, *rest)


def commit_branch(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    branch: torch.Tensor,
    start: torch.Tensor,
    commit: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pad: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    block_table: torch.Tensor | None,
    branches: int,
    eps: float,
) -> None:
    """Launch the kernel; arguments as in ``pydllm.ops.commit_branch``."""
    batch, rows, kv_heads, head_dim = k.shape
    if k.numel() == 0:
        return
    window, page = rows // branches, k_cache.shape[1]
    block_rows, num_warps = _tiles.COMMIT_BRANCH
    _commit_branch_kernel[(triton.cdiv(window, block_rows), kv_heads, batch)](
        k_cache_ptr=k_cache,
        v_cache_ptr=v_cache,
        k_ptr=k,
        v_ptr=v,
        branch_ptr=branch,
        start_ptr=start,
        commit_ptr=commit,
        pad_ptr=pad,
        cos_ptr=cos,
        sin_ptr=sin,
        k_norm_ptr=k_norm,
        table_ptr=block_table,
        window=window,
        branches=branches,
        slots=page * (1 if block_table is None else block_table.shape[1]),
        pages=0 if block_table is None else k_cache.shape[0],
        eps=eps,
        **strides(k=k, v=v, k_cache=k_cache, v_cache=v_cache),
        PAGE=0 if block_table is None else page,
        HEAD_DIM=head_dim,
        HALF=cos.shape[1],
        BLOCK_D=max(triton.next_power_of_2(head_dim), 32),
        BLOCK_ROWS=block_rows,
        num_warps=num_warps,
    )
