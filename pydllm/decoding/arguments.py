"""The arguments of ``generate``, checked before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pydllm._backend.env import BACKENDS
from pydllm._checks import (
    check_bool,
    check_choice,
    check_each,
    check_int,
    check_number,
    describe,
    each,
)
from pydllm.decoding.call import Call, Step, extents, lay_out, padded_length
from pydllm.decoding.driver import Algorithm
from pydllm.decoding.guidance import GuidedModel
from pydllm.decoding.stops import read_stops
from pydllm.models import Model
from pydllm.ops.vocab_stats import MAX_SUPPRESS_IDS

_COLDEST = 1e-6  # least temperature that is not 0
_HOTTEST = 1e6  # beyond it logits / temperature says nothing any more


@dataclass(frozen=True, kw_only=True)
class Options:
    """Arguments of ``generate`` beside the prompts, the algorithm and the length.

    ``warm``: no token ends a sequence, and every kind of step is taken.
    """

    temperature: float | Sequence[float] = 0.0
    top_k: int | None | Sequence[int | None] = None
    top_p: float | None | Sequence[float | None] = None
    guidance: float = 0.0
    suppress_ids: Sequence[int] | None = None
    logprobs: bool = False
    seed: int = 0
    request_ids: Sequence[int] | None = None
    stop: Any = None
    ignore_eos: bool = False
    backend: str | None = None
    graph: bool | str = "auto"
    max_batch: int | None = None
    deterministic: bool = False
    on_step: Callable[[Step], None] | None = None
    warm: bool = False


HOW = ("graph", "max_batch", "deterministic")  # how steps are run


def read_options(
    function: str, options: Mapping[str, Any], without: tuple[str, ...] = ()
) -> Options:
    """Keywords of ``generate`` that another function takes as well.

    Raises:
        TypeError: a keyword that ``generate`` does not have, or one of ``without``.
    """
    for name in options:
        if name not in Options.__dataclass_fields__ or name in ("warm", *without):
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    return Options(**options)


def make_call(
    model: Model,
    ids: Sequence[Sequence[int]],
    algorithm: Algorithm,
    max_new_tokens: int | Sequence[int],
    options: Options,
) -> Call:
    """The checked call.

    Raises:
        ValueError, TypeError: an argument that cannot be decoded with.
    """
    spec, device, mask_id = model.spec, model.device, model.spec.mask_id
    if not isinstance(algorithm, Algorithm):
        raise TypeError(f"algorithm: expected one such as pydllm.Static(), got {algorithm!r:.80}")
    if mask_id is None and algorithm.needs_mask:
        raise ValueError("model: expected a masked diffusion model, got one without a mask id")
    new = _new_tokens(max_new_tokens, ids, mask_id)
    temperatures = _temperatures(options.temperature, len(ids))
    _expect_greedy(algorithm, options, any(temperatures))
    top_k, top_p = _filters(algorithm, options, len(ids))
    suppressed = _suppress_ids(options.suppress_ids, mask_id, spec.vocab_size)
    model = _guided(model, algorithm, options.guidance)
    check_bool("logprobs", options.logprobs)
    if options.logprobs and not algorithm.has_logprobs:
        raise ValueError(
            f"logprobs: expected False with {type(algorithm).__name__}, whose tokens are drafts "
            "that were kept, or move, and have no distribution of their own, got True"
        )
    check_int("seed", options.seed, 0, 2**64 - 1)
    request_ids = _request_ids(options.request_ids, len(ids))
    check_bool("ignore_eos", options.ignore_eos)
    if options.backend is not None:
        check_choice("backend", options.backend, BACKENDS)
    if options.on_step is not None and not callable(options.on_step):
        raise TypeError(f"on_step: expected a function, got {describe(options.on_step)}")
    stops = read_stops(
        options.stop,
        len(ids),
        spec.vocab_size,
        model.tokenizer,
        on_device=not algorithm.ends_early,
    )
    starts = _region_starts(model, algorithm, options, ids)
    lengths = [len(prompt) for prompt in ids]
    ends = [length + count for length, count in zip(lengths, new, strict=True)]
    _check_positions(model, ends, max_new_tokens)
    algorithm.check(model, max(new))

    def numbers(values: Sequence[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=device)

    eos_ids = [] if options.ignore_eos else list(spec.eos_ids)
    ends_at = [*eos_ids, *(stops.shared_ids if stops is not None else ())]
    eos = torch.tensor(ends_at, device=device) if ends_at else None
    fill_id = spec.eos_ids[0] if spec.eos_ids else 0
    if algorithm.shares_region:
        fill_id = next(t for t in range(spec.vocab_size) if t not in (mask_id, *ends_at))
    used = extents(starts or lengths, ends, shared=algorithm.shares_region)
    max_len = padded_length(model, lengths, used, fixed_shapes=False)
    empty = -1 if mask_id is None else mask_id
    x = lay_out(model, empty, fill_id, ids, ends, max_len)
    return Call(
        model=model,
        mask_id=empty,
        x=x.to(device),
        prompt_length=numbers(lengths),
        end=numbers(ends),
        request_id=numbers(request_ids),
        # A tensor, so that recorded steps read it; 0 draws nothing and needs no noise.
        temperature=torch.tensor(temperatures, dtype=torch.float32, device=device)
        if any(temperatures)
        else 0.0,
        top_k=None if top_k is None else numbers(top_k),
        top_p=None if top_p is None else torch.tensor(top_p, dtype=torch.float32, device=device),
        guidance=float(options.guidance),
        logprobs=options.logprobs,
        seed=options.seed,
        backend=options.backend,
        eos=torch.full_like(eos, -1) if options.warm and eos is not None else eos,
        suppress_ids=numbers(suppressed) if suppressed else None,
        prompt_lengths=lengths,
        ends=ends,
        region_start=None if starts is None else numbers(starts),
        region_starts=starts,
        ignores_eos=options.ignore_eos,
        fill_id=fill_id,
        on_step=options.on_step,
        warm=options.warm,
        stops=None if options.warm else stops,
    )


def per_prompt(name: str, value: Any, prompts: int) -> list[Any]:
    """A value for every prompt, of one for all or a sequence with one each."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value] * prompts
    if len(value) != prompts:
        raise ValueError(f"{name}: expected {prompts}, one per prompt, got {len(value)}")
    return list(value)


def _new_tokens(
    max_new_tokens: Any, ids: Sequence[Sequence[int]], mask_id: int | None
) -> list[int]:
    values = per_prompt("max_new_tokens", max_new_tokens, len(ids))
    for value, prompt in zip(values, ids, strict=True):
        check_int("max_new_tokens", value, 0 if mask_id in prompt else 1)
    return values


def _region_starts(
    model: Model, algorithm: Algorithm, options: Options, ids: Sequence[Sequence[int]]
) -> list[int] | None:
    """The first mask of each prompt, or its end; None where no prompt has masks.

    Raises:
        ValueError: masks that this algorithm or model does not fill.
    """
    spec, mask_id = model.spec, model.spec.mask_id
    starts = [p.index(mask_id) if mask_id in p else len(p) for p in map(list, ids)]
    found = [row for row, prompt in enumerate(ids) if mask_id in prompt]
    if not found:
        return None
    name, refused = f"prompts[{found[0]}]", None
    if not algorithm.fills_prompts:
        refused = f"{type(algorithm).__name__}, which writes after the prompt alone"
    elif spec.seeded or spec.block_origin != "zero":
        refused = (
            "a model whose blocks begin at the prompt's end or take a token from the one before"
        )
    elif options.guidance > 0:
        refused = "guidance, which masks the prompt"
    elif algorithm.ends_early and not options.ignore_eos:
        refused = (
            f"{type(algorithm).__name__} but for ignore_eos=True (an EOS in one would be an end)"
        )
    if refused is not None:
        raise ValueError(f"{name}: expected no mask in a prompt with {refused}")
    return starts


def _temperatures(temperature: float | Sequence[float], prompts: int) -> list[float]:
    values = per_prompt("temperature", temperature, prompts)
    for value in values:
        if type(value) not in (int, float) or not 0 <= value <= _HOTTEST:
            raise ValueError(f"temperature: expected a number in [0, {_HOTTEST:g}], got {value!r}")
        if 0 < value < _COLDEST:
            raise ValueError(f"temperature: expected 0 or at least {_COLDEST:g}, got {value!r}")
    return values


def _expect_greedy(algorithm: Algorithm, options: Options, draws: bool) -> None:
    """Raise ValueError for an option of sampling with an algorithm that takes the arg-max."""
    if not algorithm.is_greedy:
        return
    for name, wanted in (("temperature", "0"), ("top_k", "None"), ("top_p", "None")):
        value = getattr(options, name)
        given = draws if name == "temperature" else any(v is not None for v in each(value))
        if given:
            raise ValueError(
                f"{name}: expected {wanted} with {type(algorithm).__name__}, which takes the most "
                f"probable tokens, got {value!r}"
            )


def _filters(
    algorithm: Algorithm, options: Options, prompts: int
) -> tuple[list[int] | None, list[float] | None]:
    """``top_k`` and ``top_p`` of each prompt; None where no prompt is filtered."""
    top_k = per_prompt("top_k", options.top_k, prompts)
    top_p = per_prompt("top_p", options.top_p, prompts)
    for k in top_k:
        if k is not None:
            check_int("top_k", k, 1)
    check_each("top_p", top_p, expect_nucleus)
    if any(k is not None for k in top_k) and not algorithm.takes_top_k:
        raise ValueError(
            f"top_k: expected None with {type(algorithm).__name__}, whose nucleus is top_p's, "
            f"got {options.top_k!r}"
        )
    some_k = any(k is not None for k in top_k)
    some_p = any(p not in (None, 1) for p in top_p)
    return (
        [2**31 - 1 if k is None else k for k in top_k] if some_k else None,
        [1.0 if p is None else float(p) for p in top_p] if some_p else None,
    )


def expect_nucleus(name: str, value: Any) -> None:
    if value is not None and not (type(value) in (int, float) and 0 < value <= 1):
        raise ValueError(f"{name}: expected a number in (0, 1] or None, got {value!r}")


def _suppress_ids(ids: Sequence[int] | None, mask_id: int | None, vocab_size: int) -> list[int]:
    """Ids that are never predicted, the mask id first."""
    ids = [] if ids is None else ids
    if not isinstance(ids, list | tuple):
        raise TypeError(f"suppress_ids: expected a list of token ids, got {describe(ids)}")
    for token in ids:
        check_int("suppress_ids", token, 0, vocab_size - 1)
    own = [] if mask_id is None else [mask_id]
    others = sorted(set(ids) - set(own))
    most = MAX_SUPPRESS_IDS - len(own)
    if len(others) > most:
        raise ValueError(f"suppress_ids: expected at most {most} ids, got {len(others)}")
    return own + others


def _guided(model: Model, algorithm: Algorithm, guidance: float) -> Model:
    check_number("guidance", guidance, 0)
    if guidance == 0:
        return model
    if not algorithm.takes_guidance:
        raise ValueError(
            f"guidance: expected 0 with {type(algorithm).__name__} (it needs forwards that see "
            f"masks in the prompt's place), got {guidance}"
        )
    guided: Any = GuidedModel(model, float(guidance))  # its forward needs the prompts' lengths
    return guided


def _request_ids(request_ids: Any, prompts: int) -> Sequence[int]:
    if request_ids is None:
        return range(prompts)
    if not isinstance(request_ids, Sequence) or isinstance(request_ids, str):
        raise TypeError(f"request_ids: expected one int per prompt, got {describe(request_ids)}")
    if len(request_ids) != prompts:
        raise ValueError(f"request_ids: expected {prompts}, one per prompt, got {len(request_ids)}")
    for request_id in request_ids:
        if type(request_id) is not int or not -(2**31) <= request_id < 2**31:
            raise ValueError(f"request_ids: expected ints in int32, got {describe(request_id)}")
    return request_ids


def _check_positions(model: Model, ends: Sequence[int], max_new_tokens: Any) -> None:
    most = model.spec.max_positions
    if most is not None and max(ends) > most:
        raise ValueError(
            f"prompts: expected at most {most} positions with "
            f"max_new_tokens={max_new_tokens}, got {max(ends)}: lower max_new_tokens"
        )
