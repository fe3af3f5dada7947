"""The definition of ``window_attention``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
) -> Tensor:
    """Softmax of ``q k^T scale`` over the visible slots, times ``v``; fp32, or fp64 for fp64.

    The window is put into the cache, attention runs over the cache, and then the rows that are not
    committed are put back. Branches are windows one after the other, of which the first commits.
    """
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm(q, q_norm, eps, None), rms_norm(k, k_norm, eps, None)
    caches, first = (k_cache, v_cache), torch.zeros_like(start) if pad is None else pad
    if block_table is not None:
        k_cache, v_cache = (cache[block_table.clamp(min=0)].flatten(1, 2) for cache in caches)
    rows, slots = q.shape[1] // branches, k_cache.shape[1]
    end = (start + length.clamp(max=rows)).clamp(max=slots)
    start, end, kv_len, commit, first = (t[:, None] for t in (start, end, kv_len, commit, first))
    row, every = (torch.arange(size, device=q.device) for size in (rows, slots))
    slot = start + row  # (B, W)
    mine = (slot >= first) & (slot < end)
    kept = mine & (row < commit)
    visible = (every >= first) & ((every < kv_len) | ((every >= start) & (every < end)))  # (B, L)

    position, key = slot - first, (every - first)[:, None]
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
    turn = cos[at_table][:, :, None], sin[at_table][:, :, None]  # (B, W, 1, rotary / 2)
    # Rows of a sequence go to different slots (W <= L): those behind the end wrap to the front.
    at = torch.arange(q.shape[0], device=q.device)[:, None], slot % slots
    parts = []
    for part in range(branches):
        own = slice(part * rows, (part + 1) * rows)
        turned_q, turned_k = rotate(q[:, own], *turn), rotate(k[:, own], *turn)
        stored, used = kept if part == 0 else torch.zeros_like(kept), []
        for cache, fresh in ((k_cache, turned_k), (v_cache, v[:, own])):
            before = cache[at]
            cache[at] = torch.where(mine[..., None, None], fresh, before)
            used.append(_only(visible, cache))
            cache[at] = torch.where(stored[..., None, None], fresh, before)
        parts.append(_only(mine, _attention(turned_q, used[0], used[1], seen, scale, softcap)))
    if block_table is not None:
        for cache, gathered in zip(caches, (k_cache, v_cache), strict=True):
            write_pages(cache, gathered[at], block_table, slot, kept)
    return parts[0] if branches == 1 else torch.cat(parts, 1)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """The heads of a group become rows of their KV head: nothing is repeated."""
    rows, kv_heads = q.shape[1], k.shape[2]
    group = q.shape[2] // kv_heads
    q = q.unflatten(2, (kv_heads, group)).transpose(1, 2).flatten(2, 3)
    k, v, mask = k.transpose(1, 2), v.transpose(1, 2), seen[:, None].repeat_interleave(group, 2)
    if softcap is None:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = torch.tanh(q.to(wide) @ k.to(wide).mT * (scale / softcap)) * softcap
        y = (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v.to(wide)).to(q.dtype)
    return y.unflatten(2, (rows, group)).transpose(1, 2).flatten(2, 3).contiguous()


def write_pages(cache: Tensor, fresh: Tensor, table: Tensor, slot: Tensor, kept: Tensor) -> None:
    """Rows of ``fresh`` (B, W, Hkv, D) that are ``kept``, written through the block table."""
    flat, size = cache.flatten(2), cache.shape[1]
    page = table.long().gather(1, (slot // size).clamp(0, max(table.shape[1] - 1, 0)).long())
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


def _only(keep: Tensor, x: Tensor) -> Tensor:
    """``x`` where ``keep``, zero elsewhere, NaN or not: `where` on bits is 5 x faster on a CPU."""
    bits = _BITS[x.itemsize]
    return (x.view(bits) & keep.to(bits).neg()[..., None, None]).view(x.dtype)
