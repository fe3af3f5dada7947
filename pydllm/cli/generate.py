"""``pydllm generate``: continue prompts, from options, standard input or a file."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from pydllm._options import BACKEND, DEVICE, JSON
from pydllm.cli.player import (
    check_player,
    fit_beside,
    player_options,
    read_beside,
    write_player,
)
from pydllm.cli.sampling import read_sampling, sampling_options
from pydllm.cli.settings import fit_algorithm, read_algorithm, read_template
from pydllm.cli.watch import Watch
from pydllm.demo import VERIFIER, WEIGHTS

PATH = click.Path(path_type=Path)


@click.command()
@click.option("--model", "source", help="Checkpoint folder or hub id; default: the bundled model.")
@click.option("--verifier", help="Checkpoint of APD's causal model; default: the bundled one.")
@click.option("--prompt", "prompts", multiple=True, help="Text to continue; repeat for a batch.")
@click.option("--chat", is_flag=True, help="Prompts are messages of a user to an assistant.")
@click.option("--system", metavar="TEXT", help="System prompt, with --chat.")
@click.option("--template", type=PATH, help="A jinja file for --chat, instead of the model's.")
@click.option("--infill", is_flag=True, help="Fill gaps such as <mask:8> in the prompts.")
@click.option("--algorithm", default="threshold", show_default=True, help="See --list-algorithms.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Its parameters.")
@click.option("--list-algorithms", is_flag=True, help="Names, parameters and defaults; then exit.")
@click.option(
    "--max-new-tokens",
    type=int,
    help="Default: 48, as the bundled model wants; with --infill 0.",
)
@sampling_options
@click.option("--logprobs", is_flag=True, help="Log-probabilities of the new tokens, with --json.")
@click.option("--stream", "streams", is_flag=True, help="Print text as soon as it is final.")
@click.option("--watch", is_flag=True, help="Show the sequences after every forward.")
@player_options
@DEVICE
@click.option(
    "--expert-parallel",
    is_flag=True,
    help="Spread a mixture's experts whole over the processes of torchrun.",
)
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16", "float64"]))
@click.option("--data", type=PATH, help="Prompts, a JSON object a line; with --out.")
@click.option("--out", type=PATH, help="Folder of the answers to --data; a cut off job goes on.")
@click.option("--engine", type=click.Choice(["process", "ray"]), help="Of a job. Default: process.")
@click.option("--batch-size", default=16, show_default=True, help="Sequences at a time, in a job.")
@click.option("--workers", type=int, help="Ray's actors. Default: one a GPU, or a CPU.")
@BACKEND
@JSON
def generate(
    source: str | None,
    verifier: str | None,
    prompts: tuple[str, ...],
    algorithm: str,
    settings: tuple[str, ...],
    list_algorithms: bool,
    max_new_tokens: int | None,
    device: str | None,
    expert_parallel: bool,
    dtype: str | None,
    data: Path | None,
    out: Path | None,
    engine: str | None,
    batch_size: int,
    workers: int | None,
    backend: str | None,
    as_json: bool,
    **values: Any,
) -> None:
    """Continue prompts (or the lines of standard input, or of a file) with a model.

    Ctrl-C prints what was decoded. Under torchrun the model is spread over the processes (tensor
    parallel); the first one prints.
    """
    import torch

    from pydllm.models import load
    from pydllm.models.parallel import is_first_process, leave_processes

    if list_algorithms:
        _list_algorithms()
        return
    sampling = read_sampling(values)
    if max_new_tokens is None:
        max_new_tokens = 0 if values["infill"] else 48
    if (data is None) != (out is None) or (data is None and (engine or workers)):
        raise click.UsageError("expected --data and --out together, and --engine with them")
    if data is not None and out is not None:
        _refuse_in_jobs(values)
        recipe = {
            "model": str(WEIGHTS if source is None else source),
            "algorithm": algorithm,
            "settings": tuple(setting.partition("=")[::2] for setting in settings),
            "verifier": str(VERIFIER if verifier is None else verifier),
            "max_new_tokens": max_new_tokens,
            "dtype": dtype,
            "backend": backend,
            **sampling,
        }
        plan = {"engine": engine or "process", "batch_size": batch_size, "workers": workers}
        plan["expert_parallel"] = expert_parallel
        _run_job(data, out, recipe, device, plan, as_json)
        return
    _check_display(values, as_json)
    check_player(values)
    options: dict[str, Any] = {
        "device": device,
        "dtype": None if dtype is None else getattr(torch, dtype),
        "tp": None,
    }
    spread = options | {"expert_parallel": expert_parallel}

    def load_verifier() -> Any:
        return load(_verifier(verifier), **options)

    chosen = read_algorithm(algorithm, settings, load_verifier)
    beside = read_beside(values["beside"], load_verifier)
    if not prompts and sys.stdin.isatty():
        click.echo("Prompts, one per line; Ctrl-D ends them (or use --prompt TEXT):", err=True)
    texts = list(prompts) or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not texts:
        raise click.UsageError("expected --prompt or lines on standard input, got neither")
    model = load(WEIGHTS if source is None else source, **spread)
    chosen, beside = fit_algorithm(chosen, settings, model), fit_beside(beside, model)
    if values["template"] is not None:
        model.chat_template = read_template(values["template"])
    arguments = sampling | {
        "max_new_tokens": max_new_tokens,
        "logprobs": values["logprobs"],
        "backend": backend,
    }
    started = time.perf_counter()
    result, answers = _decode(model, texts, chosen, arguments, values)
    seconds = time.perf_counter() - started
    first = is_first_process()
    if values["html"] is not None and "interrupted" not in result.finish_reason:
        plain = values | {"watch": False, "streams": False}
        results = {",".join((algorithm, *settings)): (chosen, result)}
        for name, other in beside.items():
            results[name] = other, _decode(model, texts, other, arguments, plain)[0]
        title = Path(source or WEIGHTS).name
        write_player(model, texts, results, title, values["html"], write=first, backend=backend)
        if first:
            click.echo(f"written: {values['html']}", err=True)
    leave_processes()
    if first:
        shown = values["streams"]
        for row, prompt in enumerate(texts):
            answer = None if answers is None else answers[row]
            if as_json:
                click.echo(json.dumps(_record(result, row, prompt, answer, seconds)))
                continue
            if not shown:
                click.echo(answer)
            click.echo(
                f"[{result.nfe[row]} forwards, "
                f"{result.tokens_per_forward[row]:.2f} tokens per forward]",
                err=True,
            )
    if "interrupted" in result.finish_reason:
        raise KeyboardInterrupt


def _verifier(given: str | None) -> str | Path:
    """The verifier that was asked for, or the repository's, which a wheel does not have."""
    if given is None and not VERIFIER.is_dir():
        raise click.UsageError("expected --verifier: no bundled verifier is installed")
    return VERIFIER if given is None else given


def _decode(
    model: Any, texts: list[str], algorithm: Any, arguments: dict[str, Any], values: dict[str, Any]
) -> tuple[Any, list[str] | None]:
    """The generation and the text to print of each prompt."""
    from pydllm import decoding
    from pydllm.models.parallel import is_first_process

    console = Console(stderr=True, quiet=not is_first_process())
    prompts: list[Any] = list(texts)
    if values["chat"]:
        system = values["system"]
        before = [] if system is None else [{"role": "system", "content": system}]
        prompts = [[*before, {"role": "user", "content": text}] for text in texts]
    with ExitStack() as stack:
        if values["watch"]:
            arguments["on_step"] = stack.enter_context(Watch(model, console))
        elif not values["streams"]:
            status = stack.enter_context(console.status("decoding"))
            arguments["on_step"] = lambda step: status.update(f"decoding, forward {step.index}")
        if values["infill"]:
            arguments["suppress_ids"] = arguments["suppress_ids"] or None
            filled = decoding.infill(model, prompts, algorithm, **arguments)
            return filled.generation, filled.text
        if not values["streams"]:
            made = decoding.generate(model, prompts, algorithm, **arguments)
            return made, made.text
        pieces = decoding.stream(model, prompts, algorithm, **arguments)
        for row, piece in pieces:
            several = len(texts) > 1
            click.echo(f"[{row}] {piece}" if several else piece, nl=several)
        if len(texts) == 1:
            click.echo()
        if pieces.generation is None:
            raise KeyboardInterrupt
        return pieces.generation, pieces.generation.text


def _record(
    result: Any, row: int, prompt: str, answer: str | None, seconds: float
) -> dict[str, Any]:
    """A prompt's line of --json."""
    start = len(result.sequences[row]) - len(result.new_tokens[row])
    if result.finish_reason[row] in ("eos", "interrupted"):
        start = len(result.sequences[row]) - int(result.step_map.shape[1])
    record = {
        "prompt": prompt,
        "text": answer,
        "ids": result.sequences[row][start:].tolist(),
        "finish_reason": result.finish_reason[row],
        "nfe": result.nfe[row].item(),
        "tokens_per_forward": round(result.tokens_per_forward[row].item(), 3),
        "step_map": result.step_map[row].tolist(),
        "seconds": round(seconds, 3),
    }
    if result.logprobs is not None:
        record["logprobs"] = [round(value, 5) for value in result.logprobs[row].tolist()]
    return record


def _list_algorithms() -> None:
    from pydllm.decoding.settings import ALGORITHMS, parameters

    for name, kind in ALGORITHMS.items():
        defaults = {field.name: field.default for field in dataclasses.fields(kind)}
        fields = ", ".join(f"{key}={defaults[key]!r}" for key in parameters(kind))
        click.echo(f"{name}: {fields}")


def _check_display(values: dict[str, Any], as_json: bool) -> None:
    for one, other in (("infill", "chat"), ("infill", "streams"), ("streams", "watch")):
        if values[one] and values[other]:
            names = [f"--{name.removesuffix('s')}" for name in (one, other)]
            raise click.UsageError(f"expected {' or '.join(names)}, got both")
    if as_json and values["streams"]:
        raise click.UsageError("expected --stream or --json, got both")
    if values["logprobs"] and not as_json:
        raise click.UsageError("expected --json with --logprobs, got none")
    if not values["chat"] and (values["system"] is not None or values["template"] is not None):
        raise click.UsageError("expected --chat with --system or --template, got none")


def _refuse_in_jobs(values: dict[str, Any]) -> None:
    given = [name for name, value in values.items() if value not in (False, None, ())]
    if given:
        raise click.UsageError(f"expected no --{given[0].removesuffix('s')} with --data, got it")


def _run_job(
    data: Path,
    out: Path,
    recipe: dict[str, Any],
    device: str | None,
    plan: dict[str, Any],
    as_json: bool,
) -> None:
    """Run a job with a progress bar and print what came of it."""
    import torch
    from rich.progress import Progress

    from pydllm.integrations.jobs import Recipe, run_job
    from pydllm.models.parallel import is_first_process, join_processes, leave_processes

    accelerated = torch.cuda.is_available() if device is None else device.startswith("cuda")
    join_processes(None, torch.device("cuda" if accelerated else "cpu"))
    started = time.perf_counter()
    with Progress(console=Console(stderr=True, quiet=not is_first_process())) as bar:
        total = sum(1 for line in data.open("rb") if line.strip()) if data.is_file() else None
        task = bar.add_task("rows", total=total)

        def progress(done: int, failed: int) -> None:
            bar.update(task, completed=done, description=f"rows, {failed} failed")

        summary = run_job(data, out, Recipe(**recipe), device=device, progress=progress, **plan)
    first = is_first_process()
    leave_processes()
    if not first:
        return
    record = dataclasses.asdict(summary) | {"seconds": round(time.perf_counter() - started, 3)}
    if as_json:
        click.echo(json.dumps(record))
    else:
        click.echo(f"{out / 'results.jsonl'}: {', '.join(f'{k} {v}' for k, v in record.items())}")
    if summary.failed == summary.rows:
        raise click.ClickException(
            f"expected an answer to at least one of {summary.rows} rows, got none: "
            f"{out / 'results.jsonl'} tells why"
        )
