"""The command line: ``pydllm demo | generate | distill | aup | env``."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pydllm._backend.env import BACKENDS
from pydllm._backend.errors import PydllmError
from pydllm.distill.command import distill

_BACKEND = click.option("--backend", type=click.Choice(BACKENDS), help="For every op.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")


class _Group(click.Group):
    """Turns the library's errors into one line and exit code 1, without a traceback."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except (PydllmError, ValueError, TypeError) as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group)
@click.version_option(package_name="pydllm")
def main() -> None:
    """Kernels and decoding algorithms for diffusion language models."""


@main.command()
@click.option("--problems", default=100, show_default=True, type=click.IntRange(1, 10000))
@click.option("--seed", default=0, show_default=True, help="Which held-out problems.")
@click.option("--only", multiple=True, help="Only algorithms whose name contains this.")
@click.option("--device", help="Default: the GPU if there is one.")
@click.option("--out", default="out/demo", show_default=True, type=click.Path(path_type=Path))
@_BACKEND
@_JSON
def demo(
    problems: int,
    seed: int,
    only: tuple[str, ...],
    device: str | None,
    out: Path,
    backend: str | None,
    as_json: bool,
) -> None:
    """Decode held-out word problems with every algorithm, on the bundled model."""
    from pydllm.demo import WEIGHTS, report
    from pydllm.demo.evaluate import algorithms, evaluate
    from pydllm.demo.task import held_out_problems
    from pydllm.models import load

    model = load(WEIGHTS, device=device)
    chosen = {
        name: algorithm
        for name, algorithm in algorithms().items()
        if not only or any(part.lower() in name.lower() for part in only)
    }
    if not chosen:
        raise click.BadParameter(
            f"expected a part of one of {'; '.join(algorithms())}, got {', '.join(only)}",
            param_hint="--only",
        )
    tasks = held_out_problems(problems, seed)
    console = Console(stderr=as_json)
    scores, generations, first = [], {}, None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        for name, algorithm in chosen.items():
            bar = progress.add_task(f"{name:30}", total=problems)
            score, generation, sequences = evaluate(
                model,
                name,
                algorithm,
                tasks,
                reference=first,
                backend=backend,
                on_batch=partial(progress.advance, bar),
            )
            scores.append(score)
            first = first or sequences
            generations[name] = generation
    shown = next((name for name in chosen if name.startswith("Threshold")), next(iter(chosen)))
    _show_answer(console, model, shown, tasks[0].prompt, generations[shown])
    title = f"{problems} held-out problems, {model.device}, {model.dtype}".replace("torch.", "")
    console.print(report.score_table(scores, title))
    out.mkdir(parents=True, exist_ok=True)
    report.write_csv(scores, out / "demo.csv")
    written = [str(out / "demo.csv")]
    try:
        report.plot_decoding_order(generations, min(problems, 24), out / "decoding-order.png")
        written.append(str(out / "decoding-order.png"))
    except ImportError:
        console.print("no picture: matplotlib is not installed (pip install 'pydllm[demo]')")
    console.print(f"written: {', '.join(written)}")
    if as_json:
        click.echo(json.dumps({"scores": [score.as_row() for score in scores], "files": written}))


def _show_answer(console: Console, model: Any, name: str, prompt: str, generation: Any) -> None:
    """The first problem's answer, unmasked step by step on a terminal, then in colour."""
    from pydllm.demo import report

    steps = [step for step in generation.step_map[0].tolist() if step >= 0]
    ids = generation.sequences[0][-generation.step_map.shape[1] :].tolist()[: len(steps)]
    words = [model.tokenizer.id_to_token(token) for token in ids]
    console.print(f"\n[bold]{prompt}[/bold]   ({name}; the number is the step)")
    if console.is_terminal:
        with Live(console=console, refresh_per_second=20, transient=True) as live:
            for step in range(max(steps) + 1):
                live.update(report.masked_answer(words, steps, step))
                time.sleep(0.15)
    console.print(report.coloured_answer(words, steps), "\n")


@main.command()
@click.option("--model", "source", help="Checkpoint folder or hub id; default: the bundled model.")
@click.option("--prompt", "prompts", multiple=True, help="Text to continue; repeat for a batch.")
@click.option("--algorithm", default="threshold", show_default=True, help="See --list-algorithms.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Its parameters.")
@click.option("--list-algorithms", is_flag=True, help="Names, parameters and defaults; then exit.")
@click.option("--max-new-tokens", default=48, show_default=True, help="The bundled model wants 48.")
@click.option("--temperature", default=0.0, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--device", help="Default: the GPU if there is one.")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16", "float64"]))
@_BACKEND
@_JSON
def generate(
    source: str | None,
    prompts: tuple[str, ...],
    algorithm: str,
    settings: tuple[str, ...],
    list_algorithms: bool,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    device: str | None,
    dtype: str | None,
    backend: str | None,
    as_json: bool,
) -> None:
    """Continue prompts (or the lines of standard input) with a model."""
    import torch

    from pydllm import decoding
    from pydllm.demo import WEIGHTS
    from pydllm.models import load

    if list_algorithms:
        for name, kind in _algorithms().items():
            fields = ", ".join(f"{f.name}={f.default!r}" for f in _settable(kind))
            click.echo(f"{name}: {fields}")
        return
    chosen = _make_algorithm(algorithm, settings)
    texts = list(prompts) or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not texts:
        raise click.UsageError("expected --prompt or lines on standard input, got neither")
    model = load(
        WEIGHTS if source is None else source,
        device=device,
        dtype=None if dtype is None else getattr(torch, dtype),
    )
    started = time.perf_counter()
    with Console(stderr=True).status("decoding") as status:
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


def _algorithms() -> dict[str, type]:
    from pydllm import decoding

    kinds = (
        decoding.Static,
        decoding.Threshold,
        decoding.Factor,
        decoding.EntropyBound,
        decoding.FreeDave,
    )
    return {kind.__name__.lower(): kind for kind in kinds}


def _settable(kind: type) -> list[dataclasses.Field]:
    """The parameters that text can state."""
    fields = dataclasses.fields(kind)
    return [field for field in fields if str(field.type) in ("int", "float", "str")]


def _make_algorithm(name: str, settings: tuple[str, ...]) -> Any:
    """Build the algorithm from ``NAME=VALUE`` strings, typed as its dataclass declares."""
    kinds = _algorithms()
    if name.lower() not in kinds:
        raise click.BadParameter(
            f"expected one of {', '.join(kinds)}, got {name}", param_hint="--algorithm"
        )
    kind = kinds[name.lower()]
    convert: dict[str, Callable[[str], Any]] = {
        field.name: {"int": int, "float": float}.get(str(field.type), str)
        for field in _settable(kind)
    }
    values = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in convert:
            raise click.BadParameter(
                f"{name} takes {', '.join(convert)}; got {key!r}", param_hint="--set"
            )
        try:
            values[key] = convert[key](value)
        except ValueError:
            kind_name = convert[key].__name__
            raise click.BadParameter(
                f"{key}: expected {kind_name}, got {value!r}", param_hint="--set"
            ) from None
    return kind(**values)


@main.command()
@_JSON
def env(as_json: bool) -> None:
    """What is installed, which backends work, and why not."""
    from pydllm import env as environment

    if as_json:
        click.echo(json.dumps(environment.report()))
    else:
        environment.main()


@main.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@click.option("--sweep", "models", multiple=True, help="Model to measure on the bundled task.")
@click.option("--algorithm", type=click.Choice(["threshold", "entropybound"]), default="threshold")
@click.option("--thresholds", default="0.98,0.95,0.9,0.8,0.7,0.5", show_default=True)
@click.option("--problems", default=100, show_default=True, type=click.IntRange(1, 10000))
@click.option(
    "--y-max", "best", multiple=True, metavar="TASK=ACCURACY", help="If not in the table."
)
@click.option("--alpha", default=3.0, show_default=True, help="How hard lost accuracy is punished.")
@click.option("--out", default="out/aup", show_default=True, type=click.Path(path_type=Path))
@click.option("--device", help="Default: the GPU if there is one.")
@_BACKEND
@_JSON
def aup(
    files: tuple[Path, ...],
    models: tuple[str, ...],
    algorithm: str,
    thresholds: str,
    problems: int,
    best: tuple[str, ...],
    alpha: float,
    out: Path,
    device: str | None,
    backend: str | None,
    as_json: bool,
) -> None:
    """Accuracy under parallelism of points from CSV, JSON or YAML FILES, or of --sweep models."""
    from pydllm import metrics
    from pydllm.demo.sweep import parse_thresholds, sweep_models
    from pydllm.metrics import report

    if not files and not models:
        raise click.UsageError("expected FILES with points or --sweep, got neither")
    limits = {}
    for setting in best:
        task, _, value = setting.rpartition("=")
        try:
            limits[task] = float(value)
        except ValueError:
            raise click.BadParameter(
                f"expected TASK=ACCURACY, got {setting!r}", param_hint="--y-max"
            ) from None
    values = parse_thresholds(thresholds, algorithm)
    tables = [metrics.read_points(path) for path in files]
    console = Console(stderr=as_json)
    tables.append(
        sweep_models(
            models, algorithm, values, problems, device=device, backend=backend, console=console
        )
    )
    points: metrics.Points = {}
    for table in tables:
        for method, tasks in table.items():
            for task, curve in tasks.items():
                points.setdefault(method, {}).setdefault(task, []).extend(curve)
    comparison = metrics.compare(points, y_max=limits, alpha=alpha)
    written = report.write(comparison, out)
    console.print(report.table(comparison))
    if not any(path.suffix == ".png" for path in written):
        console.print("no pictures: matplotlib is not installed (pip install 'pydllm[demo]')")
    console.print(f"written: {', '.join(map(str, written))}")
    if as_json:
        record = {name: getattr(comparison, name) for name in ("scores", "means", "y_max")}
        click.echo(json.dumps({**record, "points": points, "files": list(map(str, written))}))


main.add_command(distill)

if __name__ == "__main__":
    main()
