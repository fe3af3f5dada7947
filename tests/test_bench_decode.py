"""The end-to-end benchmark: every algorithm runs, and its loops decode what ours do."""

import csv

import pytest
import torch
from click.testing import CliRunner

import pydllm
from bench import decode
from bench.baselines import loops as published
from pydllm.integrations import d3llm


@pytest.fixture(scope="module")
def tiny():
    model = decode.make_model("tiny", "cpu", torch.float32)
    model.spec = pydllm.models.ModelSpec(**(vars(model.spec) | {"eos_ids": ()}))
    return model


@pytest.fixture(scope="module")
def prompts(tiny):
    texts = [
        "sam has 20 cards . he loses 1 . they double . he keeps half . how many cards ? each once",
        "sam has 3 cards . they double . he finds 4 . half are lost . how many cards ? in order",
    ]
    return [torch.tensor([tiny.tokenizer.encode(text).ids]) for text in texts]


@pytest.mark.parametrize("algorithm", decode.ALGORITHMS)
def test_smoke(algorithm, tmp_path):
    file = tmp_path / "rows.csv"
    options = f"--device cpu --model tiny --prompt 6 --new 8 --algorithm {algorithm} --csv {file}"
    options += " --temperature 0" if algorithm == "apd" else " --block 4"
    options += " --compiled aot_eager" if algorithm == "static" else ""
    result = CliRunner().invoke(decode.main, options.split())
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader(file.open()))
    compared = [row for row in rows if row["against"] != row["decoder"]]
    assert len(compared) >= 2
    assert all(float(row["seconds"]) > 0 and int(row["forwards"]) >= 1 for row in rows)
    exact = [row for row in compared if algorithm != "static" or "prefix" not in row["decoder"]]
    exact = [row for row in exact if algorithm != "static" or "dual" not in row["decoder"]]
    exact = [row for row in exact if "fixed" not in row["decoder"]]
    assert exact and all(float(row["same_tokens"]) == 1 for row in exact)


@pytest.mark.parametrize("window", [1, 4, None])
def test_published_apd_is_ours_at_temperature_0(tiny, prompts, window):
    verifier = decode.make_verifier("tiny", "cpu", torch.float32)
    loop = published.PublishedAPD(tiny, verifier, window, lookahead=6, temperature=0.0)
    algorithm = pydllm.APD(verifier, window=window, lookahead=6, compat="apd")
    for prompt in prompts:
        want = pydllm.generate(tiny, list(prompt), algorithm, max_new_tokens=24)
        tokens, forwards = loop.decode(prompt, 24)
        assert torch.equal(tokens[0], want.sequences[0]) and forwards == want.nfe[0]
        assert 4 < forwards < 24  # some drafts are refused


@pytest.mark.parametrize("threshold", [-1.0, 0.3, 1.0])
def test_published_multiblock_is_ours(tiny, prompts, threshold):
    loop = published.PublishedMultiBlock(tiny, threshold, 8)
    options = {"threshold": threshold, "block_size": 8, "cache_delay_iter": 2}
    options |= {"block_add_threshold": 0.1, "decoded_token_threshold": 0.95}
    options["mask_id"] = tiny.spec.mask_id
    for prompt in prompts:
        want, nfe = d3llm.generate_multi_block_kv_cache(tiny, prompt, max_new_tokens=32, **options)
        tokens, forwards = loop.decode(prompt, 32)
        assert torch.equal(tokens, want) and forwards == nfe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--algorithm apd --batch 2", "batch: expected with --algorithm static or freedave"),
        ("--algorithm static --temperature 1", "temperature: expected with --algorithm apd alone"),
        ("--algorithm multiblock --new 10", "expected --new to be a multiple of --block"),
    ],
)
def test_bad_options(options, message):
    result = CliRunner().invoke(decode.main, ["--model", "tiny", *options.split()])
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
