import json
import os
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

import pydllm
from pydllm.cli import main
from pydllm.decoding.settings import make_algorithm
from pydllm.demo.evaluate import Score
from pydllm.demo.sweep import frontier

PROMPT = "sam has 7 coins . he finds 5 . they double . he loses 3 . how many coins ? in order"


def _run(*arguments, stdin=None):
    return CliRunner().invoke(main, arguments, input=stdin)


def test_demo_writes_its_table_pictures_and_page(tmp_path):
    only = ("--problems", "4", "--model", "llada-tiny", "--only", "dual", "--json")
    page = tmp_path / "page.html"
    result = _run("demo", *only, "--out", str(tmp_path / "out"), "--html", str(page))
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout.splitlines()[-1])
    scores = record["scores"]
    assert {score["algorithm"] for score in scores} == {
        "Static, dual cache",
        "Threshold 0.9, dual cache",
    }
    lines = (tmp_path / "out/demo.csv").read_text().splitlines()
    assert lines[0].startswith("model,algorithm,exact_percent,forwards,tokens_per_forward")
    assert len(lines) == 3
    assert set(record["aup"]["llada-tiny"]) == {"Static", "Threshold"}
    assert all(area > 50 for area in record["aup"]["llada-tiny"].values())
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    names = ("accuracy", "forwards", "order-llada-tiny")
    assert pictures == sorted(f"{name}{theme}.png" for name in names for theme in ("", "-dark"))
    assert record["files"][-1] == str(page) and page.stat().st_size < 100_000


def test_compare_draws_a_frontier(tmp_path):
    sweeps = ("--sweep", "static", "--sweep", "threshold")
    result = _run("compare", *sweeps, "--problems", "6", "--out", str(tmp_path), "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout.splitlines()[-1])
    scores = record["scores"]
    assert [score["algorithm"] for score in scores][:2] == ["1 per step", "2 per step"]
    assert set(record["aup"]) == {"static", "threshold"}
    assert all(area > 50 for area in record["aup"].values())
    assert len((tmp_path / "llada-tiny.csv").read_text().splitlines()) == len(scores) + 1
    assert (tmp_path / "llada-tiny.png").read_bytes().startswith(b"\x89PNG")


def test_a_frontier_has_no_beaten_point():
    def score(speed, right):
        return Score("", "", right, 0.0, speed, 0.0, 0.0)

    points = [(1, 90), (2, 95), (3, 80), (4, 80), (4, 70), (2, 94)]
    best = frontier([score(*point) for point in points])
    assert [(s.tokens_per_forward, s.exact_percent) for s in best] == [(2, 95), (4, 80)]


def test_generate_answers_a_batch():
    result = _run("generate", "--prompt", PROMPT, "--prompt", PROMPT, "--json")
    assert result.exit_code == 0, result.output
    first, second = map(json.loads, result.stdout.splitlines())
    assert first["text"].split()[-2:] == ["answer", "21"]
    assert first["text"] == second["text"]
    assert first["nfe"] < 48
    assert len(first["ids"]) == len(first["step_map"]) == 48


def test_generate_reads_lines_and_parameters():
    settings = ("--algorithm", "static", "--set", "block_length=16", "--set", "tokens_per_step=4")
    result = _run("generate", *settings, "--max-new-tokens", "48", stdin=PROMPT + "\n\n")
    assert result.exit_code == 0, result.output
    assert "answer 21" in result.output
    assert "forwards" in result.output


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        ("apd", ("mixture=0.5", "window=none")),
        ("lefttoright", ("tokens_per_step=2",)),
        ("multiblock", ("block_length=24", "cache=false", "tail=full")),
        ("freedave", ("block_length=24", "draft_steps=auto")),
    ],
)
def test_generate_takes_every_algorithm(algorithm, settings):
    options = [part for setting in settings for part in ("--set", setting)]
    result = _run("generate", "--prompt", PROMPT, "--algorithm", algorithm, *options, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["text"].split()[-2:] == ["answer", "21"]


def test_names_of_algorithms_are_read_in_every_spelling(tmp_path):
    page, other = tmp_path / "page.html", "entropy_bound,block_length=2"
    asked = ("--prompt", PROMPT, "--max-new-tokens", "4", "--set", "block_length=4")
    shown = ("--html", str(page), "--beside", other, "--beside", "ENTROPY-bound,block_length=1")
    result = _run("generate", *asked, "--algorithm", "EntropyBound", *shown)
    assert result.exit_code == 0, result.output
    assert f'"{other}"' in page.read_text()
    for name in ("entropybound", "entropy_bound", "EntropyBound", "Entropy-Bound"):
        swept = _run("compare", "--sweep", name, "--model", "no-such-model")
        assert "--model: expected one of llada-tiny" in swept.output  # the check after the name's
        unknown = _run("compare", "--sweep", f"{name}s")
        assert "'entropy_bound'" in unknown.output and unknown.exit_code == 2
    for name in ("self_speculative", "self-speculative", "SelfSpeculative", "selfspeculative"):
        assert make_algorithm(name, {}) == pydllm.SelfSpeculative()


def test_list_algorithms():
    result = _run("generate", "--list-algorithms")
    assert result.exit_code == 0
    assert "threshold: threshold=0.9, block_length=32" in result.output
    assert "apd: mixture=0.7, window=16, lookahead=64" in result.output


def test_env_is_json():
    result = _run("env", "--json")
    assert result.exit_code == 0, result.output
    assert "torch" in json.loads(result.stdout)["packages"]


def test_freedave_is_lossless_and_takes_fewer_forwards(tmp_path):
    result = _run(
        "demo",
        "--model",
        "llada-tiny",
        "--problems",
        "8",
        "--only",
        "1 per step",
        "--only",
        "8 drafts",
        "--json",
        "--out",
        str(tmp_path),
    )
    assert result.exit_code == 0, result.output
    static, freedave = json.loads(result.stdout.splitlines()[-1])["scores"]
    assert freedave["equal_percent"] == 100
    assert freedave["forwards"] * 2 < static["forwards"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ("generate", "--prompt", "tom", "--algorithm", "best"),
            2,
            "expected one of static, thresh",
        ),
        (
            ("generate", "--prompt", "tom", "--set", "speed=1"),
            2,
            "threshold takes threshold, block",
        ),
        (("generate", "--prompt", "tom", "--set", "threshold=x"), 2, "expected float, got 'x'"),
        (
            ("generate", "--prompt", "tom", "--set", "threshold=2"),
            1,
            "expected a number in [0, 1",
        ),
        (
            ("generate", "--prompt", "tom", "--max-new-tokens", "0"),
            1,
            "expected an int of at least 1",
        ),
        (("generate", "--prompt", "tom", "--model", "no/such/folder"), 1, "no/such/folder"),
        (("generate", "--prompt", "unknown"), 1, "expected text that the tokenizer can encode"),
        (("generate",), 2, "expected --prompt or lines on standard input, got neither"),
        (("demo", "--problems", "0"), 2, "0 is not in the range"),
        (("demo", "--only", "magic"), 2, "expected a part of one of Static"),
        (("generate", "--backend", "metal"), 2, "'metal' is not one of"),
    ],
)
def test_bad_options(arguments, code, message):
    result = _run(*arguments, stdin="")
    assert result.exit_code == code, result.output
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


def _process(*arguments, **settings):
    done = subprocess.run(
        [sys.executable, "-m", "pydllm", *arguments],
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.parametrize("name", ["PYDLLM_BACKEND", "PYDLLM_LOG", "PYDLLM_REPLACE", "PYDLLM_PDL"])
def test_a_bad_environment_is_one_line(name):
    done = _process("env", **{name: "foo"})
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"Error: {name}: expected one of ")
    assert done.stderr.endswith("got 'foo'\n") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "device, message",
    [
        ("gpu", "expected a device such as cpu, cuda or cuda:1, got 'gpu'"),
        ("cuda:99", "expected cpu, as this torch is built for, got cuda:99|of . CUDA devices"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "demo", "compare", "aup"])
def test_a_device_that_is_not_here(command, device, message):
    result = _run(command, "--device", device)
    assert result.exit_code == 1 and re.search(f"--device: .*({message})", result.output)
    with pytest.raises(ValueError, match=f"^device: .*({message})"):
        pydllm.load("llada-tiny", device=device)


def test_messages_keep_their_brackets(tmp_path, monkeypatch):
    """Square brackets are text: those of an extra's name, and those of a folder's."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = ("--problems", "2", "--model", "llada-tiny", "--only", "0.9", "--out")
    result = _run("demo", *arguments, str(tmp_path / "[red]out[/red]"))
    assert result.exit_code == 0, result.output
    assert "pip install 'pydllm[demo]'" in result.output
    assert "[red]out[/red]" in "".join(result.output.split())


def test_the_demos_table_is_read_by_aup(tmp_path):
    only = ("--problems", "2", "--model", "llada-tiny", "--only", "threshold 0", "--out")
    assert _run("demo", *only, str(tmp_path)).exit_code == 0
    csv = str(tmp_path / "demo.csv")
    result = _run("aup", csv, "--out", str(tmp_path / "aup"), "--json")
    assert result.exit_code == 0, result.output
    points = json.loads(result.stdout.splitlines()[-1])["points"]
    assert set(points) == {"llada-tiny, Threshold"}
    assert len(points["llada-tiny, Threshold"]["word problems"]) >= 2


def test_bundled_models_have_names_everywhere(tmp_path):
    result = _run("generate", "--model", "sdar-tiny", "--prompt", PROMPT)
    assert result.exit_code == 0, result.output
    assert pydllm.load("sdar-tiny", device="cpu").spec.block_size == 8
    with pytest.raises(pydllm.CheckpointError, match="no-such-model: expected a directory"):
        pydllm.load("no-such-model")


def test_blocks_are_the_models_unless_others_are_named(tmp_path):
    """In ``generate``, on the page beside it, and in jobs."""
    prompt, page = ("--model", "sdar-tiny", "--prompt", PROMPT), tmp_path / "page.html"
    named = _run("generate", *prompt, "--set", "block_length=8", "--json")
    drafts = ("--algorithm", "freedave", "--set", "baseline=threshold")
    for options in ((), drafts, ("--html", str(page), "--beside", "static,tokens_per_step=2")):
        result = _run("generate", *prompt, *options, "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["ids"] == json.loads(named.stdout)["ids"]
    refused = _run("generate", *prompt, "--set", "block_length=16")
    assert "block_length: expected 8, the block of the block-causal model, got 16" in refused.output
    wide = _run("generate", *prompt, "--algorithm", "static", "--set", "tokens_per_step=9")
    assert "tokens_per_step: expected an int in [1, 8], got 9" in wide.output
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": PROMPT}) + "\n")
    job = ("--model", "sdar-tiny", "--data", str(data), "--out", str(tmp_path / "out"))
    result = _run("generate", *job, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads((tmp_path / "out/results.jsonl").read_text())
    assert answer["text"] == json.loads(named.stdout)["text"]


def test_an_interrupt_is_130(monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("pydllm.decoding.generate", interrupted)
    result = _run("generate", "--prompt", PROMPT)
    assert result.exit_code == 130 and "Interrupted." in result.output


def test_a_terminal_is_asked_for_prompts():
    terminal, keyboard = os.openpty()
    os.write(terminal, b"\x04")  # Ctrl-D at once: no prompt
    done = subprocess.run(
        [sys.executable, "-m", "pydllm", "generate"],
        stdin=keyboard,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and "Prompts, one per line; Ctrl-D ends them" in done.stderr


def test_the_harness_has_help_without_itself(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "pydllm.integrations.harness", raising=False)
    result = _run("lm-eval", "--help")
    assert result.exit_code == 0 and "pip install 'pydllm[eval]'" in result.output
    assert _run("lm-eval", "--tasks", "gsm8k").exit_code == 1


def test_generate_writes_a_page_of_several_algorithms(tmp_path):
    page = tmp_path / "page.html"
    other = "static,block_length=16,tokens_per_step=4"
    asked = ("--prompt", PROMPT, "--prompt", PROMPT, "--html", str(page))
    result = _run("generate", *asked, "--beside", other, "--beside", "apd", "--json")
    assert result.exit_code == 0, result.output
    assert f"written: {page}" in result.stderr.replace("\n", "")
    data = re.search(r'id="data">(.*?)</script>', page.read_text()).group(1)
    scenes = json.loads(data)["scenes"]
    assert [scene["prompt"] for scene in scenes] == [PROMPT] * 2
    runs = scenes[0]["runs"]
    assert [run["name"] for run in runs] == ["threshold", other, "apd"]
    record = json.loads(result.stdout.splitlines()[0])
    assert runs[0]["forwards"] == record["nfe"] and runs[1]["forwards"] > runs[0]["forwards"]
    assert " ".join(runs[0]["words"][:-1]) == record["text"].strip()
    assert all(len(run["words"]) == len(run["entropy"]) and run["wrong"] is None for run in runs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--beside", "static"), "expected --html with --beside, got none"),
        (("--html", "x.html", "--infill"), "expected --html or --infill, got both"),
        (
            ("--html", "x.html", "--beside", "best"),
            "Invalid value for --beside: algorithm: expected one of static, thresh",
        ),
        (("--data", "x", "--out", "y", "--html", "z"), "expected no --html with --data"),
    ],
)
def test_bad_pages(options, message):
    result = _run("generate", "--prompt", PROMPT, *options)
    assert result.exit_code == 2 and message in " ".join(result.output.split())
