"""LLaDA2.1's ``generate`` against the published loop, stated plainly."""

import inspect

import pytest
import torch

from pydllm.integrations import llada21
from tests.integrations.published_blocks import llada21 as published
from tests.integrations.test_llada2 import IDS, LLaDA2MoeModelLM
from tests.integrations.tiny import MASK, pair, prompts

LENGTHS = {"gen_length": 18, "block_length": 8}


class LLaDA21(LLaDA2MoeModelLM):
    """As a checkpoint of 2.1 comes: its own generate edits."""

    def generate(self, inputs, threshold=0.95, editing_threshold=0.9):
        raise NotImplementedError


@pytest.fixture(scope="module")
def models():
    plain, own = pair("sdar", seed=5, predicts_masks=False, num_hidden_layers=2)
    return plain, {"ours": own, "module": LLaDA21(plain)}


CASES = {
    "defaults": {},
    "quality": {"threshold": 0.7, "editing_threshold": 0.5},
    "speed": {"threshold": 0.2, "editing_threshold": 0.0},
    "no budget": {"threshold": 0.1, "editing_threshold": 0.1, "max_post_steps": 0},
    "little budget": {"threshold": 0.1, "editing_threshold": -1.0, "max_post_steps": 2},
    "three at least": {"num_to_transfer": 3, "editing_threshold": 0.2},
    "temperature": {"temperature": 0.8, "threshold": 0.5, "editing_threshold": 0.3},
    "filters": {"temperature": 1.2, "top_k": 6, "top_p": 0.9, "editing_threshold": 0.4},
    "another block": {"block_length": 5, "threshold": 0.3, "editing_threshold": 0.1},
}


@pytest.mark.parametrize("length", [3, 8, 11])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_tokens_and_forwards(models, options, length):
    plain, own = models
    for stop in (False, True):
        ids, _ = prompts(1, length, seed=length)
        given = LENGTHS | options | IDS | {"eos_early_stop": stop}
        forwards = []
        torch.manual_seed(4)
        expected = published(plain, ids, **given, forwards=forwards)
        for kind, model in own.items():
            before = getattr(model, "calls", 0)
            torch.manual_seed(4)
            x = llada21.generate(model, ids, **given)
            assert x.dtype == torch.int64 and torch.equal(x, expected)
            assert kind == "ours" or model.calls - before == len(forwards)


def test_something_is_edited(models):
    """Or the cases above say nothing."""
    plain, _ = models
    ids, _ = prompts(1, 8, seed=8)
    given = LENGTHS | IDS | {"threshold": 0.2}
    seen = {
        tuple(published(plain, ids, **given, editing_threshold=edit)[0].tolist())
        for edit in (0.0, 0.3, 2.0)
    }
    assert len(seen) == 3


@pytest.mark.parametrize("kind", ["ours", "module"])
def test_ends(models, kind):
    """Every token as the EOS in turn."""
    plain, own = models
    ids, _ = prompts(1, 6, seed=2)
    given = LENGTHS | IDS | {"threshold": 0.3, "editing_threshold": 0.2}
    for end in published(plain, ids, **given)[0].unique().tolist():
        for stop in (False, True):
            options = given | {"eos_id": end, "eos_early_stop": stop}
            x = llada21.generate(own[kind], ids, **options)
            assert torch.equal(x, published(plain, ids, **options)) and x[0, -1] == end


@pytest.mark.parametrize("options", [{}, {"top_k": 3}])
def test_our_noise(models, options):
    own = models[1]["ours"]
    ids, _ = prompts(1, 6)

    def run(seed):
        torch.manual_seed(seed)
        given = LENGTHS | IDS | {"temperature": 1.0, "compat": None, "eos_id": 58} | options
        return llada21.generate(own, ids, **given)

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    assert not any((run(seed) == MASK).any() for seed in range(4))


@pytest.mark.parametrize("compat", ["llada2.1", None])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_predicts_the_mask_ends(temperature, compat):
    """The published loop would run for ever."""
    plain, _ = pair("sdar", seed=5, num_hidden_layers=2)
    module = LLaDA21(plain)
    plainly = module.forward

    def masks(*args, **options):
        logits = plainly(*args, **options).logits
        logits[..., MASK] = logits.amax() + 3
        return type("Out", (), {"logits": logits})

    module.forward = masks
    ids, _ = prompts(1, 6)
    torch.manual_seed(0)
    given = LENGTHS | IDS | {"temperature": temperature, "compat": compat, "eos_id": 58}
    before = module.calls
    x = llada21.generate(module, ids, **given, editing_threshold=0.1)
    assert x.shape[1] and not (x == MASK).any()
    # Three blocks: until the mask is suppressed, until it is gone, and the budget.
    assert module.calls - before <= 3 * ((2 * 8 + 16) + 8 + 16)


def test_signature():
    original = {
        "inputs": None,
        "temperature": 0.0,
        "block_length": 32,
        "steps": 32,
        "gen_length": 2048,
        "top_p": None,
        "top_k": None,
        "eos_early_stop": False,
        "minimal_topk": 1,
        "threshold": 0.95,
        "editing_threshold": 0.9,
        "max_post_steps": 16,
        "eos_id": 156892,
        "mask_id": 156895,
        "num_to_transfer": 1,
    }
    parameters = list(inspect.signature(llada21.generate).parameters.values())[1:16]
    assert {p.name: p.default for p in parameters} == original


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_to_transfer": 0}, "num_to_transfer: expected an int of at least 1"),
        ({"max_post_steps": -1}, "max_post_steps: expected an int of at least 0"),
        ({"editing_threshold": torch.nan}, "editing_threshold: expected a number"),
        ({"threshold": -1.0}, "threshold: expected a number"),
        ({"mask_id": 156895}, r"mask_id: .*\[0, 61\), got 156895"),
        ({"temperature": -0.5}, "temperature: expected 0"),
        ({"inputs": None}, "inputs: expected token ids"),
    ],
)
def test_bad_arguments(models, options, message):
    given = {"inputs": prompts(1, 6)[0]} | LENGTHS | IDS | options
    with pytest.raises(ValueError, match=message):
        llada21.generate(models[1]["module"], **given)
