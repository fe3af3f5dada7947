"""d3LLM's multi-block decoders, for LLaDA and for Dream, on ``pydllm.MultiBlock``.

from pydllm.integrations.d3llm import generate_multi_block  # LLaDA, instead of d3LLM's
model.generate_multi_block = types.MethodType(d3llm.dream_generate_multi_block, model)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pydllm.decoding import Generation, MultiBlock
from pydllm.decoding import generate as decode
from pydllm.decoding.checks import expect_int, expect_number
from pydllm.integrations._board import (
    Board,
    check_prompt,
    check_temperature,
    draw_seed,
    full_attention,
    raise_stuck,
    with_ids,
)
from pydllm.integrations._dream import Call, DreamModelOutput, read_call
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
    compat: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, int]:
    """d3LLM for LLaDA: several blocks at a time, every forward over the whole sequence.

    Args:
        model: a loaded LLaDA module, whose weights are shared, or a pydllm model.
        prompt: ``(1, P)`` token ids.
        steps: not read, as in the original.
        max_new_tokens: new tokens.
        block_size: tokens in a block.
        temperature: 0 takes the arg-max; otherwise the noise is ours, whatever ``compat``: the
            original's distribution, a function of ``torch.manual_seed``, other tokens.
        remasking: not read, as in the original.
        mask_id: the mask's token id.
        threshold: nats; a token is written up to this entropy.
        block_add_threshold: part of the newest block that is decoded before the next opens.
        decoded_token_threshold: part of a block that is decoded before the next must advance.
        eos_token_id: with ``early_stop``, nothing behind it is decoded.
        early_stop: see there.
        compat: ``MultiBlock(profile="compat")``, the defects that decide tokens included, and
            ``"fixed"`` otherwise, where what follows an end of sequence is filled with it.
        backend: as in ``pydllm.ops``.

    Returns:
        ``x (1, P + max_new_tokens)`` int64 on the model's device, and the forwards. Entropies are
        fp32 (fp64 there).

    Raises:
        ValueError, TypeError: an argument that cannot be decoded.
    """
    algorithm = _algorithm(
        threshold,
        block_size,
        block_add_threshold,
        decoded_token_threshold,
        early_stop=early_stop,
        compat=compat,
    )
    return _llada(
        model, prompt, algorithm, max_new_tokens, mask_id, eos_token_id, temperature, backend
    )


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
    compat: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, int]:
    """``generate_multi_block`` with keys and values of finished blocks kept, after a delay.

    Args:
        cache_delay_iter: forwards that a finished block waits before its keys and values are kept.
        refresh_interval: one forward in so many is full and renews them.
        lazy_cache_refresh_num: not read, as in the original.
    """
    algorithm = _algorithm(
        threshold,
        block_size,
        block_add_threshold,
        decoded_token_threshold,
        cache=(cache_delay_iter, refresh_interval),
        early_stop=early_stop,
        compat=compat,
    )
    return _llada(
        model, prompt, algorithm, max_new_tokens, mask_id, eos_token_id, temperature, backend
    )


def _algorithm(
    threshold: float,
    block_size: int,
    block_add_threshold: float,
    decoded_token_threshold: float,
    *,
    early_stop: bool,
    compat: bool,
    cache: tuple[int, int] | None = None,
) -> MultiBlock:
    """The arguments under their names there; ``cache`` is delay and refresh interval."""
    expect_int("block_size", block_size, 1)
    expect_number("block_add_threshold", block_add_threshold, 0.0, 1.0)
    expect_number("decoded_token_threshold", decoded_token_threshold, 0.0, 1.0)
    delay, refresh = cache or (0, _NEVER)
    expect_int("cache_delay_iter", delay, 0)
    expect_int("refresh_interval", refresh, 1)
    return MultiBlock(
        threshold=threshold,
        block_length=block_size,
        add_at=block_add_threshold,
        full_at=decoded_token_threshold,
        delay=delay,
        refresh=refresh,
        early_stop=early_stop,
        cache=cache is not None,
        profile="compat" if compat else "fixed",
    )


def _llada(
    model: Any,
    prompt: Tensor,
    algorithm: MultiBlock,
    new: int,
    mask_id: int,
    eos_id: int | None,
    temperature: float,
    backend: str | None,
) -> tuple[Tensor, int]:
    own = full_attention(model, "d3LLM's decoder", mask_id, shifted=False)
    prompt = check_prompt("prompt", prompt, own, 0)
    if eos_id is not None and algorithm.early_stop:
        own = with_ids(own, mask_id, (eos_id,))
    generation = _run(own, prompt, algorithm, new, temperature, backend)
    return generation.sequences[0].to(own.device)[None], int(generation.nfe[0])


def _run(
    model: Model,
    prompt: Tensor,
    algorithm: MultiBlock,
    new: int,
    temperature: float,
    backend: str | None,
) -> Generation:
    if len(prompt) != 1:
        raise ValueError(f"prompt: expected one sequence, (1, P), got {tuple(prompt.shape)}")
    check_temperature(temperature)
    return decode(
        model,
        [prompt[0]],
        algorithm,
        max_new_tokens=new,
        temperature=float(temperature),
        seed=draw_seed() if temperature > 0 else 0,
        backend=backend,
    )


_DREAM_ALGORITHMS = ("entropy_threshold",)


@torch.no_grad()
def dream_generate_multi_block(
    model: Any,
    inputs: Tensor | None = None,
    generation_config: Any = None,
    *,
    compat: bool = True,
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
            predicted from its own row. Sampling is ours.
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
    algorithm = _algorithm(
        given["threshold"],
        given["block_size"],
        given["block_add_threshold"],
        given["decoded_token_threshold"],
        cache=(delay, given["refresh_interval"]) if delay < _NEVER else None,
        early_stop=given["early_stop"],
        compat=compat,
    )
    own = call.model
    eos = settings.eos_token_id
    if eos is not None and algorithm.early_stop:
        first = eos if isinstance(eos, int) else eos[0]
        own = with_ids(own, own.spec.mask_id or 0, (first,))
    seen = compat and algorithm.cache  # the published decoder with a cache reads no mask
    padding = 0 if call.pad is None or seen else int(call.pad[0])
    prompt = call.prompt[:, padding:]
    generation = _run(own, prompt, algorithm, call.new, settings.temperature, backend)
    whole = generation.sequences[0].to(own.device)[None]
    x = torch.cat((call.prompt[:, :padding], whole), 1)
    return call.result(x), int(generation.nfe[0])


@torch.no_grad()
def dream_diffusion_generate(
    model: Any,
    inputs: Tensor | None = None,
    generation_config: Any = None,
    *,
    compat: bool = True,
    backend: str | None = None,
    **kwargs: Any,
) -> tuple[DreamModelOutput | Tensor, int]:
    """d3LLM's ``diffusion_generate`` for Dream: one block after the other, by entropy, no cache.

    A forward writes the most certain mask up to the block's end and those whose entropy is below
    the threshold, at most as many as the block has masks.

    Args:
        model, inputs, generation_config, backend: as in ``dream_generate_multi_block``.
        compat: False: noise is drawn in the kernel and the mask is never predicted; True is the
            same at temperature 0, and at a temperature the noise is ours all the same.
        kwargs: the config's names, and ``threshold=0.5``, ``block_length=32`` (None: one block).

    Returns:
        The sequence ``(1, max_length)`` or a ``DreamModelOutput``, and the forwards.
    """
    options = {"threshold": 0.5, "block_length": 32}
    call = _dream_call("diffusion_generate", model, inputs, generation_config, kwargs, options)
    size = call.new if call.options["block_length"] is None else call.options["block_length"]
    if not isinstance(size, int) or size < 1 or call.new % size:
        raise ValueError(f"block_length: expected a divisor of the {call.new} new, got {size!r}")
    if call.settings.steps % (call.new // size):
        raise ValueError(
            f"steps: expected a multiple of the {call.new // size} blocks, "
            f"got {call.settings.steps}"
        )
    expect_number("threshold", call.options["threshold"], 0.0, float("inf"))
    # The original compares with "less than", the rule with "at most".
    threshold = math.nextafter(float(call.options["threshold"]), 0.0)
    temperature = call.settings.temperature
    board = Board.behind(
        call.prompt,
        call.new,
        call.model,
        pad=call.pad,
        banned=[] if compat else [call.settings.mask_token_id or 0],
        backend=backend,
    )
    board.seed = draw_seed() if temperature > 0 else 0
    for first in range(call.prompt.shape[1], board.length, size):
        last = first + size
        left, all_left = board.masks_left((first, last), (0, last))
        begin = board.first_mask(last)
        while left:
            before = all_left
            board.forward(0, board.length)
            stats = board.stats(begin, last, temperature=temperature)
            entropy = stats.entropy
            if all_left > left:  # masks of earlier blocks: only so many as this block has count
                masked = board.masked(begin, last)
                rank = (
                    entropy.masked_fill(~masked, torch.inf).argsort(stable=True, dim=1).argsort(1)
                )
                entropy = entropy.masked_fill(rank >= left, torch.inf)
            board.write(
                begin, stats.token, entropy, rule="entropy", threshold=threshold, semantics="d3llm"
            )
            left, all_left = board.masks_left((first, last), (0, last))
            if all_left == before and temperature == 0:
                raise_stuck()
    return call.result(board.x, call.history()), board.forwards


def _dream_call(
    name: str, model: Any, inputs: Tensor | None, config: Any, arguments: dict, options: dict
) -> Call:
    call = read_call(name, model, inputs, config, arguments, options, _DREAM_ALGORITHMS)
    if len(call.prompt) != 1:
        raise ValueError(f"inputs: expected one sequence, (1, P), got {tuple(call.prompt.shape)}")
    return call
