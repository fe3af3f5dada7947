"""The drop-in benchmark: its loops decode what ours do; what it counts; missing checkouts."""

import csv

import pytest
import torch
from click.testing import CliRunner

import pydllm
from bench import dropin, shapes
from bench.baselines import cached_loops as published_cached
from bench.baselines import upstream
from tests.decoding.published import PlainLLaDA, fast_dllm_generate  # noqa: E402
from tests.decoding.test_static import _prompt, _random_model  # noqa: E402


@pytest.fixture(autouse=True)
def small_dream(monkeypatch):
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"num_key_value_heads": 1, "intermediate_size": 48, "vocab_size": 64}
    small |= {"mask_token_id": 60, "eos_token_id": 61}
    monkeypatch.setattr(dropin, "DREAM_100M", dropin.DREAM_100M | small)


def test_smoke(tmp_path):
    file = tmp_path / "rows.csv"
    options = f"--device cpu --model tiny --prompt 6 --new 16 --block 8 --csv {file}"
    result = CliRunner().invoke(dropin.main, options.split())
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader(file.open()))
    # DiffusionGemma needs transformers 5.12.
    loops = set(dropin.CASES) - {"diffusion_gemma", "llada2_forward"}
    assert loops <= {row["case"] for row in rows}
    assert all(row["same_tokens"] == "1.0" for row in rows if row["case"].startswith("llada2"))
    ours = [row for row in rows if row["decoder"] == "pydllm.generate"]
    assert {row["case"] for row in ours} == loops and all(float(row["speedup"]) > 0 for row in ours)
    exact = [row for row in rows if row["decoder"].startswith("pydllm.integrations")]
    assert all(float(row["same_tokens"]) == 1 for row in exact)
    # Dream's schedule writes nothing in its first step and two tokens in its last.
    assert all(float(row["same_tokens"]) == 1 for row in ours if row["case"] != "dream")
    others = ("d3llm", "llada2")  # the latter fills what is left of the prompt's block first
    assert all(row["forwards"] == "16" for row in ours if row["case"] not in others)
    counted = {row["case"]: float(row["fewer_mults"]) for row in ours if row["fewer_mults"]}
    assert counted["llada"] > counted["fast_dllm_dual"] > 1


@pytest.mark.parametrize("limit", [None, 0.03, 0.1])
def test_published_dual_is_fast_dllm(tmp_path, limit):
    for seed in range(4):
        model, plain = _random_model(tmp_path / str(seed), seed)
        assert isinstance(plain, PlainLLaDA)
        prompt = torch.tensor([_prompt(seed, 5)])
        loop = published_cached.PublishedDual(model, 8, 1, limit)
        tokens, forwards = loop.decode(prompt, 24)
        if limit is None:
            algorithm = pydllm.Static(
                block_length=8, tokens_per_step=1, cache="dual", compat="fast_dllm"
            )
            got = pydllm.generate(model, list(prompt), algorithm, max_new_tokens=24)
            want, count = got.sequences[0], got.nfe.item()
        else:
            want, count = fast_dllm_generate(
                plain,
                prompt[0].tolist(),
                gen_length=24,
                block_length=8,
                cache="dual",
                threshold=limit,
            )
        assert torch.equal(tokens[0], want) and forwards == count


def test_multiplications_are_counted():
    job = dropin.Job("llada-100m", "cpu", torch.float32, 128, 128, 32, 1, None)
    layers, head = 12 * (4 * 768**2 + 3 * 768 * 2048), 126464 * 768
    got = dropin.fewer((256, 16.5), (256, 256), job)
    assert got == pytest.approx(256 * (layers + head) / (256 * layers + 16.5 * head))


def test_checkouts_that_are_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr(upstream, "UPSTREAM_DIR", str(tmp_path))
    options = "--device cpu --model tiny --prompt 6 --new 8 --block 8 --only llada"
    result = CliRunner().invoke(dropin.main, options.split())
    assert result.exit_code == 1
    shown = " ".join(result.output.split())
    assert "expected LLaDA" in shown and "nothing was timed" in shown


def test_widening_reaches_every_matrix_once():
    model = shapes.random_model(dropin.DREAM_100M, "cpu", torch.float32)
    before = model._embedding.std().item(), model._layers[1].gate_up.std().item()
    dropin.widen(model)
    after = model._embedding.std().item(), model._layers[1].gate_up.std().item()
    assert after == pytest.approx([4 * value for value in before])
