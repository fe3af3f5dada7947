"""AUP of several methods on several tasks: reading points, scores, means, pictures."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydllm._backend.errors import PydllmError
from pydllm.metrics.accuracy_under_parallelism import aup
from pydllm.metrics.harness_results import harness_points, is_harness_results

Curve = list[tuple[float, float]]
Points = dict[str, dict[str, Curve]]  # method, task, (tokens per forward, accuracy in percent)
COLUMNS = ("method", "task", "tokens_per_forward", "accuracy")
_DEMO = ("model", "algorithm", "exact_percent", "tokens_per_forward")


@dataclass(frozen=True)
class Comparison:
    """Scores of a table of points.

    Attributes:
        points: what was scored.
        y_max: the best accuracy of each task, in percent.
        scores: AUP by method and task.
        means: mean of a method's scores over the tasks that it has.
    """

    points: Points
    y_max: dict[str, float]
    scores: dict[str, dict[str, float]]
    means: dict[str, float]

    @property
    def ranking(self) -> list[str]:
        """Methods, the best mean first."""
        return sorted(self.means, key=lambda method: -self.means[method])


def compare(
    points: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    *,
    y_max: Mapping[str, float] | None = None,
    alpha: float = 3.0,
) -> Comparison:
    """Score every method on every task it has points for.

    Args:
        points: (tokens per forward, accuracy in percent) by method and task.
        y_max: best accuracy of a task where a method that is not in the table holds it; otherwise
            it is the best of all points of that task, autoregressive models' included.
        alpha: as in ``aup``.

    Raises:
        ValueError: as ``aup``, with method and task; ``y_max`` of a task that has no points, or
            below an accuracy of the table.
    """
    if not any(points.values()):
        raise ValueError("points: expected at least one method with a task, got none")
    best: dict[str, float] = {}
    for tasks in points.values():
        for task, curve in tasks.items():
            best[task] = max([best.get(task, 0.0), *(float(y) for _, y in curve)])
    for task, value in (y_max or {}).items():
        if task not in best:
            raise ValueError(f"y_max: expected one of {', '.join(sorted(best))}, got {task}")
        if value < best[task]:
            raise ValueError(f"y_max: {task}: expected at least {best[task]:g}, got {value:g}")
        best[task] = float(value)
    scores: dict[str, dict[str, float]] = {}
    for method, tasks in points.items():
        for task, curve in tasks.items():
            try:
                score = aup(curve, best[task], alpha)
            except ValueError as error:
                raise ValueError(f"{method}, {task}: {error}") from error
            scores.setdefault(method, {})[task] = score
    means = {method: sum(row.values()) / len(row) for method, row in scores.items()}
    kept = {method: {task: list(c) for task, c in row.items()} for method, row in points.items()}
    return Comparison(kept, best, scores, means)


def read_points(path: Path) -> Points:
    """Points from a CSV, JSON or YAML file.

    A CSV has the columns method, task, tokens_per_forward and accuracy, or is that of
    ``pydllm demo`` or ``pydllm compare --sweep``; JSON and YAML map methods
    to tasks to lists of [tokens per forward, accuracy]. A results file that lm-evaluation-harness
    wrote of this package's models is read too.

    Raises:
        ValueError: not such a file; names the line, or the method and task.
    """
    text = _read(path)
    if path.suffix == ".csv":
        return _from_csv(path, text)
    if path.suffix == ".json":
        try:
            values = json.loads(text)
            if is_harness_results(values):
                return harness_points(path, values)
            return _from_mapping(path, values)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: expected JSON, got {error}") from error
    if path.suffix in (".yaml", ".yml"):
        try:
            import yaml
        except ImportError:
            raise PydllmError(f"{path}: YAML needs pyyaml (pip install pyyaml)") from None
        try:
            return _from_mapping(path, yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: expected YAML, got {error}") from error
    raise ValueError(f"{path}: expected a .csv, .json, .yaml or .yml file")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a text file, got {error}") from error


def _from_csv(path: Path, text: str) -> Points:
    reader = csv.DictReader(text.splitlines())
    if set(_DEMO) <= set(reader.fieldnames or ()):
        return _from_demo(reader)
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(
            f"{path}: expected the columns {', '.join(COLUMNS)}, got no {', '.join(missing)}"
        )
    points: Points = {}
    for row in reader:
        method, task, *numbers = (row[name] for name in COLUMNS)
        try:
            rho, y = map(float, numbers)
        except (TypeError, ValueError):
            raise ValueError(
                f"{path}:{reader.line_num}: expected two numbers, got {numbers}"
            ) from None
        points.setdefault(method, {}).setdefault(task, []).append((rho, y))
    return points


def _from_demo(reader: csv.DictReader) -> Points:
    """``pydllm demo``'s scores: settings of one algorithm of a model are one method's points.

    Of settings with the same tokens per forward, as with two caches, the most accurate counts.
    """
    best: dict[str, dict[float, float]] = {}
    for row in reader:
        model, algorithm, *numbers = (row[name] for name in _DEMO)
        accuracy, rate = map(float, numbers)
        method = f"{model}, {re.split(r'[ ,]', algorithm)[0]}"
        curve = best.setdefault(method, {})
        curve[rate] = max(curve.get(rate, 0.0), accuracy)
    return {method: {"word problems": sorted(curve.items())} for method, curve in best.items()}


def _from_mapping(path: Path, values: Any) -> Points:
    points: Points = {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected methods by name, got {type(values).__name__}")
    for method, tasks in values.items():
        if not isinstance(tasks, dict):
            raise ValueError(f"{path}: {method}: expected tasks by name, got {tasks!r:.60}")
        for task, curve in tasks.items():
            try:
                pairs = [(float(rho), float(y)) for rho, y in curve]
            except (TypeError, ValueError):
                raise ValueError(
                    f"{path}: {method}, {task}: expected a list of "
                    f"[tokens per forward, accuracy], got {curve!r:.60}"
                ) from None
            points.setdefault(str(method), {})[str(task)] = pairs
    return points
