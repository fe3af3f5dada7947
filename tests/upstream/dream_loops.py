"""Dream's loop, and Fast-dLLM's block form of it."""

from __future__ import annotations

import random
from typing import Any

from pydllm.integrations import dream, fast_dllm_dream
from tests.integrations import published_dream as published
from tests.integrations.tiny import MASK, Plainly, prompts
from tests.upstream.compare import Case, Loop, Result
from tests.upstream.d3llm_loops import as_method
from tests.upstream.llada_loops import draw_model
from tests.upstream.models import trios
from tests.upstream.sources import Checkouts


def load_dream(checkouts: Checkouts) -> dict[str, Loop]:
    root = checkouts.root("dLLM-RL", "models", "dream")
    mixin = checkouts.file(root, "generation_utils.py").DreamGenerationMixin
    # That repository's own modeling code fails on padding outside of a GPU.
    other = checkouts.root("Fast-dLLM", "v1", "dream")
    make = trios("dream", checkouts.qwen_like(other, "model", "dream", "DreamConfig", "DreamModel"))

    def draw(rng: random.Random) -> Case:
        trio, told = draw_model(rng, make)
        # In a batch whose rows have unequal masks the original overwrites tokens.
        batch = 1 if "masks" in told else rng.choice([1, 1, 2, 3])
        length = rng.randrange(2, 9)
        pads = [rng.randrange(length) for _ in range(batch)] if rng.random() < 0.5 else None
        ids, mask = prompts(batch, length, rng.randrange(10**6), pads)
        new = rng.choice([5, 7, 8, 12])
        options: dict[str, Any] = {
            "max_new_tokens": new + (new + length == 20),  # 20 is Dream's default length
            "steps": rng.choice([1, 3, 5, new, new + 4]),
            "alg": rng.choice(["origin", "maskgit_plus", "topk_margin", "entropy"]),
            "temperature": rng.choice([0.0, 0.0, 0.4, 1.0]),
        }
        if rng.random() < 0.3:
            options["top_p"] = rng.choice([0.5, 0.9, 1.0])
        if rng.random() < 0.3:
            options["top_k"] = rng.choice([1, 5, 20, 100])
        if options["alg"] != "origin" and rng.random() < 0.3:
            options["alg_temp"] = rng.choice([0.0, 0.2, 1.0])
        if rng.random() < 0.2:
            options["eps"] = rng.choice([0.05, 0.3])
        if rng.random() < 0.15:
            options["num_return_sequences"] = 2
        if length > 3 and not pads and rng.random() < 0.15:
            ids[:, -2:] = MASK  # equally many in each row: see docs/samplers.md
        return Case(trio, ids, mask if pads else None, options, told)

    def given(case: Case) -> dict[str, Any]:
        # Without them the original takes those of the model's config, with transformers 4 top_k=50.
        filters = {"top_k": None, "top_p": None}
        return filters | case.options | {"mask_token_id": MASK, "attention_mask": case.mask}

    def run_original(case: Case) -> Result:
        method = as_method(case.trio.limited(), mixin, "diffusion_generate")
        return Result(method(case.prompt, **given(case)))

    def run_dropin(case: Case) -> Result:
        return Result(dream.diffusion_generate(case.trio.own, case.prompt, **given(case)))

    def run_restated(case: Case) -> Result:
        said = dict(case.options)
        copies = said.pop("num_return_sequences", 1)
        ids = case.prompt.repeat_interleave(copies, 0)
        pads = None
        if case.mask is not None:
            pads = (case.mask == 0).sum(1).repeat_interleave(copies).tolist()
        said["new"] = said.pop("max_new_tokens")
        said["top_k"] = min(said.get("top_k") or 61, 61)
        model = Plainly(case.trio.plain)
        return Result(published.dream(model, ids, pads, mask_id=MASK, **said)[0])

    return {"diffusion_generate": Loop(draw, run_original, run_dropin, run_restated)}


def load_fast_dllm(checkouts: Checkouts) -> dict[str, Loop]:
    root = checkouts.root("Fast-dLLM", "v1", "dream")
    (blocks,) = checkouts.package(root, "model.generation_utils_block")
    mixin = blocks.DreamGenerationMixin
    make = trios("dream", checkouts.qwen_like(root, "model", "dream", "DreamConfig", "DreamModel"))

    def draw(rng: random.Random) -> Case:
        trio, told = draw_model(rng, make)
        size, count = rng.choice([(4, 3), (6, 2), (5, 3), (8, 1)])
        by_threshold = rng.random() < 0.5
        # In a batch whose rows have unequal masks the original overwrites tokens.
        batch = 1 if by_threshold or "masks" in told else rng.choice([1, 1, 2])
        length = rng.randrange(2, 9)
        ids, _ = prompts(batch, length, rng.randrange(10**6))
        if size * count + length == 20:  # that is Dream's default length
            ids = ids[:, :-1]
        options: dict[str, Any] = {
            "max_new_tokens": size * count,
            "block_length": None if count == 1 and rng.random() < 0.5 else size,
            "steps": count * rng.choice([1, 2, 3, size]),
            "alg": "confidence_threshold" if by_threshold else rng.choice(["entropy", "origin"]),
            "temperature": rng.choice([0.0, 0.0, 0.4, 1.0]),
            "dual_cache": rng.random() < 0.5,
        }
        if by_threshold:
            options["threshold"] = rng.choice([0.0, 0.1, 0.3, 0.6, 0.9, 1.5])
        elif rng.random() < 0.4:
            options["alg_temp"] = rng.choice([0.0, 0.2, 1.0])
        if rng.random() < 0.25:
            options["top_p"] = rng.choice([0.5, 0.9, 1.0])
        if rng.random() < 0.25:
            options["top_k"] = rng.choice([1, 5, 20])
        return Case(trio, ids, None, options, told)

    def given(case: Case) -> dict[str, Any]:
        return {"top_k": None, "top_p": None, "mask_token_id": MASK} | case.options

    def run_original(case: Case) -> Result:
        method = as_method(case.trio.limited(), mixin, "diffusion_generate")
        return Result(method(case.prompt, **given(case)))

    def run_dropin(case: Case) -> Result:
        return Result(fast_dllm_dream.diffusion_generate(case.trio.own, case.prompt, **given(case)))

    def run_restated(case: Case) -> Result | None:
        said = dict(case.options)
        if said.pop("alg_temp", None):
            return None
        said["new"], said["dual"] = said.pop("max_new_tokens"), said.pop("dual_cache")
        said["block_length"] = said["block_length"] or said["new"]
        model = Plainly(case.trio.plain)
        return Result(published.fast_dllm_dream(model, case.prompt, mask_id=MASK, **said))

    return {"diffusion_generate": Loop(draw, run_original, run_dropin, run_restated)}
