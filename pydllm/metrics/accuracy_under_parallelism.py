"""AUP, accuracy under parallelism (d3LLM, arXiv 2601.07568)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from pydllm._checks import check_number, describe

# An accuracy this far below the slowest point's, in percentage points, is a failure, not a trade.
_TOLERATED_LOSS = 5.0


def aup(points: Sequence[tuple[float, float]], y_max: float, alpha: float = 3.0) -> float:
    """Area under the accuracy-parallelism curve, with accuracy that was lost counted down.

    With points sorted by rho and the weight ``W(y) = min(exp(-alpha (1 - y / y_max)), 1)``::

        rho_1 y_1 + 1/2 sum_i (rho_i - rho_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1}))

    Points between the slowest and the fastest whose accuracy is more than 5 below the slowest's are
    left out.

    Args:
        points: (rho, y) of each setting, in any order: tokens per forward, above 0 and all
            different, and accuracy in percent.
        y_max: best accuracy in percent of all methods that are compared, above 0.
        alpha: how hard lost accuracy is punished, at least 0.

    Returns:
        The score. A single point at one token per forward scores its accuracy; an accuracy that
        stays at ``y_max`` scores ``rho_max * y_max``.

    Raises:
        ValueError: no points, a number out of its range, two points at one rho, or a fastest point
            more than 5 below the slowest in accuracy (the curve does not end there: drop it).

    Example:
        >>> round(aup([(1, 80), (2, 79), (4, 76)], y_max=80), 4)
        299.5523
    """
    if not isinstance(points, Sequence):
        raise TypeError(f"points: expected a list of pairs, got {describe(points)}")
    if len(points) == 0:
        raise ValueError("points: expected at least one (tokens per forward, accuracy), got none")
    check_number("y_max", y_max, 0, above=True)
    check_number("alpha", alpha, 0)
    try:
        ordered = sorted((float(rho), float(y)) for rho, y in points)
    except (TypeError, ValueError):
        raise TypeError(
            f"points: expected pairs of numbers (tokens per forward, accuracy), got {points!r:.80}"
        ) from None
    for index, (rho, y) in enumerate(ordered):
        if not 0 < rho < math.inf:
            raise ValueError(f"points: expected tokens per forward above 0, got {rho}")
        if not 0 <= y <= 100:
            raise ValueError(f"points: expected an accuracy in percent, 0 to 100, got {y}")
        if index and rho == ordered[index - 1][0]:
            raise ValueError(f"points: expected each tokens per forward once, got {rho} twice")
    if all(y <= 1 for _, y in ordered):
        warnings.warn("points: accuracies of at most 1 percent; are they fractions?", stacklevel=2)
    least = ordered[0][1] - _TOLERATED_LOSS
    if ordered[-1][1] < least:
        raise ValueError(
            f"points: expected the fastest point's accuracy to be at least {least:g} "
            f"({_TOLERATED_LOSS:g} below the slowest's), got {ordered[-1][1]:g}"
        )
    kept = [(rho, y) for rho, y in ordered if y >= least]
    weighted = [(rho, y * min(math.exp(-alpha * (1 - y / y_max)), 1.0)) for rho, y in kept]
    area = kept[0][0] * kept[0][1]
    for (rho_before, before), (rho, after) in zip(weighted, weighted[1:], strict=False):
        area += 0.5 * (rho - rho_before) * (after + before)
    return area
