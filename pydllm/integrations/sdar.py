"""SDAR's and TraDo's ``block_diffusion_generate``, on kernels.

from pydllm.integrations.sdar import block_diffusion_generate  # instead of SDAR's generate.py
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor

from pydllm._backend.errors import PydllmError
from pydllm._checks import check_choice, check_int, check_number, describe
from pydllm.integrations._arguments import (
    block_causal,
    check_prompt,
    check_temperature,
    expect_one,
    follows,
)
from pydllm.integrations._published import LoopState, Pass, PublishedLoop, spread
from pydllm.integrations._rules import above, by_entropies, span, top
from pydllm.integrations._sampling import Drawn, check_filters, draw

__all__ = ["block_diffusion_generate"]

STRATEGIES = ("low_confidence_dynamic", "low_confidence_static", "sequential", "entropy_bounded")


@torch.no_grad()
def block_diffusion_generate(
    model: Any,
    prompt: Mapping[str, Tensor],
    mask_id: int,
    gen_length: int = 128,
    block_length: int = 8,
    denoising_steps: int = 8,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    remasking_strategy: str = "low_confidence_dynamic",
    confidence_threshold: float = 0.85,
    eb_threshold: float | None = None,
    stopping_criteria_idx: Sequence[int] | None = None,
    *,
    compat: str | None = "sdar",
    backend: str | None = None,
) -> Tensor:
    """Fill the blocks after the prompt one after the other, keys of finished blocks cached.

    Args:
        model: a loaded SDAR module, whose weights are shared, or a pydllm model with block-causal
            attention.
        prompt: has ``input_ids (1, P)``.
        mask_id: the mask's token id.
        gen_length: new tokens; rounded up to whole blocks of the whole sequence.
        block_length: tokens in a block, for this call whatever the model's own is.
        denoising_steps: of a block: the schedule, and the least number of tokens a step writes.
        temperature: of tokens and confidences; 0, on which the original fails, is greedy.
        top_k: only so many ids count; 0: all.
        top_p: of these only the best with this mass.
        remasking_strategy: ``"low_confidence_dynamic"``: all above ``confidence_threshold``, at
            least the schedule's number; ``"low_confidence_static"``: the schedule's number;
            ``"sequential"``: from the left; ``"entropy_bounded"``: the lowest entropies whose sum
            stays below ``eb_threshold``, at least one (here the original fails).
        confidence_threshold: see there.
        eb_threshold: nats, see there.
        stopping_criteria_idx: ids that end the generation with the block they are in.
        compat: ``"sdar"``: tokens drawn by torch's generator as in the original: the same seed
            gives the same tokens. And its defect: a schedule that asks for more tokens than a block
            has masks, as in the first block after a prompt that fills a part of it, overwrites
            known tokens, of the prompt too. None: drawn in the kernel, logits not stored unless
            filters need them (the same distribution, a function of ``torch.manual_seed``), known
            tokens stay, and the mask is never predicted.
        backend: as in ``pydllm.ops``.

    Returns:
        ``(1, T)`` int64 on the model's device, T a multiple of ``block_length``; after a block
        that ended the generation masks. A finished block's keys are stored by the next block's
        first forward: one forward a block fewer than the original.

    Raises:
        ValueError, TypeError: an argument out of range.
        PydllmError: masks are left after the schedule's end because the model predicts them; the
            original fails then.
    """
    for name, number in (("gen_length", gen_length), ("block_length", block_length)):
        check_int(name, number, 1)
    check_int("denoising_steps", denoising_steps, 1)
    check_temperature(temperature)
    check_filters(top_k, top_p)
    check_choice("remasking_strategy", remasking_strategy, STRATEGIES)
    check_number("confidence_threshold", confidence_threshold, 0, infinite=True)
    if remasking_strategy == "entropy_bounded":
        check_number("eb_threshold", eb_threshold, 0, infinite=True)
    own = block_causal(model, "block_diffusion_generate", mask_id, block_length)
    if not isinstance(prompt, Mapping) or "input_ids" not in prompt:
        raise TypeError(f"prompt: expected a mapping with input_ids, got {describe(prompt)}")
    ids = check_prompt("prompt['input_ids']", prompt["input_ids"], own, gen_length)
    expect_one("prompt", ids)
    total = -(-(ids.shape[1] + gen_length) // block_length) * block_length
    check_prompt("prompt['input_ids']", ids, own, total - ids.shape[1])
    loop = _Loop(
        block_length=block_length,
        quotas=spread(block_length, denoising_steps),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        strategy=remasking_strategy,
        threshold=confidence_threshold,
        bound=eb_threshold or 0.0,
        stops=set(stopping_criteria_idx or ()),
        cached=True,
        published=follows(compat, "sdar"),
    )
    return loop.run(own, ids, total - ids.shape[1], backend).x


@dataclass(kw_only=True)
class BlockCausalLoop(PublishedLoop):
    """One block after the other, aligned to position 0; keys and values of finished ones are kept.

    The first forward of a block also stores the one before, or the prompt.
    """

    block_length: int
    quotas: list[int]
    top_k: int | None
    top_p: float | None
    threshold: float

    def schedule(self, state: LoopState) -> Iterator[Pass]:
        start, size = 0, self.block_length
        for first in range(state.call.prompt_lengths[0] // size * size, state.call.max_len, size):
            for number, quota in enumerate(self.quotas_of_block()):
                if number and not any(state.block_left):
                    break
                commit = first - start if self.cached else 0
                yield Pass(
                    start=start,
                    stop=first + size,
                    first=first,
                    last=first + size,
                    commit=commit,
                    quota=quota,
                )
                start = first if self.cached else 0
                if self.ends(state, first):
                    return
            if self.ends_block(state, first):
                return

    def quotas_of_block(self) -> Iterable[int]:
        """Tokens of each step; the block is left with what they leave."""
        return self.quotas

    def ends(self, state: LoopState, first: int) -> bool:
        """Whether a step of the block at ``first`` was the last of all."""
        return False

    @abstractmethod
    def ends_block(self, state: LoopState, first: int) -> bool:
        """Whether the block at ``first`` was the last."""

    def propose(self, state: LoopState, plan: Pass, hidden: Tensor) -> Drawn:
        """Tokens of the block."""
        hot = self.temperature > 0
        # The two filters of the op look at the whole row each, those of the original one after the
        # other; and it keeps all rows, where the noise is torch's.
        if self.draws or (hot and (self.top_k or (self.top_p or 1.0) < 1)):
            logits = self.logits(state, plan, hidden)
            return draw(logits, self.temperature, self.top_k, self.top_p)
        stats = self.stats(state, plan, hidden, tempered=hot)
        return Drawn(stats.token, stats.prob, stats.entropy)


@dataclass(kw_only=True)
class _Loop(BlockCausalLoop):
    strategy: str
    bound: float
    stops: set[int]

    def quotas_of_block(self) -> Iterator[int]:
        yield from chain(self.quotas, repeat(1, self.block_length + 1))
        raise PydllmError(
            "the model predicts masks, and the schedule ends with some of them left; compat=None "
            "does not allow the prediction"
        )

    def ends_block(self, state: LoopState, first: int) -> bool:
        return bool(self.stops) and not self.stops.isdisjoint(
            state.x[0, state.call.prompt_lengths[0] :].tolist()
        )

    def choose(self, state: LoopState, plan: Pass, hidden: Tensor) -> tuple[Tensor, Tensor]:
        drawn, masked = self.propose(state, plan, hidden), state.masked(plan.first, plan.last)
        if self.strategy == "low_confidence_dynamic":
            chosen = above(drawn.prob, masked, self.threshold, plan.quota)
        elif self.strategy == "entropy_bounded":
            chosen = by_entropies(drawn.entropy, masked, self.bound)
        elif self.strategy == "sequential":
            chosen = span(masked, plan.quota)
        else:
            chosen = top(drawn.prob, masked, plan.quota)
        return drawn.token, chosen if self.published else chosen & masked
