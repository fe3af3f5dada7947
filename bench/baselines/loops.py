"""Decoding loops that do what published code does at every step, on a native model's weights.

Plain PyTorch, one module after the other: repeated KV heads, keys and values kept by concatenation,
the LM head on every row that is computed, statistics in fp64 over the whole vocabulary, decisions
read by the host. No early stop. Written from the papers and from what their code computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pydllm import reference
from pydllm.models import NativeModel
from pydllm.models.experts import Experts

# Keys, rotated, and values of every layer, each (B, Hkv, positions, D).
Past = list[tuple[Tensor, Tensor]]


def crop(past: Past, length: int) -> Past:
    return [(k[:, :, :length], v[:, :, :length]) for k, v in past]


class PlainForward:
    """Logits of a window of positions, given the keys and values of all before it."""

    def __init__(self, model: NativeModel) -> None:
        self.model = model

    def __call__(
        self, ids: Tensor, start: int = 0, past: Past | None = None
    ) -> tuple[Tensor, Past]:
        """``(B, T, V)`` logits of ``ids`` ``(B, T)`` at ``start``; ``past`` and the window's own.

        The logits are shifted by concatenation for the models that need it.
        """
        model, sizes = self.model, self.model.sizes
        half, stop = sizes.rope.rotary // 2, start + ids.shape[1]
        cos, sin = (t[start:stop] for t in model._rope.tables(stop))

        def rotate(t: Tensor) -> Tensor:
            wide = t.float()
            first, second = wide[..., :half], wide[..., half : 2 * half]
            turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
            return torch.cat((turned.to(t.dtype), t[..., 2 * half :]), -1)

        def norm(t: Tensor, weight: Tensor) -> Tensor:
            wide = t.float()
            scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + sizes.eps)
            return (wide * scale).to(t.dtype) * weight

        seen = None
        if model.spec.attention == "causal":
            seen = torch.ones(ids.shape[1], stop, dtype=torch.bool, device=ids.device).tril(start)
        elif model.spec.block_size:
            block = torch.arange(stop, device=ids.device) // model.spec.block_size
            seen = block[start:, None] >= block
        hidden = F.embedding(ids, model._embedding)
        heads = (sizes.heads, sizes.kv_heads, sizes.kv_heads)
        present = []
        for number, layer in enumerate(model._layers):
            qkv = F.linear(norm(hidden, layer.attn_norm), layer.qkv, layer.qkv_bias)
            q, k, v = qkv.unflatten(-1, (-1, sizes.head_dim)).transpose(1, 2).split(heads, 1)
            if layer.q_norm is not None:
                q, k = norm(q, layer.q_norm), norm(k, layer.k_norm)
            q, k = rotate(q), rotate(k)
            if past:
                k, v = (torch.cat(pair, 2) for pair in zip(past[number], (k, v), strict=True))
            present.append((k, v))
            k, v = (t.repeat_interleave(sizes.heads // sizes.kv_heads, 1) for t in (k, v))
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            hidden = hidden + F.linear(attended.transpose(1, 2).flatten(2), layer.out)
            rows = norm(hidden, layer.mlp_norm)
            if layer.experts is None:
                hidden = hidden + _mlp(rows, layer.gate_up, layer.down)
            else:
                hidden = hidden + _published_experts(rows, layer.experts)
        logits = F.linear(norm(hidden, model._norm), model._head)
        if model.spec.shift_logits:
            logits = torch.cat((logits[:, :1], logits[:, :-1]), 1)
        return logits, present


def _mlp(rows: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(rows, gate_up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, down)


def _published_experts(hidden: Tensor, layer: Experts) -> Tensor:
    """As the class of LLaDA2.0 does it: rows sorted by expert, a loop over those that have some."""
    moe, rows = layer.sizes, hidden.flatten(0, 1)
    options = (moe.score, moe.renormalize, moe.scale, moe.groups, moe.topk_groups)
    ids, weights = reference.route(
        hidden, layer.router, layer.router_bias, None, None, moe.top_k, *options, None, None, 1
    )
    order = ids.flatten().argsort()
    counts = ids.flatten().bincount(minlength=moe.experts).tolist()
    taken, parts, first = rows[order // moe.top_k], [], 0
    for expert, count in enumerate(counts):
        if count:
            own = taken[first : first + count]
            parts.append(_mlp(own, layer.gate_up[expert], layer.down[expert]))
            first += count
    y = torch.empty_like(taken)
    y[order] = torch.cat(parts)
    out = (y.view(*ids.shape, -1).to(weights.dtype) * weights[..., None]).sum(2).to(hidden.dtype)
    if layer.shared_gate_up is None:
        return out
    return out + _mlp(hidden, layer.shared_gate_up, layer.shared_down)


@dataclass
class PublishedLLaDA2:
    """LLaDA2.0's loop at no threshold: every step computes all tokens up to its block's end."""

    model: NativeModel
    block: int
    per_step: int

    @torch.no_grad()
    def decode(self, prompts: Tensor, new: int) -> tuple[Tensor, int]:
        """``(1, P + new)`` tokens after ``prompts`` ``(1, P)``, and forwards."""
        forward, mask_id, forwards = PlainForward(self.model), self.model.spec.mask_id, 0
        first, total = prompts.shape[1] // self.block, prompts.shape[1] + new
        blocks = -(-total // self.block)
        x = F.pad(prompts, (0, blocks * self.block - prompts.shape[1]), value=mask_id)
        for stop in range((first + 1) * self.block, x.shape[1] + 1, self.block):
            active = x[:, stop - self.block : stop]
            while (masked := active == mask_id).any():
                logits, _ = forward(x[:, :stop])
                best, token = logits[:, -self.block :].softmax(-1).max(-1)
                count = min(self.per_step, int(masked.sum()))
                chosen = torch.where(masked, best, -torch.inf)[0].topk(count).indices
                active[0, chosen] = token[0, chosen]
                forwards += 1
        return x[:, :total], forwards


@dataclass
class PublishedLoop:
    """The low-confidence loop (arXiv 2502.09992): a top-k for each sequence, no cache.

    ``forward`` may be ``PlainForward`` of the model in another form, a compiled one for instance.
    """

    model: NativeModel
    block: int
    per_step: int
    forward: Callable[[Tensor], tuple[Tensor, Past]] | None = None

    @torch.no_grad()
    def decode(self, prompts: Tensor, new: int) -> tuple[Tensor, int]:
        """``(B, P + new)`` tokens after ``prompts`` ``(B, P)``, and forwards."""
        forward = self.forward or PlainForward(self.model)
        mask_id = self.model.spec.mask_id
        x = F.pad(prompts, (0, new), value=mask_id)
        for stop in range(prompts.shape[1] + self.block, x.shape[1] + 1, self.block):
            for _ in range(self.block // self.per_step):
                logits, _ = forward(x)
                token = logits.argmax(-1)
                confidence = F.softmax(logits.double(), -1).gather(-1, token[..., None])[..., 0]
                masked = x == mask_id
                confidence[:, stop:] = -torch.inf
                confidence = torch.where(masked, confidence, -torch.inf)
                for row in range(x.shape[0]):
                    chosen = confidence[row].topk(self.per_step).indices
                    x[row, chosen] = token[row, chosen]
        return x, new // self.per_step


@dataclass
class PublishedAPD:
    """Adaptive parallel decoding (arXiv 2506.00413) with the published code's rule, one sequence.

    ``window`` None computes all positions up to the last mask shown in every round. As in that
    code, drafts are drawn from exp(logits / T) by a race in fp64, whose noise is raised to T once
    more, and targets are the arg-max of the mixture without noise. There is no nucleus.
    """

    model: NativeModel
    verifier: NativeModel
    window: int | None
    lookahead: int = 64
    mixture: float = 0.7
    temperature: float = 0.2

    @torch.no_grad()
    def decode(self, prompts: Tensor, new: int) -> tuple[Tensor, int]:
        """``(1, P + new)`` tokens after ``prompts`` ``(1, P)``, and forwards."""
        forward, verify = PlainForward(self.model), PlainForward(self.verifier)
        x = F.pad(prompts, (0, new), value=self.model.spec.mask_id)
        cursor, previous, rounds, end = prompts.shape[1], 0, 0, x.shape[1]
        past: Past = []
        verified: Past = []
        known = 0
        last = None  # the verifier's logits for the cursor; their target is never looked at
        while cursor < end:
            stop = min(cursor + self.lookahead, end)
            left = 0
            if self.window is not None:
                left = max(previous - self.window + 1, 0)
            logits, past = forward(x[:, left:stop], left, crop(past, left))
            rows = logits[0, cursor - left :].clone()
            draft = self._draft(rows)
            scores, verified = verify(torch.cat((x[0, known:cursor], draft))[None], known, verified)
            fed = scores[0, -len(draft) :]
            shifted = torch.cat((fed[:1] if last is None else last, fed[:-1]))
            target = (self.mixture * rows + (1 - self.mixture) * shifted).argmax(-1)
            agree = draft == target
            agree[0] = True
            accepted = int(agree.long().cumprod(0).sum().item())
            x[0, cursor : cursor + accepted] = draft[:accepted]
            last = fed[accepted - 1 : accepted]
            previous, cursor = cursor, cursor + accepted
            verified, known = crop(verified, cursor), cursor
            rounds += 1
        return x, rounds

    def _draft(self, logits: Tensor) -> Tensor:
        if self.temperature == 0:
            return logits.argmax(-1)
        wide = (logits / self.temperature).double()
        noise = (-torch.rand_like(wide).log()) ** self.temperature
        return (wide.exp() / noise).argmax(-1)


@dataclass
class _Block:
    start: int
    end: int
    masks: int
    full: bool
    done: int | None = None
    cached: bool = False

    @property
    def progress(self) -> float:
        return 1 - self.masks / (self.end - self.start)


@dataclass
class PublishedMultiBlock:
    """d3LLM's decoder with a cache (arXiv 2601.07568), LLaDA's family, one sequence.

    Ends of sequence mean nothing here.
    """

    model: NativeModel
    threshold: float
    block: int
    add_at: float = 0.1
    full_at: float = 0.95
    delay: int = 2

    @torch.no_grad()
    def decode(self, prompts: Tensor, new: int) -> tuple[Tensor, int]:
        """``(1, P + new)`` tokens after ``prompts`` ``(1, P)``, and forwards."""
        forward, mask_id = PlainForward(self.model), self.model.spec.mask_id
        first = prompts.shape[1]
        x = F.pad(prompts, (0, new), value=mask_id)
        blocks = [_Block(0, first, 0, True, done=0)]
        past: Past = []
        forwards = prefix = 0
        while True:
            masked = x[0] == mask_id
            newest = blocks[-1]
            more = newest.end < x.shape[1]
            if not more and all(block.masks == 0 for block in blocks):
                return x, forwards
            forwards += 1
            for before, block in zip(blocks, blocks[1:], strict=False):
                block.full |= before.progress >= self.full_at
            if more and newest.progress >= self.add_at:
                stop = min(newest.end + self.block, x.shape[1])
                full = newest.progress >= self.full_at
                blocks.append(_Block(newest.end, stop, stop - newest.end, full))

            commit = self._finished(blocks, prefix, forwards)
            waiting = any(
                block.done is not None and not block.cached and not block.masks for block in blocks
            )
            # The prompt and finished blocks wait while full forwards renew what is kept.
            start = prefix if commit is not None or (past and not waiting) else 0
            window, present = forward(x[:, start:], start, past if start else [])
            if commit is not None:
                prefix = commit.end
            past = crop(present, prefix)
            logits = window.new_full((x.shape[1], window.shape[-1]), -torch.inf)
            logits[start:] = window[0]
            probability = logits.double().softmax(-1)
            entropy = -(probability * (probability + 1e-12).log()).sum(-1)
            token = logits.argmax(-1)

            end = max(block.end for block in blocks if block.full or block.masks)
            masked[end:] = False
            accept = self._accept(entropy, masked)
            focus = next((b for b in blocks if b.full and b.masks), None)
            if focus is not None and not accept[focus.start : focus.end].any():
                inside = torch.where(masked, entropy, torch.inf)[focus.start : focus.end]
                accept[focus.start + inside.argmin()] = True
            x[0, accept] = token[accept]
            for block in blocks[1:]:
                block.masks -= int(accept[block.start : block.end].sum().item())

    def _finished(self, blocks: list[_Block], prefix: int, forwards: int) -> _Block | None:
        """The block whose keys and values this forward keeps: one at a time, in order."""
        commit = None
        for block in blocks:
            if block.end <= prefix:
                continue
            if block.masks:
                break
            if block.done is None:
                block.done = forwards
            if forwards - block.done < self.delay:
                break
            if not block.cached:
                commit, block.cached = block, True
        return commit

    def _accept(self, entropy: Tensor, masked: Tensor) -> Tensor:
        """The most certain mask, and those behind it in the order up to the threshold."""
        accept = torch.zeros_like(masked)
        order = torch.where(masked, -entropy, -torch.inf).topk(int(masked.sum().item())).indices
        for rank, place in enumerate(order):
            accept[place] = rank == 0 or not (entropy[place] > self.threshold).item()
        return accept
