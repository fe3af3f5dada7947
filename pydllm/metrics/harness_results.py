"""Points from lm-evaluation-harness's results of this package's models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What counts as accuracy, the first that a task has.
SANITIZED = "pass_at_1,sanitized"  # what `pydllm code-eval` adds
_ACCURACIES = ("exact_match", "acc", "acc_norm", "pass_at_1", "pass@1", "math_verify", "f1")


def is_harness_results(values: Any) -> bool:
    """Whether parsed JSON is such a file."""
    return isinstance(values, Mapping) and {"results", "config"} <= values.keys()


def harness_points(
    path: Path, values: Mapping[str, Any]
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """One point a task: mean tokens per forward, and the task's accuracy in percent.

    The method is the model's folder and the algorithm's name, without its parameters: results of
    one algorithm with several parameters are points of one curve. Of several filters of a task the
    best counts, of a code task the one that ``pydllm code-eval`` added.

    Raises:
        ValueError: results of another model, of no task with answers, or without an accuracy.
    """
    facts = values["config"].get("pydllm")
    if not isinstance(facts, Mapping):
        raise ValueError(f"{path}: expected results of --model pydllm, got another model's")
    method = f"{facts['model']} {facts['algorithm']}"
    points = {}
    for task, row in facts["tasks"].items():
        scores = _accuracies(values["results"].get(task, {}))
        if not scores:
            raise ValueError(
                f"{path}: {task}: expected one of {', '.join(_ACCURACIES)} among its metrics, "
                f"got {', '.join(values['results'].get(task, {})) or 'none'}"
            )
        points[task] = [(float(row["tokens_per_forward"]), 100 * max(scores))]
    if not points:
        raise ValueError(f"{path}: expected a task with generated answers, got none")
    return {method: points}


def _accuracies(results: Mapping[str, Any]) -> list[float]:
    if SANITIZED in results:
        return [float(results[SANITIZED])]
    for name in _ACCURACIES:
        found = [
            float(value)
            for key, value in results.items()
            if re.fullmatch(rf"{re.escape(name)}(,.*)?", key) and isinstance(value, (int, float))
        ]
        if found:
            return found
    return []
