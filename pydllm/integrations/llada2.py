"""LLaDA2.0's ``generate``, on kernels: a function, or a method of a loaded model.

model.generate = types.MethodType(llada2.generate, model)
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pydllm import ops
from pydllm._backend.errors import CheckpointError
from pydllm._checks import check_bool, check_int, check_number
from pydllm.integrations._arguments import (
    as_model,
    block_causal,
    check_prompt,
    check_temperature,
    expect_one,
    follows,
)
from pydllm.integrations._published import LoopState, Pass, spread
from pydllm.integrations._rules import above
from pydllm.integrations._sampling import check_filters
from pydllm.integrations.sdar import BlockCausalLoop
from pydllm.models import ModelSpec, StaticCache

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
    eos_id: int = 156892,
    mask_id: int = 156895,
    *,
    compat: str | None = "llada2",
    backend: str | None = None,
) -> Tensor:
    """Fill blocks one after the other: all tokens above a threshold, at least the schedule's.

    Args:
        model: a pydllm model or module with block-causal attention, which is decoded over cached
            keys (the original computes all tokens in every step; the same logits to rounding). A
            loaded LLaDA2 module shares its parameters and runs that way too; one that
            ``pydllm.load`` does not take computes its own logits, as in the original, and the
            choice is fused.
        inputs: ``(1, P)`` token ids.
        temperature: of tokens and confidences; 0 takes the arg-max.
        block_length: tokens in a block, blocks at multiples of it.
        steps: most steps of a block; at most ``gen_length // minimal_topk``.
        gen_length: new tokens.
        top_p, top_k: filters at a temperature, ``top_k`` first.
        eos_early_stop: end with the first ``eos_id`` before which no mask is left, in the block.
        minimal_topk: see ``steps``.
        threshold: a probability to exceed.
        eos_id: looked for at the end of each block.
        mask_id: the mask's token id.
        compat: ``"llada2"``: tokens drawn by torch's generator as in the original, and with
            ``eos_early_stop`` an ``eos_id`` in the prompt ends the generation with nothing, as
            there. None: neither; noise is drawn in the kernel, and the mask is never predicted.
        backend: as in ``pydllm.ops``.

    Returns:
        ``(1, n)`` int64, the new tokens alone, up to and including the first ``eos_id``.

    Raises:
        ValueError, TypeError: an argument out of range, or another kind of model: LLaDA2.1, which
            edits tokens (``llada21.generate``), is one.
    """
    check_temperature(temperature)
    check_filters(top_k, top_p)
    numbers = {"block_length": block_length, "gen_length": gen_length, "steps": steps}
    for name, number in (numbers | {"minimal_topk": minimal_topk}).items():
        check_int(name, number, 1)
    check_number("threshold", threshold, 0, infinite=True)
    if inputs is None:
        raise ValueError("inputs: expected token ids (1, P), got None")
    check_bool("eos_early_stop", eos_early_stop)
    _expect_no_edits(model)
    own = as_block_causal(model, block_length, mask_id)
    check_int("eos_id", eos_id, 0)
    prompt = check_prompt("inputs", inputs, own, gen_length)
    expect_one("inputs", prompt)
    length = prompt.shape[1]
    total = -(-(length + gen_length) // block_length) * block_length
    steps = min(steps, gen_length // minimal_topk)
    loop = _Loop(
        block_length=block_length,
        quotas=spread(block_length, steps),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        threshold=threshold,
        eos_id=eos_id,
        early_stop=eos_early_stop,
        cached=not runs_as_module(own),
        published=follows(compat, "llada2"),
    )
    x = loop.run(own, prompt, total - length, backend).x
    if loop.end is not None:
        return x[:, length : loop.end + 1]
    ends = (x[0, length : length + gen_length] == eos_id).nonzero().flatten()
    count = int(ends[0]) + 1 if len(ends) else gen_length
    return x[:, length : length + count]


@dataclass(kw_only=True)
class _Loop(BlockCausalLoop):
    eos_id: int
    early_stop: bool
    end: int | None = None  # position of the EOS that ended the loop early
    seen: int = 0  # EOS in the prompt and the new tokens

    def ends(self, state: LoopState, first: int) -> bool:
        """Whether the step wrote an EOS, and the first one has no mask before it."""
        if not self.early_stop:
            return False
        length, ids = state.call.prompt_lengths[0], state.x[0].tolist()
        seen, self.seen = max(self.seen, ids[:length].count(self.eos_id)), ids.count(self.eos_id)
        if self.seen == seen:
            return False
        end = ids.index(self.eos_id, 0 if self.published else length)
        if state.call.mask_id not in ids[length:end]:
            self.end = end
        return self.end is not None

    def ends_block(self, state: LoopState, first: int) -> bool:
        return self.eos_id in state.x[0, state.call.prompt_lengths[0] :].tolist()

    def choose(self, state: LoopState, plan: Pass, hidden: Tensor) -> tuple[Tensor, Tensor]:
        drawn, masked = self.propose(state, plan, hidden), state.masked(plan.first, plan.last)
        return drawn.token, above(drawn.prob, masked, self.threshold, plan.quota) & masked


def _expect_no_edits(model: Any) -> None:
    original = getattr(type(model), "generate", None) if _is_original(model) else None
    if original and "editing_threshold" in inspect.signature(original).parameters:
        raise ValueError(
            "generate: expected LLaDA2.0, got a model whose own generate edits tokens "
            "(editing_threshold: LLaDA2.1), as integrations.llada21.generate does"
        )


def _is_original(model: Any) -> bool:
    names = [kind.__name__ for kind in type(model).__mro__]
    return isinstance(model, nn.Module) and any(name.startswith("LLaDA2") for name in names)


def runs_as_module(model: Any) -> bool:
    """Whether a module computes its own logits, without a cache."""
    return isinstance(model, _Module)


def as_block_causal(model: Any, block_length: int, mask_id: int) -> Any:
    """What LLaDA2's loops decode: a pydllm model, or a module that computes its own logits.

    Raises:
        ValueError: a model without block-causal attention.
    """
    if _is_original(model):
        try:
            as_model(model)
        except CheckpointError:  # of a kind that the native transformer is not
            return _Module(model, block_length, mask_id)
    return block_causal(model, "generate", mask_id, block_length)


class _Module:
    """A module that computes its own logits, as a model: its hidden rows are logits."""

    def __init__(self, module: Any, block_length: int, mask_id: int) -> None:
        self.module = module
        weight = next(module.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        config = module.config
        vocab = config["vocab_size"] if isinstance(config, dict) else config.vocab_size
        if not 0 <= mask_id < vocab:
            raise ValueError(f"mask_id: expected a token id in [0, {vocab}), got {mask_id}")
        self.spec = ModelSpec(
            vocab_size=vocab,
            mask_id=mask_id,
            eos_ids=(),
            shift_logits=False,
            attention="block_causal",
            block_size=block_length,
            max_positions=2**31,
        )

    def new_cache(self, batch: int, max_len: int) -> StaticCache:
        return StaticCache.allocate(0, batch, 0, 0, 0, dtype=self.dtype, device=self.device)

    def forward(self, ids: Tensor, start: Tensor, cache: StaticCache, **window: Any) -> Tensor:
        """Logits of a window that begins at position 0."""
        position = torch.arange(ids.shape[1], device=ids.device)
        block = position // (self.spec.block_size or 1)
        hidden = torch.zeros(2 * position.shape, dtype=self.dtype, device=ids.device)
        hidden.masked_fill_(block > block[:, None], -torch.inf)
        return self.module(
            ids, attention_mask=hidden[None, None], position_ids=position[None]
        ).logits

    def head(self, hidden: Tensor) -> Tensor:
        return hidden

    def head_stats(self, hidden: Tensor, rows: Tensor, **options: Any) -> ops.VocabStats:
        return ops.vocab_stats(hidden[rows], **options)
