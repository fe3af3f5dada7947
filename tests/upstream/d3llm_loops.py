"""d3LLM's multi-block decoders, for LLaDA and for Dream."""

from __future__ import annotations

import random
import types
from collections.abc import Callable
from typing import Any

import torch

from pydllm.integrations import d3llm
from tests.decoding.published_multiblock import multiblock
from tests.integrations.test_d3llm import oracle
from tests.integrations.tiny import EOS, MASK, prompts
from tests.upstream.compare import Case, Loop, Result
from tests.upstream.llada_loops import draw_model
from tests.upstream.models import Trio, trios
from tests.upstream.sources import Checkouts

NEVER = 10_000


def load_llada(checkouts: Checkouts) -> dict[str, Loop]:
    root = checkouts.root("d3LLM")
    file = checkouts.file(root, "d3llm/d3llm_LLaDA/d3llm_llada_generate_util.py")
    make = trios("llada", checkouts.llada(root, "utils.utils_LLaDA.model"))
    return {
        "generate_multi_block": _llada(
            file.generate_multi_block, d3llm.generate_multi_block, make, False
        ),
        "generate_multi_block_kv_cache": _llada(
            file.generate_multi_block_kv_cache, d3llm.generate_multi_block_kv_cache, make, True
        ),
    }


def draw_options(rng: random.Random, cached: bool) -> dict[str, Any]:
    size = rng.choice([4, 5, 6, 8])
    new = size * rng.choice([1, 2, 3, 4])
    if cached and rng.random() < 0.4:
        new += rng.randrange(1, size)  # without a cache the original runs 10001 forwards then
    options: dict[str, Any] = {
        "max_new_tokens": new,
        "block_size": size,
        "threshold": rng.choice([0.2, 0.6, 1.0, 1.6, 2.5]),
        "block_add_threshold": rng.choice([0.1, 0.3, 0.5, 1.0]),
        "decoded_token_threshold": rng.choice([0.5, 0.9, 0.95, 1.0]),
        "early_stop": rng.random() < 0.7,
        "temperature": rng.choice([0.0, 0.0, 0.0, 0.5, 1.0]),
    }
    if cached:
        options["cache_delay_iter"] = rng.choice([0, 1, 2, 3, 5])
        options["refresh_interval"] = rng.choice([NEVER, NEVER, 1, 3, 4])
    return options


def restate(case: Case, shifted: bool, cached: bool) -> Result | None:
    options = case.options
    if options["temperature"] or options.get("remasking") == "random" or MASK in case.prompt:
        return None
    cache = (options["cache_delay_iter"], options["refresh_interval"]) if cached else None
    pad = 0 if case.mask is None or cached else int((case.mask == 0).sum())
    tokens, forwards, *_ = multiblock(
        oracle(case.trio.plain),
        case.prompt[0, pad:].tolist(),
        mask_id=MASK,
        eos=EOS,
        shifted=shifted,
        new=options["max_new_tokens"],
        size=options["block_size"],
        threshold=options["threshold"],
        add_at=options["block_add_threshold"],
        full_at=options["decoded_token_threshold"],
        early_stop=options["early_stop"],
        cache=cache,
    )
    return Result(tokens[None], forwards)


def _llada(
    original: Callable[..., Any],
    dropin: Callable[..., Any],
    make: Callable[[int, float, bool], Trio],
    cached: bool,
) -> Loop:
    def draw(rng: random.Random) -> Case:
        trio, told = draw_model(rng, make)
        ids, _ = prompts(1, rng.randrange(2, 9), rng.randrange(10**6))
        options = draw_options(rng, cached) | {"mask_id": MASK, "eos_token_id": EOS}
        if ids.shape[1] > 3 and rng.random() < 0.1:
            ids[0, -2:] = MASK
        if rng.random() < 0.1:
            options["remasking"] = "random"
        return Case(trio, ids, None, options, told)

    def run_original(case: Case) -> Result:
        return Result(*original(case.trio.limited(), case.prompt, **case.options))

    def run_dropin(case: Case) -> Result:
        return Result(*dropin(case.trio.own, case.prompt, **case.options))

    return Loop(draw, run_original, run_dropin, lambda case: restate(case, False, cached))


def load_dream(checkouts: Checkouts) -> dict[str, Loop]:
    root = checkouts.root("d3LLM")
    file = checkouts.file(root, "d3llm/d3llm_DREAM/d3llm_dream_generate_util.py")
    build = checkouts.qwen_like(
        root, "utils.utils_Dream.model", "dream", "DreamConfig", "DreamModel"
    )
    make = trios("dream", build)
    mixin = file.DreamGenerationMixin
    return {
        "generate_multi_block": _dream(mixin, make, False),
        "generate_multi_block with a cache": _dream(mixin, make, True),
        "diffusion_generate": _dream_single(mixin, make),
    }


def as_method(module: Any, mixin: type, name: str) -> Callable[..., Any]:
    """A method of ``mixin`` bound to the module, and the helpers that it calls."""
    for key, value in vars(mixin).items():
        if callable(value) or isinstance(value, staticmethod):
            bound = value.__func__ if isinstance(value, staticmethod) else None
            module.__dict__[key] = bound or types.MethodType(value, module)
    return module.__dict__[name]


def _dream(mixin: type, make: Callable[[int, float, bool], Trio], cached: bool) -> Loop:
    def draw(rng: random.Random) -> Case:
        trio, told = draw_model(rng, make)
        length = rng.randrange(2, 9)
        pad = rng.randrange(1, length) if rng.random() < 0.3 else 0
        ids, mask = prompts(1, length, rng.randrange(10**6), [pad])
        options = draw_options(rng, cached) | {"alg": "entropy_threshold"}
        if options["max_new_tokens"] + length == 20:
            options["max_new_tokens"] += options["block_size"]  # that is Dream's default length
        return Case(trio, ids, mask if pad else None, options, told)

    def given(case: Case) -> dict[str, Any]:
        more = {"mask_token_id": MASK, "eos_token_id": EOS, "attention_mask": case.mask}
        return case.options | more

    def run_original(case: Case) -> Result:
        method = as_method(case.trio.limited(), mixin, "generate_multi_block")
        return Result(*method(case.prompt, **given(case)))

    def run_dropin(case: Case) -> Result:
        said = given(case)
        return Result(*d3llm.dream_generate_multi_block(case.trio.own, case.prompt, **said))

    def run_restated(case: Case) -> Result | None:
        result = restate(case, True, cached)
        if result is None or case.mask is None or cached:
            return result
        pad = int((case.mask == 0).sum())
        return Result(torch.cat((case.prompt[:, :pad], result.tokens), 1), result.forwards)

    return Loop(draw, run_original, run_dropin, run_restated)


def _dream_single(mixin: type, make: Callable[[int, float, bool], Trio]) -> Loop:
    def draw(rng: random.Random) -> Case:
        trio, told = draw_model(rng, make)
        length = rng.randrange(2, 9)
        pad = rng.randrange(1, length) if rng.random() < 0.3 else 0
        ids, mask = prompts(1, length, rng.randrange(10**6), [pad])
        size, blocks = rng.choice([(4, 3), (6, 2), (5, 3), (8, 1)])
        options: dict[str, Any] = {
            "alg": "entropy_threshold",
            "max_new_tokens": size * blocks,
            "block_length": size,
            "steps": blocks * rng.choice([1, 4]),
            "threshold": rng.choice([0.2, 0.6, 1.0, 1.6, 2.5]),
            "temperature": rng.choice([0.0, 0.0, 0.5, 1.0]),
        }
        if length - pad > 3 and rng.random() < 0.2:
            ids[0, -1] = MASK
        return Case(trio, ids, mask if pad else None, options, told)

    def given(case: Case) -> dict[str, Any]:
        return case.options | {"mask_token_id": MASK, "attention_mask": case.mask}

    def run_original(case: Case) -> Result:
        method = as_method(case.trio.limited(), mixin, "diffusion_generate")
        return Result(*method(case.prompt, **given(case)))

    def run_dropin(case: Case) -> Result:
        said = given(case)
        return Result(*d3llm.dream_diffusion_generate(case.trio.own, case.prompt, **said))

    return Loop(draw, run_original, run_dropin)
