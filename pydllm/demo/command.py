"""``pydllm demo`` and ``pydllm compare --sweep``."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pydllm._options import BACKEND, DEVICE, JSON
from pydllm.demo import MODELS, VERIFIER

if TYPE_CHECKING:
    from pydllm.decoding import Generation
    from pydllm.demo.evaluate import Score
    from pydllm.demo.player import Scene
    from pydllm.demo.replay import Run

_SCENES = 10  # problems on the page of --html
_SIDE_BY_SIDE = (
    *(", 1 per step", ", 4 per step", "Threshold 0.9", "FreeDave, 8 drafts"),
    *("mixture 0.7", "pipelined, 8", "MultiBlock, entropy 0.5"),
    *("Autoregressive", "SelfSpeculative, 7"),
)


def side_by_side(plan: dict[str, Any]) -> list[str]:
    """The names of at most six algorithms of a plan that are shown next to each other."""
    best = [key for key in plan if key.endswith(_SIDE_BY_SIDE)]
    return [*best, *(key for key in plan if key not in best)][:6]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices as small as those of the bundled models take twice the time on two threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@click.command()
@click.option("--problems", default=30, show_default=True, type=click.IntRange(1, 10000))
@click.option("--seed", default=0, show_default=True, help="Which held-out problems.")
@click.option(
    "--model", "names", multiple=True, type=click.Choice(sorted(MODELS)), help="Default: all."
)
@click.option("--only", multiple=True, help="Only algorithms whose name contains this.")
@DEVICE
@click.option("--out", default="out/demo", show_default=True, type=click.Path(path_type=Path))
@click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False), help="Page that plays the unmasking."
)
@BACKEND
@JSON
def demo(
    problems: int,
    seed: int,
    names: tuple[str, ...],
    only: tuple[str, ...],
    device: str | None,
    out: Path,
    html: Path | None,
    backend: str | None,
    as_json: bool,
) -> None:
    """Decode held-out word problems with every algorithm, on the bundled models."""
    from pydllm.demo import figures, report
    from pydllm.demo.evaluate import algorithms
    from pydllm.demo.player import Scene, write_page
    from pydllm.demo.replay import replay
    from pydllm.demo.sweep import areas, by_algorithm
    from pydllm.demo.task import held_out_problems
    from pydllm.models import load

    click.get_current_context().with_resource(_one_thread())
    verifier = load(VERIFIER, device=device) if VERIFIER.is_dir() else None
    wanted = [part.lower() for part in only]
    chosen = {
        model: {
            name: algorithm
            for name, algorithm in algorithms(model, verifier).items()
            if not only or any(part in name.lower() for part in wanted)
        }
        for model in names or MODELS
    }
    if not any(chosen.values()):
        known = dict.fromkeys(name for model in chosen for name in algorithms(model, verifier))
        raise click.BadParameter(
            f"expected a part of one of {'; '.join(known)}, got {', '.join(only)}",
            param_hint="--only",
        )
    tasks = held_out_problems(problems, seed)
    console = Console(stderr=as_json, markup=False)
    out.mkdir(parents=True, exist_ok=True)
    scores: list[Score] = []
    curves: dict[tuple[str, str], list[Score]] = {}
    runs: dict[str, list[Run]] = {}
    scenes: list[Scene] = []
    shown = next((n for n, task in enumerate(tasks[:100]) if not task.in_order), 0)
    for name, plan in chosen.items():
        if not plan:
            continue
        model = load(MODELS[name], device=device)
        found, generations = _decode_all(model, name, plan, tasks, backend, console)
        if not scores:
            key = next((key for key in plan if key.startswith("Threshold")), next(iter(plan)))
            _show_answer(console, model, key, tasks[shown].prompt, shown, generations[key])
        title = f"{name}: {problems} held-out problems, {model.device}, {model.dtype}"
        console.print(report.score_table(found, title.replace("torch.", "")))
        scores += found
        curves |= {(name, key): each for key, each in by_algorithm(plan, found).items()}
        first = [shown] if html is None else [shown, *(n for n in range(_SCENES) if n != shown)]
        for row in first[: min(_SCENES, problems)]:
            played = [
                replay(
                    model,
                    generations[key],
                    row,
                    key,
                    plan[key],
                    problem=tasks[row],
                    backend=backend,
                )
                for key in side_by_side(plan)
            ]
            runs.setdefault(name, played)
            scenes.append(Scene(name, tasks[row].prompt, played))
    console.print("\n\n".join(report.NOTES), "\n")
    # Against the best accuracy of all models, so that teacher and student can be compared.
    area: dict[str, dict[str, float]] = {}
    for (name, key), value in areas(curves).items():
        area.setdefault(name, {})[key] = value
    console.print(report.area_table(area, "Area under accuracy over tokens per forward"))
    written = [out / "demo.csv"]
    report.write_csv(scores, written[0])
    try:
        written += figures.draw_all(scores, runs, out)
    except ImportError:
        console.print("no pictures: matplotlib is not installed (pip install 'pydllm[demo]')")
    if html is not None:
        write_page(scenes, "How an answer is unmasked", html)
        written.append(html)
    files = list(map(str, written))
    console.print(f"written: {', '.join(files)}")
    if as_json:
        rows = [score.as_row() for score in scores]
        click.echo(json.dumps({"scores": rows, "aup": area, "files": files}))


def sweep(
    sweeps: tuple[str, ...],
    name: str,
    problems: int,
    seed: int,
    device: str | None,
    out: Path,
    backend: str | None,
    as_json: bool,
) -> None:
    """Algorithms from careful to fast: accuracy over tokens per forward, CSV and PNG."""
    from pydllm.demo import report
    from pydllm.demo.sweep import areas, settings
    from pydllm.demo.task import held_out_problems
    from pydllm.models import load

    if "apd" in sweeps and not VERIFIER.is_dir():
        raise click.BadParameter(
            f"expected sweeps other than apd, whose verifier is not installed, got {sweeps}",
            param_hint="--sweep",
        )
    model = load(MODELS[name], device=device)
    verifier = load(VERIFIER, device=device) if VERIFIER.is_dir() else None
    tasks = held_out_problems(problems, seed)
    console = Console(stderr=as_json, markup=False)
    out.mkdir(parents=True, exist_ok=True)
    found = {}
    for kind in sweeps:
        found[kind], _ = _decode_all(
            model, name, settings(kind, name, verifier), tasks, backend, console
        )
        console.print(report.score_table(found[kind], f"{name}, {kind}: {problems} problems"))
    area = areas(found)
    for kind, value in area.items():
        console.print(f"AUP of {kind}: {value:.1f}")
    scores = [score for each in found.values() for score in each]
    written = [out / f"{name}.csv", out / f"{name}.png"]
    report.write_csv(scores, written[0])
    try:
        title = f"{name}, {problems} held-out problems"
        report.plot_frontier(found, area, title, written[1])
    except ImportError:
        console.print("no picture: matplotlib is not installed (pip install 'pydllm[demo]')")
        written.pop()
    files = list(map(str, written))
    console.print(f"written: {', '.join(files)}")
    if as_json:
        rows = [score.as_row() for score in scores]
        click.echo(json.dumps({"scores": rows, "aup": area, "files": files}))


def _decode_all(
    model: Any, name: str, plan: dict[str, Any], tasks: list, backend: str | None, console: Console
) -> tuple[list[Score], dict[str, Generation]]:
    """The score and the first batch's generation of every algorithm, with a progress bar each."""
    from pydllm.demo.evaluate import evaluate, reference_of

    scores, generations = [], {}
    decoded: dict[str, list[Any]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        for key, algorithm in plan.items():
            bar = progress.add_task(f"{key:30}", total=len(tasks))
            score, generations[key], decoded[key] = evaluate(
                model,
                (name, key),
                algorithm,
                tasks,
                reference=decoded.get(reference_of(plan, key)),
                backend=backend,
                on_batch=partial(progress.advance, bar),
            )
            scores.append(score)
    return scores, generations


def _show_answer(
    console: Console, model: Any, name: str, prompt: str, row: int, generation: Any
) -> None:
    """The answer of a row, unmasked step by step on a terminal, then in colour."""
    from pydllm.demo import report
    from pydllm.demo.replay import token_text

    words = [token_text(model, token) for token in generation.new_tokens[row].tolist()]
    steps = generation.step_map[row].tolist()[: len(words)]
    console.print(f"\n{prompt}", style="bold", end="")
    console.print(f"   ({name}; the number is the step)")
    if console.is_terminal:
        with Live(console=console, refresh_per_second=20, transient=True) as live:
            for step in range(max(steps) + 1):
                live.update(report.masked_answer(words, steps, step))
                time.sleep(0.15)
    console.print(report.coloured_answer(words, steps), "\n")
