"""Device code shared by the kernels of ``window_attention`` and ``commit_branch``.

A head is held in two halves, the first of which RoPE rotates with the second, so that a rotation
needs no shuffle. Rows of the cache are addressed by slot, through a block table where the cache has
pages.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Cache(NamedTuple):
    """One KV head of the cache: the first row of slot 0, or of page 0 where there is a table."""

    k_ptr: tl.tensor
    v_ptr: tl.tensor
    table_ptr: tl.tensor  # (slots / PAGE) int32 of the sequence, or None
    pages: tl.tensor  # of the cache, where there is a table
    stride_k_page: tl.tensor
    stride_k_row: tl.tensor
    stride_v_page: tl.tensor
    stride_v_row: tl.tensor


class Fresh(NamedTuple):
    """One KV head of the window: the first row of branch 0."""

    k_ptr: tl.tensor
    v_ptr: tl.tensor
    stride_k_row: tl.tensor
    stride_v_row: tl.tensor


class RopeParams(NamedTuple):
    """Tables (positions, HALF) fp32, and the RMS norm of each head before RoPE."""

    cos_ptr: tl.tensor
    sin_ptr: tl.tensor
    norm_ptr: tl.tensor  # (HEAD_DIM,) or None
    eps: tl.tensor


@triton.jit
def padding(pad_ptr, batch, start):
    """Padding at the beginning of a sequence, not negative."""
    pad = start * 0
    if pad_ptr is not None:
        pad = tl.maximum(tl.load(pad_ptr + batch), 0)
    return pad


@triton.jit
def sequence_cache(
    k_ptr,
    v_ptr,
    table_ptr,  # (B, slots / PAGE) int32 or None
    slots,
    pages,
    strides_k,  # of a sequence or page, of a row, of a head
    strides_v,
    batch,
    head,
    PAGE: tl.constexpr,
):
    """The Cache of one KV head of a sequence."""
    k_ptr += head * strides_k[2]
    v_ptr += head * strides_v[2]
    if PAGE == 0:
        k_ptr += batch * strides_k[0]
        v_ptr += batch * strides_v[0]
    else:
        table_ptr += batch * (slots // PAGE)
    return Cache(
        k_ptr, v_ptr, table_ptr, pages, strides_k[0], strides_k[1], strides_v[0], strides_v[1]
    )


@triton.jit
def rotary_offsets(HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_D: tl.constexpr):
    """A head in two halves: columns below HALF are pairs that RoPE rotates, the rest follows."""
    offs_h = tl.arange(0, BLOCK_D // 2)
    first = tl.where(offs_h < HALF, offs_h, offs_h + HALF)
    second = tl.where(offs_h < HALF, offs_h + HALF, offs_h + HEAD_DIM // 2)
    return first[None, :], second[None, :], (offs_h < HEAD_DIM // 2)[None, :]


@triton.jit
def load_rotated(
    rows,  # [N] where each row begins
    mask,  # [N] rows to load
    rotated,  # [N] rows to normalise and rotate; the others are loaded as they are
    position,  # [N]
    rope,  # RopeParams
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Both halves of rows after the norm and RoPE, rounded to the stored dtype after each."""
    first, second, mask_h = rotary_offsets(HEAD_DIM, HALF, BLOCK_D)
    offs_h = tl.arange(0, BLOCK_D // 2)[None, :]
    mask_x = mask[:, None] & mask_h
    mask_r = rotated[:, None] & (offs_h < HALF)
    offs_table = position.to(tl.int64)[:, None] * HALF + offs_h
    # [N, BLOCK_D / 2]
    a = tl.load(rows[:, None] + first, mask=mask_x, other=0.0)
    b = tl.load(rows[:, None] + second, mask=mask_x, other=0.0)
    if rope.norm_ptr is not None:
        squares = tl.sum(a.to(tl.float32) * a.to(tl.float32), 1)
        squares += tl.sum(b.to(tl.float32) * b.to(tl.float32), 1)
        factor = tl.rsqrt(squares / HEAD_DIM + rope.eps)[:, None]
        norm_a = tl.load(rope.norm_ptr + first, mask=mask_h, other=0.0).to(tl.float32)
        norm_b = tl.load(rope.norm_ptr + second, mask=mask_h, other=0.0).to(tl.float32)
        normed_a = ((a.to(tl.float32) * factor).to(a.dtype).to(tl.float32) * norm_a).to(a.dtype)
        normed_b = ((b.to(tl.float32) * factor).to(b.dtype).to(tl.float32) * norm_b).to(b.dtype)
        a = tl.where(rotated[:, None], normed_a, a)
        b = tl.where(rotated[:, None], normed_b, b)
    cos = tl.load(rope.cos_ptr + offs_table, mask=mask_r, other=0.0)
    sin = tl.load(rope.sin_ptr + offs_table, mask=mask_r, other=0.0)
    wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
    # Explicit fma: the same bits wherever this is inlined, so a committed key is the fresh one.
    rotated_a = tl.fma(wide_a, cos, -(wide_b * sin)).to(a.dtype)
    rotated_b = tl.fma(wide_b, cos, wide_a * sin).to(a.dtype)
    return tl.where(mask_r, rotated_a, a), tl.where(mask_r, rotated_b, b)


@triton.jit
def cache_rows(ptr, table_ptr, pages, slot, mask, stride_page, stride_row, PAGE: tl.constexpr):
    """[N] where the rows of ``slot`` begin: in one piece from ``ptr`` on, or by the block table.

    An entry that is no page is taken for the nearest one.
    """
    if table_ptr is None:
        rows = ptr + slot.to(tl.int64) * stride_row
    else:
        page = tl.load(table_ptr + slot // PAGE, mask=mask, other=0)
        page = tl.minimum(tl.maximum(page, 0), pages - 1).to(tl.int64)
        rows = ptr + page * stride_page + (slot % PAGE).to(tl.int64) * stride_row
    return rows


@triton.jit
def write_rows(
    cache,  # Cache
    k_a,  # [N, BLOCK_D / 2] both halves of the keys, after RoPE
    k_b,
    v_rows,  # [N] where each row of values begins
    mask,
    slot,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write rows to their slots, but not where the block table names no page."""
    if cache.table_ptr is not None:
        page = tl.load(cache.table_ptr + slot // PAGE, mask=mask, other=0)
        mask = mask & (page >= 0) & (page < cache.pages)
    first, second, mask_h = rotary_offsets(HEAD_DIM, HALF, BLOCK_D)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask_d = mask[:, None] & (offs_d < HEAD_DIM)
    v = tl.load(v_rows[:, None] + offs_d, mask=mask_d, other=0.0)  # [N, BLOCK_D]
    table_ptr, pages = cache.table_ptr, cache.pages
    strides_k = cache.stride_k_page, cache.stride_k_row
    strides_v = cache.stride_v_page, cache.stride_v_row
    k_ptrs = cache_rows(cache.k_ptr, table_ptr, pages, slot, mask, *strides_k, PAGE)
    v_ptrs = cache_rows(cache.v_ptr, table_ptr, pages, slot, mask, *strides_v, PAGE)
    tl.store(k_ptrs[:, None] + first, k_a, mask=mask[:, None] & mask_h)
    tl.store(k_ptrs[:, None] + second, k_b, mask=mask[:, None] & mask_h)
    tl.store(v_ptrs[:, None] + offs_d, v, mask=mask_d)


@triton.jit
def commit_rows(
    cache,
    rope,
    k_rows,  # [N] where each fresh row begins
    v_rows,
    mask,
    slot,
    pad,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write fresh rows to their slots, keys after RoPE; rows before position 0 are padding."""
    mask = mask & (slot >= pad)
    k_a, k_b = load_rotated(k_rows, mask, mask, slot - pad, rope, HEAD_DIM, HALF, BLOCK_D)
    write_rows(cache, k_a, k_b, v_rows, mask, slot, PAGE, HEAD_DIM, HALF, BLOCK_D)
