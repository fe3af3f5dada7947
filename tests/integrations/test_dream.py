"""Dream's ``diffusion_generate`` against the published loop, stated plainly."""

import types
import warnings
from types import SimpleNamespace

import pytest
import torch

from pydllm.integrations import dream
from tests.integrations.published_dream import dream as published
from tests.integrations.tiny import EOS, MASK, Plainly, pair, prompts, standin

NEW = {"max_new_tokens": 11, "mask_token_id": MASK}


@pytest.fixture(scope="module")
def models():
    return pair("dream", seed=4)


CASES = {
    "origin": {"alg": "origin"},
    "probability": {"alg": "maskgit_plus"},
    "margin": {"alg": "topk_margin"},
    "entropy": {"alg": "entropy"},
    "origin at a temperature": {"alg": "origin", "temperature": 0.8},
    "entropy at a temperature": {"alg": "entropy", "temperature": 0.4},
    "nucleus": {"alg": "entropy", "temperature": 0.5, "top_p": 0.8},
    "nucleus, greedy": {"alg": "topk_margin", "top_p": 0.7},
    "top k": {"alg": "maskgit_plus", "temperature": 1.0, "top_k": 4, "top_p": 0.95},
    "drawn places": {"alg": "entropy", "alg_temp": 0.3},
    "drawn places and tokens": {"alg": "topk_margin", "alg_temp": 0.5, "temperature": 0.7},
    "as many steps as tokens": {"alg": "entropy", "steps": 11, "eps": 1e-2},
    "more steps than tokens": {"alg": "maskgit_plus", "steps": 30},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("pads", [None, [2, 0, 1]], ids=["unpadded", "padded"])
def test_tokens(models, pads, options):
    plain, own = models
    ids, mask = prompts(3, 5, pads=pads)
    options = {"steps": 5} | options
    oracle = Plainly(plain)
    torch.manual_seed(11)
    expected, _ = published(oracle, ids, pads, new=11, mask_id=MASK, **options)
    torch.manual_seed(11)
    x = dream.diffusion_generate(own, ids, attention_mask=mask, **NEW, **options)
    assert x.dtype == torch.int64 and torch.equal(x, expected)
    assert oracle.calls == options["steps"]


def test_as_a_method_with_a_config_and_a_history(models):
    plain, _ = models
    module = standin(plain)
    module.config = SimpleNamespace(**plain.config)
    module.diffusion_generate = types.MethodType(dream.diffusion_generate, module)
    ids, mask = prompts(2, 4, pads=[1, 0])
    config = SimpleNamespace(
        alg="entropy",
        steps=6,
        max_new_tokens=9,
        return_dict_in_generate=True,
        output_history=True,
        mask_token_id=None,
        bos_token_id=3,
        top_k=None,
        num_beams=1,
    )
    expected, history = published(
        Plainly(plain), ids, [1, 0], new=9, mask_id=MASK, alg="entropy", steps=6
    )
    out = module.diffusion_generate(ids, generation_config=config, attention_mask=mask)
    assert type(out) is dream.DreamModelOutput
    assert torch.equal(out.sequences, expected) and torch.equal(out["sequences"], expected)
    assert torch.equal(out[0], expected) and list(out) == ["sequences", "history"]
    assert len(out.history) == 6
    assert all(torch.equal(a, b) for a, b in zip(out.history, history, strict=True))
    # What the call says goes before the config.
    out = module.diffusion_generate(ids, config, steps=3, output_history=False, attention_mask=mask)
    assert out.history is None and len(out) == 1
    plain_tensor = module.diffusion_generate(ids, config, return_dict_in_generate=False)
    assert isinstance(plain_tensor, torch.Tensor)
    assert config.steps == 6


@pytest.mark.parametrize("options", [{"alg": "entropy"}, {"alg": "origin", "temperature": 0.6}])
def test_hooks(models, options):
    plain, own = models
    ids, _ = prompts(2, 4)

    def run(function, **more):
        seen = []

        def on_tokens(step, x, logits):
            seen.append((step, x.clone(), None if logits is None else logits.clone()))
            if step == 1:
                x = x.clone()
                x[:, -1] = 7  # a token pinned from outside
            return x

        def on_logits(step, x, logits):
            logits[..., EOS] = -torch.inf
            return logits

        torch.manual_seed(2)
        return function(on_tokens, on_logits), seen

    expected, shown = run(
        lambda t, g: published(
            Plainly(plain), ids, new=8, mask_id=MASK, steps=4, on_tokens=t, on_logits=g, **options
        )[0]
    )
    x, seen = run(
        lambda t, g: dream.diffusion_generate(
            own,
            ids,
            max_new_tokens=8,
            mask_token_id=MASK,
            steps=4,
            generation_tokens_hook_func=t,
            generation_logits_hook_func=g,
            **options,
        )
    )
    assert torch.equal(x, expected) and (x[:, -1] == 7).all()
    assert [step for step, _, _ in seen] == [None, 0, 1, 2, 3] and seen[0][2] is None
    for (_, a, logits), (_, b, others) in zip(seen, shown, strict=True):
        assert torch.equal(a, b)
        assert logits is None or torch.allclose(logits, others)


def test_lengths(models):
    own = models[1]
    ids, _ = prompts(1, 5)
    given = {"alg": "entropy", "steps": 3, "mask_token_id": MASK}

    def length(**options):
        return dream.diffusion_generate(own, ids, **given, **options).shape[1]

    assert length() == 25  # Dream's default of 20 is of new tokens
    assert length(max_length=20) == 20
    assert length(max_length=9) == 9
    assert length(max_length=9, max_new_tokens=3) == 8
    assert (
        dream.diffusion_generate(own, ids, SimpleNamespace(max_length=12), **given).shape[1] == 12
    )
    copies = dream.diffusion_generate(own, ids, num_return_sequences=3, max_length=8, **given)
    assert copies.shape == (3, 8)


def test_padding_without_a_mask_is_told(models):
    own = models[1]
    ids, mask = prompts(2, 5, pads=[2, 0])
    given = {"alg": "entropy", "steps": 2, "max_new_tokens": 4, "pad_token_id": 58}
    with pytest.warns(UserWarning, match="padding counts as text"):
        dream.diffusion_generate(own, ids, **given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dream.diffusion_generate(own, ids, attention_mask=mask, **given)


@pytest.mark.parametrize("options", [{"alg": "entropy"}, {"alg": "origin"}, {"top_p": 0.9}])
def test_our_noise_follows_torchs_seed(models, options):
    own = models[1]
    ids, _ = prompts(2, 5)

    def run(seed):
        torch.manual_seed(seed)
        given = NEW | {"steps": 4, "temperature": 1.0, "compat": None} | options
        return dream.diffusion_generate(own, ids, **given)

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    assert not (run(2) == MASK).any()


BAD = {
    "argument": ({"step": 3}, TypeError, "arguments among alg, alg_temp,"),
    "alg": ({"alg": "p2"}, ValueError, "origin, maskgit_plus, topk_margin, entropy, got 'p2'"),
    "steps": ({"steps": 0}, ValueError, "steps: expected an int of at least 1"),
    "temperature": ({"temperature": -1}, ValueError, "temperature: expected 0"),
    "length": ({"max_new_tokens": None, "max_length": 5}, ValueError, "more than the 5 positions"),
    "positions": ({"max_new_tokens": 99}, ValueError, "at most 64 positions"),
    "mask": ({"mask_token_id": 400}, ValueError, r"mask_id: .* in \[0, 61\), got 400"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_arguments(models, case):
    options, error, message = case
    with pytest.raises(error, match=message):
        dream.diffusion_generate(models[1], prompts(1, 5)[0], **(NEW | options))


def test_bad_inputs(models):
    with pytest.raises(ValueError, match="inputs: expected token ids"):
        dream.diffusion_generate(models[1], **NEW)
    with pytest.raises(ValueError, match="shifted logits, got full attention and unshifted"):
        dream.diffusion_generate(pair("llada")[1], prompts(1, 5)[0], **NEW)
