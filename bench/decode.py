"""Time whole decodings against loops that do what published code does at every step.

    python -m bench.decode --device cpu --model llada-100m
    python -m bench.decode --device cpu --model llada-100m --algorithm apd --new 64
    python -m bench.decode --device cuda --model llada-8b --compiled inductor --csv results.csv

The weights are random, of the named model's shape: nothing is downloaded, and what one forward
costs does not depend on them. The loops of bench/baselines/loops.py run in the same run on the same
weights; "static" and "multiblock" decode as many tokens per forward as theirs. FreeDave's tokens
are those of Static, which stands in for a published loop. A random model predicts the same token
for all masks: at a mixture of 0.7 APD accepts them all, at the default here one or two per round.

Each row is compared with the last published-style loop (or Static) above it: speedup, and the share
of tokens that are the same (empty where both draw tokens, with different noise).
"""

from __future__ import annotations

import csv
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from click.core import ParameterSource
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import pydllm
from bench.baselines.loops import (
    PlainForward,
    PublishedAPD,
    PublishedLoop,
    PublishedMultiBlock,
)
from bench.ops.run import DTYPES, provenance
from bench.shapes import CONFIGS, make_model, make_verifier
from pydllm.integrations import d3llm
from pydllm.models import NativeModel

LENGTH = 128  # tokens of the prompt, and new ones
# Part of the entropies of a first forward that lies below the threshold of "multiblock".
PROBE = 0.1


@dataclass(frozen=True)
class Job:
    """What all contenders decode."""

    model: NativeModel
    verifier: NativeModel | None
    prompts: Tensor
    new: int
    block: int
    per_step: int
    temperature: float
    mixture: float
    threshold: float | None
    backend: str | None
    compiled: str | None

    def run(self, algorithm: Any, temperature: float = 0.0) -> tuple[Tensor, int]:
        result = pydllm.generate(
            self.model,
            list(self.prompts.cpu()),
            algorithm,
            max_new_tokens=self.new,
            temperature=temperature,
            backend=self.backend,
        )
        return torch.stack(result.sequences), int(result.nfe.max())


class Contender(NamedTuple):
    """A decoding that returns sequences and forwards, and the label of what it is compared with."""

    run: Callable[[], tuple[Tensor, int]]
    against: str


def static(job: Job) -> dict[str, Contender]:
    published = "published-style loop"
    loop = PublishedLoop(job.model, job.block, job.per_step)
    contenders = {published: Contender(lambda: loop.decode(job.prompts, job.new), published)}
    if job.compiled is not None:
        options = {"mode": "reduce-overhead"} if job.compiled == "inductor" else {}
        forward = torch.compile(
            PlainForward(job.model), backend=job.compiled, dynamic=False, **options
        )
        faster = PublishedLoop(job.model, job.block, job.per_step, forward)
        contenders[f"{published}, compiled"] = Contender(
            lambda: faster.decode(job.prompts, job.new), published
        )
    for cache in ("none", "prefix", "dual"):
        algorithm = pydllm.Static(block_length=job.block, tokens_per_step=job.per_step, cache=cache)
        label = f"pydllm, {cache} cache".replace("none", "no")
        contenders[label] = Contender(partial(job.run, algorithm), published)
    return contenders


def freedave(job: Job) -> dict[str, Contender]:
    contenders = {}
    for cache in ("none", "dual"):
        baseline = pydllm.Static(block_length=job.block, tokens_per_step=job.per_step, cache=cache)
        label = f"Static, {cache} cache".replace("none", "no")
        contenders[label] = Contender(partial(job.run, baseline), label)
        for drafts in (4, 8):
            algorithm = pydllm.FreeDave(draft_steps=drafts, baseline=baseline)
            name = label.replace("Static", f"FreeDave({drafts})")
            contenders[name] = Contender(partial(job.run, algorithm), label)
    return contenders


def apd(job: Job) -> dict[str, Contender]:
    contenders = {}
    for window in (16, None):
        settings = {"window": window, "lookahead": 64, "mixture": job.mixture}
        loop = PublishedAPD(job.model, job.verifier, temperature=job.temperature, **settings)
        algorithm = pydllm.APD(job.verifier, compat="apd", **settings)
        name = "no cache" if window is None else f"window {window}"
        published = f"published-style loop, {name}"
        contenders[published] = Contender(partial(loop.decode, job.prompts, job.new), published)
        contenders[f"pydllm, {name}"] = Contender(
            partial(job.run, algorithm, job.temperature), published
        )
    return contenders


def multiblock(job: Job) -> dict[str, Contender]:
    if job.model.spec.shift_logits:
        raise click.UsageError("expected a model of LLaDA's family with --algorithm multiblock")
    threshold = job.threshold
    if threshold is None:
        # Entropies of random logits lie close together, near ln V: take those of the first forward.
        x = F.pad(job.prompts, (0, job.new), value=job.model.spec.mask_id)
        with torch.no_grad():
            logits, _ = PlainForward(job.model)(x)
        probability = logits[0, -job.new :].double().softmax(-1)
        threshold = -(probability * probability.log()).sum(-1).quantile(PROBE).item()
    published = "published-style loop"
    loop = PublishedMultiBlock(job.model, threshold, job.block)
    contenders = {published: Contender(lambda: loop.decode(job.prompts, job.new), published)}
    drop_in = partial(
        d3llm.generate_multi_block_kv_cache,
        job.model,
        job.prompts,
        max_new_tokens=job.new,
        block_size=job.block,
        threshold=threshold,
        block_add_threshold=0.1,
        decoded_token_threshold=0.95,
        cache_delay_iter=2,
        mask_id=job.model.spec.mask_id,
    )
    contenders["pydllm, drop-in"] = Contender(drop_in, published)
    algorithm = pydllm.MultiBlock(threshold=threshold, block_length=job.block)
    contenders["pydllm, fixed"] = Contender(partial(job.run, algorithm), published)
    return contenders


ALGORITHMS = {"static": static, "freedave": freedave, "apd": apd, "multiblock": multiblock}
# The options that not all of them have.
USED_BY = {
    "batch": ("static", "freedave"),
    "block": ("static", "freedave", "multiblock"),
    "per_step": ("static", "freedave"),
    "temperature": ("apd",),
    "mixture": ("apd",),
    "threshold": ("multiblock",),
}


def check_options(context: click.Context, algorithm: str, new: int, block: int, step: int) -> None:
    for option, users in USED_BY.items():
        given = context.get_parameter_source(option) is not ParameterSource.DEFAULT
        if given and algorithm not in users:
            raise click.UsageError(
                f"{option}: expected with --algorithm {' or '.join(users)} alone, got {algorithm}"
            )
    if algorithm != "apd" and (new % block or block % step):
        raise click.UsageError(
            "expected --new to be a multiple of --block and --block of --tokens-per-step, "
            f"got {new}, {block} and {step}"
        )


@click.command()
@click.option("--algorithm", default="static", show_default=True, type=click.Choice([*ALGORITHMS]))
@click.option("--model", "name", default="llada-100m", type=click.Choice(["tiny", *CONFIGS]))
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--dtype", type=click.Choice(sorted(DTYPES)), help="Default: bf16 on cuda.")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1))
@click.option("--prompt", "prompt_length", type=click.IntRange(1), help=f"Default: {LENGTH}.")
@click.option("--new", type=click.IntRange(1), help=f"Default: {LENGTH}, or what fits the model.")
@click.option("--block", default=32, show_default=True, type=click.IntRange(1))
@click.option("--tokens-per-step", "per_step", default=1, show_default=True)
@click.option("--temperature", default=0.2, show_default=True, type=click.FloatRange(0.0))
@click.option("--mixture", default=0.1, show_default=True, type=click.FloatRange(0, 1), help="R.")
@click.option("--threshold", type=float, help="Nats. Default: found by a first forward.")
@click.option("--repeat", default=1, show_default=True, help="Rounds; the median is printed.")
@click.option("--backend", type=click.Choice(["auto", "cuda", "triton", "torch"]))
@click.option(
    "--compiled", type=click.Choice(["inductor", "aot_eager"]), help="The static loop too."
)
@click.option("--csv", "csv_file", type=click.Path(path_type=Path), help="Append rows to it.")
@click.pass_context
def main(
    context: click.Context,
    algorithm: str,
    name: str,
    device: str,
    dtype: str | None,
    batch: int,
    prompt_length: int | None,
    new: int | None,
    block: int,
    per_step: int,
    temperature: float,
    mixture: float,
    threshold: float | None,
    repeat: int,
    backend: str | None,
    compiled: str | None,
    csv_file: Path | None,
) -> None:
    """Time the decoders on one model's shape."""
    dtype = dtype or ("bf16" if device.startswith("cuda") else "fp32")
    model = make_model(name, device, DTYPES[dtype])
    most = model.spec.max_positions or 2 * LENGTH
    prompt_length = prompt_length or min(LENGTH, most // 2)
    new = new or min(LENGTH, most - most // 2)
    if prompt_length + new > most:
        raise click.UsageError(f"--prompt and --new: expected at most {most} positions together")
    check_options(context, algorithm, new, block, per_step)
    # Ends of sequence would let our decoders stop early: the work is to be the same.
    model.spec = pydllm.models.ModelSpec(**(vars(model.spec) | {"eos_ids": ()}))
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, model.spec.vocab_size, (batch, prompt_length), generator=generator)
    prompts = prompts.masked_fill(prompts == model.spec.mask_id, 3).to(device)
    verifier = make_verifier(name, device, DTYPES[dtype]) if algorithm == "apd" else None
    settings = (new, block, per_step, temperature, mixture, threshold, backend, compiled)
    job = Job(model, verifier, prompts, *settings)
    contenders = ALGORITHMS[algorithm](job)
    seconds: dict[str, list[float]] = {label: [] for label in contenders}
    results: dict[str, tuple[Tensor, int]] = {}
    if device.startswith("cuda") or compiled is not None:  # compile and capture first
        for contender in [*contenders.values()] * 2:
            contender.run()
    for _ in range(repeat):
        for label, contender in contenders.items():
            started = time.perf_counter()
            sequences, forwards = contender.run()
            results[label] = sequences.cpu(), forwards  # waits for the device
            seconds[label].append(time.perf_counter() - started)
    median = {label: statistics.median(times) for label, times in seconds.items()}
    drawn = algorithm == "apd" and temperature > 0
    rows = []
    for label, (sequences, forwards) in results.items():
        against = contenders[label].against
        expected, others = results[against]
        same = (sequences == expected)[:, prompt_length:].float().mean().item()
        per_forward = median[label] / forwards
        rows.append(
            {
                "decoder": label,
                "seconds": round(median[label], 3),
                "forwards": forwards,
                "ms_per_forward": round(1e3 * per_forward, 3),
                "tokens_per_s": round(batch * new / median[label], 2),
                "speedup": round(median[against] / median[label], 2),
                "speedup_per_forward": round(median[against] / others / per_forward, 2),
                "same_tokens": "" if drawn else round(same, 3),
                "against": against,
            }
        )
    title = f"{algorithm}: {name}, {dtype}, batch {batch}, {prompt_length} + {new} tokens"
    shown = [column for column in rows[0] if column != "against"]
    table = Table(*shown, title=title)
    for row in rows:
        table.add_row(*(str(row[column]) for column in shown))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if csv_file is not None:
        csv_file.parent.mkdir(parents=True, exist_ok=True)
        facts = {
            "algorithm": algorithm,
            "model": name,
            "dtype": dtype,
            "batch": batch,
            "prompt": prompt_length,
        }
        facts |= {"new": new, "block": block, "tokens_per_step": per_step}
        provenances = provenance(device) | {
            "command": "python -m bench.decode " + " ".join(sys.argv[1:])
        }
        new_file = not csv_file.exists()
        with csv_file.open("a", newline="") as file:
            writer = csv.DictWriter(file, [*facts, *rows[0], *provenances])
            if new_file:
                writer.writeheader()
            writer.writerows(facts | row | provenances for row in rows)


if __name__ == "__main__":
    main()
