"""LLaDA's ``generate``, on kernels.

from pydllm.integrations.llada import generate  # instead of LLaDA's generate.py
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pydllm._checks import check_bool, check_choice, check_number
from pydllm.decoding.state import State
from pydllm.integrations._arguments import (
    check_blocks,
    check_fills,
    check_prompt,
    check_temperature,
    check_token,
    follows,
    full_attention,
    left_padding,
)
from pydllm.integrations._published import LoopState, Pass, PublishedLoop, spread
from pydllm.integrations._rules import top
from pydllm.integrations.samplers import add_gumbel_noise

__all__ = ["generate"]


@torch.no_grad()
def generate(
    model: Any,
    prompt: Tensor,
    attention_mask: Tensor | None = None,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = 126336,
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
    *,
    eos_id: int = 126081,
    eot_id: int = 126348,
    compat: str | None = "llada",
    backend: str | None = None,
) -> Tensor:
    """Fill ``gen_length`` masks after the prompt, block by block, the most confident first.

    Args:
        model: a loaded LLaDA module, whose weights are shared, or a pydllm model.
        prompt: ``(B, P)`` token ids. Masks in it compete with those of the block for its schedule,
            so some may be left, as in the original; ``compat=None`` refuses them, and
            ``pydllm.infill`` fills all of them.
        attention_mask: ``(B, P)``, zeros on the left for padding, or None.
        steps: forwards in all, a multiple of the number of blocks.
        gen_length: new tokens, a multiple of ``block_length``.
        block_length: tokens in a block.
        temperature: 0 takes the arg-max; confidences are those of the plain logits.
        cfg_scale: weight of guidance by the same sequence with a masked prompt; 0: none.
        remasking: ``"low_confidence"`` or ``"random"``.
        mask_id: the mask's token id.
        logits_eos_inf: never predict ``eos_id``.
        confidence_eos_eot_inf: write ``eos_id`` and ``eot_id`` last.
        eos_id, eot_id: written into the original.
        compat: ``"llada"``: the original's noise, torch's generator in its order (the same seed
            gives the same tokens), and its reading of ``confidence_eos_eot_inf``: the probability
            is that of the plain logits without the two ids, at a temperature without ``eot_id``
            alone. None: noise drawn in the kernel (the same distribution, a function of
            ``torch.manual_seed``; with guidance torch's), confidence -1 for the two ids, and the
            mask is never predicted.
        backend: as in ``pydllm.ops``.

    Returns:
        ``(B, P + gen_length)`` int64 on the model's device. Equal to the original where confidences
        differ by more than rounding: they are fp32 here, in the dtype of the logits there. Where
        the original fails (guidance without an attention mask) guidance is what it says.

    Raises:
        ValueError, TypeError: an argument that the original asserts, or does not know.
    """
    _, steps = check_blocks(gen_length, block_length, steps)
    check_temperature(temperature)
    check_choice("remasking", remasking, ("low_confidence", "random"))
    check_number("cfg_scale", cfg_scale, 0)
    check_bool("logits_eos_inf", logits_eos_inf)
    check_bool("confidence_eos_eot_inf", confidence_eos_eot_inf)
    own = full_attention(model, "LLaDA's generate", mask_id, shifted=False)
    if logits_eos_inf or confidence_eos_eot_inf:
        check_token("eos_id", eos_id, own)
        check_token("eot_id", eot_id, own)
    prompt = check_prompt("prompt", prompt, own, gen_length)
    published = follows(compat, "llada")
    check_fills(prompt, mask_id, published)
    loop = _Loop(
        block_length=block_length,
        steps=steps,
        temperature=temperature,
        random=remasking == "random",
        cfg_scale=cfg_scale,
        last_ids=(eos_id, eot_id) if confidence_eos_eot_inf else (),
        suppress=[eos_id] if logits_eos_inf else [],
        pad=left_padding(attention_mask, prompt),
        published=published,
    )
    return loop.run(own, prompt, gen_length, backend).x


@dataclass(kw_only=True)
class _Loop(PublishedLoop):
    block_length: int
    steps: int
    random: bool
    cfg_scale: float
    last_ids: tuple[int, ...]

    def schedule(self, state: LoopState) -> Iterator[Pass]:
        length, size = state.call.max_len, self.block_length
        first = state.first_mask()
        for last in range(state.call.prompt_lengths[0] + size, length + 1, size):
            for step, quota in enumerate(spread(size, self.steps), 1):
                poll = int(step == self.steps)
                yield Pass(stop=length, first=first, last=last, quota=quota, poll=poll)
            if not any(state.left):
                first = last

    def forward(self, state: State, plan: Pass, **options: Any) -> Tensor:
        """With guidance of two sequences per row, the second with a masked prompt."""
        if self.cfg_scale == 0:
            return super().forward(state, plan)
        call = state.call
        given = call.x != call.mask_id  # padding counts as prompt, as in the original
        x = torch.cat((state.x, state.x.masked_fill(given, call.mask_id)))
        pad = None if self.pad is None else self.pad.repeat(2)
        pair = replace(state, x=x, cache=call.model.new_cache(len(x), 0))
        return super().forward(pair, plan, pad=pad)

    def logits(
        self, state: State, plan: Pass, hidden: Tensor, span: tuple[int, int] | None = None
    ) -> Tensor:
        logits = super().logits(state, plan, hidden, span)
        if self.cfg_scale == 0:
            return logits
        guided, unguided = logits.chunk(2)
        guided = unguided + (self.cfg_scale + 1) * (guided - unguided)
        guided[..., self.suppress] = -torch.inf
        return guided

    def choose(self, state: LoopState, plan: Pass, hidden: Tensor) -> tuple[Tensor, Tensor]:
        stored = self.cfg_scale > 0 or self.draws
        token, score = (self._from_logits if stored else self._from_stats)(state, plan, hidden)
        if self.last_ids and not self.published:
            ends = torch.isin(token, torch.tensor(self.last_ids, device=token.device))
            score = score.masked_fill(ends, -1.0)
        if self.random:
            score = torch.rand(state.x.shape, device=token.device)[:, plan.first : plan.last]
        masked = state.masked(plan.first, plan.last)
        # Confidences of the ids that come last are 0, and torch.topk decides among them.
        chosen = top(score, masked, plan.quota, front=plan.first, width=state.x.shape[1])
        return token, chosen & masked

    def _from_stats(self, state: State, plan: Pass, hidden: Tensor) -> tuple[Tensor, Tensor]:
        stats = self.stats(state, plan, hidden)
        if not (self.last_ids and self.published) or self.random:
            return stats.token, stats.prob
        # The original removes the two ids between its arg-max and its softmax.
        rest = self.stats(state, plan, hidden, suppress=self.last_ids)
        return stats.token, torch.where(stats.token == rest.token, rest.prob, 0.0)

    def _from_logits(self, state: State, plan: Pass, hidden: Tensor) -> tuple[Tensor, Tensor]:
        # Noise is drawn for all positions.
        span = (0, state.call.max_len) if self.temperature > 0 else (plan.first, plan.last)
        logits = self.logits(state, plan, hidden, span)
        token = add_gumbel_noise(logits, self.temperature).argmax(-1)
        decided = slice(plan.first - span[0], plan.last - span[0])
        token, logits = token[:, decided], logits[:, decided]
        if self.last_ids and self.published:
            gone = self.last_ids if self.temperature == 0 else self.last_ids[1:]
            logits[..., list(gone)] = -torch.inf
        return token, logits.softmax(-1).gather(-1, token[..., None]).squeeze(-1)
