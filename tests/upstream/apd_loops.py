"""APD's loop for Dream, with a verifier and without."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import nn

from pydllm.integrations import apd
from tests.integrations import published_apd as published
from tests.integrations.tiny import EOS, MASK, prompts
from tests.upstream.compare import Case, Loop, Result
from tests.upstream.llada_loops import draw_model
from tests.upstream.models import trios
from tests.upstream.sources import Absent, Checkouts


def load_apd(checkouts: Checkouts) -> dict[str, Loop]:
    root = checkouts.root("apd")
    dream = checkouts.qwen_like(root, "dream", "dream", "DreamConfig", "DreamModel")
    # The configuration's default is not to cache, and kv_window is not read then.
    make = trios("dream", lambda config: dream(config | {"use_cache": True}))
    experts = trios("qwen2-sliding", _qwen2, use_sliding_window=False)
    return {name: _loop(name, make, experts) for name in ("apd", "leftright")}


def _qwen2(config: dict[str, Any]) -> nn.Module:
    try:
        from transformers import Qwen2Config, Qwen2ForCausalLM
    except ImportError as error:
        raise Absent(f"transformers cannot be imported: {error}") from error
    known = {key: value for key, value in config.items() if key != "architectures"}
    return Qwen2ForCausalLM(Qwen2Config(**known))


def _loop(name: str, make: Any, experts: Any) -> Loop:
    def draw(rng: random.Random) -> Case:
        trio, told = draw_model(rng, make)
        length, new = rng.randrange(2, 9), rng.choice([1, 5, 8, 12, 16])
        padded = rng.random() < 0.2
        ids, mask = prompts(1, length, rng.randrange(10**6), [1] if padded else None)
        if length > 3 and rng.random() < 0.1:
            ids[0, -2:] = MASK
        if rng.random() < 0.05:
            ids[0, 0] = EOS
        options: dict[str, Any] = {
            "alg": name,
            "max_new_tokens": new + (new + length == 20),  # 20 is Dream's default length
            "temperature": rng.choice([0.0, 0.0, 0.2, 0.6, 1.0]),
            "kv_window": rng.choice([None, None, 0, 1, 2, 4, 16]),
            "max_lookahead": rng.choice([None, None, 1, 2, 3, 6, 20]),
        }
        # Which of the two runs does not depend on the name.
        if rng.random() < (0.9 if name == "apd" else 0.1) and "masks" not in told:
            options["apd_mixture_weight"] = rng.choice([0.0, 0.3, 0.5, 0.8, 0.95, 1.0])
            options["verifier"] = rng.randrange(4)
            experts(options["verifier"], 1.0, True)  # building it takes numbers from torch
        else:
            steps = rng.choice([1, 1, 2, 3, 5])
            options["tokens_per_step"] = min(steps, options["max_lookahead"] or steps)
        if rng.random() < 0.3:
            options["top_p"] = rng.choice([0.5, 0.9, 1.0])
        if rng.random() < 0.2:
            options["top_k"] = rng.choice([1, 5, 20])
        return Case(trio, ids, mask if padded else None, options, told)

    def given(case: Case, kind: str) -> dict[str, Any]:
        filters: dict[str, Any] = {"top_k": None, "top_p": None, "attention_mask": case.mask}
        said = filters | case.options | {"mask_token_id": MASK, "eos_token_id": EOS}
        number = said.pop("verifier", None)
        if number is not None:
            expert = experts(number, 1.0, True)
            said["verifier_model"] = expert.own if kind == "own" else expert.limited()
        return said | {"return_dict_in_generate": True}

    def run_original(case: Case) -> Result:
        module: Any = case.trio.limited()
        out = module.diffusion_generate(case.prompt, **given(case, "module"))
        return result(out.sequences, out.profile.acceptance_counts, module.forwards)

    def run_dropin(case: Case) -> Result:
        out = apd.diffusion_generate(case.trio.own, case.prompt, **given(case, "own"))
        counts, forwards = out.profile.acceptance_counts, out.profile.num_forward_evals
        if out.profile.num_tokens_generated != sum(counts):
            raise ValueError("num_tokens_generated is not the sum of the counts")
        return result(out.sequences, counts, forwards)

    def run_restated(case: Case) -> Result:
        said = {key: value for key, value in case.options.items() if key not in ("alg", "verifier")}
        said["new"] = said.pop("max_new_tokens")
        number = case.options.get("verifier")
        expert = None if number is None else experts(number, 1.0, True).plain
        plain, ids = case.trio.plain, {"mask_id": MASK, "eos_id": EOS}
        found = published.apd(plain, expert, case.prompt, **said, **ids)
        return result(found.sequences, found.acceptance_counts, len(found.acceptance_counts))

    return Loop(draw, run_original, run_dropin, run_restated)


def result(x: Any, counts: list[int], forwards: int) -> Result:
    """Tokens, and what each round wrote."""
    return Result(torch.cat((x, torch.tensor([counts])), 1), forwards)
