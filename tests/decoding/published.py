"""What published decoding loops do, stated plainly, batch 1, on an independent plain forward.

Nothing here is fast and nothing is shared with the package: these are the oracles of the parity
tests. ``PlainLLaDA`` recomputes everything from a LLaDA state dict in the dtype of the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class PlainLLaDA:
    """A LLaDA forward from its checkpoint tensors, with an optional frozen cache."""

    def __init__(self, weights: dict[str, Tensor], config: dict) -> None:
        self.weights, self.config = weights, config

    def _rotate(self, x: Tensor, start: int) -> Tensor:
        size = x.shape[-1]
        inverse = self.config["rope_theta"] ** (-torch.arange(0, size, 2, dtype=x.dtype) / size)
        angle = torch.arange(start, start + x.shape[-2], dtype=x.dtype)[:, None] * inverse
        cos, sin = angle.cos(), angle.sin()
        first, second = x[..., : size // 2], x[..., size // 2 :]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    def forward(
        self, ids: Tensor, start: int = 0, cache: list | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Logits ``(T, V)`` of the window ``ids (T,)`` at ``start``, and the keys and values.

        ``cache`` holds (keys, values) of every layer, heads first, for positions from 0 on; the
        window replaces or extends it from ``start`` on. Without a cache the window sees itself
        alone.
        """
        config, w = self.config, self.weights
        heads, kv_heads = config["n_heads"], config["n_kv_heads"]
        width = config["d_model"]

        def norm(x: Tensor, name: str) -> Tensor:
            return F.rms_norm(x, (width,), w[name], config["rms_norm_eps"])

        x = w["model.transformer.wte.weight"][ids]
        kept = []
        for layer in range(config["n_layers"]):
            prefix = f"model.transformer.blocks.{layer}."
            h = norm(x, prefix + "attn_norm.weight")
            q, k, v = (
                F.linear(h, w[f"{prefix}{part}_proj.weight"], w.get(f"{prefix}{part}_proj.bias"))
                .unflatten(-1, (count, -1))
                .transpose(0, 1)
                for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
            )
            q, k = self._rotate(q, start), self._rotate(k, start)
            if cache is not None:
                keys, values = cache[layer]
                stop = start + len(ids)
                k = torch.cat((keys[:, :start], k, keys[:, stop:]), 1)
                v = torch.cat((values[:, :start], v, values[:, stop:]), 1)
            kept.append((k, v))
            k, v = (t.repeat_interleave(heads // kv_heads, 0) for t in (k, v))
            scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
            attended = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
            x = x + attended @ w[prefix + "attn_out.weight"].T
            h = norm(x, prefix + "ff_norm.weight")
            gate, up = (h @ w[f"{prefix}{part}_proj.weight"].T for part in ("ff", "up"))
            x = x + (F.silu(gate) * up) @ w[prefix + "ff_out.weight"].T
        x = norm(x, "model.transformer.ln_f.weight")
        return x @ w["model.transformer.ff_out.weight"].T, kept


def llada_generate(
    model: PlainLLaDA, prompt: list[int], *, steps: int, gen_length: int, block_length: int
) -> Tensor:
    """LLaDA's low-confidence loop: full forward, softmax, top-k of the block, every step."""
    mask_id = model.config["mask_token_id"]
    x = torch.tensor(prompt + [mask_id] * gen_length)
    blocks = gen_length // block_length
    steps_a_block = steps // blocks
    for block in range(blocks):
        stop = len(prompt) + (block + 1) * block_length
        masks = (x[stop - block_length : stop] == mask_id).sum().item()
        quota = [
            masks // steps_a_block + (step < masks % steps_a_block) for step in range(steps_a_block)
        ]
        for count in quota:
            logits, _ = model.forward(x)
            token = logits.argmax(-1)
            confidence = logits.softmax(-1).gather(1, token[:, None]).squeeze(1)
            confidence[stop:] = -torch.inf
            confidence[x != mask_id] = -torch.inf
            chosen = confidence.topk(count).indices
            token = torch.where(x == mask_id, token, x)
            x[chosen] = token[chosen]
    return x


def _transfer(
    logits: Tensor, x: Tensor, mask_id: int, *, threshold: float | None, factor: float | None
) -> Tensor:
    """Fast-dLLM's transfer: which masks of ``x (T,)`` become tokens; returns the new ``x``."""
    masked = x == mask_id
    count = int(masked.sum())
    if count == 0:
        return x
    token = logits.argmax(-1)
    confidence = logits.double().softmax(-1).gather(1, token[:, None]).squeeze(1)
    confidence[~masked] = -torch.inf
    ranked = confidence.topk(count)
    if threshold is not None:
        kept = 1
        while kept < count and ranked.values[kept] >= threshold:
            kept += 1
    else:
        # Ranks are walked until one fails; if it is the last that fails, it is taken all the same.
        bounds = [1 - factor / (rank + 1) for rank in range(1, count + 1)]
        bounds[0] = -1.0
        kept = 0
        for kept in range(count):  # noqa: B007
            if ranked.values[kept] < bounds[kept]:
                break
        if kept == 0 or kept == count - 1:
            kept += 1
    chosen = ranked.indices[:kept]
    x = x.clone()
    x[chosen] = token[chosen]
    return x


def fast_dllm_generate(
    model: PlainLLaDA,
    prompt: list[int],
    *,
    gen_length: int,
    block_length: int,
    cache: str,
    threshold: float | None = None,
    factor: float | None = None,
) -> tuple[Tensor, int]:
    """Fast-dLLM's loops with no, prefix or dual cache; returns tokens and forwards."""
    mask_id = model.config["mask_token_id"]
    rule = {"mask_id": mask_id, "threshold": threshold, "factor": factor}
    x = torch.tensor(prompt + [mask_id] * gen_length)
    forwards = 0
    for start in range(len(prompt), len(x), block_length):
        stop = start + block_length
        kept: list = []
        for step in range(block_length):
            if step > 0 and not (x[start:stop] == mask_id).any():
                break
            forwards += 1
            if cache == "none" or step == 0:
                logits, kept = model.forward(x)
                x[:stop] = _transfer(logits[:stop], x[:stop], **rule)
            elif cache == "prefix":
                prefix = [(k[:, :start], v[:, :start]) for k, v in kept]
                logits, _ = model.forward(x[start:], start, prefix)
                x[start:stop] = _transfer(logits[:block_length], x[start:stop], **rule)
            else:
                logits, _ = model.forward(x[start:stop], start, kept)
                x[start:stop] = _transfer(logits, x[start:stop], **rule)
    return x, forwards
