"""Every decoder runs on mixtures of experts, and FreeDave on them equals static decoding.

``python -m tests.decoding.test_moe_decoding 300`` runs the full count of random models.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import pydllm
from pydllm.models import load
from tests.models.moe_plain import CONFIGS, random_weights, write_moe

KINDS = ("llada2", "llada2.2", "sdar-moe", "sdar-moe-mixed", "rnd1", "llada-moe-mixed")
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_experts": 8}
MORE = {"mlp_only_layers": [0], "moe_layer_freq": [0, 1], "n_group": 4, "topk_group": 2}


def random_model(folder, kind, seed, dtype=torch.float64):
    config = CONFIGS[kind] | SMALL
    config |= {key: value for key, value in MORE.items() if config.get(key)}
    if kind == "llada-moe-mixed":
        config["num_key_value_heads"] = 4
    if kind == "llada2.2":
        config["expert_capacity"] = 5
    write_moe(folder, config, random_weights(config, seed, torch.float64))
    return load(folder, device="cpu", dtype=dtype)


def lossless(folder, seed, dtype=torch.float64, backend="torch", most=3, new=13):
    """Whether FreeDave writes what static decoding writes; forwards of both."""
    rng = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    model = random_model(Path(folder) / f"{seed}", kind, seed, dtype)
    blocks = model.spec.block_size
    prompts = [
        [rng.randrange(57) for _ in range(rng.randint(1, 9))] for _ in range(rng.randint(1, most))
    ]
    score = rng.choice(("confidence", "entropy", "margin"))
    cache = "none" if blocks else rng.choice(("none", "prefix", "dual"))
    static = pydllm.Static(block_length=blocks or rng.choice((4, 8)), score=score, cache=cache)
    mode = rng.choice(("strict", "pipelined")) if blocks else "strict"
    drafts = rng.choice((2, 4, 8))
    algorithm = pydllm.FreeDave(draft_steps=drafts, mode=mode, baseline=static)
    options = {"max_new_tokens": rng.randint(new // 2, new), "backend": backend}
    expected = pydllm.generate(model, prompts, static, **options)
    got = pydllm.generate(model, prompts, algorithm, **options)
    equal = torch.equal(torch.cat(got.sequences), torch.cat(expected.sequences))
    return equal, int(got.nfe.sum()), int(expected.nfe.sum())


def test_freedave_equals_static_decoding(tmp_path):
    results = [lossless(tmp_path, seed) for seed in range(12)]
    assert all(equal for equal, _, _ in results)
    assert sum(ours for _, ours, _ in results) < sum(theirs for _, _, theirs in results)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_freedave_equals_static_decoding_in_fp16_kernels(tmp_path):
    assert lossless(tmp_path, 2, torch.float16, "triton", most=1, new=4)[0]


ALGORITHMS = {
    "static": pydllm.Static(block_length=8),
    "threshold": pydllm.Threshold(threshold=0.3, block_length=8),
    "factor": pydllm.Factor(factor=2.0, block_length=8),
    "entropy bound": pydllm.EntropyBound(bound=2.0, block_length=8),
    "multi-block": pydllm.MultiBlock(threshold=1.0, block_length=8),
}


@pytest.mark.parametrize(
    "kind, name",
    [
        (kind, name)
        for kind in ("llada2", "rnd1")
        for name in ALGORITHMS
        if (kind, name) != ("llada2", "multi-block")
    ],
)
def test_decoders_run(tmp_path, kind, name):
    """A batch of two is each of them alone."""
    model = random_model(tmp_path, kind, 3)
    prompts, algorithm = [[1, 2, 3], [4, 5, 6, 7, 8]], ALGORITHMS[name]
    got = pydllm.generate(model, prompts, algorithm, max_new_tokens=11)
    for row, prompt in enumerate(prompts):
        alone = pydllm.generate(model, [prompt], algorithm, max_new_tokens=11)
        assert torch.equal(got.sequences[row], alone.sequences[0])
        assert (got.sequences[row] != model.spec.mask_id).all()


def test_apd_with_a_verifier_of_experts(tmp_path):
    model, verifier = (random_model(tmp_path / kind, kind, 4) for kind in ("rnd1", "qwen3-moe"))
    algorithm = pydllm.APD(verifier=verifier, mixture=0.7, window=None, lookahead=4)
    got = pydllm.generate(model, [[1, 2, 3]], algorithm, max_new_tokens=9)
    assert len(got.sequences[0]) == 12 and got.verifier_nfe is not None


def main(count: int) -> None:
    """Print how many of ``count`` random models FreeDave is lossless on, and the forwards."""
    equal = ours = theirs = 0
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(count):
            same, own, static = lossless(folder, seed)
            equal, ours, theirs = equal + same, ours + own, theirs + static
            if not same:
                print(f"seed {seed} differs")
    print(f"{equal} of {count} equal; {ours} forwards, static decoding {theirs}")
    sys.exit(equal != count)


if __name__ == "__main__":
    main(int(sys.argv[1]))
