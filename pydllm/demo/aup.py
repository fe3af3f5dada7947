"""``pydllm aup``."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console

from pydllm._options import BACKEND, DEVICE, JSON

ALGORITHMS = ("threshold", "entropybound", "multiblock")


@click.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@click.option("--sweep", "models", multiple=True, help="Model to measure on the bundled task.")
@click.option(
    "--algorithm",
    type=click.Choice(["threshold", "entropybound", "multiblock"]),
    default="threshold",
)
@click.option("--thresholds", default="0.98,0.95,0.9,0.8,0.7,0.5", show_default=True)
@click.option("--problems", default=100, show_default=True, type=click.IntRange(1, 10000))
@click.option(
    "--y-max", "best", multiple=True, metavar="TASK=ACCURACY", help="If not in the table."
)
@click.option("--alpha", default=3.0, show_default=True, help="How hard lost accuracy is punished.")
@click.option("--out", default="out/aup", show_default=True, type=click.Path(path_type=Path))
@DEVICE
@BACKEND
@JSON
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
    from pydllm.demo.points import parse_thresholds, sweep_models
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
    console = Console(stderr=as_json, markup=False)
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
