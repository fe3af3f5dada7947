"""Fast-dLLM v2's ``generate``, on kernels.

from pydllm.integrations.fast_dllm_v2 import generate  # generate(model, ids, ...)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pydllm._backend.errors import PydllmError
from pydllm._checks import check_bool, check_number
from pydllm.decoding.state import State
from pydllm.integrations._arguments import as_model, check_prompt, check_temperature, with_ids
from pydllm.integrations._published import LoopState, Pass, PublishedLoop

__all__ = ["generate"]

_MASK_BLOCK = 32  # of the published denoising forwards, whatever block_size says


@torch.no_grad()
def generate(
    model: Any,
    input_ids: Tensor,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    tokenizer: Any = None,
    mask_id: int = 151665,
    threshold: float = 1,
    small_block_size: int = 8,
    block_size: int = 32,
    stop_token: int = 151645,
    stopping_criteria: Any = None,
    top_p: float = 0.95,
    temperature: float = 0,
    use_block_cache: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """Fill blocks from left to right, sub-block by sub-block; keys of finished blocks are cached.

    Args:
        model: a loaded ``Fast_dLLM_QwenForCausalLM``, whose weights are shared, or a pydllm model.
        input_ids: ``(1, P)`` prompt.
        max_new_tokens: ``max_new_tokens // block_size`` blocks are filled, the first of which holds
            the prompt's rest: in all ``max_new_tokens - P % block_size + 1`` tokens, or fewer.
        max_length: instead, P included.
        tokenizer, stopping_criteria: not used, as in the original.
        mask_id: the mask's token id.
        threshold: probability above which a token is written; the best one always is.
        small_block_size: tokens of a sub-block; a divisor of ``block_size``.
        block_size: tokens of a block.
        stop_token: ends the answer, which is cut after it.
        top_p: at temperatures above 0, ids are drawn from the smallest set with this mass.
        temperature: 0 is greedy. Tokens are drawn by torch's generator, as in the original.
        use_block_cache: forward a sub-block alone, over keys of its block's last full forward.
        backend: as in ``pydllm.ops``.

    Returns:
        ``(1, P + new)`` int64 on the model's device. A prompt of exactly one block, which the
        original loses (it answers no prompt, and from ties), is stored like a longer one.

    Raises:
        ValueError, TypeError: an argument out of range.
        PydllmError: the model predicts the mask itself and the loop, as the original's, would not
            end.
    """
    if max_new_tokens is None:
        if max_length is None:
            raise ValueError("max_new_tokens: expected a number, or max_length, got neither")
        max_new_tokens = max_length - input_ids.shape[1]
    for name, value in (
        ("max_new_tokens", max_new_tokens),
        ("block_size", block_size),
        ("small_block_size", small_block_size),
    ):
        if type(value) is not int or not 1 <= value < 2**31:
            raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
    if block_size % small_block_size:
        raise ValueError(
            f"small_block_size: expected a divisor of block_size {block_size}, "
            f"got {small_block_size}"
        )
    check_number("threshold", threshold, 0, infinite=True)
    check_temperature(temperature)
    check_number("top_p", top_p, 0, 1, above=True)
    check_bool("use_block_cache", use_block_cache)
    own = as_model(model)
    if not own.spec.shift_logits:
        raise ValueError("generate: expected a model with shifted logits, got one without")
    own = with_ids(
        own,
        mask_id,
        (stop_token,),
        attention="block_causal",
        block_size=block_size,
        block_origin="zero",
        context="block",
    )
    ids = check_prompt("input_ids", input_ids, own, max_new_tokens + 1)
    if len(ids) != 1 or ids.shape[1] == 0:
        raise ValueError(f"input_ids: expected one prompt (1, P), got {tuple(ids.shape)}")
    loop = _Loop(
        blocks=max_new_tokens // block_size,
        size=block_size,
        small=small_block_size,
        block_cache=use_block_cache,
        threshold=threshold,
        temperature=temperature,
        top_p=top_p,
        stop_token=stop_token,
        cached=True,
    )
    # Whole blocks, and one token after the last.
    new = -(-(ids.shape[1] + max_new_tokens + 1) // block_size) * block_size + 1 - ids.shape[1]
    return loop.run(own, ids, new, backend).x[:, : loop.end]


@dataclass(frozen=True, kw_only=True)
class _Part(Pass):
    """A pass that denoises a part of a block, or else (``denoises`` false) stores what is known
    and predicts the token after it."""

    denoises: bool = True
    attention: str | None = None


@dataclass(kw_only=True)
class _Loop(PublishedLoop):
    """One answer; ``end``: its length, the prompt included."""

    blocks: int
    size: int
    small: int
    block_cache: bool
    threshold: float
    top_p: float
    stop_token: int
    end: int = 0

    def schedule(self, state: LoopState) -> Iterator[Pass]:
        prompt, size = state.call.prompt_lengths[0], self.size
        stored, known = prompt // size * size, prompt
        if stored:
            yield self._store(0, stored, known=stored < prompt)
            known = max(known, stored + 1)
        for _ in range(self.blocks):
            if self._stopped(state, prompt, known):
                break
            yield from self._fill(state, stored, known)
            end = stored + size
            if self._stopped(state, known, end):
                known = end
                break
            yield self._store(stored, end)
            stored, known = end, end + 1
        answer = state.x[0, prompt:known].tolist()
        stops = self.stop_token in answer
        self.end = prompt + answer.index(self.stop_token) + 1 if stops else known

    def _store(self, start: int, end: int, *, known: bool = False) -> _Part:
        last = end if known else end + 1
        return _Part(
            start=start, stop=end, first=end, last=last, commit=end - start, denoises=False
        )

    def _fill(self, state: LoopState, start: int, known: int) -> Iterator[Pass]:
        """The passes of a block, sub-block by sub-block."""
        end, kept = start + self.size, False
        for first in range(start, end, self.small):
            last = first + self.small
            while not self._stopped(state, known, end):
                part = state.x[0, first:last].tolist()
                masks = part.count(state.call.mask_id)
                if masks == 0:
                    break
                if self.block_cache and kept and part[0] != state.call.mask_id:
                    yield _Part(
                        start=first,
                        stop=last,
                        seen=end,
                        first=first,
                        last=last,
                        commit=self.small,
                        attention="full",
                    )
                else:
                    kept = True
                    commit = self.size if self.block_cache else 0
                    yield _Part(start=start, stop=end, first=first, last=last, commit=commit)
                if self.temperature == 0 and state.block_left == [masks]:
                    raise PydllmError("the model predicts the mask: the loop would not end")

    def _stopped(self, state: LoopState, first: int, last: int) -> bool:
        """Whether [first, last) has a stop token with no mask before it."""
        ids = state.x[0, first:last].tolist()
        if self.stop_token not in ids:
            return False
        return state.call.mask_id not in ids[: ids.index(self.stop_token)]

    def forward(self, state: State, plan: Any, **options: Any) -> Tensor:
        if plan.denoises:  # with blocks of its own in the mask
            model = state.call.model
            model = with_ids(model, state.call.mask_id, block_size=_MASK_BLOCK)
            state = replace(state, call=replace(state.call, model=model))
        return super().forward(state, plan, attention=plan.attention)

    def choose(self, state: LoopState, plan: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Every masked token above the threshold, and the best."""
        logits, masked = self.logits(state, plan, hidden), state.masked(plan.first, plan.last)
        if not plan.denoises or masked.shape[1] == 0:
            return logits.argmax(-1), masked
        token, prob = _choose(logits, self.temperature, self.top_p)
        prob = prob.masked_fill(~masked, -torch.inf)
        accepted = prob > self.threshold
        accepted[0, prob[0].argmax()] = True
        return token, accepted & masked


def _choose(logits: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Tokens ``(1, T)`` and their probabilities, in the dtype of the logits."""
    if temperature == 0:
        prob, token = logits.softmax(-1).max(-1)
        return token, prob
    probs = (logits / temperature).softmax(-1)
    ordered, order = probs.sort(descending=True)
    beyond = ordered.cumsum(-1) > top_p
    beyond[..., 1:] = beyond[..., :-1].clone()
    beyond[..., 0] = False
    probs = probs.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0)
    probs = probs / probs.sum(-1, keepdim=True)
    token = torch.multinomial(probs[0], 1).T
    return token, probs.gather(-1, token[..., None])[..., 0]
