"""LLaDA2's ``generate`` against the published loop, stated plainly."""

import inspect
import types
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pydllm.integrations import llada2
from tests.integrations.published_blocks import llada2 as published
from tests.integrations.tiny import EOS, MASK, pair, prompts

IDS = {"mask_id": MASK, "eos_id": EOS}
LENGTHS = {"gen_length": 18, "block_length": 8, "steps": 8}


class LLaDA2MoeModelLM(nn.Module):
    """A module as a LLaDA2 checkpoint comes: it computes its own logits and takes a mask."""

    def __init__(self, plain):
        super().__init__()
        self.plain, self.calls = plain, 0
        self.config = SimpleNamespace(vocab_size=plain.config["vocab_size"])
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, ids, attention_mask=None, position_ids=None):
        self.calls += 1
        size = ids.shape[1]
        assert attention_mask.shape == (1, 1, size, size) and len(ids) == 1
        assert position_ids.tolist() == [list(range(size))]
        seen = (attention_mask[0, 0] == 0).sum(1)  # the end of the row's block
        block = int(seen[0])
        assert torch.equal(seen, (torch.arange(size) // block + 1) * block)
        return SimpleNamespace(logits=self.plain(ids[0], block=block)[1][None])


@pytest.fixture(scope="module")
def models():
    plain, own = pair("sdar", seed=5, predicts_masks=False, num_hidden_layers=2)
    return plain, {"ours": own, "module": LLaDA2MoeModelLM(plain)}


CASES = {
    "greedy": {},
    "default threshold, few steps": {"steps": 3},
    "low threshold": {"threshold": 0.2},
    "all at once": {"threshold": 0.0},
    "minimal top k": {"minimal_topk": 4},
    "temperature": {"temperature": 0.8, "threshold": 0.5},
    "filters": {"temperature": 1.2, "top_k": 6, "top_p": 0.9},
    "filters at no temperature": {"top_k": 2, "top_p": 0.5},
    "another block": {"block_length": 5, "steps": 5},
}


@pytest.mark.parametrize("length", [3, 8, 11])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("kind", ["ours", "module"])
def test_tokens(models, kind, options, length):
    plain, own = models
    for stop in (False, True):
        ids, _ = prompts(1, length, seed=length)
        given = LENGTHS | options | IDS | {"eos_early_stop": stop}
        torch.manual_seed(4)
        expected = published(plain, ids, **given)
        torch.manual_seed(4)
        x = llada2.generate(own[kind], ids, **given)
        assert x.dtype == torch.int64 and torch.equal(x, expected)


@pytest.mark.parametrize("kind", ["ours", "module"])
@pytest.mark.parametrize("stop", [False, True])
def test_ends(models, kind, stop):
    """Every token as the end of sequence in turn."""
    plain, own = models
    ids, _ = prompts(1, 6, seed=2)
    given = LENGTHS | IDS | {"threshold": 0.3, "eos_early_stop": stop}
    whole = published(plain, ids, **given)[0]
    lengths = set()
    for end in whole.unique().tolist():
        given["eos_id"] = end
        expected = published(plain, ids, **given)
        x = llada2.generate(own[kind], ids, **given)
        assert torch.equal(x, expected)
        if stop and end in ids:  # the published loop finds that one, and returns nothing
            assert x.shape == (1, 0)
            x = llada2.generate(own[kind], ids, **given, compat=None)
        assert x[0, -1] == end
        lengths.add(x.shape[1])
    assert len(lengths) > 3
    assert set(whole.tolist()) & set(ids[0].tolist())


@pytest.mark.parametrize("kind", ["ours", "module"])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}])
def test_our_noise(models, kind, options):
    own = models[1][kind]
    ids, _ = prompts(1, 6)

    def run(seed):
        torch.manual_seed(seed)
        given = LENGTHS | IDS | {"temperature": 1.0, "compat": None, "eos_id": 58} | options
        return llada2.generate(own, ids, **given)

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    assert not any((run(seed) == MASK).any() for seed in range(4))


def test_as_a_method(models):
    module = models[1]["module"]
    module.generate = types.MethodType(llada2.generate, module)
    ids, _ = prompts(1, 6)
    before = module.calls
    x = module.generate(inputs=ids, **LENGTHS, **IDS)
    # 18 tokens behind 6: blocks of 2, 8 and 8 masks, at most one a step here.
    assert 0 < module.calls - before <= 18 and x.shape[0] == 1
    del module.generate


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
        "eos_id": 156892,
        "mask_id": 156895,
    }
    parameters = list(inspect.signature(llada2.generate).parameters.values())[1:13]
    assert {p.name: p.default for p in parameters} == original


@pytest.mark.parametrize("kind", ["ours", "module"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: expected an int of at least 1"),
        ({"minimal_topk": 0}, "minimal_topk: expected an int of at least 1"),
        ({"threshold": -1.0}, "threshold: expected a number"),
        ({"mask_id": 156895}, r"mask_id: .*\[0, 61\), got 156895"),
        ({"top_p": -0.5}, "top_p: expected a positive number"),
        ({"temperature": -0.5}, "temperature: expected 0"),
    ],
)
def test_bad_arguments(models, kind, options, message):
    with pytest.raises(ValueError, match=message):
        llada2.generate(models[1][kind], prompts(1, 6)[0], **LENGTHS | IDS | options)


def test_bad_models_and_inputs(models):
    own = models[1]["ours"]
    with pytest.raises(ValueError, match="inputs: expected token ids"):
        llada2.generate(own, **LENGTHS, **IDS)
    with pytest.raises(ValueError, match="one sequence"):
        llada2.generate(own, prompts(2, 6)[0], **LENGTHS, **IDS)
    with pytest.raises(ValueError, match="block-causal attention, got full"):
        llada2.generate(pair("llada")[1], prompts(1, 6)[0], **LENGTHS, **IDS)

    class LLaDA21(LLaDA2MoeModelLM):
        def generate(self, inputs, threshold=0.95, editing_threshold=0.9):
            raise NotImplementedError

    with pytest.raises(ValueError, match="expected LLaDA2.0, got .* edits tokens"):
        llada2.generate(LLaDA21(models[0]), prompts(1, 6)[0], **LENGTHS, **IDS)
