"""Decoding, loading, patching, jobs, metrics and the drop-in functions."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

import pydllm
from pydllm import metrics
from pydllm.integrations import (
    d3llm,
    dream,
    fast_dllm,
    fast_dllm_dream,
    fast_dllm_v2,
    llada,
    llada2,
    samplers,
    sdar,
)
from pydllm.integrations.jobs import Recipe, run_job
from tests.bad_inputs import Case
from tests.integrations import stand_ins
from tests.integrations.tiny import EOS, MASK, pair
from tests.models.plain import RECENT, random_plain, write_checkpoint

NUMBERS = ("1", [[]], {}, object(), float("nan"))  # where a list with one for each prompt is valid
PROMPTS = (3, "x", {}, [], [3], [[1.5]], [["x"]], [None], [[-1]], [[10**9]], [[True]], [object()])
PROMPTS += (torch.zeros(3), torch.zeros(1, 2), [torch.zeros(2, 2).long()], [{"role": "user"}])


@cache
def model(name: str = "llada") -> Any:
    changes = {"num_hidden_layers": 2, "block_size": 4} if name == "sdar" else {}
    return pair(name, predicts_masks=False, **changes)[1]


@cache
def fast_dllm_v2_model() -> Any:
    folder = Path(tempfile.mkdtemp())
    plain = random_plain(RECENT["fast-dllm-v2"] | {"tie_word_embeddings": False})
    write_checkpoint(folder, plain)
    return pydllm.load(folder, device="cpu")


@cache
def verifier() -> Any:
    return pydllm.load("verifier-tiny", device="cpu")


@cache
def bundled() -> Any:
    return pydllm.load("llada-tiny", device="cpu")


def generation(**more: Any) -> dict[str, Any]:
    usual = {"model": model(), "prompts": [[1, 2], [3]], "algorithm": pydllm.Static(block_length=4)}
    return usual | {"max_new_tokens": 4, "temperature": 0.5, "seed": 1, "backend": "torch"} | more


def generating() -> dict[str, Any]:
    usual = generation(top_k=3, top_p=0.9, guidance=0.0, suppress_ids=[1], logprobs=False)
    usual |= {"stop": None, "ignore_eos": False, "request_ids": [0, 1], "graph": False}
    return usual | {"max_batch": 1, "deterministic": False, "on_step": print_nothing}


def print_nothing(step: object) -> None:
    pass


NOT_MODELS: tuple[Any, ...] = (None, 3, "llada-tiny", {}, torch.nn.Linear(1, 1), pydllm.Static)
ALGORITHMS: tuple[Any, ...] = (None, 3, "static", {}, pydllm.Static, object())
DECODING: dict[str, tuple[Any, ...]] = {
    "model": NOT_MODELS,
    "prompts": (None, *PROMPTS),
    "algorithm": ALGORITHMS,
    "max_new_tokens": (None, *NUMBERS, 0, -1, True, 2**31, [4], [4, 0]),
    "temperature": (None, *NUMBERS, True, -1.0, 1e300, 1e-9, [0.5], [0.5, "x"]),
    "top_k": (*NUMBERS, True, 0, -1, [3], [3, 0]),
    "top_p": (*NUMBERS, True, 0.0, 1.5, [0.5], [0.5, 2.0]),
    "suppress_ids": (3, "x", {}, [1.5], [-1], [10**9], [True], object()),
    "stop": (1.5, {}, object(), [object()], [[1.5]], [[]]),
    "request_ids": (3, "x", {}, [0], [0, 1.5], [0, 2**31], [0, True], object()),
    "graph": (None, 3, "yes", [True]),
    "on_step": (3, "x", {}),
}


def dropin(prompt: str = "prompt", **more: Any) -> Any:
    def make() -> dict[str, Any]:
        return {"model": model(), prompt: torch.tensor([[1, 2, 3]]), "mask_id": MASK} | more

    return make


def dream_call(**more: Any) -> Any:
    def make() -> dict[str, Any]:
        usual = {"model": model("dream"), "inputs": torch.tensor([[1, 2, 3]])}
        return usual | {"max_new_tokens": 8, "steps": 8, "mask_token_id": MASK} | more

    return make


LLADA = {"steps": 8, "gen_length": 8, "block_length": 4, "temperature": 0.0, "compat": "llada"}
LLADA |= {"remasking": "low_confidence", "backend": "torch"}
FAST = LLADA | {"compat": "fast_dllm", "version": "a9b81e4"}
D3 = {"max_new_tokens": 8, "block_size": 4, "temperature": 0.0, "threshold": 0.5}
D3 |= {"block_add_threshold": 0.5, "decoded_token_threshold": 0.5, "early_stop": True}
BLOCKS = {"gen_length": 8, "block_length": 4, "temperature": 1.0, "top_k": 3, "top_p": 0.9}
DROPIN: dict[str, tuple[Any, ...]] = {
    "model": (None, 3, "x", {}, torch.nn.Linear(1, 1)),
    "compat": (3, "nonsense", ["x"]),
    "temperature": (None, "0.5", [0.5], -1.0, {}),
}


def logits() -> dict[str, Any]:
    return {"logits": torch.randn(1, 4, 8), "temperature": 0.5, "top_p": 0.9, "top_k": 3}


def job() -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp())
    data = folder / "data.jsonl"
    data.write_text('{"prompt": "tom has 3"}\n')
    recipe = Recipe("llada-tiny", "static", (), "verifier-tiny", 4, 0.0, 0, None, None)
    usual = {"data": data, "out": folder / "out", "recipe": recipe, "engine": "process"}
    return usual | {"batch_size": 2, "device": "cpu", "expert_parallel": False}


def recipe() -> dict[str, Any]:
    usual = {"model": "llada-tiny", "algorithm": "static", "settings": (), "verifier": "x"}
    usual |= {"max_new_tokens": 4, "temperature": 0.5, "seed": 1, "dtype": None, "backend": None}
    return usual | {"top_k": 3, "top_p": 0.5}


def algorithm(kind: Any, optional: str = "", **settings: Any) -> Case:
    return Case(kind, lambda: settings, optional, name=kind.__name__)


BLOCK = {"block_length": 4, "cache": "dual", "first_token": "window"}
FOLLOWED = BLOCK | {"compat": "fast_dllm"}
CASES = (
    Case(pydllm.generate, generating, "backend max_batch on_step", instead=DECODING),
    Case(
        pydllm.stream,
        lambda: generation(model=bundled(), max_batch=1, deterministic=False),
        "backend max_batch",
        instead=DECODING,
    ),
    Case(
        pydllm.warmup,
        lambda: {
            "model": model(),
            "algorithm": pydllm.Static(block_length=4),
            "batch": 1,
            "max_len": 4,
            "max_new_tokens": 2,
            "temperature": 0.5,
            "seed": 1,
        },
        "max_new_tokens",
        instead={
            "model": NOT_MODELS,
            "algorithm": ALGORITHMS,
            "temperature": tuple(v for v in DECODING["temperature"] if v != [0.5]),
        },
    ),
    Case(
        metrics.log_likelihood,
        lambda: {"model": model(), "pairs": [([1], [2])], "samples": 1, "batch_size": 1, "seed": 1},
        instead={
            "model": NOT_MODELS,
            "pairs": (None, 3, "x", {}, [3], [[1]], [([1],)], [([1], ["x"])], [([1], [10**9])]),
        },
    ),
    Case(
        metrics.aup,
        lambda: {"points": [(1.0, 80.0)], "y_max": 80.0, "alpha": 3.0},
        instead={"points": (None, 3, "x", {}, [], [3], [(1,)], [("x", 1)], [(0, 1)], [(1, 101)])},
    ),
    algorithm(pydllm.Static, "compat", tokens_per_step=1, score="confidence", **FOLLOWED),
    algorithm(pydllm.Threshold, "compat", threshold=0.9, min_tokens=1, **FOLLOWED),
    algorithm(pydllm.Factor, factor=1.0, **BLOCK),
    algorithm(pydllm.EntropyBound, bound=0.1, **BLOCK),
    Case(
        pydllm.FreeDave,
        lambda: {
            "draft_steps": 4,
            "mode": "strict",
            "cache": "none",
            "first_token": "window",
            "lossless": "tokens",
            "baseline": pydllm.Static(block_length=4),
        },
        "baseline",
    ),
    algorithm(pydllm.FreeDave, draft_steps=4, block_length=4, cache="dual"),
    algorithm(
        pydllm.MultiBlock,
        "refresh",
        threshold=0.5,
        block_length=4,
        add_at=0.1,
        full_at=0.9,
        delay=1,
        refresh=2,
        early_stop=True,
        cache=True,
        tail=4,
    ),
    algorithm(
        pydllm.SelfSpeculative,
        "drafts threshold",
        drafts=4,
        forwards=2,
        threshold=0.5,
        adapter=True,
        align=True,
    ),
    algorithm(
        pydllm.Editing,
        "edit_threshold",
        threshold=0.5,
        edit_threshold=0.5,
        max_post_steps=2,
        min_tokens=1,
        block_length=4,
    ),
    algorithm(
        pydllm.LevenshteinEditing,
        "edit_threshold",
        threshold=0.5,
        edit_threshold=0.5,
        max_post_steps=2,
        block_length=4,
    ),
    Case(
        pydllm.LeftToRight,
        lambda: {"tokens_per_step": 1, "window": 4, "lookahead": 4, "top_p": 0.5},
        "top_p",
        instead={name: ("1", 1.5, {}, True, 0, [0]) for name in ("window", "lookahead")},
    ),
    Case(
        pydllm.APD,
        lambda: {
            "verifier": verifier(),
            "mixture": 0.5,
            "window": 4,
            "lookahead": 4,
            "top_p": 0.5,
            "emit": "draft",
            "compat": "apd",
        },
        "verifier compat",
        instead={
            "verifier": (3, "x", {}, pydllm.Static),
            "top_p": ("1", [0.5], {}, True, 0.0, 1.5),
            "mixture": (None, "0.5", {}, True, float("nan"), 1.5, [2.0], ["x"]),
            "window": ("1", 1.5, {}, True, -1, [-1], [0, 1]),
            "lookahead": ("1", 1.5, {}, True, 0, [0]),
        },
    ),
    Case(
        pydllm.load,
        lambda: {
            "source": "llada-tiny",
            "device": "cpu",
            "dtype": torch.float32,
            "attention": "full",
            "mask_id": 3,
            "eos_ids": [1],
            "shift_logits": False,
            "causal": None,
            "adapter": None,
            "revision": None,
            "weights": "int8",
            "tp": 1,
            "expert_parallel": False,
            "check": False,
        },
        "device dtype attention mask_id eos_ids shift_logits weights tp",
        instead={
            "source": (None, 3, 1.5, {}, torch.nn.Linear, "no/such/folder", torch.nn.Linear(1, 1)),
            "device": (3.5, {}, "gpu", "cuda:99", [1]),
            "dtype": (3, "float32", {}, torch.int64, float),
            "eos_ids": ("x", 1.5, {}, [1.5], [-1], [10**9], [True], object()),
            "causal": (3, "nonsense", {}),
            "adapter": (3, "no/such/folder", {}),
            "revision": (3, {}, "main"),
        },
    ),
    Case(
        pydllm.patch,
        lambda: {
            "model": stand_ins.of(stand_ins.KINDS["DreamSdpaAttention"])(),
            "self_check": False,
            "backend": "torch",
        },
        "backend",
        instead={"model": (None, 3, "x", {}, torch.nn.Linear)},
    ),
    Case(run_job, job, "device", instead={"progress": (3,)}),
    Case(
        Recipe,
        recipe,
        "dtype backend top_k top_p",
        # Names are looked up when the job begins.
        instead={name: (None, 3, {}, ["x"]) for name in ("model", "algorithm", "verifier")}
        | {"settings": (None, 3, "x", {})},
    ),
    Case(llada.generate, dropin(**LLADA, cfg_scale=0.0), "backend", instead=DROPIN),
    Case(
        sdar.block_diffusion_generate,
        lambda: {
            "model": model("sdar"),
            "prompt": {"input_ids": torch.tensor([[1, 2, 3]])},
            "mask_id": MASK,
            **BLOCKS,
            "denoising_steps": 4,
            "remasking_strategy": "low_confidence_dynamic",
            "confidence_threshold": 0.85,
        },
        "top_k top_p",
        instead=DROPIN | {"prompt": (None, 3, "x", {}, torch.zeros(1, 2), {"input_ids": [1]})},
    ),
    Case(
        llada2.generate,
        lambda: {
            "model": model("sdar"),
            "inputs": torch.tensor([[1, 2, 3]]),
            **BLOCKS,
            "steps": 4,
            "threshold": 0.9,
            "eos_early_stop": True,
            "minimal_topk": 1,
            "eos_id": EOS,
            "mask_id": MASK,
        },
        "top_p top_k",
        (("eos_id", -1),),
        instead=DROPIN,
    ),
    Case(
        fast_dllm_v2.generate,
        lambda: {
            "model": fast_dllm_v2_model(),
            "input_ids": torch.tensor([[1, 2, 3]]),
            "max_new_tokens": 8,
            "mask_id": MASK,
            "threshold": 0.9,
            "small_block_size": 2,
            "block_size": 4,
            "stop_token": EOS,
            "top_p": 0.9,
            "temperature": 0.0,
            "use_block_cache": False,
        },
        instead=DROPIN,
    ),
    *(
        Case(call, dropin(**FAST, threshold=0.5), "threshold backend", instead=DROPIN)
        for call in (
            fast_dllm.generate,
            fast_dllm.generate_with_prefix_cache,
            fast_dllm.generate_with_dual_cache,
        )
    ),
    Case(
        dream.diffusion_generate,
        dream_call(alg="entropy"),
        "max_new_tokens mask_token_id",
        instead=DROPIN,
    ),
    Case(
        fast_dllm_dream.diffusion_generate,
        dream_call(block_length=4),
        "block_length mask_token_id",
        instead=DROPIN,
    ),
    Case(d3llm.generate_multi_block, dropin(**D3), "threshold", instead=DROPIN),
    Case(
        d3llm.generate_multi_block_kv_cache,
        dropin(**D3, cache_delay_iter=2, refresh_interval=4),
        "threshold",
        instead=DROPIN,
    ),
    Case(samplers.sample_tokens, logits, "top_p top_k", free="logits", instead=DROPIN),
)
