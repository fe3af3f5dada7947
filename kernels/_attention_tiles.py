"""Device code of ``window_attention``: the online softmax over key tiles, and its splits."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ._attention import cache_rows, load_rotated, rotary_offsets

LOG2_E = 1.4426950408889634


class Span(NamedTuple):
    """Where a sequence's window lies and what is visible."""

    start: tl.tensor  # slot of row 0
    length: tl.tensor  # rows in use
    pad: tl.tensor  # slots before position 0
    visible_end: tl.tensor  # position


class Limits(NamedTuple):
    """[BLOCK_M] positions that each query row sees."""

    begin: tl.tensor
    end: tl.tensor


class Leaves(NamedTuple):
    """Groups of rows, each after a row of the trunk; they count as branches 1, 2, ..."""

    first_root: tl.tensor  # the trunk row that the first one follows; below 0: not in use
    rows: tl.tensor  # of each


class Scores(NamedTuple):
    """From dot products to scores in base 2."""

    scale: tl.tensor  # scale * log2(e), or scale / softcap
    softcap: tl.tensor  # softcap * log2(e), or None


class OnlineSoftmax(NamedTuple):
    """What is carried over key tiles."""

    acc: tl.tensor  # [BLOCK_M, BLOCK_D] weighted sum of values
    m_i: tl.tensor  # [BLOCK_M] maximum, base 2
    l_i: tl.tensor  # [BLOCK_M] sum of weights


class Parts(NamedTuple):
    """Where the splits of the keys go."""

    values_ptr: tl.tensor  # (splits, rows, HEAD_DIM) fp32
    state_ptr: tl.tensor  # (2, splits, rows) fp32: maximum and sum
    splits: tl.tensor
    rows: tl.tensor  # of all sequences and heads, int64
    row: tl.tensor  # [BLOCK_M] of them
    mask: tl.tensor  # [BLOCK_M] rows that there are
    used: tl.tensor  # [BLOCK_M] rows that see keys


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
def no_keys(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """The online softmax of no keys."""
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    return OnlineSoftmax(acc, m, tl.zeros([BLOCK_M], dtype=tl.float32))


@triton.jit
def attend(
    q_a,
    q_b,
    k_a,
    k_b,
    v,
    seen,  # [1 or BLOCK_M, BLOCK_N]
    online,
    scores,  # Scores
    poison,  # None, or rows [BLOCK_M, 1] and what is added to their sums, [1, BLOCK_D]
):
    """One key tile."""
    s = tl.dot(q_a, tl.trans(k_a), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    s = tl.dot(q_b, tl.trans(k_b), s, input_precision="ieee") * scores.scale
    if scores.softcap is not None:
        s = capped(s, scores.softcap)
    s = tl.where(seen, s, float("-inf"))
    m_new = tl.maximum(online.m_i, tl.max(s, 1))
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s - shift[:, None])
    alpha = tl.exp2(online.m_i - shift)
    l_new = online.l_i * alpha + tl.sum(p, 1)
    acc = online.acc * alpha[:, None]
    if poison is not None:
        acc = tl.where(poison[0], acc + poison[1], acc)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return OnlineSoftmax(acc, m_new, l_new)


@triton.jit
def merge_split(total, split):
    """Merge a split into those before it; one without keys has sum 0 and changes nothing."""
    used = split.l_i != 0.0  # a NaN is not 0
    m_split = tl.where(used, split.m_i, float("-inf"))
    m_new = tl.maximum(total.m_i, m_split)
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha, beta = tl.exp2(total.m_i - shift), tl.exp2(m_split - shift)
    l_new = tl.fma(total.l_i, alpha, tl.where(used, split.l_i, 0.0) * beta)
    added = tl.where(used[:, None], split.acc, 0.0) * beta[:, None]
    acc = tl.fma(total.acc, tl.broadcast_to(alpha[:, None], added.shape), added)
    return OnlineSoftmax(acc, m_new, l_new)


@triton.jit
def store_split(parts, online, split, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store a split for ``_window_attention_merge_kernel``; values only where there are keys."""
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    at = split * parts.rows + parts.row
    weight = tl.where(parts.used, online.l_i, 0.0)
    tl.store(parts.state_ptr + at, online.m_i, mask=parts.mask)
    tl.store(parts.state_ptr + parts.splits * parts.rows + at, weight, mask=parts.mask)
    mask = (parts.mask & (weight != 0.0))[:, None] & (offs_d < HEAD_DIM)
    tl.store(parts.values_ptr + at[:, None] * HEAD_DIM + offs_d, online.acc, mask=mask)


@triton.jit
def attend_rotated(
    q_a,
    q_b,
    online,
    cache,
    fresh,  # Fresh with rotated keys, or None where no tile has fresh keys
    span,
    limits,  # or None: every row sees all that is visible
    scores,
    first_tile,  # tiles [first_tile, last_tile)
    last_tile,
    PAGE: tl.constexpr,
    ALIGN: tl.constexpr,  # bytes that every row begins at a multiple of
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Key tiles that are rotated from end to end: cached, or rotated by the pass before this."""
    low, high, mask_h = rotary_offsets(HEAD_DIM, HALF, BLOCK_D)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    for tile in range(first_tile, last_tile):
        position = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        visible = position < span.visible_end
        slot = position + span.pad
        # [BLOCK_N]
        k_rows = cache_rows(
            cache.k_ptr,
            cache.table_ptr,
            cache.pages,
            slot,
            visible,
            cache.stride_k_page,
            cache.stride_k_row,
            PAGE,
        )
        v_rows = cache_rows(
            cache.v_ptr,
            cache.table_ptr,
            cache.pages,
            slot,
            visible,
            cache.stride_v_page,
            cache.stride_v_row,
            PAGE,
        )
        if fresh is not None:
            row = slot - span.start
            inside = (row >= 0) & (row < span.length)
            visible = visible | inside
            row = row.to(tl.int64)
            k_rows = tl.where(inside, fresh.k_ptr + row * fresh.stride_k_row, k_rows)
            v_rows = tl.where(inside, fresh.v_ptr + row * fresh.stride_v_row, v_rows)
            k_rows = tl.multiple_of(k_rows, [ALIGN])
            v_rows = tl.multiple_of(v_rows, [ALIGN])
        mask_n = visible[:, None]
        # [BLOCK_N, BLOCK_D / 2]
        k_a = tl.load(k_rows[:, None] + low, mask=mask_n & mask_h, other=0.0)
        k_b = tl.load(k_rows[:, None] + high, mask=mask_n & mask_h, other=0.0)
        mask_v = mask_n & (offs_d < HEAD_DIM)
        v = tl.load(v_rows[:, None] + offs_d, mask=mask_v, other=0.0)  # [BLOCK_N, BLOCK_D]
        seen = visible[None, :]
        if limits is not None:
            seen = seen & (position[None, :] >= limits.begin[:, None])
            seen = seen & (position[None, :] < limits.end[:, None])
        online = attend(q_a, q_b, k_a, k_b, v, seen, online, scores, None)
    return online


@triton.jit
def leaf_keys(
    row,  # [BLOCK_N] slots less that of the window's first
    branch,
    span,
    window,
    leaves,
):
    """[BLOCK_N] Which keys of a branch are there, and their fresh rows: the trunk as far as the row
    that the leaf follows, then the leaf."""
    root = leaves.first_root + branch - 1
    trunk_end = tl.where(branch == 0, span.length, root + 1)
    own = row - trunk_end + window + (branch - 1) * leaves.rows
    end = tl.where(branch == 0, trunk_end, tl.where(root < 0, 0, trunk_end + leaves.rows))
    return (row >= 0) & (row < end), tl.where(row < trunk_end, row, own)


@triton.jit
def attend_window(
    q_a,
    q_b,
    online,
    cache,
    fresh,
    rope,
    span,
    limits,
    scores,
    branch_m,  # [BLOCK_M] branch of each query row, or None where there is one
    first_branch,
    last_branch,
    window,  # rows of a branch, or of the trunk
    leaves,  # Leaves, or None
    first_tile,  # tiles [first_tile, last_tile), with fresh keys among them
    last_tile,
    PAGE: tl.constexpr,
    ALIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Key tiles on the window, fresh and cached keys side by side, each once for every branch."""
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    tiles = tl.maximum(last_tile - first_tile, 0)
    branches = last_branch + 1 - first_branch
    # Not pipelined: copies in flight of rows, tables and values together would not fit.
    for step in tl.range(0, tiles * branches, num_stages=1):
        tile = first_tile + step // branches
        branch = first_branch + step % branches
        position = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        slot = position + span.pad
        row = slot - span.start
        if leaves is None:
            inside = (row >= 0) & (row < span.length)
        else:
            inside, row = leaf_keys(row, branch, span, window, leaves)
        visible = inside | (position < span.visible_end)
        cached = visible & ~inside
        if leaves is None:
            row = (branch * window + row).to(tl.int64)
        else:
            row = row.to(tl.int64)
        # [BLOCK_N]
        k_cached = cache_rows(
            cache.k_ptr,
            cache.table_ptr,
            cache.pages,
            slot,
            cached,
            cache.stride_k_page,
            cache.stride_k_row,
            PAGE,
        )
        v_cached = cache_rows(
            cache.v_ptr,
            cache.table_ptr,
            cache.pages,
            slot,
            cached,
            cache.stride_v_page,
            cache.stride_v_row,
            PAGE,
        )
        # The compiler does not see that both pointers are aligned, and would load 2 bytes a time.
        k_rows = tl.where(inside, fresh.k_ptr + row * fresh.stride_k_row, k_cached)
        v_rows = tl.where(inside, fresh.v_ptr + row * fresh.stride_v_row, v_cached)
        k_rows = tl.multiple_of(k_rows, [ALIGN])
        v_rows = tl.multiple_of(v_rows, [ALIGN])
        k_a, k_b = load_rotated(k_rows, visible, inside, position, rope, HEAD_DIM, HALF, BLOCK_D)
        mask_v = visible[:, None] & (offs_d < HEAD_DIM)
        v = tl.load(v_rows[:, None] + offs_d, mask=mask_v, other=0.0)  # [BLOCK_N, BLOCK_D]
        seen = visible[None, :]
        if limits is not None:
            seen = seen & (position[None, :] >= limits.begin[:, None])
            seen = seen & (position[None, :] < limits.end[:, None])
        if branch_m is None:
            online = attend(q_a, q_b, k_a, k_b, v, seen, online, scores, None)
        else:
            # A row of another branch has weights of 0. Times a value that is not finite they would
            # be NaN: such values are added by themselves, to the branch's own rows.
            mine = (branch_m == branch)[:, None]
            finite = (v - v).to(tl.float32) == 0.0
            clean = tl.where(finite, v, 0.0).to(v.dtype)
            poison = tl.sum(tl.where(finite, 0.0, v.to(tl.float32)), 0)[None, :]
            poison = tl.where(poison == 0.0, -0.0, poison)  # -0 changes no bit
            online = attend(q_a, q_b, k_a, k_b, clean, seen & mine, online, scores, (mine, poison))
    return online


@triton.jit
def attend_keys(
    q_a,
    q_b,
    cache,
    fresh,
    rope,
    span,
    limits,
    scores,
    branch_m,  # [BLOCK_M], or None where there is one branch
    window_range,  # positions [begin, end), branches [first, last], rows of a branch
    leaves,  # Leaves, or None
    first,  # tiles [first, last)
    last,
    IS_ROTATED: tl.constexpr,
    PAGE: tl.constexpr,
    ALIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The online softmax of a range of key tiles: before the window, on it, and after it."""
    window_begin, window_end, first_branch, last_branch, window = window_range
    before = tl.maximum(tl.minimum(tl.maximum(window_begin, 0) // BLOCK_N, last), first)
    after = tl.maximum(tl.minimum(tl.cdiv(window_end, BLOCK_N), last), before)
    online = no_keys(BLOCK_M, BLOCK_D)
    for segment in tl.static_range(3):
        if segment == 1 and not IS_ROTATED:
            online = attend_window(
                q_a,
                q_b,
                online,
                cache,
                fresh,
                rope,
                span,
                limits,
                scores,
                branch_m,
                first_branch,
                last_branch,
                window,
                leaves,
                before,
                after,
                PAGE,
                ALIGN,
                HEAD_DIM,
                HALF,
                BLOCK_N,
                BLOCK_D,
            )
        elif segment == 0 or not IS_ROTATED:
            online = attend_rotated(
                q_a,
                q_b,
                online,
                cache,
                fresh if IS_ROTATED else None,
                span,
                limits,
                scores,
                first if segment == 0 else after,
                last if segment == 2 or IS_ROTATED else before,
                PAGE,
                ALIGN,
                HEAD_DIM,
                HALF,
                BLOCK_N,
                BLOCK_D,
            )
    return online
