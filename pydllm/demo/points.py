"""Points of an accuracy-parallelism curve: one model, the bundled task, several thresholds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console

from pydllm.decoding import EntropyBound, MultiBlock, Static, Threshold
from pydllm.decoding.driver import Algorithm
from pydllm.demo.evaluate import evaluate
from pydllm.demo.task import Problem, held_out_problems
from pydllm.models import Model, load

TASK = "word problems"
BLOCK = 24
KINDS: dict[str, Callable[[float], Algorithm]] = {
    "threshold": lambda value: Threshold(threshold=value, block_length=BLOCK),
    "entropybound": lambda value: EntropyBound(bound=value, block_length=BLOCK),
    "multiblock": lambda value: MultiBlock(threshold=value, block_length=BLOCK),
}
# Below this the curve has ended, in percentage points from its slowest point: as in pydllm.metrics.
_TOLERATED_LOSS = 5.0


def sweep(
    model: Model,
    problems: list[Problem],
    kind: str,
    thresholds: Sequence[float],
    *,
    backend: str | None = None,
    on_point: Callable[[], None] = lambda: None,
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Decode the problems at one token a step and at every threshold.

    Returns:
        (tokens per forward, accuracy in percent) of each setting, and those left out: faster than
        the last point whose accuracy is within 5 of the slowest, or a speed that was there already
        with a better accuracy.
    """
    points = []
    for algorithm in (Static(block_length=BLOCK), *map(KINDS[kind], thresholds)):
        score, _, _ = evaluate(model, ("", ""), algorithm, problems, backend=backend)
        points.append((score.tokens_per_forward, score.exact_percent))
        on_point()
    kept = curve(points)
    return kept, [point for point in points if point not in kept]


def curve(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that an area is taken under: the best at each speed, as far as accuracy lasts."""
    best: dict[float, float] = {}
    for rho, y in points:
        best[rho] = max(y, best.get(rho, 0.0))
    kept = sorted(best.items())
    while kept[-1][1] < kept[0][1] - _TOLERATED_LOSS:
        kept.pop()
    return kept


def parse_thresholds(text: str, kind: str) -> list[float]:
    """Numbers with commas between, each one that the algorithm takes."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--thresholds: expected numbers with commas between, got {text!r}"
        ) from None
    for value in values:
        KINDS[kind](value)
    return values


def sweep_models(
    models: Sequence[str],
    kind: str,
    thresholds: Sequence[float],
    problems: int,
    *,
    device: str | None,
    backend: str | None,
    console: Console,
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """The curve of each model, by its folder's name and the task; says what was left out."""
    loaded = {name: load(name, device=device) for name in models}  # all, before the first runs
    tasks = held_out_problems(problems)
    points = {}
    for name, model in loaded.items():
        with console.status(f"decoding with {name}"):
            kept, left_out = sweep(model, tasks, kind, thresholds, backend=backend)
        for rho, y in left_out:
            console.print(f"{name}: left out {y:.1f} % at {rho:.2f} tokens per forward")
        points[name.rstrip("/").rpartition("/")[2]] = {TASK: kept}
    return points
