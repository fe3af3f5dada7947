"""LLaDA2.1's ``generate``, which edits its own tokens, on kernels: a function, or a method.

model.generate = types.MethodType(llada21.generate, model)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pydllm._checks import check_bool, check_int, check_number
from pydllm.integrations._arguments import check_prompt, check_temperature, follows
from pydllm.integrations._published import LoopState, Pass, PublishedLoop
from pydllm.integrations._rules import above
from pydllm.integrations._sampling import Drawn, check_filters, draw
from pydllm.integrations.llada2 import as_block_causal, runs_as_module

__all__ = ["generate"]


@torch.no_grad()
def generate(
    model: Any,
    inputs: Tensor | None = None,
    temperature: float = 0.0,
    block_length: int = 32,
    steps: int = 32,
    gen_length: int = 2048,
    top_p: float | None = None,
    top_k: int | None = None,
    eos_early_stop: bool = False,
    minimal_topk: int = 1,
    threshold: float = 0.95,
    editing_threshold: float = 0.9,
    max_post_steps: int = 16,
    eos_id: int = 156892,
    mask_id: int = 156895,
    num_to_transfer: int = 1,
    *,
    compat: str | None = "llada2.1",
    backend: str | None = None,
) -> Tensor:
    """Fill blocks one after the other, and correct their tokens until nothing changes.

    Args:
        model: as in ``llada2.generate``.
        inputs: ``(1, P)`` token ids.
        temperature: of tokens and confidences; 0 takes the arg-max.
        block_length: tokens in a block, blocks at multiples of it.
        steps, minimal_topk: without effect, as in the original.
        gen_length: new tokens.
        top_p, top_k: filters at a temperature, ``top_k`` first.
        eos_early_stop: end with the first complete block that holds an ``eos_id``.
        threshold: a probability that a mask's token has to exceed.
        editing_threshold: a probability that a token has to exceed to replace another; below 0
            as 0.
        max_post_steps: forwards of a block that has no mask, at most.
        eos_id: cuts the answer.
        mask_id: the mask's token id.
        num_to_transfer: masks that a step fills at least.
        compat: ``"llada2.1"``: tokens drawn by torch's generator as in the original; the mask is
            predicted as there, but for a step of which nothing would be written for ever, and for
            blocks that take more than ``2 * block_length + max_post_steps`` forwards, with which
            the original may not end. None: drawn in the kernel, and the mask is never predicted.
        backend: as in ``pydllm.ops``.

    Returns:
        ``(1, n)`` int64, the new tokens alone, up to and including the first ``eos_id``.

    Raises:
        ValueError, TypeError: an argument out of range, or another kind of model.
    """
    check_temperature(temperature)
    check_filters(top_k, top_p)
    numbers = {"block_length": block_length, "gen_length": gen_length, "steps": steps}
    numbers |= {"minimal_topk": minimal_topk, "num_to_transfer": num_to_transfer}
    for name, number in numbers.items():
        check_int(name, number, 1)
    check_int("max_post_steps", max_post_steps, 0)
    check_number("threshold", threshold, 0, infinite=True)
    check_number("editing_threshold", editing_threshold, -torch.inf, infinite=True)
    if inputs is None:
        raise ValueError("inputs: expected token ids (1, P), got None")
    check_bool("eos_early_stop", eos_early_stop)
    own = as_block_causal(model, block_length, mask_id)
    check_int("eos_id", eos_id, 0)
    prompt = check_prompt("inputs", inputs, own, gen_length)
    if len(prompt) != 1:
        raise ValueError(f"inputs: expected one sequence, (1, P), got {tuple(prompt.shape)}")
    length = prompt.shape[1]
    total = -(-(length + gen_length) // block_length) * block_length
    loop = _Loop(
        block_length=block_length,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        threshold=threshold,
        edit_threshold=max(editing_threshold, 0.0),
        least=num_to_transfer,
        budget=max_post_steps,
        eos_id=eos_id,
        early_stop=eos_early_stop,
        cached=not runs_as_module(own),
        published=follows(compat, "llada2.1"),
    )
    x = loop.run(own, prompt, total - length, backend).x
    new = x[:, length : length + gen_length]
    ends = (new[0] == eos_id).nonzero().flatten()
    return new[:, : int(ends[0]) + 1] if len(ends) else new


@dataclass(kw_only=True)
class _Loop(PublishedLoop):
    block_length: int
    top_k: int | None
    top_p: float | None
    threshold: float
    edit_threshold: float
    least: int
    budget: int
    eos_id: int
    early_stop: bool
    stuck: bool = False  # the mask is not predicted any more in this block
    edits: Tensor = field(default_factory=lambda: torch.zeros(()))  # of the last step

    def schedule(self, state: LoopState) -> Iterator[Pass]:
        start, size, length = 0, self.block_length, state.call.prompt_lengths[0]
        for first in range(length // size * size, state.call.max_len, size):
            steps = post = 0
            masks = int(state.masked(first, first + size).sum())
            self.stuck = False
            while True:
                post += masks == 0
                if post > self.budget:
                    break
                commit = first - start if self.cached else 0
                yield Pass(
                    start=start,
                    stop=first + size,
                    first=first,
                    last=first + size,
                    commit=commit,
                    number=steps,
                )
                start = first if self.cached else 0
                steps += 1
                before, masks = masks, state.block_left[0]
                edited = int(self.edits)
                if before == 0 and not edited:
                    break
                unchanged = masks == before and not edited and self.temperature == 0
                self.stuck |= unchanged or steps >= 2 * size + self.budget
            ids = state.x[0, length : first + size].tolist()
            if self.early_stop and state.call.mask_id not in ids and self.eos_id in ids:
                return

    def choose(self, state: LoopState, plan: Pass, hidden: Tensor) -> tuple[Tensor, Tensor]:
        drawn, masked = self._propose(state, plan, hidden), state.masked(plan.first, plan.last)
        fill = above(drawn.prob, masked, self.threshold, self.least) & masked
        position = torch.arange(plan.first, plan.last, device=masked.device)
        known = ~masked & (position >= state.prompt_length[:, None])
        changes = drawn.token != state.x[:, plan.first : plan.last]
        edit = known & changes & (drawn.prob > self.edit_threshold)
        self.edits = edit.sum()
        return drawn.token, fill | edit

    def _propose(self, state: LoopState, plan: Pass, hidden: Tensor) -> Drawn:
        """Tokens of the block, known ones as well."""
        mask_id, hot = state.call.mask_id, self.temperature > 0
        if self.draws or (hot and (self.top_k or (self.top_p or 1.0) < 1)):
            logits = self.logits(state, plan, hidden)
            if self.stuck:
                logits[..., mask_id] = -torch.inf
            return draw(logits, self.temperature, self.top_k, self.top_p)
        position = torch.arange(state.x.shape[1], device=state.x.device)
        eligible = (position >= plan.first).expand_as(state.x)
        suppress = (mask_id,) if self.stuck else ()
        stats = self.stats(state, plan, hidden, suppress=suppress, tempered=hot, eligible=eligible)
        return Drawn(stats.token, stats.prob, stats.entropy)
