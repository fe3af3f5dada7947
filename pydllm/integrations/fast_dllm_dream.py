"""Fast-dLLM's ``diffusion_generate`` for Dream, the block form with a cache, on kernels.

model.diffusion_generate = types.MethodType(fast_dllm_dream.diffusion_generate, model)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from pydllm._checks import check_number
from pydllm.integrations._arguments import follows, raise_stuck
from pydllm.integrations._dream import DreamLoop, DreamModelOutput, read_call
from pydllm.integrations._published import LoopState, Pass
from pydllm.integrations._rules import by_threshold, drawn, top

__all__ = ["DreamModelOutput", "diffusion_generate"]

# The published loop knows two rules: this one, and by any other name the entropy's.
ALGORITHMS = ("confidence_threshold", "entropy", "origin", "maskgit_plus", "topk_margin")


@torch.no_grad()
def diffusion_generate(
    model: Any,
    inputs: Tensor | None = None,
    generation_config: Any = None,
    *,
    compat: str | None = "fast_dllm",
    backend: str | None = None,
    **kwargs: Any,
) -> DreamModelOutput | Tensor:
    """Fill the masks after the inputs block by block, over cached keys and values.

    Args:
        model: a loaded Dream module, whose weights are shared, or a pydllm model.
        inputs: ``(B, P)`` token ids, not padded. With ``"confidence_threshold"`` the original takes
            one sequence; several are decoded side by side, each as if alone.
        generation_config: as in ``pydllm.integrations.dream``. ``alg`` is
            ``"confidence_threshold"``, or any of Dream's names for the lowest entropy first on
            Dream's schedule, or drawn by ``alg_temp``.
        compat: ``"fast_dllm"``: at a temperature torch's generator in the original's order. None:
            noise is drawn in the kernel, and the mask is never predicted. ``pydllm.Threshold`` has
            none of the original's peculiarities: the first token of a block is taken from the
            block's first forward, whatever its confidence; the others are predicted by a window
            that begins with the block; with ``steps`` equal to the number of blocks nothing but the
            first token is written.
        backend: as in ``pydllm.ops``.
        kwargs: the config's names, and ``threshold=0.9``, ``block_length=32`` (None: one block) and
            ``dual_cache=False``; ``attention_mask`` of ones.

    Returns:
        As ``pydllm.integrations.dream.diffusion_generate``; ``history`` stays empty, as there.
        The filters and the confidences in the dtype of the logits as there, or fp32 without them.

    Raises:
        ValueError, TypeError: an unknown argument or value, lengths that do not fit, or padding,
            which the original masks wrongly once keys are cached.
        PydllmError: the model predicts nothing but masks; the original does not return then.
    """
    options = {"threshold": 0.9, "block_length": 32, "dual_cache": False}
    call = read_call(
        "diffusion_generate", model, inputs, generation_config, kwargs, options, ALGORITHMS
    )
    if call.pad is not None:
        raise ValueError("attention_mask: expected ones (no padding with a cache), got zeros")
    size, steps = call.blocks()
    check_number("threshold", call.options["threshold"], 0, infinite=True)
    loop = _Loop(
        settings=call.settings,
        temperature=call.settings.temperature,
        block_length=size,
        steps=steps,
        threshold=float(call.options["threshold"]),
        dual=call.options["dual_cache"],
        cached=True,
        published=follows(compat, "fast_dllm"),
    )
    return call.result(loop.run(call.model, call.prompt, call.new, backend).x, call.history())


@dataclass(kw_only=True)
class _Loop(DreamLoop):
    block_length: int
    steps: int
    threshold: float
    dual: bool

    @property
    def by_threshold(self) -> bool:
        return self.settings.alg == "confidence_threshold"

    @property
    def places_temperature(self) -> float:
        return 0.0 if self.by_threshold else super().places_temperature

    def schedule(self, state: LoopState) -> Iterator[Pass]:
        length, size = state.call.max_len, self.block_length
        for first in range(state.call.prompt_lengths[0], length, size):
            last = first + size
            yield Pass(stop=length, first=first, last=first + 1, commit=length)
            state.block_left = [left + size - 1 for left in state.block_left]
            stop = last if self.dual else length
            for step in count(1):
                if step > 1 and not any(state.block_left):
                    break
                if not self.by_threshold and step == self.steps:
                    break  # after a forward that decides nothing, in the original
                quota = 0
                if not self.by_threshold:
                    quota = self.quota(sum(state.block_left), len(state.x), step, self.steps)
                before = state.block_left
                yield Pass(
                    start=first,
                    stop=stop,
                    seen=length,
                    first=first,
                    last=last,
                    quota=quota,
                    number=step,
                )
                stuck = any(before) and state.block_left == before and self.temperature == 0
                if self.by_threshold and stuck:
                    raise_stuck()

    def choose(self, state: LoopState, plan: Pass, hidden: Tensor) -> tuple[Tensor, Tensor]:
        masked, width = state.masked(plan.first, plan.last), plan.stop - plan.first
        if plan.number == 0:
            return self._first_token(state, plan, hidden), masked
        logits, wanted = None, masked
        if self.stored:
            # The original's sampler gets, by threshold, the masks of later blocks as well.
            end = plan.stop if self.by_threshold and self.published else plan.last
            logits = self.logits(state, plan, hidden, (plan.first, end))
            wanted = state.masked(plan.first, end)
        name = "prob" if self.by_threshold else "entropy"
        token, score = self.propose(state, plan, hidden, logits, wanted, name)
        token, score = token[:, : self.block_length], score[:, : self.block_length]
        if self.by_threshold:
            counts = state.block_left
            return token, by_threshold(score, masked, self.threshold, counts, width)
        if self.places_temperature:
            return token, drawn(score, masked, plan.quota, self.places_temperature, width=width)
        return token, top(score, masked, plan.quota, width=width) & masked

    def _first_token(self, state: LoopState, plan: Pass, hidden: Tensor) -> Tensor:
        """Whatever its confidence; with torch's noise a token is drawn for every position."""
        if not self.stored:
            return self.stats(state, plan, hidden).token
        span = (0, plan.stop) if self.temperature > 0 else (plan.first, plan.last)
        logits = self.logits(state, plan, hidden, span)
        everywhere = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
        token, _ = self.propose(state, plan, hidden, logits, everywhere, "entropy")
        return token[:, plan.first - span[0], None]
