"""The definition of ``window_attention``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pydllm.reference._attention_tiles import attention_in_tiles
from pydllm.reference.rms_norm import rms_norm

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
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
    *,
    scale: float,
    branches: int = 1,
    causal: bool = False,
    block_size: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    eps: float = 1e-6,
    batch_invariant: bool = False,
) -> Tensor:
    """Softmax of ``q k^T scale`` over the visible slots, times ``v``; fp32, or fp64 for fp64.

    The window is put into the cache, attention runs over the cache, and then the rows that are not
    committed are put back. Branches are windows one after the other, of which the first commits.
    """
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm(q, q_norm, eps, None), rms_norm(k, k_norm, eps, None)
    caches = k_cache, v_cache
    if block_table is not None:
        pages = block_table.clamp(0, k_cache.shape[0] - 1)
        k_cache, v_cache = (cache[pages].flatten(1, 2) for cache in caches)
    batch, rows, slots = q.shape[0], q.shape[1] // branches, k_cache.shape[1]
    start, length, kv_len, commit = (t[:, None] for t in (start, length, kv_len, commit))
    end = (start + length.clamp(max=rows)).clamp(max=slots)
    row, every = (torch.arange(size, device=q.device) for size in (rows, slots))
    slot = start + row  # (B, W)
    mine = (slot >= 0) & (slot < end)
    visible = (every < kv_len) | ((every >= start) & (every < end))  # (B, L)
    position, key = slot, every
    if pad is not None:
        first = pad[:, None]
        mine, visible = mine & (slot >= first), visible & (every >= first)
        position, key = slot - first, (every - first)[:, None]
    kept = mine & (row < commit)

    query = position[..., None]
    seen = visible[:, None].expand(-1, rows, -1)  # (B, W, L)
    if causal:
        seen = seen & (key <= query)
    if block_size is not None:
        offset = 0 if block_offset is None else block_offset[:, None, None]
        seen = seen & ((key + offset) // block_size <= (query + offset) // block_size)
    if window is not None:
        seen = seen & ((key - query).abs() < window)

    at_table = position.clamp(0, cos.shape[0] - 1)
    if branches > 1:
        at_table = at_table.repeat(1, branches)
    turn = cos[at_table].unsqueeze(2), sin[at_table].unsqueeze(2)  # (B, T, 1, rotary / 2)
    q, k = rotate(torch.cat((q, k), 2), *turn).split((q.shape[2], k.shape[2]), 2)
    # Rows of a sequence go to different slots (W <= L): those after the end wrap to the front.
    at = torch.arange(batch, device=q.device)[:, None], slot % slots
    put, stored = mine[..., None, None], kept[..., None, None]
    mask_rows, mask_slots = _bit_mask(mine, q), _bit_mask(visible, k_cache)
    parts = []
    for part in range(branches):
        own = slice(part * rows, (part + 1) * rows)
        used = []
        for cache, fresh in ((k_cache, k), (v_cache, v)):
            before, fresh = cache[at], fresh[:, own] if branches > 1 else fresh
            cache[at] = torch.where(put, fresh, before)
            used.append(_only(mask_slots, cache))
            cache[at] = torch.where(stored, fresh, before) if part == 0 else before
        query_rows = q[:, own] if branches > 1 else q
        attended = _attention(query_rows, used[0], used[1], seen, scale, softcap, batch_invariant)
        parts.append(_only(mask_rows, attended))
    if block_table is not None:
        for cache, gathered in zip(caches, (k_cache, v_cache), strict=True):
            write_pages(cache, gathered[at], block_table, slot, kept)
    return parts[0] if branches == 1 else torch.cat(parts, 1)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    scale: float,
    softcap: float | None,
    batch_invariant: bool,
) -> Tensor:
    """The heads of a group become rows of their KV head: nothing is repeated."""
    rows, kv_heads = q.shape[1], k.shape[2]
    group = q.shape[2] // kv_heads
    q, k, v, mask = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), seen[:, None]
    if group > 1:
        q = q.unflatten(1, (kv_heads, group)).transpose(2, 3).flatten(2, 3)
        mask = mask.repeat_interleave(group, 2)
    if batch_invariant:
        y = attention_in_tiles(q, k, v, mask, scale, softcap)
    elif softcap is None:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = torch.tanh(q.to(wide) @ k.to(wide).mT * (scale / softcap)) * softcap
        y = (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v.to(wide)).to(q.dtype)
    if group > 1:
        y = y.unflatten(2, (rows, group)).transpose(2, 3).flatten(1, 2)
    return y.transpose(1, 2).contiguous()


def write_pages(cache: Tensor, fresh: Tensor, table: Tensor, slot: Tensor, kept: Tensor) -> None:
    """Rows of ``fresh`` (B, W, Hkv, D) that are ``kept``, written through the block table."""
    flat, size = cache.flatten(2), cache.shape[1]
    page = table.long().gather(1, (slot // size).clamp(0, max(table.shape[1] - 1, 0)).long())
    kept = kept & (page >= 0) & (page < flat.shape[0])
    index = torch.where(kept, page * size + slot % size, flat.shape[0] * size)
    # Row of `fresh` that each slot of the cache takes, -1 for none; the last entry is for the rest.
    source = index.new_full((flat.shape[0] * size + 1,), -1)
    source[index.flatten()] = torch.arange(index.numel(), device=index.device)
    source = source[:-1].view(cache.shape[:2])
    taken = fresh.flatten(0, 1)[source.clamp(min=0)]
    cache.copy_(torch.where((source >= 0)[..., None, None], taken, cache))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first ``2 * cos.shape[-1]`` dimensions turned, half-split, in the dtype of the table."""
    half = cos.shape[-1]
    a, b, rest = x.split((half, half, x.shape[-1] - 2 * half), -1)
    turned = x[..., : 2 * half] * torch.cat((cos, cos), -1)
    turned[..., :half].addcmul_(b, sin, value=-1)
    turned[..., half:].addcmul_(a, sin)
    turned = turned.to(x.dtype)
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


def _bit_mask(keep: Tensor, like: Tensor) -> Tensor:
    """All bits of an element of ``like`` where ``keep`` (B, N), none elsewhere; (B, N, 1, 1)."""
    return keep.to(_BITS[like.itemsize]).neg()[..., None, None]


def _only(mask: Tensor, x: Tensor) -> Tensor:
    """``x`` where ``mask``, zero elsewhere, NaN or not: `where` on bits is 5 x faster on a CPU."""
    return (x.view(mask.dtype) & mask).view(x.dtype)
