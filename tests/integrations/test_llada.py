"""LLaDA's ``generate`` against the published loop, stated plainly."""

import inspect

import pytest
import torch

from pydllm.integrations import llada
from pydllm.integrations._arguments import as_model
from tests.integrations.published_llada import llada as published
from tests.integrations.tiny import EOS, EOT, MASK, Plainly, pair, prompts, standin

IDS = {"mask_id": MASK, "eos_id": EOS, "eot_id": EOT}
LENGTHS = {"steps": 6, "gen_length": 12, "block_length": 6}


@pytest.fixture(scope="module")
def models():
    return pair("llada-gqa")


def seeded(function, *args, **kwargs):
    torch.manual_seed(5)
    return function(*args, **kwargs)


CASES = {
    "greedy": {},
    "one block": {"steps": 5, "block_length": 12},
    "a token a step": {"steps": 12},
    "more steps than tokens": {"steps": 16},
    "random": {"remasking": "random"},
    "temperature": {"temperature": 0.8},
    "random at a temperature": {"temperature": 0.8, "remasking": "random"},
    "guided": {"cfg_scale": 1.5},
    "guided at a temperature": {"cfg_scale": 0.5, "temperature": 0.6},
    "no eos": {"logits_eos_inf": True},
    "no eos, guided": {"logits_eos_inf": True, "cfg_scale": 1.0},
    "eos last": {"confidence_eos_eot_inf": True},
    "eos last at a temperature": {"confidence_eos_eot_inf": True, "temperature": 0.7},
    "all of them": {"confidence_eos_eot_inf": True, "logits_eos_inf": True, "cfg_scale": 0.7},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("pads", [None, [0, 3, 1]], ids=["unpadded", "padded"])
def test_tokens(models, pads, options):
    plain, own = models
    ids, mask = prompts(3, 5, pads=pads)
    given = LENGTHS | options
    said = dict(given)
    said["eos_inf"] = EOS if said.pop("logits_eos_inf", False) else None
    said["last_ids"] = (EOS, EOT) if said.pop("confidence_eos_eot_inf", False) else ()
    oracle = Plainly(plain)
    expected = seeded(published, oracle, ids, pads, mask_id=MASK, **said)
    x = seeded(llada.generate, own, ids, mask, **given, **IDS)
    assert x.dtype == torch.int64 and x.shape == (3, 17)
    assert torch.equal(x, expected)
    assert oracle.calls == given["steps"] * (2 if "cfg_scale" in options else 1)


def test_masks_in_the_prompt_are_filled_and_ends_matter_nothing(models):
    plain, own = models
    ids, _ = prompts(2, 6)
    ids[0, 2:4], ids[1, 3], ids[1, 0] = MASK, MASK, EOS
    expected = published(Plainly(plain), ids, mask_id=MASK, **LENGTHS)
    assert torch.equal(llada.generate(own, ids, **LENGTHS, **IDS), expected)


def test_masks_of_the_prompt_take_from_the_schedule(models):
    ids, mask = prompts(3, 9, pads=[2, 0, 0])
    ids[0, 4:6], ids[1, 2:7] = MASK, MASK
    x = llada.generate(models[1], ids, mask, **LENGTHS, **IDS)
    assert (x == MASK).sum() == 7
    with pytest.raises(ValueError, match="with compat=None expected no masks, got 7 .*infill"):
        llada.generate(models[1], ids, mask, **LENGTHS, **IDS, compat=None)


def test_eos_last_writes_ends_last(models):
    """A model that mostly predicts the end: the option decides, in both readings."""
    plain, _ = models
    plain = type(plain)(plain.config, dict(plain.weights))
    head = plain.weights["model.transformer.ff_out.weight"].clone()
    head[EOS] = head[EOT] * 1.1 + head[3] * 0.3
    plain.weights["model.transformer.ff_out.weight"] = head
    module = standin(plain)
    ids, _ = prompts(4, 5, seed=2)
    option = {"confidence_eos_eot_inf": True}
    expected = published(Plainly(plain), ids, mask_id=MASK, last_ids=(EOS, EOT), **LENGTHS)
    assert torch.equal(llada.generate(module, ids, **LENGTHS, **IDS, **option), expected)
    assert not torch.equal(llada.generate(module, ids, **LENGTHS, **IDS), expected)
    late = llada.generate(module, ids, **LENGTHS, **IDS, **option, compat=None)
    assert (late == EOS).any()


@pytest.mark.parametrize("options", [{}, {"cfg_scale": 1.0}, {"remasking": "random"}])
def test_our_noise_follows_torchs_seed(models, options):
    own = models[1]
    ids, mask = prompts(3, 5, pads=[1, 0, 0])
    given = LENGTHS | IDS | {"temperature": 1.0, "compat": None} | options

    def run(seed):
        torch.manual_seed(seed)
        return llada.generate(own, ids, mask, **given)

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    assert not (run(2) == MASK).any()


@pytest.mark.parametrize("guided", [False, True])
def test_our_noise_has_the_distribution(models, guided):
    """One new token, many sequences: frequencies against the softmax."""
    plain, own = models
    one, _ = prompts(1, 4)
    count, temperature = 3000, 0.7
    logits = Plainly(plain)(torch.cat((one, torch.tensor([[MASK]])), 1))[0, -1]
    if guided:
        blank = Plainly(plain)(torch.full((1, 5), MASK))[0, -1]
        logits = blank + 1.5 * (logits - blank)
    logits[MASK] = -torch.inf
    p = (logits / temperature).softmax(-1)
    torch.manual_seed(1)
    x = llada.generate(
        own,
        one.expand(count, -1),
        steps=1,
        gen_length=1,
        block_length=1,
        temperature=temperature,
        cfg_scale=0.5 if guided else 0.0,
        compat=None,
        **IDS,
    )
    seen = torch.bincount(x[:, -1], minlength=len(p)) / count
    # The total variation of an empirical distribution is on average below sum sqrt(p q / n) / 2;
    # it leaves that by 0.05 once in exp(-2 n 0.05^2) < 1e-6 (McDiarmid).
    mean = ((p * (1 - p) / count).sqrt().sum() / 2).item()
    assert (seen - p).abs().sum().item() / 2 < mean + 0.05


def test_signature():
    names = list(inspect.signature(llada.generate).parameters.values())
    original = {
        "attention_mask": None,
        "steps": 128,
        "gen_length": 128,
        "block_length": 128,
        "temperature": 0.0,
        "cfg_scale": 0.0,
        "remasking": "low_confidence",
        "mask_id": 126336,
        "logits_eos_inf": False,
        "confidence_eos_eot_inf": False,
    }
    assert [p.name for p in names[:12]] == ["model", "prompt", *original]
    assert {p.name: p.default for p in names[2:12]} == original


BAD = {
    "gen_length": ({"gen_length": 13}, ValueError, "multiple of block_length 6, got 13"),
    "steps": ({"steps": 7}, ValueError, "multiple of the 2 blocks, got 7"),
    "zero": ({"block_length": 0}, ValueError, "block_length: expected an int of at least 1"),
    "remasking": ({"remasking": "best"}, ValueError, "low_confidence, random, got 'best'"),
    "temperature": ({"temperature": -1.0}, ValueError, "temperature: expected 0"),
    "cfg": ({"cfg_scale": -1.0}, ValueError, "cfg_scale: expected a finite number of at least 0"),
    "mask": ({"mask_id": 126336}, ValueError, r"mask_id: .* in \[0, 61\), got 126336"),
    "compat": ({"compat": False}, TypeError, "compat: expected 'llada' or None, got False"),
    "eos": ({"eos_id": 99, "logits_eos_inf": True}, ValueError, r"eos_id: .*\[0, 61\), got 99"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_arguments(models, case):
    options, error, message = case
    with pytest.raises(error, match=message):
        llada.generate(models[1], prompts(2, 5)[0], **(LENGTHS | IDS | options))


def test_bad_tensors(models):
    own, (ids, mask) = models[1], prompts(2, 5)
    given = LENGTHS | IDS
    for prompt, error, message in (
        (ids.tolist(), TypeError, "prompt: expected a tensor of token ids, got <class 'list'>"),
        (ids.float(), TypeError, "token ids, got torch.float32"),
        (ids[0], ValueError, r"prompt: expected shape \(B, P\), got \(5,\)"),
        (ids + 50, ValueError, r"prompt: expected token ids in \[0, 61\)"),
        (ids.repeat(1, 20), ValueError, "at most 64 positions"),
    ):
        with pytest.raises(error, match=message):
            llada.generate(own, prompt, **given)
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \(2, 5\)"):
        llada.generate(own, ids, mask[:1], **given)
    mask[0, 3] = 0
    with pytest.raises(ValueError, match="zeros on the left alone"):
        llada.generate(own, ids, mask, **given)
    with pytest.raises(TypeError, match="expected a loaded module or a pydllm model"):
        llada.generate("GSAI-ML/LLaDA-8B-Instruct", ids, **given)
    with pytest.raises(ValueError, match="full attention and unshifted logits, got full attention"):
        llada.generate(pair("dream")[1], ids, **given)


def test_a_module_is_adapted_once_and_until_it_moves(models):
    import copy
    import pickle

    module = standin(models[0])
    own = as_model(module)
    assert as_model(module) is own
    assert set(module.state_dict()) == set(models[0].weights)
    twin = copy.deepcopy(module)
    assert as_model(twin) is not own and as_model(module) is own
    pickle.dumps(module.__dict__["_pydllm_model"])
    module.to(torch.float32)
    moved = as_model(module)
    assert moved is not own and moved.dtype == torch.float32
