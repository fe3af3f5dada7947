"""Fast-dLLM's block form of ``diffusion_generate`` against the published loop, stated plainly."""

from types import SimpleNamespace

import pytest
import torch

from pydllm import PydllmError
from pydllm.integrations import dream, fast_dllm_dream
from tests.integrations.published_dream import fast_dllm_dream as published
from tests.integrations.tiny import MASK, Plainly, pair, prompts, standin

NEW = {"max_new_tokens": 12, "mask_token_id": MASK, "block_length": 6, "steps": 8}


@pytest.fixture(scope="module")
def models():
    return pair("dream", seed=2, predicts_masks=False)


CASES = {
    "threshold": {"alg": "confidence_threshold", "threshold": 0.4},
    "default threshold": {"alg": "confidence_threshold"},
    "all at once": {"alg": "confidence_threshold", "threshold": 0.0},
    "above one": {"alg": "confidence_threshold", "threshold": 2.0},
    "threshold at a temperature": {
        "alg": "confidence_threshold",
        "temperature": 0.5,
        "threshold": 0.5,
    },
    "nucleus": {"alg": "confidence_threshold", "top_p": 0.8, "temperature": 0.7},
    "nucleus, greedy": {"alg": "confidence_threshold", "top_p": 0.6, "threshold": 0.7},
    "entropy": {"alg": "entropy"},
    "any other name": {"alg": "maskgit_plus"},
    "few steps": {"alg": "entropy", "steps": 4},
    "no steps": {"alg": "entropy", "steps": 2},
    "entropy at a temperature": {"alg": "entropy", "temperature": 0.6, "top_k": 8},
    "one block": {"alg": "entropy", "block_length": None, "steps": 5},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dual", [False, True], ids=["prefix", "dual"])
def test_tokens(models, dual, options):
    plain, own = models
    given = NEW | options | {"dual_cache": dual}
    said = {"new": given.pop("max_new_tokens"), "mask_id": given.pop("mask_token_id")}
    said |= given | {"dual": dual, "block_length": given["block_length"] or said["new"]}
    del said["dual_cache"]
    for seed in range(2):
        ids, _ = prompts(1, 5, seed=seed)
        oracle = Plainly(plain)
        torch.manual_seed(3)
        expected = published(oracle, ids, **said)
        torch.manual_seed(3)
        x = fast_dllm_dream.diffusion_generate(
            own, ids, **NEW | options | {"dual_cache": dual}, attention_mask=torch.ones_like(ids)
        )
        assert torch.equal(x, expected)


def test_a_batch_by_entropy_and_side_by_side_by_threshold(models):
    plain, own = models
    ids, _ = prompts(3, 5)
    said = {"new": 12, "mask_id": MASK, "steps": 8, "block_length": 6, "dual": True}
    expected = published(Plainly(plain), ids, alg="entropy", **said)
    given = NEW | {"dual_cache": True}
    assert torch.equal(
        fast_dllm_dream.diffusion_generate(own, ids, alg="entropy", **given), expected
    )
    given |= {"alg": "confidence_threshold", "threshold": 0.5}
    alone = [fast_dllm_dream.diffusion_generate(own, row[None], **given) for row in ids]
    assert torch.equal(fast_dllm_dream.diffusion_generate(own, ids, **given), torch.cat(alone))


def test_return_types(models):
    module = standin(models[0])
    ids, _ = prompts(1, 5)
    config = SimpleNamespace(alg="entropy", return_dict_in_generate=True, output_history=True)
    out = fast_dllm_dream.diffusion_generate(module, ids, config, **NEW)
    assert type(out) is dream.DreamModelOutput and out.history == []
    assert out.sequences.shape == (1, 17)


def test_a_model_that_predicts_masks_alone(models):
    plain = type(models[0])(models[0].config, dict(models[0].weights))
    plain.weights["model.norm.weight"] = torch.zeros_like(plain.weights["model.norm.weight"])
    given = NEW | {"mask_token_id": 0, "alg": "confidence_threshold"}
    ids = prompts(1, 5)[0].clamp(min=1)
    with pytest.raises(PydllmError, match="predicts the mask at every"):
        fast_dllm_dream.diffusion_generate(standin(plain), ids, **given)
    x = fast_dllm_dream.diffusion_generate(standin(plain), ids, compat=None, **given)
    assert not (x == 0).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_length": 5}, "divisor of the 12 new, got 5"),
        ({"steps": 7}, "multiple of the 2 blocks, got 7"),
        ({"alg": "p2"}, "alg: expected one of confidence_threshold, entropy,"),
        ({"threshold": -1}, "threshold: expected a number of at least 0"),
        ({"attention_mask": torch.tensor([[0, 1, 1, 1, 1]])}, "no padding with a cache"),
    ],
)
def test_bad_arguments(models, options, message):
    with pytest.raises(ValueError, match=message):
        fast_dllm_dream.diffusion_generate(models[1], prompts(1, 5)[0], **(NEW | options))
