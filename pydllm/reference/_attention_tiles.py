"""Attention whose rows do not depend on how many there are: one order of sums for any shape."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# A matrix library chooses the order of a sum from the shape of the product: this one is constant.
_ROWS, _KEYS = 32, 64


def attention_in_tiles(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """``softmax(q k^T scale) v`` of ``(B, H, R, D)``, key tile by key tile from the first slot on.

    ``seen``: ``(B, 1, R, L)``. A tile that a row does not see leaves the row's sums as they are, so
    the slots after the last visible one do not matter. fp32, or fp64 for fp64.
    """
    rows, dtype = q.shape[2], q.dtype
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v = (_padded(t, size).to(wide) for t, size in ((q, _ROWS), (k, _KEYS), (v, _KEYS)))
    seen = F.pad(seen, (0, -seen.shape[3] % _KEYS, 0, -rows % _ROWS))
    tiles = list(zip(k.split(_KEYS, 2), v.split(_KEYS, 2), seen.split(_KEYS, 3), strict=True))
    parts = []
    for part, queries in enumerate(q.split(_ROWS, 2)):
        own = slice(part * _ROWS, (part + 1) * _ROWS)
        acc = torch.zeros_like(queries)
        best = queries.new_full((*queries.shape[:3], 1), -torch.inf)
        total = torch.zeros_like(best)
        for keys, values, mask in tiles:
            scores = _product(queries, keys.mT) * scale
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            scores.masked_fill_(~mask[:, :, own], -torch.inf)
            following = torch.maximum(best, scores.amax(-1, keepdim=True))
            base = following.masked_fill(following == -torch.inf, 0)
            weights, alpha = (scores - base).exp_(), (best - base).exp_()
            total = total * alpha + weights.sum(-1, keepdim=True)
            acc = acc * alpha + _product(weights, values)
            best = following
        parts.append(acc / total.masked_fill(total == 0, 1))
    return torch.cat(parts, 2)[:, :, :rows].to(dtype)


def _padded(x: Tensor, multiple: int) -> Tensor:
    return F.pad(x, (0, 0, 0, -x.shape[2] % multiple))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Heads one after the other: a batched product may choose by the size of the batch."""
    flat = zip(a.flatten(0, 1).unbind(), b.flatten(0, 1).unbind(), strict=True)
    return torch.stack([x @ y for x, y in flat]).view(*a.shape[:3], b.shape[3])
