import random

import pytest

from pydllm.metrics import aup


@pytest.mark.parametrize(
    ("points", "y_max", "alpha", "expected"),
    [
        # Published points of d3LLM's comparison, their scores recomputed by hand.
        ([(1, 74.02), (9.11, 73.09)], 74.98, 3, 637.6549),
        ([(1, 39.8), (5.95, 39.63)], 67.73, 3, 96.6405),
        ([(1, 83.47), (4.94, 81.36)], 83.94, 3, 391.3278),
        ([(1, 76.57), (5.12, 76.57)], 83.94, 3, 318.9862),
        ([(1, 49.92), (2.61, 48.74)], 49.92, 3, 126.6553),
        # Made-up ones: constant accuracy, order, alpha, a dropped point, a weight above 1.
        ([(1, 80), (3, 80)], 80, 3, 240),
        ([(1, 80), (2, 79), (4, 76)], 80, 3, 299.5523),
        ([(4, 76), (1, 80), (2, 79)], 80, 3, 299.5523),
        ([(1, 80), (2, 79), (4, 76)], 80, 10, 270.6722),
        ([(1, 80), (2, 74), (4, 76)], 80, 3, 298.1207),
        ([(1, 80), (3, 80)], 70, 3, 240),
        ([(1, 61.5)], 80, 3, 61.5),
    ],
)
def test_worked_scores(points, y_max, alpha, expected):
    assert aup(points, y_max, alpha) == pytest.approx(expected, abs=1e-4)


# Accuracy at one token a forward; tokens per forward and accuracy at the tuned threshold: as
# published, on GSM8K-CoT, MATH, MBPP, HumanEval and Long-GSM8K. None: the first point alone.
LLADA_BEST = (74.98, 41.15, 63.6, 67.73, 82.56)
LLADA = {
    "LLaDA": [(72.55,), (32.2,), (41.72,), (38.28,), (78.58,)],
    "Fast-dLLM": [
        (74.79, 2.77, 74.68),
        (32.1, 1.97, 30.82),
        (41.58, 2.13, 38.6),
        (38.16, 2.56, 37.8),
        (78.45, 2.45, 78.01),
    ],
    "D2F": [
        (74.98, 2.88, 74.39),
        (29.1, 2.66, 28.94),
        (39.1, 2.13, 39.0),
        (41.02, 2.69, 40.64),
        (76.0, 2.7, 75.66),
    ],
    "dParallel": [
        (74.0, 5.14, 72.63),
        (32.0, 3.17, 30.18),
        (41.62, 2.35, 40.0),
        (39.68, 4.93, 39.02),
        (79.15, 4.49, 76.65),
    ],
    "d3LLM": [
        (74.02, 9.11, 73.09),
        (32.76, 5.74, 30.36),
        (42.0, 4.21, 40.6),
        (39.8, 5.95, 39.63),
        (78.32, 6.95, 74.22),
    ],
}
DREAM_BEST = (83.94, 49.92, 63.8, 72.25, 82.56)
DREAM = {
    "Dream": [(83.94,), (39.63,), (57.2,), (55.2,), (78.95,)],
    "Fast-dLLM": [
        (83.68, 1.44, 79.0),
        (39.53, 1.78, 38.3),
        (56.38, 1.2, 53.2),
        (54.86, 1.33, 54.27),
        (78.83, 1.79, 76.57),
    ],
    "Fast-dLLM v2": [
        (82.82, 2.21, 81.48),
        (49.92, 2.61, 48.74),
        (61.23, 2.04, 59.12),
        (63.2, 2.58, 61.7),
        (82.34, 2.58, 80.97),
    ],
    "dParallel": [
        (83.8, 3.02, 82.12),
        (39.06, 2.94, 38.72),
        (57.8, 2.24, 55.4),
        (56.08, 2.57, 54.27),
        (81.27, 3.49, 78.56),
    ],
    "d3LLM": [
        (83.47, 4.94, 81.36),
        (39.38, 3.92, 38.21),
        (58.8, 2.96, 55.6),
        (58.86, 3.2, 57.1),
        (81.2, 4.8, 77.18),
    ],
    "EAGLE-3": [
        (76.57, 5.12, 76.57),
        (39.8, 5.72, 39.8),
        (60.2, 5.69, 60.2),
        (67.58, 5.98, 67.58),
        (80.52, 5.57, 80.52),
    ],
}


def _scores(table, best):
    """AUP of each method on every task."""
    return {
        method: [
            aup([(1, row[0]), *([row[1:]] if row[1:] else [])], y_max)
            for row, y_max in zip(rows, best, strict=True)
        ]
        for method, rows in table.items()
    }


def test_published_points_rank_as_published():
    llada, dream = _scores(LLADA, LLADA_BEST), _scores(DREAM, DREAM_BEST)
    for task in range(5):
        for table, least in ((llada, "LLaDA"), (dream, "Dream")):
            diffusion = [name for name in table if name != "EAGLE-3"]
            assert max(diffusion, key=lambda name: table[name][task]) == "d3LLM" or (
                table is dream and task == 1  # Fast-dLLM v2 has another parent
            )
            assert least not in sorted(diffusion, key=lambda name: -table[name][task])[:3]
    means = {
        (family, name): sum(row) / 5
        for family, table in (("llada", llada), ("dream", dream))
        for name, row in table.items()
    }
    leaders = [("dream", "EAGLE-3"), ("llada", "d3LLM"), ("dream", "d3LLM"), ("llada", "dParallel")]
    assert sorted(means, key=lambda key: -means[key])[:4] == leaders
    published = (305.3, 274.3, 221.7, 175.2)
    assert [means[key] for key in leaders] == pytest.approx(published, abs=0.06)
    order = sorted((key[1] for key in means if key[0] == "llada"), key=lambda n: means["llada", n])
    assert order[-2:] == ["dParallel", "d3LLM"] and order[0] == "LLaDA"


def test_it_scales_and_grows():
    """Twice the tokens per forward, twice the area; a faster point that is kept adds to it."""
    rng = random.Random(0)
    for _ in range(100):
        points = [(1 + 3 * i + rng.random(), 80 - 4 * rng.random()) for i in range(4)]
        points[0] = (1, 80)
        area = aup(points, 85)
        assert aup([(2 * rho, y) for rho, y in points], 85) == pytest.approx(2 * area)
        assert aup([*points, (20, 75 + 5 * rng.random())], 85) > area


@pytest.mark.parametrize(
    ("points", "y_max", "alpha", "message"),
    [
        ([], 80, 3, "points: expected at least one"),
        ([(1, 80), (2, 79), (4, 74)], 80, 3, "fastest point's accuracy to be at least 75 .*got 74"),
        ([(0, 80)], 80, 3, "tokens per forward above 0, got 0"),
        ([(1, 101)], 80, 3, "accuracy in percent, 0 to 100, got 101"),
        ([(1, float("nan"))], 80, 3, "accuracy in percent"),
        ([(1, 80), (1, 79)], 80, 3, "each tokens per forward once, got 1.0 twice"),
        ([(1, 80)], 0, 3, "y_max: expected a finite number above 0, got 0"),
        ([(1, 80)], 80, -1, "alpha: expected a finite number of at least 0, got -1"),
    ],
)
def test_bad_input(points, y_max, alpha, message):
    with pytest.raises(ValueError, match=message):
        aup(points, y_max, alpha)


def test_fractions_are_warned_of():
    with pytest.warns(UserWarning, match="are they fractions"):
        aup([(1, 0.8), (2, 0.79)], 0.8)
