"""LLaDA2.0's ``generate``, on kernels: a function, or a method of a loaded model.

model.generate = types.MethodType(llada2.generate, model)
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from pydllm import ops
from pydllm._backend.errors import CheckpointError
from pydllm.decoding.checks import expect_int, expect_number
from pydllm.integrations._board import (
    Board,
    as_model,
    check_prompt,
    check_temperature,
    draw_seed,
    with_ids,
)
from pydllm.integrations._drawing import check_filters
from pydllm.integrations.sdar import each_block, propose, spread, write_confident
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
    compat: bool = True,
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
        compat: tokens drawn by torch's generator as in the original, and with ``eos_early_stop``
            an ``eos_id`` in the prompt ends the generation with nothing, as there. False: neither;
            the mask is never predicted.
        backend: as in ``pydllm.ops``.

    Returns:
        ``(1, n)`` int64, the new tokens alone, up to and including the first ``eos_id``.

    Raises:
        ValueError, TypeError: an argument out of range, or another kind of model: LLaDA2.1, which
            edits tokens, is one.
    """
    check_temperature(temperature)
    check_filters(top_k, top_p)
    numbers = {"block_length": block_length, "gen_length": gen_length, "steps": steps}
    for name, number in (numbers | {"minimal_topk": minimal_topk}).items():
        expect_int(name, number, 1)
    expect_number("threshold", threshold, 0.0, float("inf"))
    if inputs is None:
        raise ValueError("inputs: expected token ids (1, P), got None")
    own = _model(model, block_length, mask_id)
    prompt = check_prompt("inputs", inputs, own, gen_length)
    if len(prompt) != 1:
        raise ValueError(f"inputs: expected one sequence, (1, P), got {tuple(prompt.shape)}")
    length = prompt.shape[1]
    total = -(-(length + gen_length) // block_length) * block_length
    kind = _Whole if isinstance(own, _Module) else Board
    board = kind.behind(
        prompt,
        total - length,
        own,
        cached=True,
        banned=[] if compat else [mask_id],
        backend=backend,
    )
    if not compat:
        board.seed = draw_seed()
    steps = min(steps, gen_length // minimal_topk)
    quotas = spread(block_length, steps) if steps else []
    options = (temperature, top_k, top_p)
    for forwards in each_block(board, length, block_length):
        first = last = 0
        # The schedule first: no forward without a step left.
        for quota, first in zip(quotas, forwards, strict=False):
            last = first + block_length
            masked = board.masked(first, last)
            drawn = propose(board, first, last, options, compat)
            noisy = compat and temperature > 0
            write_confident(board, first, drawn, threshold, quota, published=noisy)
            if eos_early_stop and bool((masked & (board.x[:, first:last] == eos_id)).any()):
                end = _complete_end(board, length, last, eos_id, compat)
                if end is not None:
                    return board.x[:, length : end + 1]
        if last and bool((board.x[:, length:last] == eos_id).any()):
            break
    ends = (board.x[0, length : length + gen_length] == eos_id).nonzero().flatten()
    count = int(ends[0]) + 1 if len(ends) else gen_length
    return board.x[:, length : length + count]


def _complete_end(board: Board, length: int, last: int, eos_id: int, compat: bool) -> int | None:
    """Where the first end of sequence is, if no new token before it is a mask."""
    begin = 0 if compat else length
    end = begin + int((board.x[0, begin:last] == eos_id).nonzero()[0])
    return None if bool(board.masked(length, max(end, length)).any()) else end


def _model(model: Any, block_length: int, mask_id: int) -> Any:
    if isinstance(model, nn.Module) and any(
        kind.__name__.startswith("LLaDA2") for kind in type(model).__mro__
    ):
        original = getattr(type(model), "generate", None)
        if original and "editing_threshold" in inspect.signature(original).parameters:
            raise ValueError(
                "generate: expected LLaDA2.0, got a model whose own generate edits tokens "
                "(editing_threshold: LLaDA2.1), which this loop does not"
            )
        try:
            own = as_model(model)
        except CheckpointError:  # of a kind that the native transformer is not
            return _Module(model, block_length, mask_id)
    else:
        own = as_model(model)
    if own.spec.attention != "block_causal":
        raise ValueError(
            f"generate: expected a model with block-causal attention, got {own.spec.attention}"
        )
    return with_ids(own, mask_id, block_size=block_length)


class _Module:
    """What a board has to know of a module that computes its own logits."""

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
            pad_id=None,
        )

    def new_cache(self, batch: int, max_len: int) -> StaticCache:
        return StaticCache.allocate(0, batch, 0, 0, 0, dtype=self.dtype, device=self.device)


class _Whole(Board):
    """A board whose forward computes everything before and in the block, with the module."""

    def forward(self, start: int, stop: int, *, seen: int | None = None, commit: int = 0) -> None:
        model: Any = self.model
        position = torch.arange(stop, device=self.x.device)
        block = position // model.spec.block_size
        hidden = torch.zeros(stop, stop, dtype=model.dtype, device=self.x.device)
        hidden.masked_fill_(block > block[:, None], -torch.inf)
        out = model.module(
            self.x[:, :stop], attention_mask=hidden[None, None], position_ids=position[None]
        )
        self._logits, self.forwards = out.logits, self.forwards + 1

    def logits(self, first: int, last: int) -> Tensor:
        return self._logits[:, first:last].clone()

    def stats(self, first: int, last: int, **options: Any) -> ops.VocabStats:
        temperature = options.get("temperature", 0.0)
        batch, width = self.x.shape[0], last - first
        counter = None
        if temperature > 0:
            place = torch.arange(first, last, dtype=torch.int32, device=self.x.device)
            draw = torch.full_like(place, self.forwards)
            counter = torch.stack((place, torch.zeros_like(place), draw), -1).repeat(batch, 1)
        banned = torch.tensor(self.banned, dtype=torch.int32, device=self.x.device)
        stats = ops.vocab_stats(
            self._logits[:, first:last].reshape(batch * width, -1),
            temperature=temperature,
            tempered=options.get("tempered", False),
            seed=self.seed,
            counter=counter,
            banned=banned if self.banned else None,
            backend=self.backend,
        )
        return ops.VocabStats(*(field.view(batch, width) for field in stats))
