"""``pydllm verify``: every family passes, and what is wrong is found."""

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from pydllm.cli import main
from pydllm.demo import MODELS
from pydllm.models import verify as module
from pydllm.models.verify import verify
from tests.models import moe_plain
from tests.models.plain import CONFIGS, RECENT, random_plain, write_checkpoint

TRUNKS = {
    "llada-bias": "nothing",  # no class of transformers has a bias of the head
    "llada-qkv-bias": "Qwen2",
    "dream": "Qwen2",
    "a2d-qwen2-tied": "Qwen2",
    "a2d-qwen3": "Qwen3",
    "partial-rotary": "nothing",  # nor one whose heads rotate in part
    "sdar": "Qwen3",
    "nemotron": "Ministral3",
    "diff-encoder": "Qwen3",
    "fast-dllm-v2": "Qwen2",
    "mistral": "Mistral",
    "qwen2-sliding": "Qwen2",
} | dict.fromkeys(("llada", "llada-gqa", "llada-mqa", "llada-tied", "llada-padded"), "Llama")
EVERY = CONFIGS | RECENT


@pytest.mark.parametrize("name", EVERY)
def test_every_family_passes(tmp_path, name):
    transformers = pytest.importorskip("transformers", reason="compares with its classes")
    folder = write_checkpoint(tmp_path, random_plain(EVERY[name], dtype=torch.float32))
    report = verify(folder, device="cpu", new_tokens=6)
    assert report.passed, str(report)
    kind = TRUNKS.get(name)
    if kind == "Ministral3" and not hasattr(transformers, "Ministral3Config"):
        kind = "nothing"
    assert kind is None or report.facts["compared with"].startswith(kind), report.facts
    counted = [check for check in report.checks if "greedy" in check.name]
    if kind != "nothing":
        assert counted and all("of 10 equal" in check.found for check in counted)
    else:
        assert not counted


@pytest.mark.parametrize("name", ["sdar-moe-mixed", "llada-moe-mixed", "rnd1", "llada2"])
def test_mixtures_pass(tmp_path, name):
    """Those with a softmax have a class in transformers, of either layout of experts."""
    pytest.importorskip("transformers", reason="compares with its classes")
    config = moe_plain.CONFIGS[name]
    weights = moe_plain.random_weights(config, 0, torch.float32)
    moe_plain.write_moe(tmp_path, config, weights)
    report = verify(tmp_path, device="cpu", new_tokens=4)
    assert report.passed, str(report)
    public = "nothing" if name == "llada2" else "Qwen3MoeForCausalLM"
    assert report.facts["compared with"].startswith(public)
    assert any("greedy" in check.name for check in report.checks) == (name != "llada2")


def damaged(monkeypatch, change):
    """What is loaded is not what the files say."""
    load = module.load

    def wrong(*arguments, **options):
        model = load(*arguments, **options)
        change(model)
        return model

    monkeypatch.setattr(module, "load", wrong)


CHANGES = {
    "a weight": (lambda model: model._layers[1].qkv[:8].mul_(1.2), "Qwen2ForCausalLM: relative"),
    "rope": (lambda model: model._rope._tables.clear() or model._rope._frequency.mul_(1.05), "rel"),
    "nan": (lambda model: model._layers[1].down.fill_(float("nan")), "finite logits: false"),
}


@pytest.mark.parametrize("change, message", CHANGES.values(), ids=CHANGES)
def test_what_is_wrong_is_found(tmp_path, monkeypatch, change, message):
    pytest.importorskip("transformers", reason="compares with its classes")
    folder = write_checkpoint(tmp_path, random_plain(CONFIGS["dream"], dtype=torch.float32))
    damaged(monkeypatch, change)
    report = verify(folder, device="cpu", new_tokens=4)
    assert not report.passed
    lines = [line for line in str(report).splitlines() if line.startswith("FAILED")]
    assert any(message in line for line in lines), str(report)
    assert f"{len(lines)} of {len(report.checks)} FAILED" in str(report)


def test_the_command(tmp_path):
    folder = write_checkpoint(tmp_path, random_plain(CONFIGS["dream"], dtype=torch.float32))
    run = CliRunner().invoke(main, ["verify", str(folder), "--device", "cpu", "--no-reference"])
    assert run.exit_code == 0 and "all checks passed" in run.output
    assert "compared with:          nothing: not asked for" in run.output
    assert "EOS ids:                59, 57" in run.output
    words = ["--device", "cpu", "--json", "--no-reference", "--set", "attention=causal"]
    run = CliRunner().invoke(main, ["verify", str(folder), *words])
    report = json.loads(run.output)
    assert report["passed"] and report["facts"]["attention"] == "causal"
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors")
    run = CliRunner().invoke(main, ["verify", str(folder), "--device", "cpu", "--no-reference"])
    assert run.exit_code == 1 and "FAILED" in run.output and "Traceback" not in run.output
    run = CliRunner().invoke(main, ["verify", str(tmp_path / "nothing")])
    assert run.exit_code == 1 and "expected a directory or a hub id" in run.output


def test_a_turn_that_ends_with_no_eos_id_is_told(tmp_path):
    """A chat model whose files name the end of a text alone."""
    bundled = MODELS["sdar-tiny"]
    for file in bundled.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    template = "{% for m in messages %}{{ m.content }}<pad>{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    report = verify(tmp_path, device="cpu", new_tokens=0, reference=False)
    found = report.facts["a turn ends with"]
    assert found == "2 '<pad>', which is not an EOS id: load(..., eos_ids=) adds it"
    report = verify(tmp_path, device="cpu", new_tokens=0, reference=False, eos_ids=[1, 2])
    assert report.facts["a turn ends with"] == "2 '<pad>'"
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    report = verify(tmp_path, device="cpu", new_tokens=0, reference=False)
    assert "a turn ends with" not in report.facts
