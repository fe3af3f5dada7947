"""The published points of d3LLM's comparison (arXiv 2601.07568), as data, and their scores."""

import json

import pytest
from click.testing import CliRunner

from pydllm.cli import main
from pydllm.metrics import compare, read_points
from pydllm.metrics.comparison import COLUMNS

TASKS = ("GSM8K-CoT", "MATH", "MBPP", "HumanEval", "Long-GSM8K")


def _curves(*cells):
    """Cells of (accuracy at one token a forward[, tokens per forward, accuracy])."""
    rows = [[(1.0, cell[0]), *([cell[1:]] if len(cell) > 1 else [])] for cell in cells]
    return dict(zip(TASKS, rows, strict=False))


LLADA = {
    "Qwen-2.5-7B-it": _curves((74.1,), (41.15,), (63.6,), (67.73,), (82.56,)),
    "LLaDA": _curves((72.55,), (32.2,), (41.72,), (38.28,), (78.58,)),
    "Fast-dLLM": _curves(
        (74.79, 2.77, 74.68),
        (32.1, 1.97, 30.82),
        (41.58, 2.13, 38.6),
        (38.16, 2.56, 37.8),
        (78.45, 2.45, 78.01),
    ),
    "D2F": _curves(
        (74.98, 2.88, 74.39),
        (29.1, 2.66, 28.94),
        (39.1, 2.13, 39.0),
        (41.02, 2.69, 40.64),
        (76.0, 2.7, 75.66),
    ),
    "dParallel": _curves(
        (74.0, 5.14, 72.63),
        (32.0, 3.17, 30.18),
        (41.62, 2.35, 40.0),
        (39.68, 4.93, 39.02),
        (79.15, 4.49, 76.65),
    ),
    "d3LLM": _curves(
        (74.02, 9.11, 73.09),
        (32.76, 5.74, 30.36),
        (42.0, 4.21, 40.6),
        (39.8, 5.95, 39.63),
        (78.32, 6.95, 74.22),
    ),
}
DREAM = {
    "Qwen-2.5-7B-it": _curves((74.1,), (41.15,), (63.8,), (72.25,), (82.56,)),
    "EAGLE-3": _curves(
        (76.57, 5.12, 76.57),
        (39.8, 5.72, 39.8),
        (60.2, 5.69, 60.2),
        (67.58, 5.98, 67.58),
        (80.52, 5.57, 80.52),
    ),
    "Dream": _curves((83.94,), (39.63,), (57.2,), (55.2,), (78.95,)),
    "Fast-dLLM-Dream": _curves(
        (83.68, 1.44, 79.0),
        (39.53, 1.78, 38.3),
        (56.38, 1.2, 53.2),
        (54.86, 1.33, 54.27),
        (78.83, 1.79, 76.57),
    ),
    "Fast-dLLM-v2": _curves(
        (82.82, 2.21, 81.48),
        (49.92, 2.61, 48.74),
        (61.23, 2.04, 59.12),
        (63.2, 2.58, 61.7),
        (82.34, 2.58, 80.97),
    ),
    "dParallel-Dream": _curves(
        (83.8, 3.02, 82.12),
        (39.06, 2.94, 38.72),
        (57.8, 2.24, 55.4),
        (56.08, 2.57, 54.27),
        (81.27, 3.49, 78.56),
    ),
    "d3LLM-Dream": _curves(
        (83.47, 4.94, 81.36),
        (39.38, 3.92, 38.21),
        (58.8, 2.96, 55.6),
        (58.86, 3.2, 57.1),
        (81.2, 4.8, 77.18),
    ),
}


def test_published_points_score_and_rank_as_published():
    llada, dream = compare(LLADA), compare(DREAM)
    assert llada.y_max == {
        "GSM8K-CoT": 74.98,
        "MATH": 41.15,
        "MBPP": 63.6,
        "HumanEval": 67.73,
        "Long-GSM8K": 82.56,
    }
    assert dream.y_max["MATH"] == 49.92 and dream.y_max["GSM8K-CoT"] == 83.94
    assert llada.scores["d3LLM"]["GSM8K-CoT"] == pytest.approx(637.6549, abs=1e-4)
    assert llada.scores["d3LLM"]["HumanEval"] == pytest.approx(96.6405, abs=1e-4)
    assert dream.scores["d3LLM-Dream"]["GSM8K-CoT"] == pytest.approx(391.3278, abs=1e-4)
    assert dream.scores["EAGLE-3"]["GSM8K-CoT"] == pytest.approx(318.9862, abs=1e-4)
    assert dream.scores["Fast-dLLM-v2"]["MATH"] == pytest.approx(126.6553, abs=1e-4)
    # The leaderboard's means, one digit as it shows them.
    assert round(llada.means["d3LLM"], 1) == 274.3
    assert round(llada.means["dParallel"], 1) == 175.2
    assert round(dream.means["EAGLE-3"], 1) == 305.3
    assert round(dream.means["d3LLM-Dream"], 1) == 221.7
    assert llada.ranking[:2] == ["d3LLM", "dParallel"]
    assert dream.ranking[:2] == ["EAGLE-3", "d3LLM-Dream"]
    for task in TASKS:  # best of the diffusion models on every task
        best = max((m for m in LLADA if m != "Qwen-2.5-7B-it"), key=lambda m: llada.scores[m][task])
        assert best == "d3LLM"


def test_means_are_over_the_tasks_a_method_has():
    """The published script always divides by five, which makes 147.4 of this 184.3."""
    coder = {
        "Qwen2.5-Coder-7B": {
            "HE": [(1, 86.6)],
            "HE+": [(1, 82.3)],
            "M": [(1, 83.5)],
            "M+": [(1, 70.1)],
        },
        "d3LLM-Coder": {
            "HE": [(1, 82.4), (2.88, 79.7)],
            "HE+": [(1, 74.4), (2.88, 71.3)],
            "M": [(1, 80.1), (2.5, 80.0)],
            "M+": [(1, 69.6), (2.5, 69.3)],
        },
    }
    result = compare(coder)
    assert result.means["d3LLM-Coder"] == pytest.approx(184.294, abs=1e-3)
    del coder["Qwen2.5-Coder-7B"]["M"], coder["Qwen2.5-Coder-7B"]["M+"]
    assert compare(coder).means["Qwen2.5-Coder-7B"] == pytest.approx((86.6 + 82.3) / 2)


def test_a_best_accuracy_from_outside_the_table():
    assert compare({"a": {"t": [(1, 60), (2, 60)]}}).means["a"] == 120
    assert compare({"a": {"t": [(1, 60), (2, 60)]}}, y_max={"t": 80}).means["a"] < 120
    for y_max, message in (({"x": 1}, "expected one of t, got x"), ({"t": 50}, "at least 60")):
        with pytest.raises(ValueError, match=message):
            compare({"a": {"t": [(1, 60)]}}, y_max=y_max)


@pytest.mark.parametrize("kind", ["csv", "json", "yaml"])
def test_files_to_tables_and_pictures(tmp_path, kind):
    path = tmp_path / f"points.{kind}"
    if kind == "csv":
        rows = [(m, t, *point) for m, c in LLADA.items() for t, ps in c.items() for point in ps]
        lines = [COLUMNS, *rows]
        path.write_text("\n".join(",".join(map(str, line)) for line in lines))
    elif kind == "json":
        path.write_text(json.dumps(LLADA))
    else:
        yaml = pytest.importorskip("yaml", reason="pyyaml is not installed")
        path.write_text(yaml.safe_dump(json.loads(json.dumps(LLADA))))
    assert read_points(path) == LLADA
    out = tmp_path / "out"
    result = CliRunner().invoke(main, ["aup", str(path), "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout.splitlines()[-1])
    assert record["means"]["d3LLM"] == pytest.approx(274.3, abs=0.05)
    assert {file.name for file in out.iterdir()} == {
        "points.csv",
        "scores.json",
        "curves.png",
        "bars.png",
    }
    assert read_points(out / "points.csv") == LLADA
    assert (out / "bars.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "method,task\nx,y\n", "got no tokens_per_forward, accuracy"),
        ("a.csv", f"{','.join(COLUMNS)}\nx,y,1,fast\n", "a.csv:2: expected two numbers"),
        ("a.json", "{", "expected JSON"),
        ("a.json", "[1]", "expected methods by name, got list"),
        ("a.json", '{"x": 3}', "x: expected tasks by name, got 3"),
        ("a.json", '{"x": {"t": [[1]]}}', "x, t: expected a list of"),
        ("a.json", '{"x": {"t": [[1, 80], [4, 74]]}}', "x, t: points: expected the fastest point"),
        ("a.json", "{}", "expected at least one method with a task, got none"),
        ("a.txt", "", "expected a .csv, .json, .yaml or .yml file"),
    ],
)
def test_bad_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    result = CliRunner().invoke(main, ["aup", str(tmp_path / name), "--out", str(tmp_path / "o")])
    assert result.exit_code == 1, result.output
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected FILES with points or --sweep"),
        (("no.csv",), "no.csv: expected a text file"),
        (("--sweep", "m", "--thresholds", "x"), "--thresholds: expected numbers"),
        (("--sweep", "m", "--thresholds", "2"), "threshold: expected a number in"),
        (("--sweep", "no/such/model"), "no/such/model"),
        (("no.csv", "--y-max", "GSM8K"), "expected TASK=ACCURACY, got 'GSM8K'"),
    ],
)
def test_bad_options(tmp_path, arguments, message):
    result = CliRunner().invoke(main, ["aup", *arguments, "--out", str(tmp_path / "o")])
    assert result.exit_code in (1, 2), result.output
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "o").exists()


def test_a_sweep_of_the_bundled_model(tmp_path):
    from pydllm.demo import WEIGHTS

    arguments = ["--sweep", str(WEIGHTS), "--problems", "8", "--thresholds", "0.9,0.5,0.01"]
    out = tmp_path / "out"
    result = CliRunner().invoke(main, ["aup", *arguments, "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    curve = json.loads(result.stdout.splitlines()[-1])["points"]["llada-tiny"]["word problems"]
    assert 2 <= len(curve) <= 3 and curve[1][0] > 1.5 * curve[0][0]
    assert curve[0][1] == 100
    assert "left out" in result.output + result.stderr
