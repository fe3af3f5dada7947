"""SDAR's ``block_diffusion_generate`` against the published loop, stated plainly."""

import inspect

import pytest
import torch

from pydllm import PydllmError
from pydllm.integrations.sdar import block_diffusion_generate
from tests.integrations.published_blocks import sdar as published
from tests.integrations.tiny import MASK, Plainly, pair, prompts, standin


@pytest.fixture(scope="module")
def models():
    return pair("sdar", seed=1, predicts_masks=False, num_hidden_layers=2)


LENGTHS = {"gen_length": 13, "block_length": 4, "denoising_steps": 4}
CASES = {
    "default": {},
    "low threshold": {"confidence_threshold": 0.3},
    "all at once": {"confidence_threshold": 0.0},
    "cold": {"temperature": 0.3, "confidence_threshold": 0.7},
    "greedy by top_k": {"top_k": 1, "remasking_strategy": "sequential"},
    "nucleus": {"top_p": 0.7},
    "both filters": {"top_p": 0.8, "top_k": 5, "temperature": 1.5},
    "static": {"remasking_strategy": "low_confidence_static", "denoising_steps": 3},
    "sequential": {"remasking_strategy": "sequential", "denoising_steps": 2},
    "more steps than tokens": {"denoising_steps": 7},
    "one step": {"denoising_steps": 1, "remasking_strategy": "low_confidence_static"},
    "another block": {"block_length": 6, "denoising_steps": 4},
    "short": {"gen_length": 1},
    "stops": {"stopping_criteria_idx": [3, 5, 17, 20, 22, 30, 40, 41, 42]},
}


@pytest.mark.parametrize("length", [3, 8, 10])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_same_seed_same_tokens(models, options, length):
    plain, own = models
    ids, _ = prompts(1, length, seed=length)
    given = LENGTHS | options
    torch.manual_seed(8)
    expected, _ = published(plain, ids, MASK, **given)
    torch.manual_seed(8)
    x = block_diffusion_generate(own, {"input_ids": ids}, MASK, **given)
    assert x.dtype == torch.int64 and torch.equal(x, expected)


@pytest.mark.parametrize("strategy", ["low_confidence_dynamic", "low_confidence_static"])
def test_greedy_and_its_forwards(models, strategy):
    """At temperature 0, where the original divides by zero."""
    plain, own = models
    ids, _ = prompts(1, 10)
    given = LENGTHS | {"temperature": 0.0, "remasking_strategy": strategy}
    given["confidence_threshold"] = 0.5
    expected, forwards = published(plain, ids, MASK, **given)
    module, calls = standin(plain), []
    x = block_diffusion_generate(module, {"input_ids": ids}, MASK, **given)
    assert torch.equal(x, expected)
    own = module.__dict__["_pydllm_model"].model
    plain_forward = type(own).forward

    class Counting(type(own)):
        def forward(self, *args, **kwargs):
            calls.append(1)
            return plain_forward(self, *args, **kwargs)

    counted = Counting.__new__(Counting)
    counted.__dict__.update(vars(own))
    assert torch.equal(block_diffusion_generate(counted, {"input_ids": ids}, MASK, **given), x)
    blocks = (x.shape[1] - 8) // 4
    assert len(calls) == forwards - blocks - 1  # none of its own for a block's keys or the prompt's


def test_entropy_bounded(models):
    """The published branch fails; by its text: lowest entropies while their sum is below."""
    plain, own = models
    ids, _ = prompts(1, 8)
    given = LENGTHS | {"temperature": 0.0, "remasking_strategy": "entropy_bounded"}
    for bound in (0.0, 2.0, 100.0):
        x = torch.cat((ids[0], torch.full((16,), MASK)))
        for first in range(8, 24, 4):
            while (x[first : first + 4] == MASK).any():
                logits = plain(x[: first + 4], block=4)[1][first:]
                entropy = torch.distributions.Categorical(logits=logits).entropy()
                masks = [j for j in range(4) if x[first + j] == MASK]
                masks.sort(key=lambda j: entropy[j].item())
                total = 0.0
                for rank, j in enumerate(masks):
                    total += entropy[j].item()
                    if rank == 0 or total < bound:
                        x[first + j] = logits[j].argmax()
        out = block_diffusion_generate(own, {"input_ids": ids}, MASK, eb_threshold=bound, **given)
        assert torch.equal(out[0], x)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 5, "top_p": 0.9}])
def test_our_noise(models, options):
    own = models[1]
    ids, _ = prompts(1, 6)

    def run(seed):
        torch.manual_seed(seed)
        given = LENGTHS | options | {"compat": None}
        return block_diffusion_generate(own, {"input_ids": ids}, MASK, **given)

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    assert not any((run(seed)[:, 6:] == MASK).any() for seed in range(5))


def test_the_prompt_stays_without_the_quirk(models):
    """One step for a block of which the prompt fills a part: the original overwrites that part."""
    ids, _ = prompts(1, 6)
    given = LENGTHS | {"denoising_steps": 1, "remasking_strategy": "low_confidence_static"}
    torch.manual_seed(0)
    overwritten = block_diffusion_generate(models[1], {"input_ids": ids}, MASK, **given)
    kept = block_diffusion_generate(models[1], {"input_ids": ids}, MASK, **given, compat=None)
    assert torch.equal(kept[:, :6], ids) and torch.equal(overwritten[:, :4], ids[:, :4])
    assert not torch.equal(overwritten[:, 4:6], ids[:, 4:6])


def test_a_model_that_predicts_masks_alone(models):
    plain = type(models[0])(models[0].config, dict(models[0].weights))
    plain.weights["model.norm.weight"] = torch.zeros_like(plain.weights["model.norm.weight"])
    ids = prompts(1, 6)[0].clamp(min=1)
    with pytest.raises(PydllmError, match="the schedule ends with some of them left"):
        block_diffusion_generate(standin(plain), {"input_ids": ids}, 0, temperature=0.0, **LENGTHS)


def test_signature():
    original = {
        "gen_length": 128,
        "block_length": 8,
        "denoising_steps": 8,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "remasking_strategy": "low_confidence_dynamic",
        "confidence_threshold": 0.85,
        "eb_threshold": None,
        "stopping_criteria_idx": None,
    }
    parameters = list(inspect.signature(block_diffusion_generate).parameters.values())[:13]
    assert [p.name for p in parameters] == ["model", "prompt", "mask_id", *original]
    assert {p.name: p.default for p in parameters[3:]} == original


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remasking_strategy": "best"}, "low_confidence_dynamic, low_confidence_static, seq"),
        ({"remasking_strategy": "entropy_bounded"}, "eb_threshold: expected a number"),
        ({"denoising_steps": 0}, "denoising_steps: expected an int of at least 1"),
        ({"top_k": -1}, "top_k: expected an int of at least 0"),
        ({"top_p": 0.0}, "top_p: expected a positive number"),
        ({"gen_length": 99}, "at most 64 positions"),
    ],
)
def test_bad_arguments(models, options, message):
    ids, _ = prompts(1, 6)
    with pytest.raises((ValueError, TypeError), match=message):
        block_diffusion_generate(models[1], {"input_ids": ids}, MASK, **LENGTHS | options)


def test_bad_models_and_prompts(models):
    ids, _ = prompts(2, 6)
    with pytest.raises(ValueError, match="one sequence"):
        block_diffusion_generate(models[1], {"input_ids": ids}, MASK, **LENGTHS)
    with pytest.raises(ValueError, match="block-causal attention, got full"):
        block_diffusion_generate(pair("llada")[1], {"input_ids": ids[:1]}, MASK, **LENGTHS)
    assert Plainly(models[0]).shift is False
