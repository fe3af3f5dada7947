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


# (1, accuracy), (tokens per forward, accuracy) on GSM8K-CoT, as published.
PUBLISHED = {
    "Fast-dLLM": [(1, 74.79), (2.77, 74.68)],
    "D2F": [(1, 74.98), (2.88, 74.39)],
    "dParallel": [(1, 74.0), (5.14, 72.63)],
    "d3LLM": [(1, 74.02), (9.11, 73.09)],
}


def test_published_points_rank_as_published():
    scores = {name: aup(points, 74.98) for name, points in PUBLISHED.items()}
    assert sorted(scores, key=scores.get) == ["Fast-dLLM", "D2F", "dParallel", "d3LLM"]


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
