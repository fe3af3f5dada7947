"""What the demo prints fits a terminal of 80 columns; its pictures draw what they are given."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

import pydllm
from pydllm.demo import MODELS, VERIFIER, figures, report
from pydllm.demo.command import side_by_side
from pydllm.demo.evaluate import Score, algorithms, reference_of
from pydllm.demo.replay import Run


@pytest.fixture(scope="module")
def verifier():
    return pydllm.load(VERIFIER, device="cpu")


def _printed(*things):
    file = io.StringIO()
    console = Console(file=file, width=80, markup=False)
    for thing in things:
        console.print(thing)
    return file.getvalue().splitlines()


def _score(model, name, right=100.0, forwards=99.9, rate=99.99):
    return Score(model, name, right, forwards, rate, 99999.0, 100.0)


def _rounds(name):
    """As a score has them: those of SelfSpeculative alone."""
    return 16.0 if name.startswith("SelfSpeculative") else None


@pytest.mark.parametrize("model", MODELS)
def test_tables_fit(model, verifier):
    names = list(algorithms(model, verifier))
    title = f"{model}: 10000 held-out problems, cuda:0, bfloat16"
    scores = [replace(_score(model, name), tokens_per_round=_rounds(name)) for name in names]
    lines = _printed(report.score_table(scores, title))
    assert sum("16.00" in line for line in lines) == sum("SelfSpec" in name for name in names)
    assert not any("\u2026" in line for line in lines) and max(map(len, lines)) <= 80
    assert all(any(line.strip().startswith(name + " ") for line in lines) for name in names)
    assert {"algorithm", "forwards", "right", "same"} <= set(" ".join(lines).split())


def test_the_table_of_areas_fits():
    row = dict.fromkeys(("EntropyBound", "LeftToRight", "SelfSpeculative"), 1234.0)
    lines = _printed(report.area_table(dict.fromkeys(MODELS, row), "AUP"))
    assert not any("\u2026" in line for line in lines)
    assert sum(line.count("1234") for line in lines) == 3 * len(MODELS)


@pytest.mark.parametrize("model", MODELS)
def test_six_algorithms_stand_side_by_side(model, verifier):
    plan = algorithms(model, verifier)
    names = side_by_side(plan)
    assert len(names) == 6 and names[0] == next(iter(plan)) and set(names) <= set(plan)
    assert {figures.family(name) for name in names} >= {"Static", "Threshold", "FreeDave"}


def test_points_worth_a_name():
    """The front, the first setting, and each algorithm's fastest that is as accurate."""
    found = [
        _score("m", "Static, 1 per step", 98, rate=0.7),
        _score("m", "Static, 4 per step", 44, rate=2.8),
        _score("m", "Threshold 0.9", 97.5, rate=7),
        _score("m", "Threshold 0.6", 90, rate=9),
        _score("m", "FreeDave, 4 drafts", 98, rate=2),
        _score("m", "FreeDave, 8 drafts", 98, rate=2.6),
        _score("m", "APD, mixture 0.7", 99, rate=14),
    ]
    from pydllm.demo.sweep import frontier

    front = frontier(found)
    assert [score.algorithm for score in front] == ["APD, mixture 0.7"]
    named = {score.algorithm for score in figures._worth_a_name(found, front)}
    wanted = "Static, 1 per step; Threshold 0.9; FreeDave, 8 drafts; APD, mixture 0.7"
    assert named == set(wanted.split("; "))


def _texts(figure):
    return [text.get_text() for axis in figure.axes for text in axis.texts]


def test_the_picture_of_forwards_says_what_is_lost():
    pytest.importorskip("matplotlib")
    scores = [_score("m", "Static, 1 per step", 98, 40), _score("m", "Static, 4 per step", 44, 10)]
    scores += [_score("m", "Threshold 0.9", 97, 5), _score("n", "Static, 1 per step", 90, 30)]
    figure = figures.forwards(scores, figures.THEMES[0])
    assert _texts(figure) == ["1.0 x", "4.0 x, \u221254 points", "8.0 x", "1.0 x"]


def test_names_cover_no_point_and_no_other_name():
    pytest.importorskip("matplotlib")
    rates = (0.7, 2, 2.6, 7, 7.2, 7.4, 14)
    names = (
        "Static, 1",
        "LeftToRight, 2",
        "FreeDave, 8",
        "Factor 1",
        "Threshold 0.9",
        "MultiBlock",
    )
    scores = [
        _score("m", name, 98 - n % 2, rate=rate)
        for n, (name, rate) in enumerate(zip((*names, "APD, 0.7"), rates, strict=True))
    ]
    figure = figures.accuracy(scores, figures.THEMES[1])
    axis = figure.axes[0]
    assert {text.get_text() for text in axis.texts} == {score.algorithm for score in scores}
    from matplotlib.text import Text

    boxes = [Text.get_window_extent(text) for text in axis.texts]
    points = [axis.transData.transform((s.tokens_per_forward, s.exact_percent)) for s in scores]
    for place, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:place])
        assert not any(box.contains(*point) for point in points)


def test_the_order_is_on_its_own_scale_and_frames_what_is_wrong():
    pytest.importorskip("matplotlib")
    from matplotlib import colormaps

    slow = Run("slow", ["a", "b", "c"], [0, 10, 20], 21, [])
    fast = Run("fast", ["a", "b"], [0, 1], 2, [1])
    figure = figures.order("m", [slow, fast], figures.THEMES[0])
    shades = [[patch.get_facecolor() for patch in axis.patches] for axis in figure.axes]
    cividis = colormaps["cividis"]
    assert shades == [[cividis(0.0), cividis(0.5), cividis(1.0)], [cividis(0.0), cividis(1.0)]]
    assert [patch.get_linewidth() for patch in figure.axes[1].patches] == [0, 2]
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles == ["slow: 21 forwards, right", "fast: 2 forwards, wrong"]


def test_speculation_is_compared_with_the_autoregressive_answer():
    plan = algorithms("dual-tiny", None)
    kinds = {name: reference_of(plan, name) for name in plan}
    first = "Static, 1 per step"
    assert kinds["Threshold 0.9"] == kinds["Autoregressive"] == kinds[first] == first
    assert kinds["SelfSpeculative, 15"] == "Autoregressive"
    alone = {name: each for name, each in plan.items() if name.startswith("SelfSpeculative")}
    assert {reference_of(alone, name) for name in alone} == {"SelfSpeculative, 3"}
