"""Device code shared by ``window_attention`` and ``commit_branch``.

A head is held in two halves, the first of which RoPE turns with the second, so that a turn needs no
shuffle. Rows of the cache are addressed by slot, through a block table where the cache has pages.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


@triton.jit
def halves(HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_D: tl.constexpr):
    """A head in two halves: columns below HALF are pairs that RoPE turns, the rest follows."""
    offs_h = tl.arange(0, BLOCK_D // 2)
    first = tl.where(offs_h < HALF, offs_h, offs_h + HALF)
    second = tl.where(offs_h < HALF, offs_h + HALF, offs_h + HEAD_DIM // 2)
    return first[None, :], second[None, :], (offs_h < HEAD_DIM // 2)[None, :]


@triton.jit
def load_turned(
    rows,  # [N] where each row begins
    mask,  # [N] rows to load
    turn,  # [N] rows to normalise and rotate; the others are loaded as they are
    position,  # [N]
    norm_ptr,  # (HEAD_DIM,) weight of the RMS norm before RoPE
    eps,
    cos_ptr,
    sin_ptr,
    HAS_NORM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Both halves of rows after the norm and RoPE, rounded to the stored dtype after each."""
    first, second, mask_h = halves(HEAD_DIM, HALF, BLOCK_D)
    offs_h = tl.arange(0, BLOCK_D // 2)[None, :]
    mask_x = mask[:, None] & mask_h
    mask_turn = turn[:, None] & (offs_h < HALF)
    offs_table = position.to(tl.int64)[:, None] * HALF + offs_h
    # [N, BLOCK_D / 2]
    a = tl.load(rows[:, None] + first, mask=mask_x, other=0.0)
    b = tl.load(rows[:, None] + second, mask=mask_x, other=0.0)
    if HAS_NORM:
        squares = tl.sum(a.to(tl.float32) * a.to(tl.float32), 1)
        squares += tl.sum(b.to(tl.float32) * b.to(tl.float32), 1)
        factor = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        norm_a = tl.load(norm_ptr + first, mask=mask_h, other=0.0).to(tl.float32)
        norm_b = tl.load(norm_ptr + second, mask=mask_h, other=0.0).to(tl.float32)
        normed_a = ((a.to(tl.float32) * factor).to(a.dtype).to(tl.float32) * norm_a).to(a.dtype)
        normed_b = ((b.to(tl.float32) * factor).to(b.dtype).to(tl.float32) * norm_b).to(b.dtype)
        a = tl.where(turn[:, None], normed_a, a)
        b = tl.where(turn[:, None], normed_b, b)
    cos = tl.load(cos_ptr + offs_table, mask=mask_turn, other=0.0)
    sin = tl.load(sin_ptr + offs_table, mask=mask_turn, other=0.0)
    wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
    # Explicit fma: the same bits wherever this is inlined, so a committed key is the fresh one.
    turned_a = tl.fma(wide_a, cos, -(wide_b * sin)).to(a.dtype)
    turned_b = tl.fma(wide_b, cos, wide_a * sin).to(a.dtype)
    return tl.where(mask_turn, turned_a, a), tl.where(mask_turn, turned_b, b)


@triton.jit
def cache_rows(ptr, table_ptr, slot, mask, stride_page, stride_row, PAGE: tl.constexpr):
    """[N] where the rows of ``slot`` begin: in one piece from ``ptr`` on, or by the block table."""
    if PAGE == 0:
        return ptr + slot.to(tl.int64) * stride_row
    page = tl.load(table_ptr + slot // PAGE, mask=mask, other=0).to(tl.int64)
    return ptr + page * stride_page + (slot % PAGE).to(tl.int64) * stride_row


@triton.jit
def commit_rows(
    k_cache_ptr,
    v_cache_ptr,
    table_ptr,
    k_rows,  # [N] where each fresh row begins, and so on
    v_rows,
    mask,
    slot,
    position,
    k_norm_ptr,
    eps,
    cos_ptr,
    sin_ptr,
    stride_k_page,
    stride_k_row,
    stride_v_page,
    stride_v_row,
    HAS_NORM: tl.constexpr,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write fresh rows to their slots, keys after RoPE; rows before position 0 are padding."""
    first, second, mask_h = halves(HEAD_DIM, HALF, BLOCK_D)
    mask = mask & (position >= 0)
    k_a, k_b = load_turned(
        k_rows,
        mask,
        mask,
        position,
        k_norm_ptr,
        eps,
        cos_ptr,
        sin_ptr,
        HAS_NORM,
        HEAD_DIM,
        HALF,
        BLOCK_D,
    )
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask_d = mask[:, None] & (offs_d < HEAD_DIM)
    v = tl.load(v_rows[:, None] + offs_d, mask=mask_d, other=0.0)  # [N, BLOCK_D]
    k_ptrs = cache_rows(k_cache_ptr, table_ptr, slot, mask, stride_k_page, stride_k_row, PAGE)
    v_ptrs = cache_rows(v_cache_ptr, table_ptr, slot, mask, stride_v_page, stride_v_row, PAGE)
    tl.store(k_ptrs[:, None] + first, k_a, mask=mask[:, None] & mask_h)
    tl.store(k_ptrs[:, None] + second, k_b, mask=mask[:, None] & mask_h)
    tl.store(v_ptrs[:, None] + offs_d, v, mask=mask_d)


@triton.jit
def capped(s, softcap):
    """``softcap * tanh(s)``; a series near 0, where the quotient would cancel."""
    x = tl.minimum(tl.abs(s), 20.0)
    e = tl.exp2(x * -2.8853900817779268)
    square = s * s
    series = s * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315))))
    quotient = (1.0 - e) / (1.0 + e)
    return softcap * tl.where(x < 0.2, series, tl.where(s < 0, -quotient, quotient))


@triton.jit
def attend(
    q_a,
    q_b,
    k_a,
    k_b,
    v,
    seen,  # [1 or BLOCK_M, BLOCK_N]
    acc,
    m_i,
    l_i,
    qk_scale,
    softcap,
    HAS_CAP: tl.constexpr,
):
    """One key tile of the online softmax, in base 2."""
    s = tl.dot(q_a, tl.trans(k_a), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    s = tl.dot(q_b, tl.trans(k_b), s, input_precision="ieee") * qk_scale
    if HAS_CAP:
        s = capped(s, softcap)
    s = tl.where(seen, s, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(s, 1))
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s - shift[:, None])
    alpha = tl.exp2(m_i - shift)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return acc, m_new, l_i


@triton.jit
def attend_cached(
    q_a,
    q_b,
    acc,
    m_i,
    l_i,
    begin_m,  # [BLOCK_M] positions that each query row sees, where HAS_LIMITS
    end_m,
    k_cache_ptr,
    v_cache_ptr,
    table_ptr,
    stride_k_page,
    stride_k_row,
    stride_v_page,
    stride_v_row,
    first_tile,  # tiles [first_tile, last_tile), all of them outside the window
    last_tile,
    visible_end,  # positions
    pad,
    qk_scale,
    softcap,
    HAS_LIMITS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Key tiles that are cached from end to end."""
    first, second, mask_h = halves(HEAD_DIM, HALF, BLOCK_D)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    for tile in range(first_tile, last_tile):
        position = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        visible = position < visible_end
        slot = position + pad
        k_rows = cache_rows(
            k_cache_ptr, table_ptr, slot, visible, stride_k_page, stride_k_row, PAGE
        )[:, None]
        v_rows = cache_rows(
            v_cache_ptr, table_ptr, slot, visible, stride_v_page, stride_v_row, PAGE
        )[:, None]
        mask_n = visible[:, None]
        k_a = tl.load(k_rows + first, mask=mask_n & mask_h, other=0.0)  # [BLOCK_N, BLOCK_D / 2]
        k_b = tl.load(k_rows + second, mask=mask_n & mask_h, other=0.0)
        mask_v = mask_n & (offs_d < HEAD_DIM)
        v = tl.load(v_rows + offs_d, mask=mask_v, other=0.0)  # [BLOCK_N, BLOCK_D]
        seen = visible[None, :]
        if HAS_LIMITS:
            seen = seen & (position[None, :] >= begin_m[:, None])
            seen = seen & (position[None, :] < end_m[:, None])
        acc, m_i, l_i = attend(
            q_a, q_b, k_a, k_b, v, seen, acc, m_i, l_i, qk_scale, softcap, HAS_CAP
        )
    return acc, m_i, l_i


@triton.jit
def attend_window(
    q_a,
    q_b,
    acc,
    m_i,
    l_i,
    begin_m,  # [BLOCK_M] positions that each query row sees, where HAS_LIMITS
    end_m,
    branch_m,  # [BLOCK_M] branch of each query row
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
    stride_k_page,
    stride_k_cache_row,
    stride_v_page,
    stride_v_cache_row,
    stride_k_row,
    stride_v_row,
    first_tile,  # tiles [first_tile, last_tile), with fresh keys among them
    last_tile,
    visible_end,  # positions
    pad,
    start,
    length,
    window,
    qk_scale,
    softcap,
    HAS_BRANCHES: tl.constexpr,
    HAS_LIMITS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_NORM: tl.constexpr,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Key tiles on the window, fresh and cached keys side by side, once for every branch."""
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    tiles = tl.maximum(last_tile - first_tile, 0)
    # Not pipelined: copies in flight of rows, tables and values together would not fit.
    for step in tl.range(0, tiles * (last_branch + 1 - first_branch), num_stages=1):
        branch = first_branch + step // tiles
        position = (first_tile + step % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        slot = position + pad
        row = slot - start
        fresh = (row >= 0) & (row < length)
        visible = fresh | (position < visible_end)
        cached = visible & ~fresh
        row = (branch * window + row).to(tl.int64)
        # [BLOCK_N]
        k_cached = cache_rows(
            k_cache_ptr, table_ptr, slot, cached, stride_k_page, stride_k_cache_row, PAGE
        )
        v_cached = cache_rows(
            v_cache_ptr, table_ptr, slot, cached, stride_v_page, stride_v_cache_row, PAGE
        )
        k_rows = tl.where(fresh, k_ptr + row * stride_k_row, k_cached)
        v_rows = tl.where(fresh, v_ptr + row * stride_v_row, v_cached)
        k_a, k_b = load_turned(
            k_rows,
            visible,
            fresh,
            position,
            k_norm_ptr,
            eps,
            cos_ptr,
            sin_ptr,
            HAS_NORM,
            HEAD_DIM,
            HALF,
            BLOCK_D,
        )
        mask_v = visible[:, None] & (offs_d < HEAD_DIM)
        v = tl.load(v_rows[:, None] + offs_d, mask=mask_v, other=0.0)  # [BLOCK_N, BLOCK_D]
        seen = visible[None, :]
        if HAS_LIMITS:
            seen = seen & (position[None, :] >= begin_m[:, None])
            seen = seen & (position[None, :] < end_m[:, None])
        if HAS_BRANCHES:
            # What is not a row's own leaves it as it was, NaN or not.
            mine = branch_m == branch
            seen = seen & mine[:, None]
        before = acc
        acc, m_i, l_i = attend(
            q_a, q_b, k_a, k_b, v, seen, acc, m_i, l_i, qk_scale, softcap, HAS_CAP
        )
        if HAS_BRANCHES:
            acc = tl.where(mine[:, None], acc, before)
    return acc, m_i, l_i
