"""More loops of published code (see published.py): Fast-dLLM's dual cache, and Dream's.

Written from the papers and from what their code computes at every step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.baselines.loops import PlainForward
from pydllm.models import NativeModel

# Keys before the rotation and values of every layer, each (B, Hkv, positions, D).
Cache = list[tuple[Tensor, Tensor]]


class ReplacingForward:
    """Logits of a window whose keys and values replace their places in a cache.

    The cache holds keys before the rotation, so all of them are rotated at every step; the places
    are found from a mask.
    """

    def __init__(self, model: NativeModel) -> None:
        self.model = model

    def __call__(
        self, ids: Tensor, cache: Cache | None = None, places: Tensor | None = None
    ) -> tuple[Tensor, Cache]:
        """``(B, T, V)`` logits of ``ids``; without a cache of the whole sequence, which becomes it.

        ``places (1, L)`` bool marks the window in the cache, which is written in place.
        """
        model, sizes = self.model, self.model.sizes
        half, length = sizes.rope.rotary // 2, ids.shape[1]
        last = length
        index = None
        if places is not None:
            index = places.nonzero(as_tuple=True)[1]
            last = int(index.max()) + 1
            length = places.shape[1]
        cos, sin = model._rope.tables(length)

        def rotate(t: Tensor, start: int) -> Tensor:
            wide, stop = t.float(), start + t.shape[2]
            first, second = wide[..., :half], wide[..., half : 2 * half]
            c, s = cos[start:stop], sin[start:stop]
            turned = torch.cat((first * c - second * s, second * c + first * s), -1)
            return torch.cat((turned.to(t.dtype), t[..., 2 * half :]), -1)

        def norm(t: Tensor, weight: Tensor) -> Tensor:
            wide = t.float()
            scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + sizes.eps)
            return (wide * scale).to(t.dtype) * weight

        hidden = F.embedding(ids, model._embedding)
        heads = (sizes.heads, sizes.kv_heads, sizes.kv_heads)
        kept: Cache = []
        for number, layer in enumerate(model._layers):
            qkv = F.linear(norm(hidden, layer.attn_norm), layer.qkv, layer.qkv_bias)
            q, k, v = qkv.unflatten(-1, (-1, sizes.head_dim)).transpose(1, 2).split(heads, 1)
            if cache is not None and index is not None:
                keys, values = cache[number]
                keys[:, :, index], values[:, :, index] = k, v
                k, v = keys, values
            kept.append((k, v))
            q, k = rotate(q, last - q.shape[2]), rotate(k, 0)
            k, v = (t.repeat_interleave(sizes.heads // sizes.kv_heads, 1) for t in (k, v))
            attended = F.scaled_dot_product_attention(q, k, v)
            hidden = hidden + F.linear(attended.transpose(1, 2).flatten(2), layer.out)
            gate, up = F.linear(norm(hidden, layer.mlp_norm), layer.gate_up).chunk(2, -1)
            hidden = hidden + F.linear(F.silu(gate) * up, layer.down)
        return F.linear(norm(hidden, model._norm), model._head), kept


@dataclass
class PublishedDual:
    """Fast-dLLM's loop with its dual cache (arXiv 2505.22618), LLaDA's family, one sequence.

    A number of tokens per step, or with ``threshold`` those above it and at least one.
    """

    model: NativeModel
    block: int
    per_step: int
    threshold: float | None = None

    @torch.no_grad()
    def decode(self, prompts: Tensor, new: int) -> tuple[Tensor, int]:
        """``(1, P + new)`` tokens after ``prompts`` ``(1, P)``, and forwards."""
        forward, mask_id = ReplacingForward(self.model), self.model.spec.mask_id
        x, forwards = F.pad(prompts, (0, new), value=mask_id), 0
        for stop in range(prompts.shape[1] + self.block, x.shape[1] + 1, self.block):
            start = stop - self.block
            logits, cache = forward(x)
            masked = x == mask_id
            masked[:, stop:] = False
            self._write(x, logits, masked)
            forwards += 1
            places = torch.zeros_like(masked)
            places[:, start:stop] = True
            window = x[:, start:stop]
            while (window == mask_id).sum() > 0:
                logits, _ = forward(window, cache, places)
                self._write(window, logits, window == mask_id)
                forwards += 1
        return x, forwards

    def _write(self, x: Tensor, logits: Tensor, masked: Tensor) -> None:
        token = logits.argmax(-1)
        probability = F.softmax(logits.double(), -1).gather(-1, token[..., None])[..., 0]
        confidence = torch.where(masked, probability, -torch.inf)
        token = torch.where(masked, token, x)
        for row in range(x.shape[0]):
            most = int(masked[row].sum()) if self.threshold is not None else self.per_step
            chosen = confidence[row].topk(most).indices
            accept = torch.zeros_like(masked[row])
            for rank, place in enumerate(chosen):
                low = self.threshold is not None and confidence[row, place] < self.threshold
                accept[place] = rank == 0 or not low
            x[row, accept] = token[row, accept]


@dataclass
class PublishedDream:
    """Dream's loop (arXiv 2508.15487): shifted logits of everything, the most confident first.

    The number of tokens of a step follows from times between 1 and ``eps``; the last writes what is
    left.
    """

    model: NativeModel
    steps: int
    eps: float = 1e-3

    @torch.no_grad()
    def decode(self, prompts: Tensor, new: int) -> tuple[Tensor, int]:
        """``(B, P + new)`` tokens after ``prompts`` ``(B, P)``, and forwards."""
        forward, mask_id = PlainForward(self.model), self.model.spec.mask_id
        x = F.pad(prompts, (0, new), value=mask_id)
        times = torch.linspace(1, self.eps, self.steps + 1)
        for step in range(self.steps):
            logits, _ = forward(x)  # shifted by concatenation
            masked = x == mask_id
            confidence, token = F.softmax(logits[masked], -1).max(-1)
            share = 1 - times[step + 1] / times[step] if step < self.steps - 1 else 1.0
            count = int(masked.sum() / x.shape[0] * share)
            score = torch.full_like(logits[..., 0], -torch.inf)
            score[masked] = confidence
            tokens = torch.full_like(x, mask_id)
            tokens[masked] = token
            if count > 0:
                chosen = score.topk(count).indices
                rows = torch.arange(x.shape[0], device=x.device)[:, None]
                x[rows, chosen] = tokens[rows, chosen]
        return x, self.steps
