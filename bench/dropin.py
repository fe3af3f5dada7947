"""Time published decoding code and this package in its place: the same run, the same weights.

    python -m bench.dropin --device cpu --model llada-100m
    python -m bench.dropin --only llada --only fast_dllm_dual --csv out/dropin.csv
    python -m bench.dropin --only llada2 --only llada2_forward --model llada2-200m --device cpu
    PYDLLM_UPSTREAM_DIR=/checkouts python -m bench.dropin    # bench/baselines/upstream.py

The original is the repository's function where PYDLLM_UPSTREAM_DIR has it, otherwise our
restatement of what it computes (published.py, published_cached.py). Ours is the algorithm that
gives its tokens, and the function of the same signature where this package has one. All take turns,
`--repeat` rounds; times are medians. `fewer_mults` is what the model's matrix products alone would
give, from counting the rows that go through the layers and through the LM head: on a CPU, where
these products are nearly all of a forward, no exact method can be much faster than that.
`cpu_seconds` is the time that the process worked, on all its threads: on a CPU that others use too,
`cpu_speedup` is the fairer ratio.

Weights are random, wider than at initialisation (standard deviation 0.08), so that positions
predict different tokens and equal tokens mean something.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import pydllm
from bench.baselines import gemma, upstream
from bench.baselines.cached_loops import PublishedDream, PublishedDual
from bench.baselines.loops import (
    PlainForward,
    PublishedLLaDA2,
    PublishedLoop,
    PublishedMultiBlock,
)
from bench.decode import PROBE
from bench.ops.run import DTYPES, provenance
from bench.shapes import CONFIGS, make_model, random_model
from pydllm._backend.errors import PydllmError
from pydllm.models import NativeModel

WIDER = 4.0  # 0.02 becomes 0.08
# Dream's shape at 100M parameters, shifted logits, grouped heads, biases.
DREAM_100M = CONFIGS["dream-7b"] | {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "intermediate_size": 2048,
}


class Contender(NamedTuple):
    """A decoding: its label, what it returns, and its rows through the layers and the head."""

    label: str
    run: Callable[[], tuple[Tensor, int]]
    rows: tuple[float, float] | None = None


@dataclass(frozen=True)
class Job:
    """What all decode."""

    name: str
    device: str
    dtype: torch.dtype
    prompt_length: int
    new: int
    block: int
    per_step: int
    backend: str | None

    @property
    def steps(self) -> int:
        return self.new // self.per_step

    def prompt(self, model: NativeModel) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, model.spec.vocab_size, (1, self.prompt_length), generator=generator)
        return ids.masked_fill(ids == model.spec.mask_id, 3).to(self.device)

    def settings(self) -> dict[str, Any] | None:
        return None if self.name == "tiny" else CONFIGS[self.name]

    def random(self) -> NativeModel:
        """The named model, without ends of sequence: the work is to be the same for all."""
        model = make_model(self.name, self.device, self.dtype)
        if self.name != "tiny":
            widen(model)
        return without_ends(model)

    def ours(
        self, model: NativeModel, algorithm: Any, rows: tuple[float, float] | None = None
    ) -> Contender:
        def run() -> tuple[Tensor, int]:
            prompts = list(self.prompt(model).cpu())
            result = pydllm.generate(
                model, prompts, algorithm, max_new_tokens=self.new, backend=self.backend
            )
            return torch.stack(result.sequences), int(result.nfe.max())

        return Contender("pydllm.generate", run, rows)


def widen(model: NativeModel) -> None:
    tensors = [model._embedding, model._head]
    tensors += [getattr(layer, name) for layer in model._layers for name in vars(layer)]
    for tensor in {t.data_ptr(): t for t in tensors if t is not None and t.ndim == 2}.values():
        tensor.mul_(WIDER)


def without_ends(model: NativeModel) -> NativeModel:
    model.spec = replace(model.spec, eos_ids=())
    return model


def drop_in(module: str, name: str, call: Callable[[Any], Any]) -> list[Contender]:
    """The function of the original's signature, where this package has one."""
    if importlib.util.find_spec(f"pydllm.integrations.{module}") is None:
        return []
    function = getattr(importlib.import_module(f"pydllm.integrations.{module}"), name)
    return [Contender(f"pydllm.integrations.{module}.{name}", lambda: call(function))]


def llada_module(job: Job, root: Path, package: str) -> tuple[Any, NativeModel]:
    """Their module and ours on its weights."""
    settings = job.settings()
    if settings is None:
        raise click.UsageError("expected a random model with PYDLLM_UPSTREAM_DIR, got tiny")
    torch.manual_seed(0)
    module = upstream.llada(root, package, settings, job.device, job.dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.02 * WIDER)
    return module, without_ends(pydllm.load(module))


def llada(job: Job) -> list[Contender]:
    """LLaDA's generate: every forward over everything, one schedule."""
    folder, root = upstream.find("LLaDA"), upstream.find("Fast-dLLM/llada", "Fast-dLLM/v1/llada")
    total = job.prompt_length + job.new
    theirs = (job.steps * total, job.steps * total)
    # The head of a step is computed at the masks of the block alone.
    masks = sum(range(job.block, 0, -job.per_step)) * (job.new // job.block)
    arguments = {"steps": job.steps, "gen_length": job.new, "block_length": job.block}
    if folder is not None and root is not None:
        module, model = llada_module(job, root, "model")
        function = upstream.function(folder, "generate.py", "generate")
        arguments["mask_id"] = model.spec.mask_id
        ids = job.prompt(model)
        original = Contender(
            "LLaDA/generate.py", lambda: (function(module, ids, **arguments), job.steps), theirs
        )
    else:
        module = model = job.random()
        loop = PublishedLoop(model, job.block, job.per_step)
        original = Contender("restatement", lambda: loop.decode(job.prompt(model), job.new), theirs)
        arguments["mask_id"] = model.spec.mask_id
    algorithm = pydllm.Static(block_length=job.block, tokens_per_step=job.per_step, compat="llada")
    ours = job.ours(model, algorithm, (job.steps * total, masks))

    def call(function: Any) -> tuple[Tensor, int]:
        return function(module, job.prompt(model), **arguments), job.steps

    return [original, ours, *drop_in("llada", "generate", call)]


def fast_dllm_dual(job: Job) -> list[Contender]:
    """Fast-dLLM's generate_with_dual_cache: a full forward per block, then the block alone."""
    root = upstream.find("Fast-dLLM/llada", "Fast-dLLM/v1/llada")
    total, blocks = job.prompt_length + job.new, job.new // job.block
    rows = blocks * (total + (job.block // job.per_step - 1) * job.block)
    masks = sum(range(job.block, 0, -job.per_step)) * blocks
    arguments = {"steps": job.steps, "gen_length": job.new, "block_length": job.block}
    if root is not None:
        module, model = llada_module(job, root, "model")
        function = upstream.function(root, "generate.py", "generate_with_dual_cache")
        arguments["mask_id"] = model.spec.mask_id
        ids = job.prompt(model)
        original = Contender(
            "Fast-dLLM/llada/generate.py", lambda: function(module, ids, **arguments), (rows, rows)
        )
    else:
        module = model = job.random()
        loop = PublishedDual(model, job.block, job.per_step)
        original = Contender(
            "restatement", lambda: loop.decode(job.prompt(model), job.new), (rows, rows)
        )
        arguments["mask_id"] = model.spec.mask_id
    algorithm = pydllm.Static(
        block_length=job.block, tokens_per_step=job.per_step, cache="dual", compat="fast_dllm"
    )
    ours = job.ours(model, algorithm, (rows, masks))

    def call(function: Any) -> tuple[Tensor, int]:
        return function(module, job.prompt(model), **arguments)

    return [original, ours, *drop_in("fast_dllm", "generate_with_dual_cache", call)]


def dream(job: Job) -> list[Contender]:
    """Dream's diffusion_generate, maskgit_plus: shifted logits, everything one block.

    Its times spread the tokens a little unevenly over the steps, ``Static`` evenly: the tokens of
    the function with Dream's arguments are the ones to compare.
    """
    name = job.name if job.name.startswith("dream") else "dream-100m"
    settings = CONFIGS.get(name, DREAM_100M)
    model = without_ends(random_model(settings, job.device, job.dtype))
    widen(model)
    total = job.prompt_length + job.new
    loop = PublishedDream(model, job.steps)
    theirs = (job.steps * total, job.steps * total)
    original = Contender("restatement", lambda: loop.decode(job.prompt(model), job.new), theirs)
    algorithm = pydllm.Static(block_length=job.new, tokens_per_step=job.per_step, compat="dream")
    masks = sum(range(job.new, 0, -job.per_step))

    def call(function: Any) -> tuple[Tensor, int]:
        found = function(
            model,
            job.prompt(model),
            max_new_tokens=job.new,
            steps=job.steps,
            alg="maskgit_plus",
            temperature=0.0,
            mask_token_id=model.spec.mask_id,
        )
        return getattr(found, "sequences", found), job.steps

    ours = job.ours(model, algorithm, (job.steps * total, masks))
    return [original, ours, *drop_in("dream", "diffusion_generate", call)]


def d3llm(job: Job) -> list[Contender]:
    """d3LLM's generate_multi_block_kv_cache on LLaDA."""
    root = upstream.find("d3LLM")
    if root is not None:
        module, model = llada_module(job, root, "utils.utils_LLaDA.model")
    else:
        module = model = job.random()
    ids, mask_id = job.prompt(model), model.spec.mask_id
    # Entropies of random logits lie close together: the threshold is taken from a first forward.
    with torch.no_grad():
        logits, _ = PlainForward(model)(F.pad(ids, (0, job.new), value=mask_id))
    probability = logits[0, -job.new :].double().softmax(-1)
    limit = -(probability * probability.clamp(min=1e-300).log()).sum(-1).quantile(PROBE).item()
    arguments = {"max_new_tokens": job.new, "block_size": job.block, "threshold": limit}
    arguments |= {"block_add_threshold": 0.1, "decoded_token_threshold": 0.95}
    arguments |= {"cache_delay_iter": 2, "mask_id": mask_id}
    if root is not None:
        file = "d3llm/d3llm_LLaDA/d3llm_llada_generate_util.py"
        function = upstream.function(root, file, "generate_multi_block_kv_cache")
        original = Contender("d3LLM", lambda: function(module, ids, **arguments))
    else:
        loop = PublishedMultiBlock(model, limit, job.block)
        original = Contender("restatement", lambda: loop.decode(ids, job.new))
    algorithm = pydllm.MultiBlock(threshold=limit, block_length=job.block, early_stop=False)

    def call(function: Any) -> tuple[Tensor, int]:
        return function(module, ids, **arguments)

    return [
        original,
        job.ours(model, algorithm),
        *drop_in("d3llm", "generate_multi_block_kv_cache", call),
    ]


def llada2_models(job: Job) -> tuple[Any, NativeModel]:
    """LLaDA2.0's own class where it is found, otherwise a model of ours; and the native model."""
    if job.name == "tiny":
        model = pydllm.load("llada2-tiny", device=job.device, dtype=job.dtype)
        return model, without_ends(model)
    settings = CONFIGS[job.name if job.name.startswith("llada2") else "llada2-200m"]
    root = upstream.find("dllm/dllm/pipelines/llada2")
    if root is None:
        model = without_ends(random_model(settings, job.device, job.dtype))
        model.spec = replace(model.spec, block_size=job.block)
        widen(model)
        return model, model
    torch.manual_seed(0)
    theirs = upstream.LLaDA2(root, settings, job.device, job.dtype)
    with torch.no_grad():
        for parameter in theirs.module.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.02 * WIDER)
    return theirs, without_ends(pydllm.load(theirs.module, block_size=job.block))


def llada2(job: Job) -> list[Contender]:
    """LLaDA2.0's generate, without a cache, on its own class."""
    theirs, model = llada2_models(job)
    ids = job.prompt(model)
    arguments = {"block_length": job.block, "steps": job.block // job.per_step}
    arguments |= {"gen_length": job.new, "threshold": 1.0}
    arguments |= {"mask_id": model.spec.mask_id, "eos_id": model.spec.vocab_size}  # never predicted

    def call(function: Any) -> tuple[Tensor, int]:
        return torch.cat((ids, function(ids, **arguments)), 1), job.steps

    if isinstance(theirs, NativeModel):
        loop = PublishedLLaDA2(model, job.block, job.per_step)
        original, module = Contender("restatement", lambda: loop.decode(ids, job.new)), model
    else:
        original = Contender("LLaDA2MoeModelLM.generate", lambda: call(theirs.generate))
        module = theirs.module
    algorithm = pydllm.Static(block_length=job.block, tokens_per_step=job.per_step)
    ours = job.ours(model, algorithm)
    return [
        original,
        ours,
        *drop_in("llada2", "generate", lambda function: call(partial(function, module))),
    ]


def llada2_forward(job: Job) -> list[Contender]:
    """One forward of LLaDA2.0 over one block without a cache: what each position predicts."""
    theirs, model = llada2_models(job)
    ids = job.prompt(model)
    block = ids.repeat(1, -(-job.block // ids.shape[1]))[:, : job.block]
    at = torch.full((1,), job.block, dtype=torch.int32, device=ids.device)
    zero, cache = torch.zeros_like(at), model.new_cache(1, 0)
    plain = PlainForward(model)

    def found(logits: Tensor) -> tuple[Tensor, int]:
        return torch.cat((ids, logits.argmax(-1)), 1), 1

    def ours() -> tuple[Tensor, int]:
        hidden = model.forward(block, zero, cache, length=at, kv_len=at, commit=zero)
        return found(model.head(hidden))

    @torch.no_grad()
    def original() -> tuple[Tensor, int]:
        if isinstance(theirs, NativeModel):
            return found(plain(block)[0])
        mask = torch.zeros(1, 1, job.block, job.block, device=ids.device)
        return found(theirs.forward(block, attention_mask=mask).logits)

    label = "restatement" if isinstance(theirs, NativeModel) else "LLaDA2MoeModelLM"
    return [Contender(label, original), Contender("pydllm model", ours)]


def diffusion_gemma(job: Job) -> list[Contender]:
    """transformers' DiffusionGemma and its step on kernels; the model: bench/baselines/gemma.py."""
    if importlib.util.find_spec("pydllm.integrations.diffusion_gemma") is None:
        raise PydllmError("expected pydllm.integrations.diffusion_gemma, found none")
    place = importlib.import_module("pydllm.integrations.diffusion_gemma")
    model = gemma.make(job.device, job.dtype, 512 if job.name == "tiny" else gemma.VOCAB)
    ids = torch.randint(5, 500, (1, job.prompt_length), device=job.device)

    def ours() -> tuple[Tensor, int]:
        with place.accelerate(model, backend=job.backend):
            return gemma.generate(model, ids, job.new)

    return [
        Contender("transformers", lambda: gemma.generate(model, ids, job.new)),
        Contender("pydllm.integrations.diffusion_gemma.accelerate", ours),
    ]


CASES = {
    "llada": llada,
    "fast_dllm_dual": fast_dllm_dual,
    "dream": dream,
    "d3llm": d3llm,
    "llada2": llada2,
    "llada2_forward": llada2_forward,
    "diffusion_gemma": diffusion_gemma,
}


def fewer(model_rows: tuple[float, float], others: tuple[float, float], job: Job) -> float:
    """The original's multiplications in the layers and the head over ours."""
    settings = job.settings() or {}
    width, hidden = settings.get("d_model", 768), settings.get("mlp_hidden_size", 2048)
    layers, vocab = settings.get("n_layers", 12), settings.get("vocab_size", 126464)
    layer = layers * (4 * width * width + 3 * width * hidden)
    cost = [rows * layer + head * vocab * width for rows, head in (others, model_rows)]
    return cost[0] / cost[1]


def measure(name: str, job: Job, repeat: int) -> list[dict[str, Any]]:
    contenders = CASES[name](job)
    seconds: dict[str, list[float]] = {contender.label: [] for contender in contenders}
    worked: dict[str, list[float]] = {contender.label: [] for contender in contenders}
    results: dict[str, tuple[Tensor, int]] = {}
    for _ in range(repeat):
        for contender in contenders:
            started, before = time.perf_counter(), time.process_time()
            tokens, forwards = contender.run()
            results[contender.label] = tokens.cpu(), int(forwards)  # waits for the device
            seconds[contender.label].append(time.perf_counter() - started)
            worked[contender.label].append(time.process_time() - before)
    first = contenders[0]
    expected, base = results[first.label][0], statistics.median(seconds[first.label])
    rows = []
    for contender in contenders:
        tokens, forwards = results[contender.label]
        median = statistics.median(seconds[contender.label])
        same = (tokens == expected)[:, job.prompt_length :].float().mean().item()
        counted = ""
        if contender.rows is not None and first.rows is not None and name != "dream":
            counted = f"{fewer(contender.rows, first.rows, job):.2f}"
        rows.append(
            {
                "case": name,
                "decoder": contender.label,
                "seconds": round(median, 3),
                "forwards": forwards,
                "ms_per_forward": round(1e3 * median / forwards, 2),
                "tokens_per_s": round(job.new / median, 2),
                "speedup": round(base / median, 2),
                "cpu_seconds": round(statistics.median(worked[contender.label]), 3),
                "cpu_speedup": round(
                    statistics.median(worked[first.label])
                    / statistics.median(worked[contender.label]),
                    2,
                ),
                "fewer_mults": counted,
                "same_tokens": round(same, 4),
            }
        )
    return rows


@click.command()
@click.option("--only", multiple=True, type=click.Choice([*CASES]), help="Default: all.")
@click.option("--model", "name", default="llada-100m", type=click.Choice(["tiny", *CONFIGS]))
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--dtype", type=click.Choice(sorted(DTYPES)), help="Default: bf16 on cuda.")
@click.option("--prompt", "prompt_length", default=128, show_default=True, type=click.IntRange(1))
@click.option("--new", default=128, show_default=True, type=click.IntRange(1))
@click.option("--block", default=32, show_default=True, type=click.IntRange(1))
@click.option("--tokens-per-step", "per_step", default=1, show_default=True, type=click.IntRange(1))
@click.option("--repeat", default=1, show_default=True, type=click.IntRange(1), help="Rounds.")
@click.option("--backend", type=click.Choice(["auto", "cuda", "triton", "torch"]))
@click.option("--csv", "csv_file", type=click.Path(path_type=Path), help="Append rows to it.")
def main(
    only: tuple[str, ...],
    name: str,
    device: str,
    dtype: str | None,
    prompt_length: int,
    new: int,
    block: int,
    per_step: int,
    repeat: int,
    backend: str | None,
    csv_file: Path | None,
) -> None:
    """Time the originals and ours."""
    if new % block or block % per_step:
        raise click.UsageError(
            "expected --new to be a multiple of --block and --block of --tokens-per-step, "
            f"got {new}, {block} and {per_step}"
        )
    dtype = dtype or ("bf16" if device.startswith("cuda") else "fp32")
    job = Job(name, device, DTYPES[dtype], prompt_length, new, block, per_step, backend)
    console = Console(width=None if sys.stdout.isatty() else 170)
    rows: list[dict[str, Any]] = []
    for case in only or CASES:
        try:
            rows += measure(case, job, repeat)
        except PydllmError as error:
            console.print(f"{case}: {error}")
    if not rows:
        raise click.ClickException("nothing was timed")
    table = Table(*rows[0], title=f"{name}, {dtype}, {device}, {prompt_length} + {new} tokens")
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table)
    if csv_file is not None:
        csv_file.parent.mkdir(parents=True, exist_ok=True)
        facts = {"model": name, "dtype": dtype, "prompt": prompt_length, "new": new}
        facts |= {"block": block, "tokens_per_step": per_step, "repeat": repeat}
        facts |= provenance(device) | {
            "command": f"python -m bench.dropin {' '.join(sys.argv[1:])}"
        }
        new_file = not csv_file.exists()
        with csv_file.open("a", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *facts])
            if new_file:
                writer.writeheader()
            writer.writerows(row | facts for row in rows)


if __name__ == "__main__":
    main()
