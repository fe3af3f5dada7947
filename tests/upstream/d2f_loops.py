"""D2F's loop for LLaDA, as in d3LLM's repository, against ``MultiBlock(compat="d2f")``."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, distributions

import pydllm
from tests.integrations.tiny import EOS, MASK
from tests.models.plain import Plain
from tests.upstream.compare import Case, Loop, Result
from tests.upstream.family_loops import ENDS, answers, draw_batch, ended
from tests.upstream.models import trios
from tests.upstream.sources import Checkouts, with_constants

BLOCK = 4
THEIR_EOS = 126081  # in the loop's code


class Model:
    """A plain forward of blocks that begin at the prompt's end, with keys kept as the loop asks."""

    def __init__(self, plain: Plain, prompt: int) -> None:
        self.plain, self.prompt, self.forwards = plain, prompt, 0

    def eval(self) -> None:
        pass

    def __call__(
        self, ids: Tensor, *, past_key_values: Any, update_kvcache: int, **options: Any
    ) -> SimpleNamespace:
        self.forwards += 1
        kept, logits, rest = past_key_values, [], ids[0]
        seen = len(kept[0][0]) if kept else 0
        if not seen:  # the prompt is one block
            _, rows, kept = self.plain(rest[: self.prompt])
            logits, rest, seen = [rows], rest[self.prompt :], self.prompt
        _, rows, made = self.plain(rest, seen, kept, block=BLOCK, offset=-self.prompt)
        every = [
            tuple(torch.cat(pair)[:update_kvcache] for pair in zip(old, new, strict=True))
            for old, new in zip(kept, made, strict=True)
        ]
        return SimpleNamespace(logits=torch.cat([*logits, rows])[None], past_key_values=every)


def load_d2f(checkouts: Checkouts) -> dict[str, Loop]:
    path = checkouts.root("d3LLM", "utils", "utils_LLaDA") / "eval_d2f.py"
    others = {"dists": distributions, "F": torch.nn.functional, "T": object}
    others |= {"register_model": lambda name: lambda kind: kind, "Accelerator": object}
    found = checkouts.functions(path, **others)
    loop = with_constants(found["_generate_block_single"], {THEIR_EOS: EOS})
    make = trios("sdar", None, num_hidden_layers=2, block_size=BLOCK, silent=(MASK,), **ENDS)

    def draw(rng: random.Random) -> Case:
        case = draw_batch(rng, make, new=rng.choice([4, 8, 16, 24]))
        case.options["threshold"] = rng.choice([0.1, 0.3, 0.5, 0.9])
        case.options["add_at"] = rng.choice([0.1, 0.25, 0.5, 1.0])
        case.options["full_at"] = rng.choice([0.25, 0.5, 0.95, 1.0])
        return case

    def run_original(case: Case) -> Result:
        options, rows, forwards = case.options, [], 0
        for prompt in options["prompts"]:
            model = Model(case.trio.plain, len(prompt))
            x = loop(_evaluator(model, options, found), torch.tensor([prompt]))[0]
            rows.append(ended(x, options["new"]))
            forwards += model.forwards
        return Result(torch.tensor(rows), forwards)

    def run_ours(case: Case) -> Result:
        names = ("threshold", "add_at", "full_at")
        algorithm = pydllm.MultiBlock(
            block_length=BLOCK,
            score="confidence",
            forced="ready",
            compat="d2f",
            **{name: case.options[name] for name in names},
        )
        own = copy.copy(case.trio.own)
        own.spec = replace(own.spec, block_origin="prompt")
        got = answers(replace(case, trio=replace(case.trio, own=own)), algorithm)
        # A prompt's forward is one of its own here.
        return got._replace(forwards=(got.forwards or 0) - len(case.options["prompts"]))

    return {"_generate_block_single": Loop(draw, run_original, run_ours)}


def _evaluator(model: Model, options: dict[str, Any], found: dict[str, Callable]) -> Any:
    """What the loop asks of the class that it is a method of."""
    return SimpleNamespace(
        model=model,
        mask_token_id=MASK,
        block_size=BLOCK,
        block_add_threshold=options["add_at"],
        skip_threshold=options["threshold"],
        decoded_token_threshold=options["full_at"],
        max_length=model.prompt + options["new"],
        max_new_tokens=options["new"],
        device="cpu",
        target_dtype=torch.float64,
        temperature=0.0,
        top_p=None,
        top_k=None,
        sampling_strategy="default",
        tokenizer=SimpleNamespace(decode=lambda *ids, **options: ""),
        _update_block_completion_states=lambda *states: found["_update_block_completion_states"](
            None, *states
        ),
    )
