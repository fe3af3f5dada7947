"""FreeDave's loops: static and with drafts, for full and for block-causal attention.

LLaDA is the repository's own modeling code, Dream that of APD's, which takes a mask of scores as
FreeDave needs it. The block-causal loops run on a plain forward in the place of SDAR's code.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from pydllm.integrations import freedave
from tests.integrations import published_freedave as published
from tests.integrations.tiny import EOS, MASK, Plainly, prompts
from tests.models.plain import Plain
from tests.upstream.compare import Case, Loop, Result
from tests.upstream.llada_loops import draw_model
from tests.upstream.models import LIMIT, Endless, Trio, trios
from tests.upstream.sources import Checkouts

PAD = 58
IDS = {"mask_token_id": MASK, "eos_token_id": EOS, "pad_token_id": PAD}


class BlockModel(nn.Module):
    """Logits of versions of a block or of several, side by side in the batch or along it; keys of
    the blocks that ``store_kv`` names are kept as their tokens."""

    def __init__(self, plain: Plain) -> None:
        super().__init__()
        self.plain, self.forwards = plain, 0

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Any,
        use_cache: bool,
        output_attentions: bool,
        store_kv: bool,
    ) -> SimpleNamespace:
        self.forwards += 1
        if self.forwards > LIMIT:
            raise Endless(f"{LIMIT} forwards")
        before: list[int] = getattr(past_key_values, "stored_ids", [])
        width = len(set(position_ids[0].tolist()))
        size = int(attention_mask[0, 0, 0].sum()) - len(before)
        if position_ids[0, 0] != len(before) or attention_mask.shape[-2] != position_ids.shape[1]:
            raise RuntimeError("expected the positions after the stored ones")
        rows = []
        for ids in input_ids.reshape(-1, width):
            whole = torch.tensor(before + ids.tolist())
            rows.append(self.plain(whole, block=size)[1][len(before) :])
        if store_kv:
            past_key_values.stored_ids = before + input_ids[0].tolist()
        return SimpleNamespace(logits=torch.stack(rows).view(*input_ids.shape, -1))


def load_freedave(checkouts: Checkouts) -> dict[str, Loop]:
    root, other = checkouts.root("FreeDave"), checkouts.root("apd")
    (core,) = checkouts.package(root, "generation.core")
    llada = trios("llada-gqa", checkouts.llada(root, "modeling.llada"))
    build = checkouts.qwen_like(other, "dream", "dream", "DreamConfig", "DreamModel")
    dream = trios("dream", build)
    sdar = trios("sdar", None, num_hidden_layers=2)
    loops = {}
    for kind, make in (("LLaDA", llada), ("Dream", dream), ("SDAR", sdar)):
        for drafts in (False, True):
            name = "block" if kind == "SDAR" else "full"
            name = f"block_decode_with_{name}_attention{'_FreeDave' if drafts else ''}"
            loops[f"{name}, {kind}"] = _loop(core, name, make, kind, drafts)
    return loops


def _loop(
    core: Any,
    name: str,
    make: Callable[[int, float, bool], Trio],
    kind: str,
    drafts: bool,
) -> Loop:
    dropin = getattr(freedave, name)

    def draw(rng: random.Random) -> Case:
        trio, told = draw_model(rng, make)
        batch = rng.choice([1, 1, 2, 3]) if kind != "SDAR" and not drafts else 1
        length = rng.randrange(2, 9)
        # LLaDA's code turns keys before the window as if there were no padding.
        padded = kind == "Dream" and rng.random() < 0.3
        pads = [rng.randrange(1, min(4, length)) for _ in range(batch)] if padded else None
        ids, mask = prompts(batch, length, rng.randrange(10**6), pads)
        if length > 3 and not padded and kind != "SDAR" and rng.random() < 0.1:
            ids[0, -2:] = MASK
        block, blocks = rng.choice([(4, 3), (6, 2), (5, 3), (8, 1), (12, 1), (3, 4), (1, 6)])
        if kind != "Dream" and rng.random() < 0.15:
            block, blocks = 2, 5
        options: dict[str, Any] = {
            "block_length": block,
            "max_gen_length": block * blocks,
            "temperature": rng.choice([0.0, 0.0, 0.0, 0.5, 1.0]),
            "alg_temp": rng.choice([None, 0, -1]),
            "early_exit": rng.random() < 0.5,
        }
        if kind == "SDAR":
            options["max_gen_length"] += rng.randrange(block)
        else:
            options["dual_cache"] = rng.random() < 0.5
        if not drafts:
            options["decoding_steps"] = blocks * rng.choice([1, 2, block, block, block + 2])
        else:
            options["draft_steps"] = rng.choice([1, 2, 3, 4, 8, 40])
            options["eager_acceptance_mode"] = rng.random() < 0.5
            options["draft_mode"] = rng.choice(["batch_expanding", "tree_attention"])
            if options["eager_acceptance_mode"] and "dual_cache" in options:
                options["dual_cache"] = False  # on which the original fails
        if rng.random() < 0.4:
            options["confidence_threshold"] = rng.choice([0.0, 0.05, 0.2, 0.4, 0.9, 1.5])
        if rng.random() < 0.25:
            options["top_p"] = rng.choice([0.5, 0.9, 1.0])
        if rng.random() < 0.25:
            options["top_k"] = rng.choice([1, 5, 20])
        return Case(trio, ids, mask if padded else None, options, told)

    def run_original(case: Case) -> Result:
        if kind == "SDAR":
            module: Any = BlockModel(case.trio.plain)
        else:
            module = case.trio.limited()
        # A mask of scores is what Dream and LLaDA take, their eval scripts ask for it.
        owner = core.DLMGeneration(kind != "SDAR", device=torch.device("cpu"))
        given = case.options | IDS | {"use_cache": True, "attention_mask": case.mask}
        return result(getattr(owner, name)(module, case.prompt, **given), module.forwards)

    def run_dropin(case: Case) -> Result:
        given = case.options | IDS | {"attention_mask": case.mask}
        found = dropin(case.trio.own, case.prompt, **given)
        return result(found, found.nfe)

    def run_restated(case: Case) -> Result:
        given = {key: value for key, value in case.options.items() if key != "draft_mode"}
        if kind == "SDAR":
            found = published.block_causal(case.trio.plain, case.prompt, **given, **IDS)
        else:
            pads = None if case.mask is None else (case.mask == 0).sum(1).tolist()
            found = published.full(Plainly(case.trio.plain), case.prompt, pads, **given, **IDS)
        return result(found, found.nfe)

    return Loop(draw, run_original, run_dropin, run_restated)


def result(found: Any, forwards: int | None) -> Result:
    """Tokens, the step map, and the counters, in one matrix."""
    tokens = torch.cat((found.sequences, found.trajectory_step_map), 1)
    if found.num_hit_tokens is not None:
        counted = [int(found.num_proposed_tokens), int(found.num_hit_tokens)]
        tokens = torch.cat((tokens, torch.tensor([counted])), 1)
    return Result(tokens, forwards)
