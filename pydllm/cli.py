"""The command line: ``pydllm demo | compare | generate | distill | aup | verify | env | ...``."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from pydllm._backend import env as env_settings
from pydllm._backend.errors import PydllmError
from pydllm._options import BACKEND, DEVICE, JSON
from pydllm.demo import MODELS, SWEEPS, VERIFIER, WEIGHTS
from pydllm.demo.aup import aup
from pydllm.demo.command import demo
from pydllm.distill.command import distill

PATH = click.Path(path_type=Path)


class _Group(click.Group):
    """Turns the library's errors into one line and exit code 1, without a traceback."""

    def invoke(self, context: click.Context) -> Any:
        try:
            if env_settings.ERROR is not None:
                raise ValueError(env_settings.ERROR)
            return super().invoke(context)
        except (PydllmError, ValueError, TypeError, OSError) as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            context.exit(130)  # 128 + SIGINT, as shells have it


@click.group(cls=_Group)
@click.version_option(package_name="pydllm")
def main() -> None:
    """Kernels and decoding algorithms for diffusion language models."""


@main.command()
@click.option("--model", "source", help="Checkpoint folder or hub id; default: the bundled model.")
@click.option("--verifier", help="Checkpoint of APD's causal model; default: the bundled one.")
@click.option("--prompt", "prompts", multiple=True, help="Text to continue; repeat for a batch.")
@click.option("--algorithm", default="threshold", show_default=True, help="See --list-algorithms.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Its parameters.")
@click.option("--list-algorithms", is_flag=True, help="Names, parameters and defaults; then exit.")
@click.option("--max-new-tokens", default=48, show_default=True, help="The bundled model wants 48.")
@click.option("--temperature", default=0.0, show_default=True)
@click.option("--seed", default=0, show_default=True)
@DEVICE
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
    max_new_tokens: int,
    temperature: float,
    seed: int,
    device: str | None,
    dtype: str | None,
    data: Path | None,
    out: Path | None,
    engine: str | None,
    batch_size: int,
    workers: int | None,
    backend: str | None,
    as_json: bool,
) -> None:
    """Continue prompts (or the lines of standard input, or of a file) with a model.

    Under torchrun the model is spread over the processes (tensor parallel); the first one prints.
    """
    import torch

    from pydllm import decoding
    from pydllm.decoding.settings import ALGORITHMS, parameters
    from pydllm.models import load
    from pydllm.models.parallel import is_first_process, leave_processes

    if list_algorithms:
        for name, kind in ALGORITHMS.items():
            defaults = {field.name: field.default for field in dataclasses.fields(kind)}
            fields = ", ".join(f"{key}={defaults[key]!r}" for key in parameters(kind))
            click.echo(f"{name}: {fields}")
        return
    if (data is None) != (out is None) or (data is None and (engine or workers)):
        raise click.UsageError("expected --data and --out together, and --engine with them")
    if data is not None and out is not None:
        pairs = (setting.partition("=") for setting in settings)
        recipe = {
            "model": str(WEIGHTS if source is None else source),
            "algorithm": algorithm,
            "settings": tuple((key, value) for key, _, value in pairs),
            "verifier": str(VERIFIER if verifier is None else verifier),
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
            "dtype": dtype,
            "backend": backend,
        }
        plan = {"engine": engine or "process", "batch_size": batch_size, "workers": workers}
        _run_job(data, out, recipe, device, plan, as_json)
        return
    options: dict[str, Any] = {
        "device": device,
        "dtype": None if dtype is None else getattr(torch, dtype),
        "tp": None,
    }
    chosen = _make_algorithm(
        algorithm, settings, lambda: load(VERIFIER if verifier is None else verifier, **options)
    )
    if not prompts and sys.stdin.isatty():
        click.echo("Prompts, one per line; Ctrl-D ends them (or use --prompt TEXT):", err=True)
    texts = list(prompts) or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not texts:
        raise click.UsageError("expected --prompt or lines on standard input, got neither")
    model = load(WEIGHTS if source is None else source, **options)
    started = time.perf_counter()
    console = Console(stderr=True, quiet=not is_first_process())
    with console.status("decoding") as status:
        result = decoding.generate(
            model,
            texts,
            chosen,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            backend=backend,
            on_step=lambda step: status.update(f"decoding, forward {step.index}"),
        )
    seconds = time.perf_counter() - started
    first = is_first_process()
    leave_processes()
    if not first:
        return
    for row, prompt in enumerate(texts):
        answer = None if result.text is None else result.text[row]
        if as_json:
            record = {
                "prompt": prompt,
                "text": answer,
                "ids": result.sequences[row][-max_new_tokens:].tolist(),
                "nfe": result.nfe[row].item(),
                "tokens_per_forward": round(result.tokens_per_forward[row].item(), 3),
                "step_map": result.step_map[row].tolist(),
                "seconds": round(seconds, 3),
            }
            click.echo(json.dumps(record))
        else:
            click.echo(answer)
            click.echo(
                f"[{result.nfe[row]} forwards, "
                f"{result.tokens_per_forward[row]:.2f} tokens per forward]",
                err=True,
            )


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


def _make_algorithm(name: str, settings: tuple[str, ...], verifier: Callable[[], Any]) -> Any:
    """Build the algorithm from ``NAME=VALUE`` strings."""
    from pydllm.decoding.settings import SettingError, make_algorithm

    pairs = (setting.partition("=") for setting in settings)
    try:
        return make_algorithm(name, {key: value for key, _, value in pairs}, verifier)
    except SettingError as error:
        raise click.BadParameter(str(error), param_hint="--algorithm, --set") from None


@main.command()
@click.option("--sweep", "sweeps", multiple=True, type=click.Choice(SWEEPS))
@click.option("--original", metavar="MODULE:FUNCTION", help="A decoding function, and ...")
@click.option("--patched", metavar="MODULE:FUNCTION", help="... the one to compare it with.")
@click.option("--model", "source", default="llada-tiny", show_default=True, help="Bundled, or DIR.")
@click.option(
    "--loader", metavar="MODULE:FUNCTION", help="Makes the model of DIR; it is called so."
)
@click.option("--prepare", metavar="MODULE:FUNCTION", help="Called with the model for --patched.")
@click.option("--prompts", type=click.Path(path_type=Path), help="A line each: text, or JSON.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="For both functions.")
@click.option("--set-original", "first", multiple=True, metavar="NAME=VALUE")
@click.option("--set-patched", "second", multiple=True, metavar="NAME=VALUE")
@click.option("--batch", default=1, show_default=True, help="Prompts of one length a call.")
@click.option("--repeat", default=3, show_default=True, help="Timed rounds; the median counts.")
@click.option("--strict", is_flag=True, help="Exit code 1 unless all tokens are equal.")
@click.option("--problems", default=50, show_default=True, type=click.IntRange(1, 10000))
@click.option("--seed", default=0, show_default=True, help="Which held-out problems.")
@DEVICE
@click.option("--out", default="out/compare", show_default=True, type=click.Path(path_type=Path))
@BACKEND
@JSON
def compare(
    sweeps: tuple[str, ...],
    original: str | None,
    patched: str | None,
    source: str,
    problems: int,
    seed: int,
    device: str | None,
    out: Path,
    backend: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Sweep algorithms from careful to fast: accuracy over tokens per forward, CSV and PNG. Or run
    two decoding functions on the same prompts: tokens, forwards, time, CSV.
    """
    if sweeps and not (original or patched):
        from pydllm.demo.command import sweep

        if source not in MODELS:
            raise click.BadParameter(
                f"expected one of {', '.join(MODELS)} with --sweep, got {source}",
                param_hint="--model",
            )
        return sweep(sweeps, source, problems, seed, device, out, backend, as_json)
    if sweeps or not (original and patched):
        raise click.UsageError("expected --sweep, or --original and --patched")
    from pydllm.demo.task import held_out_problems
    from pydllm.integrations.command import side_by_side

    texts = [problem.prompt for problem in held_out_problems(problems, seed)]
    if source not in MODELS and options["prompts"] is None:
        raise click.UsageError(f"expected --prompts with --model {source}, got none")
    folder = str(MODELS.get(source, source))
    rows = side_by_side((original, patched), folder, texts, device, out, as_json=as_json, **options)
    if as_json:
        click.echo(json.dumps(rows))


@main.command()
@JSON
def env(as_json: bool) -> None:
    """What is installed, which backends work, and why not."""
    from pydllm import env as environment

    if as_json:
        click.echo(json.dumps(environment.report()))
    else:
        environment.main()


@main.command()
@click.argument("source", metavar="DIR")
@DEVICE
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16", "float64"]))
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="As pydllm.load has.")
@click.option("--reference/--no-reference", default=True, help="Compare with transformers.")
@click.option("--new-tokens", default=16, show_default=True, help="Of each continuation.")
@BACKEND
@JSON
def verify(
    source: str,
    device: str | None,
    dtype: str | None,
    settings: tuple[str, ...],
    reference: bool,
    new_tokens: int,
    backend: str | None,
    as_json: bool,
) -> None:
    """Load a checkpoint, compare its forwards with transformers', print a report.

    The first thing to run on new weights, and what to attach to a bug; exit code 1 if one fails.
    """
    import torch

    from pydllm.integrations.command import read_setting
    from pydllm.models.verify import verify as run

    report = run(
        MODELS.get(source, source),
        device=device,
        dtype=None if dtype is None else getattr(torch, dtype),
        reference=reference,
        new_tokens=new_tokens,
        backend=backend,
        **dict(map(read_setting, settings)),
    )
    click.echo(json.dumps(report.as_dict()) if as_json else str(report))
    if not report.passed:
        sys.exit(1)


LM_EVAL_HELP = """\
Usage: pydllm lm-eval [ARGUMENTS OF LM-EVAL]

  lm-evaluation-harness with this package's models: its arguments, less --model. It is not
  installed here: pip install 'pydllm[eval]', then this shows its own help. Example:

  pydllm lm-eval --tasks gsm8k --batch_size 8 --model_args pretrained=DIR,algorithm=threshold"""


@main.command("lm-eval", context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def lm_eval(arguments: tuple[str, ...]) -> None:
    """lm-evaluation-harness with this package's models: its arguments, less --model."""
    try:
        from pydllm.integrations.harness import main as run
    except ImportError as error:
        if not {"--help", "-h"}.isdisjoint(arguments):
            click.echo(LM_EVAL_HELP)
            return
        raise PydllmError(
            f"lm-evaluation-harness cannot be imported ({error}): pip install 'pydllm[eval]'"
        ) from error
    run(arguments)


for command in (demo, aup, distill):
    main.add_command(command)

if __name__ == "__main__":
    main()
