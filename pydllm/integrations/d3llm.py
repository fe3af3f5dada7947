"""d3LLM's multi-block decoders, for LLaDA and for Dream.

from pydllm.integrations.d3llm import generate_multi_block  # LLaDA, instead of d3LLM's
model.generate_multi_block = types.MethodType(d3llm.dream_generate_multi_block, model)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pydllm._checks import check_bool, check_int, check_number
from pydllm.decoding import MultiBlock
from pydllm.decoding import generate as decode
from pydllm.integrations._arguments import (
    check_prompt,
    draw_seed,
    expect_one,
    follows,
    full_attention,
    raise_stuck,
    with_ids,
)
from pydllm.integrations._d3llm import PublishedMultiBlock, Settings
from pydllm.integrations._dream import Call, DreamModelOutput, read_call
from pydllm.integrations._published import LoopState, Pass, PublishedLoop
from pydllm.integrations._rules import first
from pydllm.models import Model

__all__ = [
    "dream_diffusion_generate",
    "dream_generate_multi_block",
    "generate_multi_block",
    "generate_multi_block_kv_cache",
]

_NEVER = 10_000  # the value by which the Dream decoder says "no cache"


@torch.no_grad()
def generate_multi_block(
    model: Any,
    prompt: Tensor,
    steps: int = 128,
    max_new_tokens: int = 512,
    block_size: int = 32,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = 126336,
    threshold: float = 0.5,
    block_add_threshold: float = 0.5,
    decoded_token_threshold: float = 0.5,
    eos_token_id: int | None = None,
    early_stop: bool = False,
    *,
    compat: str | None = "d3llm",
    backend: str | None = None,
) -> tuple[Tensor, int]:
    """d3LLM for LLaDA: several blocks at a time, every forward over the whole sequence.

    Args:
        model: a loaded LLaDA module, whose weights are shared, or a pydllm model.
        prompt: ``(1, P)`` token ids.
        steps: not read, as in the original.
        max_new_tokens: new tokens, at least one block. Where they are no multiple of ``block_size``
            the rest stays masks under ``compat``, as in the original, which gives up after 10001
            forwards; they are reported and not run.
        block_size: tokens in a block.
        temperature: of the tokens; 0 takes the arg-max.
        remasking: ``"low_confidence"``, or, under ``compat``, ``"random"``: uniform numbers in
            place of the entropies.
        mask_id: the mask's token id.
        threshold: nats; a token is written up to this entropy. None: 999.
        block_add_threshold: part of the newest block that is decoded before the next opens.
        decoded_token_threshold: part of a block that is decoded before the next must advance.
        eos_token_id: with ``early_stop``, nothing after it is decoded.
        early_stop: see there.
        compat: ``"d3llm"``: the published loop, the defects that decide tokens included, with
            torch's generator in its order. None: ``pydllm.MultiBlock``, where what follows an EOS
            is filled with it; noise is drawn in the kernel.
        backend: as in ``pydllm.ops``.

    Returns:
        ``x (1, P + max_new_tokens)`` int64 on the model's device, and the forwards. Entropies are
        fp32 (fp64 there).

    Raises:
        ValueError, TypeError: an argument that cannot be decoded.
    """
    settings = Settings(
        _nats(threshold),
        block_size,
        block_add_threshold,
        decoded_token_threshold,
        _stop(eos_token_id, early_stop),
        temperature,
        remasking,
    )
    return _llada(model, prompt, settings, max_new_tokens, mask_id, compat, backend)


@torch.no_grad()
def generate_multi_block_kv_cache(
    model: Any,
    prompt: Tensor,
    steps: int = 128,
    max_new_tokens: int = 512,
    block_size: int = 32,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = 126336,
    threshold: float = 0.5,
    block_add_threshold: float = 0.5,
    decoded_token_threshold: float = 0.5,
    cache_delay_iter: int = 10000,
    refresh_interval: int = 10000,
    lazy_cache_refresh_num: int = 0,
    eos_token_id: int | None = None,
    early_stop: bool = False,
    *,
    compat: str | None = "d3llm",
    backend: str | None = None,
) -> tuple[Tensor, int]:
    """``generate_multi_block`` with keys and values of finished blocks kept, after a delay.

    Args:
        cache_delay_iter: forwards that a finished block waits before its keys and values are kept.
        refresh_interval: one forward in so many is full and renews them.
        lazy_cache_refresh_num: not read, as in the original.
    """
    settings = Settings(
        _nats(threshold),
        block_size,
        block_add_threshold,
        decoded_token_threshold,
        _stop(eos_token_id, early_stop),
        temperature,
        remasking,
        (cache_delay_iter, refresh_interval),
    )
    return _llada(model, prompt, settings, max_new_tokens, mask_id, compat, backend)


def _nats(threshold: float | None) -> float:
    return 999.0 if threshold is None else threshold


def _stop(eos_id: int | None, early_stop: bool) -> int | None:
    check_bool("early_stop", early_stop)
    return eos_id if early_stop else None


def _llada(
    model: Any,
    prompt: Tensor,
    settings: Settings,
    new: int,
    mask_id: int,
    compat: str | None,
    backend: str | None,
) -> tuple[Tensor, int]:
    own = full_attention(model, "d3LLM's decoder", mask_id, shifted=False)
    if settings.eos_id is not None:
        own = with_ids(own, mask_id, (settings.eos_id,))
    check_int("max_new_tokens", new, 1)
    prompt = check_prompt("prompt", prompt, own, new)
    return _run(own, prompt, settings, new, compat, backend)


def _run(
    model: Model,
    prompt: Tensor,
    settings: Settings,
    new: int,
    compat: str | None,
    backend: str | None,
    pad: Tensor | None = None,
) -> tuple[Tensor, int]:
    """The sequence ``(1, L)`` and the forwards."""
    expect_one("prompt", prompt)
    if follows(compat, "d3llm"):
        loop = PublishedMultiBlock(settings=settings, temperature=settings.temperature, pad=pad)
        return loop.run(model, prompt, new, backend).x, loop.nfe
    if settings.remasking == "random":
        raise ValueError("remasking: expected 'low_confidence' without compat, got 'random'")
    delay, refresh = settings.cache or (0, _NEVER)
    algorithm = MultiBlock(
        threshold=float(settings.threshold),
        block_length=settings.block_size,
        add_at=settings.block_add_threshold,
        full_at=settings.decoded_token_threshold,
        delay=delay,
        refresh=refresh,
        early_stop=settings.eos_id is not None,
        cache=settings.cache is not None,
    )
    hidden = 0 if pad is None else int(pad[0])
    generation = decode(
        model,
        [prompt[0, hidden:]],
        algorithm,
        max_new_tokens=new,
        temperature=settings.temperature,
        seed=draw_seed() if settings.temperature > 0 else 0,
        backend=backend,
    )
    x = torch.cat((prompt[:, :hidden], generation.sequences[0].to(model.device)[None]), 1)
    return x, int(generation.nfe[0])


_DREAM_ALGORITHMS = ("entropy_threshold",)


@torch.no_grad()
def dream_generate_multi_block(
    model: Any,
    inputs: Tensor | None = None,
    generation_config: Any = None,
    *,
    compat: str | None = "d3llm",
    backend: str | None = None,
    **kwargs: Any,
) -> tuple[DreamModelOutput | Tensor, int]:
    """d3LLM for Dream: several blocks at a time, with a cache if ``cache_delay_iter`` < 10000.

    Args:
        model: a loaded Dream module, whose weights are shared, or a pydllm model.
        inputs: ``(1, P)`` token ids.
        generation_config: as in ``pydllm.integrations.dream``, with ``alg="entropy_threshold"``,
            the only one this decoder has.
        compat: as in ``generate_multi_block``; here the published window's first position is
            predicted from its own row.
        backend: as in ``pydllm.ops``.
        kwargs: the config's names, and ``threshold=0.9``, ``block_size=32``,
            ``block_add_threshold=0.5``, ``decoded_token_threshold=0.5``,
            ``cache_delay_iter=10000``, ``early_stop=False``, ``refresh_interval=10000``;
            ``attention_mask`` with zeros on the left for padding, which with ``compat`` and a cache
            counts as text all the same, as in the original.

    Returns:
        The sequence ``(1, max_length)`` or a ``DreamModelOutput``, and the forwards.

    Raises:
        ValueError, TypeError: an unknown argument or value, or lengths that do not fit.
    """
    options = {
        "threshold": 0.9,
        "block_size": 32,
        "block_add_threshold": 0.5,
        "decoded_token_threshold": 0.5,
        "cache_delay_iter": _NEVER,
        "early_stop": False,
        "refresh_interval": _NEVER,
    }
    call = _dream_call("generate_multi_block", model, inputs, generation_config, kwargs, options)
    given, settings = call.options, call.settings
    delay = given["cache_delay_iter"]
    eos = _stop(settings.eos_token_id, given["early_stop"])
    eos_id = eos if eos is None or isinstance(eos, int) else eos[0]
    own = call.model
    if eos_id is not None:
        own = with_ids(own, own.spec.mask_id or 0, (eos_id,))
    said = Settings(
        _nats(given["threshold"]),
        given["block_size"],
        given["block_add_threshold"],
        given["decoded_token_threshold"],
        eos_id,
        settings.temperature,
        cache=(delay, given["refresh_interval"]) if delay < _NEVER else None,
    )
    # The published decoder with a cache reads no attention mask.
    pad = None if compat and said.cache is not None else call.pad
    x, forwards = _run(own, call.prompt, said, call.new, compat, backend, pad)
    return call.result(x), forwards


@torch.no_grad()
def dream_diffusion_generate(
    model: Any,
    inputs: Tensor | None = None,
    generation_config: Any = None,
    *,
    compat: str | None = "d3llm",
    backend: str | None = None,
    **kwargs: Any,
) -> tuple[DreamModelOutput | Tensor, int]:
    """d3LLM's ``diffusion_generate`` for Dream: one block after the other, by entropy, no cache.

    A forward writes the most certain mask up to the block's end and those whose entropy is below
    the threshold, at most as many as the block has masks.

    Args:
        model, inputs, generation_config, backend: as in ``dream_generate_multi_block``.
        compat: ``"d3llm"``: torch's generator in the original's order. None: noise is drawn in the
            kernel and the mask is never predicted.
        kwargs: the config's names, and ``threshold=0.5``, ``block_length=32`` (None: one block).

    Returns:
        The sequence ``(1, max_length)`` or a ``DreamModelOutput``, and the forwards.
    """
    options = {"threshold": 0.5, "block_length": 32}
    call = _dream_call("diffusion_generate", model, inputs, generation_config, kwargs, options)
    size, _ = call.blocks()
    check_number("threshold", call.options["threshold"], 0, infinite=True)
    loop = _EntropyLoop(
        block_length=size,
        threshold=float(call.options["threshold"]),
        temperature=call.settings.temperature,
        pad=call.pad,
        published=follows(compat, "d3llm"),
    )
    decoded = loop.run(call.model, call.prompt, call.new, backend)
    return call.result(decoded.x, call.history()), int(decoded.counters["nfe"][0])


@dataclass(kw_only=True)
class _EntropyLoop(PublishedLoop):
    block_length: int
    threshold: float

    def schedule(self, state: LoopState) -> Iterator[Pass]:
        length, begin = state.call.max_len, state.first_mask()
        for block in range(state.call.prompt_lengths[0], length, self.block_length):
            last, left = block + self.block_length, self.block_length
            before: list[int] | None = None
            while left:
                yield Pass(stop=length, first=begin, last=last, block=block, quota=left)
                (left,) = state.block_left
                if state.left == before and self.temperature == 0:
                    raise_stuck()
                before = state.left
            if not any(state.left):
                begin = last

    def choose(self, state: LoopState, plan: Pass, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest entropy and those below the threshold, at most as many as the block has
        masks."""
        stats, masked = self.stats(state, plan, hidden), state.masked(plan.first, plan.last)
        token = stats.token
        if self.draws:
            logits = self.logits(state, plan, hidden)[masked] / self.temperature
            token[masked] = torch.multinomial(logits.softmax(-1), 1)[:, 0]
        below = (masked & (stats.entropy < self.threshold)).sum(1, keepdim=True)
        return token, first(-stats.entropy, masked, below.clamp(1, plan.quota))


def _dream_call(
    name: str, model: Any, inputs: Tensor | None, config: Any, arguments: dict, options: dict
) -> Call:
    call = read_call(name, model, inputs, config, arguments, options, _DREAM_ALGORITHMS)
    expect_one("inputs", call.prompt)
    return call
