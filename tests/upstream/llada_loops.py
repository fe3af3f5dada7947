"""LLaDA's and Fast-dLLM's loops for LLaDA."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from pydllm.integrations import fast_dllm, llada
from tests.integrations import published_llada as published
from tests.integrations.tiny import EOS, EOT, MASK, Plainly, prompts
from tests.upstream.compare import Case, Loop, Result
from tests.upstream.models import Trio, trios
from tests.upstream.sources import Checkouts, with_constants

SCALES = (1.0, 1.3, 1.7, 2.0, 2.4, 2.75)


def draw_model(rng: random.Random, make: Callable[[int, float, bool], Trio]) -> tuple[Trio, str]:
    seed, scale = rng.randrange(8), rng.choice(SCALES)
    predicts_masks = rng.random() < 0.1
    told = f"model {seed}, EOS x {scale}{', may predict masks' if predicts_masks else ''}"
    return make(seed, scale, predicts_masks), told


def draw_lengths(rng: random.Random) -> dict[str, int]:
    """Lengths that LLaDA's loops take: whole blocks, and whole steps a block."""
    block, blocks = rng.choice([(4, 3), (6, 2), (5, 3), (8, 1), (12, 1), (3, 4), (1, 6)])
    steps = blocks * rng.choice([1, 2, 3, block, block + 2])
    return {"steps": steps, "gen_length": block * blocks, "block_length": block}


def load_llada(checkouts: Checkouts) -> dict[str, Loop]:
    file = checkouts.file(checkouts.root("LLaDA"), "generate.py")
    original = with_constants(file.generate, {126081: EOS, 126348: EOT})
    make = trios(
        "llada-gqa", checkouts.llada(checkouts.root("dllm", "dllm", "pipelines", "llada"), "models")
    )

    def draw(rng: random.Random) -> Case:
        trio, told = draw_model(rng, make)
        batch, length = rng.choice([1, 1, 2, 3]), rng.randrange(2, 9)
        pads = [rng.randrange(min(4, length)) for _ in range(batch)]
        padded = batch > 1 and rng.random() < 0.6
        ids, mask = prompts(batch, length, rng.randrange(10**6), pads if padded else None)
        if length > 3 and not padded and rng.random() < 0.15:
            ids[0, -2:] = MASK
        options: dict[str, Any] = draw_lengths(rng)
        options["temperature"] = rng.choice([0.0, 0.0, 0.4, 1.0])
        if rng.random() < 0.3:
            # Without a mask the original fails where it is guided.
            options["cfg_scale"] = rng.choice([0.5, 1.5])
            padded = True
        for name in ("logits_eos_inf", "confidence_eos_eot_inf"):
            if rng.random() < 0.25:
                options[name] = True
        if rng.random() < 0.2:
            options["remasking"] = "random"
        return Case(trio, ids, mask if padded else None, options, told)

    def run_original(case: Case) -> Result:
        module = case.trio.limited()
        return Result(original(module, case.prompt, case.mask, mask_id=MASK, **case.options))

    def run_dropin(case: Case) -> Result:
        ids = {"mask_id": MASK, "eos_id": EOS, "eot_id": EOT}
        return Result(llada.generate(case.trio.own, case.prompt, case.mask, **case.options, **ids))

    def run_restated(case: Case) -> Result:
        said = dict(case.options)
        said["eos_inf"] = EOS if said.pop("logits_eos_inf", False) else None
        said["last_ids"] = (EOS, EOT) if said.pop("confidence_eos_eot_inf", False) else ()
        pads = None if case.mask is None else (1 - case.mask).sum(1).tolist()
        model = Plainly(case.trio.plain)
        return Result(published.llada(model, case.prompt, pads, mask_id=MASK, **said))

    return {"generate": Loop(draw, run_original, run_dropin, run_restated)}


FAST_DLLM = {
    "generate": (fast_dllm.generate, "none"),
    "generate_with_prefix_cache": (fast_dllm.generate_with_prefix_cache, "prefix"),
    "generate_with_dual_cache": (fast_dllm.generate_with_dual_cache, "dual"),
}


def load_fast_dllm(checkouts: Checkouts) -> dict[str, Loop]:
    return _fast_dllm(checkouts, ("Fast-dLLM", "v1", "llada"), {})


def load_fast_dllm_2025(checkouts: Checkouts) -> dict[str, Loop]:
    return _fast_dllm(checkouts, ("Fast-dLLM-24cc59e", "llada"), {"version": "24cc59e"})


def _fast_dllm(
    checkouts: Checkouts, place: tuple[str, ...], own: dict[str, Any]
) -> dict[str, Loop]:
    root = checkouts.root(*place)
    file = checkouts.file(root, "generate.py")
    make = trios("llada", checkouts.llada(root, "model"))
    return {name: _fast_dllm_loop(name, getattr(file, name), make, own) for name in FAST_DLLM}


def _fast_dllm_loop(
    name: str,
    original: Callable[..., Any],
    make: Callable[[int, float, bool], Trio],
    own: dict[str, Any],
) -> Loop:
    dropin, cache = FAST_DLLM[name]

    def draw(rng: random.Random) -> Case:
        trio, told = draw_model(rng, make)
        ids, _ = prompts(1, rng.randrange(2, 9), rng.randrange(10**6))
        if rng.random() < 0.1:
            ids[0, -2:] = MASK
        options: dict[str, Any] = draw_lengths(rng)
        options["temperature"] = rng.choice([0.0, 0.0, 0.5, 1.0])
        rule = rng.choice(["schedule", "threshold", "threshold", "factor"])
        if rule == "threshold":
            options["threshold"] = rng.choice([0.0, 0.05, 0.2, 0.4, 0.6, 0.9, 1.0, 1.5])
        elif rule == "factor" and not own:  # June 2025 has none
            options["factor"] = rng.choice([0.3, 0.7, 1.0, 2.0])
        if rng.random() < 0.2:
            options["remasking"] = "random"
        return Case(trio, ids, None, options, told)

    def run_original(case: Case) -> Result:
        return Result(*original(case.trio.limited(), case.prompt, mask_id=MASK, **case.options))

    def run_dropin(case: Case) -> Result:
        given = case.options | own
        return Result(*dropin(case.trio.own, case.prompt, mask_id=MASK, **given))

    def run_restated(case: Case) -> Result:
        model = Plainly(case.trio.plain)
        said = case.options | own
        return Result(*published.fast_dllm(model, case.prompt, cache=cache, mask_id=MASK, **said))

    return Loop(draw, run_original, run_dropin, run_restated)
