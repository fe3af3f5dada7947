"""A comparison as a table, a CSV file and pictures."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from rich.table import Table

from pydllm.metrics.comparison import COLUMNS, Comparison


def table(comparison: Comparison) -> Table:
    """Scores by method and task, the best mean first; tasks a method lacks are left out of it."""
    tasks = sorted(comparison.y_max)
    shown = Table(title="AUP, accuracy under parallelism")
    shown.add_column("method")
    for task in tasks:
        shown.add_column(f"{task} (best {comparison.y_max[task]:g} %)", justify="right")
    shown.add_column("mean (tasks)", justify="right")
    for method in comparison.ranking:
        row = comparison.scores[method]
        cells = [f"{row[task]:.1f}" if task in row else "" for task in tasks]
        shown.add_row(method, *cells, f"{comparison.means[method]:.1f} ({len(row)})")
    return shown


def write(comparison: Comparison, out: Path) -> list[Path]:
    """Points and scores as CSV and JSON; curves and bars as PNG where there is matplotlib."""
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "points.csv", out / "scores.json"]
    with written[0].open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for method, tasks in comparison.points.items():
            for task, curve in tasks.items():
                writer.writerows((method, task, *point) for point in curve)
    names = ("scores", "means", "y_max", "ranking")
    scores = {name: getattr(comparison, name) for name in names}
    written[1].write_text(json.dumps(scores, indent=2) + "\n")
    try:
        plot_curves(comparison, out / "curves.png")
        plot_bars(comparison, out / "bars.png")
    except ImportError:
        return written
    return [*written, out / "curves.png", out / "bars.png"]


def plot_curves(comparison: Comparison, path: Path) -> None:
    """Accuracy over tokens per forward: a panel per task, a line per method."""
    from matplotlib.figure import Figure

    tasks = sorted(comparison.y_max)
    figure = Figure(figsize=(4.2 * len(tasks), 3.6), layout="constrained")
    axes = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axis, task in zip(axes, tasks, strict=True):
        for number, (method, curves) in enumerate(comparison.points.items()):
            if task in curves:
                axis.plot(
                    *zip(*sorted(curves[task]), strict=True), "o-", c=f"C{number}", label=method
                )
        axis.set(title=task, xlabel="tokens per forward", ylabel="accuracy (%)")
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def plot_bars(comparison: Comparison, path: Path) -> None:
    """AUP: a group of bars a task, a bar a method."""
    from matplotlib.figure import Figure

    tasks, methods = sorted(comparison.y_max), list(comparison.scores)
    figure = Figure(figsize=(2.5 + 1.6 * len(tasks), 3.6), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(methods)
    for number, method in enumerate(methods):
        places = [n for n, task in enumerate(tasks) if task in comparison.scores[method]]
        heights = [comparison.scores[method][tasks[place]] for place in places]
        centres = [place + width * (number + 0.5) - 0.4 for place in places]
        axis.bar(centres, heights, width, label=method, color=f"C{number}")
    axis.set_xticks(range(len(tasks)), tasks)
    axis.set_ylabel("AUP")
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)
