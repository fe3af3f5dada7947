"""Programs in the answers of code tasks, and ``pydllm code-eval``."""

import json

import pytest
from click.testing import CliRunner

from pydllm.cli import main
from pydllm.metrics import read_points
from pydllm.metrics.programs import first_block, passes, program, sanitize

HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'from typing import List\n\n\ndef total(values: List[int]) -> int:\n    """Sum."""\n',
    "entry_point": "total",
}
CHECK = "def check(f):\n    assert f([1, 2]) == 3\n\ncheck(total)"


@pytest.mark.parametrize(
    ("answer", "block"),
    [
        ("Sure.\n```python\nx = 1\n```\nDone ```", "x = 1\n"),
        ("x = 1\n```\nThat is it.", "x = 1\n"),
        ("x = 1", "x = 1"),
        ("```\nx = 1\n```", ""),
    ],
)
def test_the_first_block(answer, block):
    assert first_block(answer) == block


@pytest.mark.parametrize(
    ("text", "entry_point", "code"),
    [
        # What the entry point needs, in the order of first definition; prose before and after.
        (
            "Here it is:\nimport math\ndef f(x):\n    return g(x)\ndef g(x):\n\treturn k\n"
            "k = 2\ndef unused():\n    return 1\nThat is all you need, my friend.",
            "f",
            "import math\ndef f(x):\n    return g(x)\ndef g(x):\n    return k\nk = 2",
        ),
        # A later definition replaces the earlier one at its place.
        (
            "def f():\n    return 1\nx = 1\ndef f():\n    return 2",
            None,
            "def f():\n    return 2\nx = 1",
        ),
        # A function that returns nothing, an expression and a tuple are no definitions.
        ("def f():\n    print(1)\nf()\nx, y = 1, 2", None, ""),
        # Of attributes the last name counts, not what it is taken of.
        (
            "class a:\n    b = 1\ndef b():\n    return 1\ndef f():\n    return a.b",
            "f",
            "def b():\n    return 1\ndef f():\n    return a.b",
        ),
        # The longest run of lines, blank ones not counted; of equal runs the first.
        ("x = 1\n)\n\n\n\ny = 2", None, "x = 1"),
        ("no program )", "f", ""),
        ("", None, ""),
        ("x = 1\0", None, ""),
    ],
)
def test_sanitize(text, entry_point, code):
    assert sanitize(text, entry_point) == code


def test_a_hundred_lines_are_looked_at():
    assert sanitize("\n".join(f"x{n} = {n}" for n in range(120))).count("\n") == 99


def test_humaneval_begins_with_its_prompt_and_mbpp_does_not():
    sample = {"doc": HUMANEVAL, "resps": [["    return sum(values)\n```\nexplained"]]}
    code = program(sample)
    assert code.startswith("from typing import List\ndef total(") and "explained" not in code
    mbpp = {"doc": {"text": "Add.", "task_id": 3}, "resps": [["def add(a, b):\n    return a + b"]]}
    assert program(mbpp) == "def add(a, b):\n    return a + b"
    with pytest.raises(ValueError, match="expected resps and doc"):
        program({"resps": [[]], "doc": HUMANEVAL})


@pytest.mark.parametrize(
    ("code", "good"),
    [
        ("def total(v):\n    return sum(v)", True),
        ("def total(v):\n    print('noise', flush=True)\n    return sum(v)", True),
        ("def total(v):\n    return 0", False),
        ("def total(v", False),
        ("import os\nos._exit(0)", False),
        ("import time\ntime.sleep(60)\ndef total(v):\n    return sum(v)", False),
    ],
)
def test_passes(code, good):
    assert passes(code, CHECK, seconds=1.5) is good


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_code_eval_and_then_aup(tmp_path):
    answers = ["    return sum(values)\n```", "    return 0", "```python\nimport\n```"]
    samples = [{"doc": HUMANEVAL, "target": CHECK, "resps": [[text]]} for text in answers]
    path = write(tmp_path / "samples_humaneval_2026.jsonl", samples)
    facts = {"model": "m", "algorithm": "a", "tasks": {"humaneval": {"tokens_per_forward": 2.0}}}
    scores = {"humaneval": {"pass@1,create_test": 0.9}, "gsm8k": {"exact_match,none": 0.5}}
    results = tmp_path / "results_2026.json"
    results.write_text(json.dumps({"results": scores, "config": {"pydllm": facts}}))
    assert read_points(results) == {"m a": {"humaneval": [(2.0, 90.0)]}}
    arguments = ["code-eval", str(results), "--confirm-run-unsafe-code"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "pass@1 0.3333" in result.output
    text = path.with_name(f"{path.name}.cleaned").read_text()
    cleaned = [json.loads(line) for line in text.splitlines()]
    assert [row["pass_at_1"] for row in cleaned] == [1.0, 0.0, 0.0]
    assert cleaned[0]["task_id"] == "HumanEval/0" and "sum(values)" in cleaned[0]["completion"][0]
    assert read_points(results)["m a"]["humaneval"][0][1] == pytest.approx(100 / 3)
    assert json.loads(results.read_text())["results"]["humaneval"]["pass@1,create_test"] == 0.9
    alone = CliRunner().invoke(main, [*arguments[:1], str(path), *arguments[2:], "--json"])
    assert json.loads(alone.output) == {str(path): pytest.approx(1 / 3)}


def test_code_eval_refuses(tmp_path):
    good = {"doc": HUMANEVAL, "target": CHECK, "resps": [["x"]]}
    other = tmp_path / "results_1.json"
    other.write_text(json.dumps({"results": {"gsm8k": {}}, "config": {}}))
    plain = tmp_path / "plain.json"
    plain.write_text("{}")
    for path, confirm, message in [
        (write(tmp_path / "a.jsonl", [good]), [], "expected --confirm-run-unsafe-code"),
        (write(tmp_path / "b.jsonl", []), None, "expected samples of lm-eval, JSON objects"),
        (write(tmp_path / "c.jsonl", [good, {"doc": {}}]), None, "c.jsonl:2: expected resps"),
        (write(tmp_path / "d.jsonl", [good | {"target": None}]), None, "d.jsonl:1: expected tests"),
        (tmp_path / "none.jsonl", None, "expected samples of lm-eval, JSON lines"),
        (other, None, "expected samples_TASK_1.jsonl of HumanEval or MBPP beside it"),
        (plain, None, "expected a results file of lm-eval, got other JSON"),
    ]:
        flags = ["--confirm-run-unsafe-code"] if confirm is None else confirm
        result = CliRunner().invoke(main, ["code-eval", str(path), *flags])
        assert result.exit_code != 0 and message in " ".join(result.output.split()), result.output
