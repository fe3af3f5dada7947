"""The definition of ``window_attention``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pydllm.reference._attention_tiles import attention_in_tiles
from pydllm.reference._window_layout import Layout, only
from pydllm.reference.rms_norm import rms_norm


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    start: Tensor,
    length: Tensor,
    kv_len: Tensor,
    commit: Tensor,
    cos: Tensor,
    sin: Tensor,
    pad: Tensor | None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    block_table: Tensor | None = None,
    block_offset: Tensor | None = None,
    scale: float = 1.0,
    branches: int = 1,
    causal: bool = False,
    block_size: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    eps: float = 1e-6,
    leaves: int = 0,
    leaf_rows: int = 1,
    batch_invariant: bool = False,
    layouts: dict[Any, Any] | None = None,
    whole: bool = False,
    read_only: bool = False,
) -> Tensor:
    """Softmax of ``q k^T scale`` over the visible slots, times ``v``; fp32, or fp64 for fp64.

    Attention runs over a copy of the cache into which the window is put. Branches are windows one
    after the other, of which the first commits. Leaves are windows over a cache that has the trunk.
    ``layouts`` keeps the layout for the next call, by ``window``; ``whole`` and ``read_only`` as in
    ``Layout.make``.
    """
    if leaves:
        options = scale, window, softcap, eps, batch_invariant, layouts
        tables = cos, sin, pad, q_norm, k_norm, block_table
        pair = None if k_cache is None or v_cache is None else (k_cache, v_cache)
        return _with_leaves(
            (q, k, v), pair, start, length, commit, tables, options, leaves, leaf_rows
        )
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm(q, q_norm, eps, None), rms_norm(k, k_norm, eps, None)
    rows, group = q.shape[1] // branches, q.shape[2] // k.shape[2]
    caches = () if k_cache is None or v_cache is None else (k_cache, v_cache)
    stored = tuple(_in_one_piece(cache, block_table) for cache in caches)
    layout = None if layouts is None else layouts.get(window)
    if layout is None:
        slots = stored[0].shape[1] if stored else None
        numbers = start, length, kv_len, commit, cos, sin, pad, block_offset
        masks = branches, causal, block_size, window
        whole, read_only = whole and not batch_invariant, read_only or k_cache is None
        layout = Layout.make(q, rows, slots, group, *numbers, *masks, whole, read_only)
        if layouts is not None:
            layouts[window] = layout
    both = rotate(torch.cat((q, k), 2), layout.cos, layout.sin)
    q, k = both.split_with_sizes((q.shape[2], k.shape[2]), 2)
    parts = []
    for part in range(branches):
        own = slice(part * rows, (part + 1) * rows)
        queries, *fresh = (t[:, own] for t in (q, k, v)) if branches > 1 else (q, k, v)
        if stored:
            keys, values = (_put(*pair, layout) for pair in zip(stored, fresh, strict=True))
        else:
            keys, values = (only(layout.rows, each) for each in fresh)
        attended = _attention(queries, keys, values, group, layout, scale, softcap, batch_invariant)
        parts.append(only(layout.rows, attended))
    if layout.kept is not None:
        for cache, each in zip(caches, (k, v), strict=True):
            commit_rows(cache, each[:, :rows], block_table, layout.slot, layout.kept)
    return parts[0] if branches == 1 else torch.cat(parts, 1)


def _with_leaves(
    heads: tuple[Tensor, Tensor, Tensor],
    caches: tuple[Tensor, Tensor] | None,
    start: Tensor,
    length: Tensor,
    commit: Tensor,
    tables: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    options: tuple[float, int | None, float | None, float, bool, dict[Any, Any] | None],
    leaves: int,
    leaf_rows: int,
) -> Tensor:
    """A causal window, the trunk; then each leaf, a window of its own after a row of the trunk."""
    cos, sin, pad, q_norm, k_norm, table = tables
    scale, window, softcap, eps, batch_invariant, layouts = options
    batch, count = heads[0].shape[:2]
    rows = count - leaves * leaf_rows
    if caches is None:
        copies = [t.new_zeros(batch, rows + leaf_rows, *t.shape[2:]) for t in heads[1:]]
    else:
        whole = [_in_one_piece(cache, table) for cache in caches]
        copies = [F.pad(cache, (0, 0, 0, 0, 0, leaf_rows)) for cache in whole]
    slots = copies[0].shape[1] - leaf_rows
    length = torch.minimum(length, slots - start).clamp(0, rows)

    def attend(
        part: tuple[Tensor, ...],
        copies: list[Tensor],
        pad: Tensor | None,
        causal: bool,
        *at: Tensor,
    ) -> Tensor:
        (q, k, v), (k_copy, v_copy), (start, length, commit) = part, copies, at
        return window_attention(
            *(q, k, v, k_copy, v_copy, start, length, start, commit, cos, sin, pad),
            q_norm=q_norm,
            k_norm=k_norm,
            scale=scale,
            causal=causal,
            window=window,
            softcap=softcap,
            eps=eps,
            batch_invariant=batch_invariant,
            layouts=None if layouts is None else layouts.setdefault(("leaves", causal), {}),
        )

    trunk = attend(tuple(t[:, :rows] for t in heads), copies, pad, True, start, length, length)
    if caches is not None:
        row = torch.arange(rows, device=start.device)
        slot = start[:, None] + row
        kept = (row < torch.minimum(commit, length)[:, None]) & (slot >= 0)
        kept = kept if pad is None else kept & (slot >= pad[:, None])
        index = slot.clamp(0, slots - 1)
        for cache, copy in zip(caches, copies, strict=True):
            fresh = copy[torch.arange(batch, device=start.device)[:, None], index]
            commit_rows(cache, fresh, table, slot, kept)
    root = length[:, None] - leaves + torch.arange(leaves, device=start.device)
    at = (start[:, None] + root + 1).flatten().int()
    used = torch.where(root < 0, 0, leaf_rows).flatten().int()
    parts = tuple(t[:, rows:].unflatten(1, (leaves, leaf_rows)).flatten(0, 1) for t in heads)
    each = [copy.repeat_interleave(leaves, 0) for copy in copies]
    padding = None if pad is None else pad.repeat_interleave(leaves)
    leaf = attend(parts, each, padding, False, at, used, torch.zeros_like(used))
    return torch.cat((trunk, leaf.unflatten(0, (batch, leaves)).flatten(1, 2)), 1)


def _in_one_piece(cache: Tensor, table: Tensor | None) -> Tensor:
    """``(B, L, Hkv, D)``: the cache, or its pages in the order of a block table."""
    return cache if table is None else cache[table.clamp(0, cache.shape[0] - 1)].flatten(1, 2)


def _put(cache: Tensor, fresh: Tensor, layout: Layout) -> Tensor:
    """The visible slots of a cache (B, L, Hkv, D), zeros in the others, and the window's rows."""
    used = cache.clone() if layout.slots is None else only(layout.slots, cache)
    if layout.placed is not None:
        used[layout.placed] = fresh if layout.source is None else fresh[layout.source]
    return used


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: int,
    layout: Layout,
    scale: float,
    softcap: float | None,
    batch_invariant: bool,
) -> Tensor:
    """The heads of a group become rows of their KV head: nothing is repeated."""
    rows = q.shape[1]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if group > 1:
        q = q.unflatten(1, (-1, group)).transpose(2, 3).flatten(2, 3)
    if batch_invariant and layout.seen is not None:
        y = attention_in_tiles(q, k, v, layout.seen.expand(-1, -1, q.shape[2], -1), scale, softcap)
    elif softcap is None:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=layout.bias, scale=scale)
    else:
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = torch.tanh(q.to(wide) @ k.to(wide).mT * (scale / softcap)) * softcap
        scores = scores if layout.bias is None else scores + layout.bias
        y = (scores.softmax(-1) @ v.to(wide)).to(q.dtype)
    if group > 1:
        y = y.unflatten(2, (rows, group)).transpose(2, 3).flatten(1, 2)
    return y.transpose(1, 2).contiguous()


def commit_rows(
    cache: Tensor, fresh: Tensor, table: Tensor | None, slot: Tensor, kept: Tensor
) -> None:
    """Rows of ``fresh`` (B, W, Hkv, D) that are ``kept``, written to their slots."""
    if table is not None:
        write_pages(cache, fresh, table, slot, kept)
        return
    # Rows of a sequence go to different slots (W <= L): those after the end wrap to the front.
    at = torch.arange(fresh.shape[0], device=fresh.device)[:, None], slot % cache.shape[1]
    cache[at] = torch.where(kept[..., None, None], fresh, cache[at])


def write_pages(cache: Tensor, fresh: Tensor, table: Tensor, slot: Tensor, kept: Tensor) -> None:
    """Rows of ``fresh`` (B, W, Hkv, D) that are ``kept``, written through the block table."""
    if kept.numel() == 0:
        return
    pages, size = cache.shape[:2]
    page = table.long().gather(1, (slot // size).clamp(0, max(table.shape[1] - 1, 0)).long())
    kept = kept & (page >= 0) & (page < pages)
    index = torch.where(kept, page * size + slot % size, pages * size)
    # Row of `fresh` that each slot of the cache takes, -1 for none; the last entry is for the rest.
    source = index.new_full((pages * size + 1,), -1)
    source[index.flatten()] = torch.arange(index.numel(), device=index.device)
    source = source[:-1].view(cache.shape[:2])
    taken = fresh.flatten(0, 1)[source.clamp(min=0)]
    cache.copy_(torch.where((source >= 0)[..., None, None], taken, cache))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first ``cos.shape[-1]`` dimensions rotated, half-split, in the dtype of the table.

    ``cos`` and ``sin`` have an entry for each of these dimensions, ``sin`` minus those of the first
    half.
    """
    rotary = cos.shape[-1]
    pairs = x if rotary == x.shape[-1] else x[..., :rotary]
    first, second = pairs.chunk(2, -1)
    rotated = (pairs * cos).add_(torch.cat((second, first), -1) * sin)
    rotated = rotated if rotated.dtype == x.dtype else rotated.to(x.dtype)
    return rotated if pairs is x else torch.cat((rotated, x[..., rotary:]), -1)
