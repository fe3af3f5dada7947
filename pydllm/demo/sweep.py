"""Settings of an algorithm from careful to fast, for the frontier of accuracy over parallelism."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

from pydllm.decoding import APD, EntropyBound, Factor, FreeDave, MultiBlock, Static, Threshold
from pydllm.decoding.driver import Algorithm
from pydllm.demo import SWEEPS
from pydllm.demo.evaluate import BLOCKS, Score
from pydllm.demo.points import curve
from pydllm.metrics import aup
from pydllm.models import Model

Key = TypeVar("Key", bound=Hashable)
_THRESHOLDS = (0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


def settings(sweep: str, model: str, verifier: Model | None) -> dict[str, Algorithm]:
    """The settings of a sweep on a bundled model, by display name."""
    block = BLOCKS[model]
    if sweep == "static":
        return {
            f"{n} per step": Static(block_length=block, tokens_per_step=n)
            for n in (1, 2, 3, 4, 6, 8)
            if n <= block
        }
    if sweep == "threshold":
        return {
            f"threshold {limit}": Threshold(threshold=limit, block_length=block)
            for limit in _THRESHOLDS
        }
    if sweep == "factor":
        return {
            f"factor {f}": Factor(factor=f, block_length=block)
            for f in (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
        }
    if sweep == "entropy_bound":
        return {
            f"bound {b}": EntropyBound(bound=b, block_length=block)
            for b in (0.01, 0.1, 0.2, 0.5, 1.0, 2.0)
        }
    if sweep == "freedave":
        return {
            f"{n} drafts": FreeDave(draft_steps=n, block_length=block) for n in (1, 2, 4, 8, 16)
        }
    if sweep == "apd" and verifier is not None:
        return {
            f"R {mixture}, W {window}, M {lookahead}": APD(
                verifier, mixture=mixture, window=window, lookahead=lookahead
            )
            for mixture in (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0)
            for window in (1, 16)
            for lookahead in (32, 40, 48)
        }
    if sweep == "multiblock":
        limits = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0)
        return {
            f"entropy {limit}": MultiBlock(threshold=limit, block_length=block) for limit in limits
        }
    raise ValueError(f"sweep: expected one of {', '.join(SWEEPS)}, got {sweep!r}")


def frontier(scores: list[Score]) -> list[Score]:
    """The scores that no other beats in both accuracy and tokens per forward, slowest first."""
    best: list[Score] = []
    for score in sorted(scores, key=lambda s: (-s.tokens_per_forward, -s.exact_percent)):
        if not best or score.exact_percent > best[-1].exact_percent:
            best.append(score)
    return best[::-1]


def by_algorithm(plan: dict[str, Algorithm], scores: list[Score]) -> dict[str, list[Score]]:
    """The scores of each algorithm, whatever its settings.

    The plan's first, the careful decoding that the others are compared with, begins every curve.
    """
    first = next(iter(plan))
    groups: dict[str, list[Score]] = {}
    for algorithm, score in zip(plan.values(), scores, strict=True):
        name = type(algorithm).__name__
        if name not in groups:
            groups[name] = [scores[0]] if "1 per step" in first and score is not scores[0] else []
        groups[name].append(score)
    return groups


def areas(sweeps: Mapping[Key, list[Score]]) -> dict[Key, float]:
    """AUP of each sweep, against the best accuracy of all of them."""
    best = max(score.exact_percent for scores in sweeps.values() for score in scores)
    points = {
        name: curve([(score.tokens_per_forward, score.exact_percent) for score in scores])
        for name, scores in sweeps.items()
    }
    return {name: aup(kept, y_max=best) if best else 0.0 for name, kept in points.items()}
