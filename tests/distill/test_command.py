import json

import pytest
import torch
from click.testing import CliRunner

import pydllm
from pydllm.cli import main
from pydllm.demo import WEIGHTS
from tests.models.plain import CONFIGS, random_plain, write_checkpoint
from training import prompts

SMALL = (
    *("--max-new-tokens", "48", "--block-length", "24", "--windows", "12,24", "--shard", "2"),
    *("--batch-size", "2", "--accumulation", "1", "--lora-rank", "0", "--device", "cpu"),
)


def _distill(out, data, *changes, teacher=WEIGHTS, steps=3):
    arguments = ["--teacher", str(teacher), "--data", str(data), "--out", str(out), *SMALL]
    return CliRunner().invoke(main, ["distill", *arguments, "--steps", str(steps), *changes])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    CliRunner().invoke(prompts.main, ["--out", str(path), "--count", "4"], catch_exceptions=False)
    return path


def test_the_student_loads_and_the_command_goes_on(tmp_path, data):
    out, pattern = tmp_path / "out", ("--answer-pattern", r"answer (\d+)$", "--save-every", "1")
    result = _distill(out, data, *pattern)
    assert result.exit_code == 0, result.output
    assert "4 of 4 trajectories" in result.output
    names = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "training.png"} <= names
    student = pydllm.load(out, device="cpu")
    assert pydllm.generate(
        student,
        ["sam has 7 coins . how many coins ? in order"],
        pydllm.Threshold(threshold=0.9),
        max_new_tokens=48,
    ).text
    weights = (out / "model.safetensors").read_bytes()
    assert weights != (WEIGHTS / "model.safetensors").read_bytes()
    assert len(weights) == pytest.approx(
        len((WEIGHTS / "model.safetensors").read_bytes()), rel=0.01
    )

    # The same command again does nothing twice and ends with the same bytes, even when a shard,
    # the state's last step and the student are gone.
    (out / "trajectories" / "00001.safetensors").unlink()
    (out / "model.safetensors").unlink()
    state = torch.load(out / "training.pt", weights_only=True)
    again = _distill(out, data, *pattern)
    assert again.exit_code == 0, again.output
    assert (out / "model.safetensors").read_bytes() == weights
    assert state["step"] == 3
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]

    other = _distill(out, data, *pattern, steps=4)
    assert other.exit_code == 1
    assert "expected steps 3, got 4" in " ".join(other.output.split())


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        (("--teacher", "no/such"), 1, "--teacher: expected a folder, got no/such"),
        (("--data", "no.jsonl"), 1, "--data: expected a file, got no.jsonl"),
        (("--windows", "12,x"), 1, "--windows: expected ints with commas between, got '12,x'"),
        (("--windows", "0"), 1, "windows: expected one or more ints"),
        (("--ratios", "0.9,0.1"), 1, "ratios: expected two numbers"),
        (("--score", "best"), 1, "score: expected one of confidence"),
        (("--max-new-tokens", "1000"), 1, "--data: expected at most 128 positions with"),
        (("--answer-pattern", "("), 1, "--answer-pattern: expected a regular expression"),
        (("--preset", "gpt"), 2, "'gpt' is not one of"),
        (("--steps", "0"), 2, "0 is not in the range"),
        (("--device", "cuda", "--accelerate"), 1, "--accelerate"),
    ],
)
def test_bad_options_write_nothing(tmp_path, data, changes, code, message):
    result = _distill(tmp_path / "out", data, *changes)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected one prompt a line, got none"),
        ('{"prompt": "tom"}\n{"text": "tom"}', "prompts.jsonl:2: expected an object whose prompt"),
        ("tom", "prompts.jsonl:1: expected a JSON object"),
        ('{"prompt": [1, 86]}', r"prompts[0][1]: expected a token id in [0, 86), got 86"),
        ('{"prompt": [0]}', "expected no mask in a prompt"),
        ('{"prompt": "unheard of"}', "expected text that the tokenizer can encode"),
    ],
)
def test_bad_data_writes_nothing(tmp_path, text, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    result = _distill(tmp_path / "out", path)
    assert result.exit_code == 1, result.output
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_damaged_settings_are_named(tmp_path, data, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/settings.json").write_text(text)
    result = _distill(tmp_path / "out", data)
    assert result.exit_code == 1
    assert "out/settings.json: expected" in "".join(result.output.split("\n"))


def test_other_folders_and_models_are_refused(tmp_path, data):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("mine")
    result = _distill(tmp_path / "used", data)
    assert result.exit_code == 1 and "expected a new folder or one to go on" in result.output
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["thesis.txt"]
    sdar = write_checkpoint(tmp_path / "sdar", random_plain(CONFIGS["sdar"]))
    result = _distill(tmp_path / "out", data, teacher=sdar)
    assert result.exit_code == 1
    assert "expected a model with full attention, got 'block_causal'" in result.output
    assert not (tmp_path / "out").exists()
