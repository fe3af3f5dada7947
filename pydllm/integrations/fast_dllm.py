"""Fast-dLLM's loops for LLaDA, on kernels; those for Dream are in ``fast_dllm_dream``.

from pydllm.integrations.fast_dllm import generate_with_dual_cache  # instead of its generate.py
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from pydllm._checks import check_choice, check_number
from pydllm.integrations._arguments import (
    check_blocks,
    check_fills,
    check_prompt,
    check_temperature,
    follows,
    full_attention,
    raise_stuck,
)
from pydllm.integrations._published import LoopState, Pass, PublishedLoop, spread
from pydllm.integrations._rules import by_factor, by_threshold, first
from pydllm.integrations.samplers import get_transfer_index, get_transfer_index_dynamic

__all__ = ["generate", "generate_with_dual_cache", "generate_with_prefix_cache"]


@torch.no_grad()
def generate(
    model: Any,
    prompt: Tensor,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = 126336,
    threshold: float | None = None,
    factor: float | None = None,
    *,
    version: str = "a9b81e4",
    compat: str | None = "fast_dllm",
    backend: str | None = None,
) -> tuple[Tensor, int]:
    """Fill masks block by block, every forward over the whole sequence.

    Args:
        model: a loaded LLaDA module, whose weights are shared, or a pydllm model.
        prompt: ``(B, P)`` token ids, not padded. The original takes one sequence; several are
            decoded side by side, each as if alone, until the last has finished a block. Masks in it
            compete with those of the block, so some may be left, as in the original;
            ``compat=None`` refuses them, and ``pydllm.infill`` fills all of them.
        steps: a multiple of the number of blocks; the schedule where there is neither a threshold
            nor a factor.
        gen_length: new tokens, a multiple of ``block_length``.
        block_length: tokens in a block.
        temperature: 0 takes the arg-max; confidences are those of the plain logits.
        remasking: ``"low_confidence"`` or ``"random"``.
        mask_id: the mask's token id.
        threshold: write every token with this probability, and at least one.
        factor: write rank r while its probability is at least ``1 - factor / (r + 1)``; goes before
            ``threshold``.
        version: the commit of NVlabs/Fast-dLLM that is followed: ``"a9b81e4"`` (May 2026) or
            ``"24cc59e"`` (June 2025). In the first the dual cache ends a block after its steps,
            with a threshold or a factor too, and leaves masks where some are left; in the second a
            block that is complete after its first forward costs one more where there is a cache.
        compat: ``"fast_dllm"``: the original's noise, torch's generator in its order. None: noise
            is drawn in the kernel, and the mask is never predicted.
        backend: as in ``pydllm.ops``.

    Returns:
        ``x (B, P + gen_length)`` int64 on the model's device, and the forwards. Confidences are
        fp32 (fp64 there), so tokens can differ where two of them, or one and the threshold, agree
        to rounding.

    Raises:
        ValueError, TypeError: an argument that the original asserts, or does not know.
        PydllmError: the model predicts nothing but masks; the original does not return then.
    """
    lengths = gen_length, block_length, steps
    rule = temperature, remasking, threshold, factor, version, compat
    return _decode(model, prompt, lengths, rule, mask_id, "none", backend)


@torch.no_grad()
def generate_with_prefix_cache(
    model: Any,
    prompt: Tensor,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = 126336,
    threshold: float | None = None,
    factor: float | None = None,
    *,
    version: str = "a9b81e4",
    compat: str | None = "fast_dllm",
    backend: str | None = None,
) -> tuple[Tensor, int]:
    """``generate``, where keys and values before a block are those of the block's first forward."""
    lengths = gen_length, block_length, steps
    rule = temperature, remasking, threshold, factor, version, compat
    return _decode(model, prompt, lengths, rule, mask_id, "prefix", backend)


@torch.no_grad()
def generate_with_dual_cache(
    model: Any,
    prompt: Tensor,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = 126336,
    threshold: float | None = None,
    factor: float | None = None,
    *,
    version: str = "a9b81e4",
    compat: str | None = "fast_dllm",
    backend: str | None = None,
) -> tuple[Tensor, int]:
    """``generate``, where only the block is recomputed; all around it is of its first forward."""
    lengths = gen_length, block_length, steps
    rule = temperature, remasking, threshold, factor, version, compat
    return _decode(model, prompt, lengths, rule, mask_id, "dual", backend)


def _decode(
    model: Any,
    prompt: Tensor,
    lengths: tuple[int, int, int],
    rule: tuple,
    mask_id: int,
    cache: str,
    backend: str | None,
) -> tuple[Tensor, int]:
    temperature, remasking, threshold, factor, version, compat = rule
    gen_length, block_length, _ = lengths
    _, steps = check_blocks(*lengths)
    check_temperature(temperature)
    check_choice("version", version, ("a9b81e4", "24cc59e"))
    check_choice("remasking", remasking, ("low_confidence", "random"))
    for name, limit in (("threshold", threshold), ("factor", factor)):
        if limit is not None:
            check_number(name, limit, 0, infinite=True)
    own = full_attention(model, "Fast-dLLM's generate", mask_id, shifted=False)
    prompt = check_prompt("prompt", prompt, own, gen_length)
    published = follows(compat, "fast_dllm")
    check_fills(prompt, mask_id, published)
    loop = _Loop(
        block_length=block_length,
        steps=steps,
        temperature=temperature,
        remasking=remasking,
        threshold=threshold,
        factor=factor,
        version=version,
        cache=cache,
        cached=cache != "none",
        published=published,
    )
    decoded = loop.run(own, prompt, gen_length, backend)
    return decoded.x, int(decoded.counters["nfe"][0])


@dataclass(kw_only=True)
class _Loop(PublishedLoop):
    block_length: int
    steps: int
    remasking: str
    threshold: float | None
    factor: float | None
    version: str
    cache: str

    def schedule(self, state: LoopState) -> Iterator[Pass]:
        length, begin = state.call.max_len, state.first_mask()
        # Since May 2026 the dual cache ends a block after its steps; before, a block took two
        # forwards at least where there was a cache.
        most = max(self.steps, 1) if self.cache == "dual" and self.version == "a9b81e4" else None
        least = 2 if self.cached and self.version == "24cc59e" else 1
        for block in range(state.call.prompt_lengths[0], length, self.block_length):
            last = block + self.block_length
            quotas, before = spread(self.block_length, self.steps), None
            for step in count():
                if step == most or (step >= least and not any(state.block_left)):
                    break
                # After the schedule's end only masks that were predicted are left, one per step.
                quota = quotas[step] if step < self.steps else 1
                whole = step == 0 or not self.cached
                yield Pass(
                    start=0 if whole else block,
                    stop=last if self.cache == "dual" and not whole else length,
                    seen=length,
                    commit=length if whole and self.cached else 0,
                    first=begin if whole else block,
                    last=last,
                    block=block,
                    quota=quota,
                )
                stuck = any(state.block_left) and state.left == before and self.temperature == 0
                scheduled = self.threshold is None and self.factor is None
                if stuck and most is None and not (scheduled and step < self.steps):
                    raise_stuck()
                before = state.left
            if not any(state.left):
                begin = last

    def choose(self, state: LoopState, plan: Pass, hidden: Tensor) -> tuple[Tensor, Tensor]:
        random = self.remasking == "random"
        if self.published and (self.temperature > 0 or random):
            return self._from_logits(state, plan, hidden)
        stats, masked = self.stats(state, plan, hidden), state.masked(plan.first, plan.last)
        score = torch.rand(masked.shape, device=masked.device) if random else stats.prob
        if self.factor is not None:
            return stats.token, by_factor(score, masked, self.factor)
        if self.threshold is not None:
            return stats.token, by_threshold(score, masked, self.threshold)
        return stats.token, first(score, masked, plan.quota)

    def _from_logits(self, state: LoopState, plan: Pass, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The window's noise is drawn for all its positions."""
        if self.cache == "prefix" and plan.start > 0 and self.temperature > 0:
            # The original draws the noise of these steps twice and uses the second.
            shape = (*hidden.shape[:2], state.call.model.spec.vocab_size)
            torch.rand(shape, dtype=torch.float64, device=hidden.device)
        logits = self.logits(state, plan, hidden, (plan.start, plan.stop))
        masked = state.masked(plan.start, plan.stop)
        masked[:, plan.last - plan.start :] = False
        x = state.x[:, plan.start : plan.stop]
        arguments = (logits, self.temperature, self.remasking, masked, x)
        if self.factor is not None:
            token, chosen = get_transfer_index_dynamic(*arguments, factor=self.factor)
        else:
            quota = masked.new_full((len(x),), plan.quota, dtype=torch.int32)
            token, chosen = get_transfer_index(
                *arguments, quota, self.threshold, version=self.version
            )
        decided = slice(plan.first - plan.start, plan.last - plan.start)
        return token[:, decided], chosen[:, decided]
