"""The block-causal loops, SDAR's, LLaDA2.0's and LLaDA2.1's, and the schedulers of diffusers.

The two loops run on a plain forward in the place of their modeling code: it takes their arguments.
"""

from __future__ import annotations

import random
import types
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from pydllm.integrations import llada2, llada21
from pydllm.integrations.diffusers import BlockRefinementScheduler, EntropyBoundScheduler
from pydllm.integrations.sdar import block_diffusion_generate
from tests.integrations import published_blocks as published
from tests.integrations.tiny import EOS, MASK, prompts
from tests.models.plain import Plain
from tests.upstream.compare import Case, Loop, Result
from tests.upstream.llada_loops import draw_model
from tests.upstream.models import trios
from tests.upstream.sources import Checkouts


class BlockModel(nn.Module):
    """Logits of a block, keys of the blocks that ``store_kv`` names kept: as SDAR's module."""

    def __init__(self, plain: Plain) -> None:
        super().__init__()
        self.plain, self.forwards = plain, 0
        self.device = torch.device("cpu")

    def forward(
        self,
        ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Any = None,
        use_cache: bool = False,
        store_kv: bool = False,
    ) -> SimpleNamespace:
        self.forwards += 1
        before: list[int] = getattr(past_key_values, "stored_ids", [])
        whole = torch.tensor(before + ids[0].tolist())
        # The first row's block ends where its mask does; SDAR's is of ones, LLaDA2's of -inf.
        seen = attention_mask.flatten(0, -3)[0]
        seen = seen > 0.5 if seen.dtype == torch.float32 else seen == 0
        size = int(seen[0].sum()) - len(before)
        if not (position_ids[0] == torch.arange(len(before), len(whole))).all():
            raise RuntimeError("expected the positions after the stored ones")
        logits = self.plain(whole, block=size)[1][len(before) :]
        if store_kv:
            past_key_values.stored_ids = whole.tolist()
        return SimpleNamespace(logits=logits[None])


class LLaDA2MoeModelLM(BlockModel):
    """The same under the name by which the drop-in knows a module with logits of its own."""

    def __init__(self, plain: Plain) -> None:
        super().__init__(plain)
        self.config = SimpleNamespace(vocab_size=plain.config["vocab_size"])
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))


def load_sdar(checkouts: Checkouts) -> dict[str, Loop]:
    original = checkouts.file(checkouts.root("SDAR"), "generate.py").block_diffusion_generate
    make = trios("sdar", None, num_hidden_layers=2, block_size=4)
    strategies = ("low_confidence_dynamic", "low_confidence_static", "sequential")

    def draw(rng: random.Random) -> Case:
        trio, told = draw_model(rng, make)
        ids, _ = prompts(1, rng.randrange(1, 12), rng.randrange(10**6))
        size = rng.choice([3, 4, 6, 8])
        options: dict[str, Any] = {
            "gen_length": rng.randrange(1, 25),
            "block_length": size,
            "denoising_steps": rng.choice([1, 2, 3, size, size + 2]),
            "temperature": rng.choice([0.3, 0.7, 1.0, 1.5]),
            "remasking_strategy": rng.choice(strategies),
            "confidence_threshold": rng.choice([0.0, 0.2, 0.5, 0.85]),
        }
        if rng.random() < 0.3:
            options["top_k"] = rng.choice([0, 1, 5, 20])
        if rng.random() < 0.3:
            options["top_p"] = rng.choice([0.5, 0.9, 1.0])
        if rng.random() < 0.5:
            options["stopping_criteria_idx"] = [EOS, rng.randrange(50)]
        return Case(trio, ids, None, options, told)

    def run_original(case: Case) -> Result:
        module = BlockModel(case.trio.plain)
        x = original(module, {"input_ids": case.prompt}, MASK, **case.options)
        return Result(x)

    def run_dropin(case: Case) -> Result:
        prompt = {"input_ids": case.prompt}
        return Result(block_diffusion_generate(case.trio.own, prompt, MASK, **case.options))

    def run_restated(case: Case) -> Result:
        return Result(published.sdar(case.trio.plain, case.prompt, MASK, **case.options)[0])

    return {"block_diffusion_generate": Loop(draw, run_original, run_dropin, run_restated)}


def load_llada2(checkouts: Checkouts) -> dict[str, Loop]:
    root = checkouts.root("dllm", "dllm", "pipelines", "llada2")
    (modeling,) = checkouts.package(root, "models.modeling_llada2_moe")
    theirs = vars(modeling.LLaDA2MoeModelLM)
    make = trios("sdar", None, num_hidden_layers=2, block_size=4)

    def draw(rng: random.Random) -> Case:
        trio, told = draw_model(rng, make)
        ids, _ = prompts(1, rng.randrange(1, 12), rng.randrange(10**6))
        if rng.random() < 0.1:
            ids[0, 0] = EOS
        size = rng.choice([3, 4, 6, 8])
        options: dict[str, Any] = {
            "gen_length": rng.randrange(1, 25),
            "block_length": size,
            "steps": rng.choice([1, 2, 3, size, size + 2]),
            "temperature": rng.choice([0.0, 0.0, 0.5, 1.0]),
            "threshold": rng.choice([0.0, 0.2, 0.5, 0.95]),
            "eos_early_stop": rng.random() < 0.5,
            "minimal_topk": rng.choice([1, 1, 2]),
        }
        if rng.random() < 0.3:
            options["top_k"] = rng.choice([1, 5, 20])
        if rng.random() < 0.3:
            options["top_p"] = rng.choice([0.5, 0.9, 1.0])
        return Case(trio, ids, None, options, told)

    ids = {"eos_id": EOS, "mask_id": MASK}

    def run_original(case: Case) -> Result:
        module = LLaDA2MoeModelLM(case.trio.plain)
        for name in ("_top_k_logits", "_top_p_logits", "_get_num_transfer_tokens"):
            module.__dict__[name] = theirs[name].__func__
        name = "_sample_with_temperature_topk_topp"
        module.__dict__[name] = types.MethodType(theirs[name], module)
        generate = types.MethodType(theirs["generate"], module)
        return Result(generate(case.prompt, **case.options, **ids))

    def run_dropin(case: Case) -> Result:
        return Result(llada2.generate(case.trio.own, case.prompt, **case.options, **ids))

    def run_module(case: Case) -> Result:
        module = LLaDA2MoeModelLM(case.trio.plain)
        return Result(llada2.generate(module, case.prompt, **case.options, **ids))

    def run_restated(case: Case) -> Result:
        return Result(published.llada2(case.trio.plain, case.prompt, **case.options, **ids))

    return {
        "generate": Loop(draw, run_original, run_dropin, run_restated),
        "generate, logits of the module": Loop(draw, run_original, run_module),
    }


def load_llada21(checkouts: Checkouts) -> dict[str, Loop]:
    root = checkouts.root("dllm", "dllm", "pipelines", "llada21")
    (modeling,) = checkouts.package(root, "models.modeling_llada21_moe")
    theirs = vars(modeling.LLaDA2MoeModelLM)
    make = trios("sdar", None, num_hidden_layers=2, block_size=4, silent=(MASK,))

    def draw(rng: random.Random) -> Case:
        trio, told = draw_model(rng, make)
        ids, _ = prompts(1, rng.randrange(1, 12), rng.randrange(10**6))
        options: dict[str, Any] = {
            "gen_length": rng.randrange(1, 25),
            "block_length": rng.choice([3, 4, 6, 8]),
            "temperature": rng.choice([0.0, 0.0, 0.5, 1.0]),
            "threshold": rng.choice([0.0, 0.2, 0.5, 0.95]),
            "editing_threshold": rng.choice([-1.0, 0.0, 0.2, 0.5, 0.9]),
            "max_post_steps": rng.choice([0, 1, 3, 16]),
            "num_to_transfer": rng.choice([1, 1, 2, 5]),
            "eos_early_stop": rng.random() < 0.5,
        }
        if rng.random() < 0.3:
            options["top_k"] = rng.choice([1, 5, 20])
        if rng.random() < 0.3:
            options["top_p"] = rng.choice([0.5, 0.9, 1.0])
        return Case(trio, ids, None, options, told)

    ids = {"eos_id": EOS, "mask_id": MASK}

    def run_original(case: Case) -> Result:
        module = LLaDA2MoeModelLM(case.trio.plain)
        for name in ("_top_k_logits", "_top_p_logits"):
            module.__dict__[name] = theirs[name].__func__
        name = "_sample_with_temperature_topk_topp"
        module.__dict__[name] = types.MethodType(theirs[name], module)
        generate = types.MethodType(theirs["generate"], module)
        return Result(generate(case.prompt, **case.options, **ids))

    def run_dropin(case: Case) -> Result:
        return Result(llada21.generate(case.trio.own, case.prompt, **case.options, **ids))

    def run_module(case: Case) -> Result:
        module = LLaDA2MoeModelLM(case.trio.plain)
        return Result(llada21.generate(module, case.prompt, **case.options, **ids))

    def run_restated(case: Case) -> Result:
        return Result(published.llada21(case.trio.plain, case.prompt, **case.options, **ids))

    return {
        "generate": Loop(draw, run_original, run_dropin, run_restated),
        "generate, logits of the module": Loop(draw, run_original, run_module),
    }


def load_diffusers(checkouts: Checkouts) -> dict[str, Loop]:
    root = checkouts.root("diffusers", "src")
    refinement, bound = checkouts.package(
        root,
        "diffusers.schedulers.scheduling_block_refinement",
        "diffusers.schedulers.scheduling_entropy_bound",
    )
    return {
        "BlockRefinementScheduler": _scheduler(
            _draw_refinement, refinement.BlockRefinementScheduler, BlockRefinementScheduler
        ),
        "EntropyBoundScheduler": _scheduler(
            _draw_bound, bound.EntropyBoundScheduler, EntropyBoundScheduler
        ),
    }


VOCAB = 40


def _draw_refinement(rng: random.Random) -> dict[str, Any]:
    block = rng.choice([4, 6, 9])
    step: dict[str, Any] = {
        "mask_token_id": rng.choice([VOCAB - 1, VOCAB - 1, None]),
        "temperature": rng.choice([0.0, 0.0, 0.6, 1.0, 1.4]),
        "threshold": rng.choice([None, 0.0, 0.3, 0.7, 2.0]),
        "editing_threshold": rng.choice([None, 0.0, 0.3, 0.8]),
        "sampling_method": rng.choice(["auto", "auto", "greedy", "multinomial"]),
    }
    if step["sampling_method"] == "multinomial":
        step["temperature"] = rng.choice([0.6, 1.0])
    if rng.random() < 0.3:
        step["top_k"] = rng.choice([1, 5, 100])
    if rng.random() < 0.3:
        step["top_p"] = rng.choice([0.5, 0.9, 1.0])
    config = {"threshold": 0.6, "editing_threshold": rng.choice([None, 0.5])}
    return {"block": block, "config": config | {"block_length": block}, "step": step}


def _draw_bound(rng: random.Random) -> dict[str, Any]:
    config = {"entropy_bound": rng.choice([0.0, 0.1, 1.0, 5.0]), "t_max": rng.choice([0.8, 1.2])}
    step = {"entropy_bound": rng.choice([None, None, 0.5])}
    return {"block": rng.choice([4, 6, 9]), "config": config, "step": step}


def _scheduler(draw_options: Any, original: Any, dropin: Any) -> Loop:
    """Blocks from the first step to the last, each with logits of its own."""

    def draw(rng: random.Random) -> Case:
        options = draw_options(rng) | {
            "steps": rng.choice([1, 2, 3, 5, 12]),
            "batch": rng.choice([1, 3]),
            "scale": rng.choice([0.5, 2.0, 6.0]),
            "seed": rng.randrange(10**6),
        }
        return Case(None, torch.zeros(0), None, options)  # type: ignore[arg-type]

    def run(kind: Any, case: Case) -> Result:
        given = case.options
        scheduler = kind(**given["config"])
        scheduler.set_timesteps(given["steps"])
        noise = torch.Generator().manual_seed(given["seed"])
        generator = torch.Generator().manual_seed(given["seed"] + 1)
        shape = (given["batch"], given["block"])
        mask = given["step"].get("mask_token_id")
        fields = []
        for _ in range(2):  # a second block begins anew
            x = torch.randint(VOCAB - 1, shape, generator=noise)
            if mask is not None:
                x[:, 1:] = mask
            for step in range(given["steps"]):
                logits = torch.randn(*shape, VOCAB, generator=noise) * given["scale"]
                logits[..., VOCAB - 1] = -20.0
                out = scheduler.step(logits, step, x, generator=generator, **given["step"])
                x = out.prev_sample
                for name in ("transfer_index", "editing_transfer_index", "accepted_index"):
                    if hasattr(out, name):
                        fields.append(getattr(out, name).long())
                fields += [x, out.sampled_tokens]
        return Result(torch.cat(fields))

    return Loop(draw, lambda case: run(original, case), lambda case: run(dropin, case))
