"""d3LLM's decoders by their own names against the published ones, stated plainly."""

import inspect
from types import SimpleNamespace

import pytest
import torch

from pydllm import PydllmError
from pydllm.integrations import d3llm
from tests.decoding.published_multiblock import multiblock as published
from tests.integrations.tiny import EOS, MASK, pair, prompts, standin


@pytest.fixture(scope="module")
def models():
    return {name: pair(name, seed=6, predicts_masks=False) for name in ("llada", "dream")}


def oracle(plain):
    """``Plain`` with heads first, cached keys before the window's own."""

    def forward(ids, start, cache):
        frozen = cache and [tuple(t.transpose(0, 1) for t in kv) for kv in cache]
        _, logits, kept = plain(ids, start, frozen)
        keys = []
        for layer, own in enumerate(kept):
            heads = tuple(t.transpose(0, 1) for t in own)
            if cache:
                heads = tuple(torch.cat(pair, 1) for pair in zip(cache[layer], heads, strict=True))
            keys.append(heads)
        return logits, keys

    return forward


SETTINGS = {
    "default": {},
    "eager": {"threshold": 1.5, "add_at": 0.1, "full_at": 0.95},
    "sequential": {"threshold": 0.8, "add_at": 1.0, "full_at": 1.0},
    "early stop": {"threshold": 1.5, "add_at": 0.1, "full_at": 0.9, "early_stop": True},
}


def expected(plain, ids, settings, *, shifted, cache=None, new=18, size=6):
    said = {"threshold": 0.5, "add_at": 0.5, "full_at": 0.5, "early_stop": False} | settings
    lengths = {"new": new, "size": size, "mask_id": MASK, "eos": EOS}
    x, nfe, margin, _, _ = published(
        oracle(plain), ids[0].tolist(), shifted=shifted, cache=cache, **lengths, **said
    )
    assert margin > 1e-6
    return x, nfe


def renamed(settings, eos=EOS):
    names = {"add_at": "block_add_threshold", "full_at": "decoded_token_threshold"}
    given = {names.get(key, key): value for key, value in settings.items()}
    return given | ({"eos_token_id": eos} if settings.get("early_stop") else {})


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_llada(models, settings):
    plain, own = models["llada"]
    for seed in range(3):
        ids, _ = prompts(1, 5, seed=seed)
        tokens, nfe = expected(plain, ids, settings, shifted=False)
        x, forwards = d3llm.generate_multi_block(
            own, ids, max_new_tokens=18, block_size=6, mask_id=MASK, **renamed(settings)
        )
        assert type(forwards) is int and x.shape == (1, 23)
        assert torch.equal(x[0], tokens) and forwards == nfe


@pytest.mark.parametrize("cache", [(10_000, 10_000), (2, 10_000), (1, 3), (0, 4)], ids=str)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_llada_with_a_cache(models, settings, cache):
    plain, own = models["llada"]
    ids, _ = prompts(1, 5, seed=4)
    tokens, nfe = expected(plain, ids, settings, shifted=False, cache=cache)
    x, forwards = d3llm.generate_multi_block_kv_cache(
        own,
        ids,
        max_new_tokens=18,
        block_size=6,
        mask_id=MASK,
        cache_delay_iter=cache[0],
        refresh_interval=cache[1],
        **renamed(settings),
    )
    assert torch.equal(x[0], tokens) and forwards == nfe


@pytest.mark.parametrize("cache", [None, (2, 10_000), (1, 3)], ids=str)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("pad", [0, 2])
def test_dream(models, pad, settings, cache):
    plain, own = models["dream"]
    ids, mask = prompts(1, 6, seed=1, pads=[pad])
    if cache is not None:
        pad = 0  # the published decoder with a cache takes it for text
    tokens, nfe = expected(plain, ids[:, pad:], settings, shifted=True, cache=cache)
    given = {"alg": "entropy_threshold", "max_new_tokens": 18, "block_size": 6}
    given |= {"mask_token_id": MASK, "attention_mask": mask, "threshold": 0.5}
    if cache is not None:
        given |= dict(zip(("cache_delay_iter", "refresh_interval"), cache, strict=True))
    x, forwards = d3llm.dream_generate_multi_block(own, ids, **given | renamed(settings))
    assert torch.equal(x[0, pad:], tokens) and forwards == nfe
    assert torch.equal(x[0, :pad], ids[0, :pad])


@pytest.mark.parametrize("cache", [(0, 10_000), (2, 10_000), (3, 3)], ids=str)
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_ends_and_rests(family, cache):
    """Models that predict the EOS much, early stop, lengths that are no multiple of the block.

    The published decoders decide the end on the masks in ``x``: some answers keep a mask, or a
    token after the EOS.
    """
    odd = 0
    for seed in range(16):
        plain, _ = pair(family, seed=20 + seed, predicts_masks=False)
        plain.weights[plain.ends[2] + ".weight"][EOS] *= 1.0 + 0.25 * (seed % 8)
        ids, _ = prompts(1, 3 + seed % 4, seed=seed)
        new, size = 11 + seed % 9, 4 + seed % 3
        settings = {"threshold": (0.6, 1.6)[seed % 2], "add_at": 0.1, "full_at": 0.9}
        tokens, nfe = expected(
            plain,
            ids,
            settings | {"early_stop": True},
            shifted=family == "dream",
            cache=cache,
            new=new,
            size=size,
        )
        given = renamed(settings | {"early_stop": True}) | {"block_size": size}
        given |= dict(zip(("cache_delay_iter", "refresh_interval"), cache, strict=True))
        if family == "llada":
            given |= {"max_new_tokens": new, "mask_id": MASK}
            x, forwards = d3llm.generate_multi_block_kv_cache(standin(plain), ids, **given)
        else:
            given |= {"alg": "entropy_threshold", "mask_token_id": MASK}
            given["max_length"] = new + ids.shape[1]
            x, forwards = d3llm.dream_generate_multi_block(standin(plain), ids, **given)
        assert torch.equal(x[0], tokens) and forwards == nfe
        answer = tokens[ids.shape[1] :]
        odd += bool(answer[(answer == EOS).cumsum(0) > 0].ne(EOS).any() or (answer == MASK).any())
    assert odd > 0 or family == "dream"  # there it is rare


@pytest.mark.parametrize("seed", [4, 8])
def test_a_forward_of_which_no_row_is_wanted(seed):
    """The model predicts the mask, and all masks left are in a block whose keys are kept."""
    plain, own = pair("dream", seed=seed, predicts_masks=True)
    ids, _ = prompts(1, 4, seed=seed)
    settings = {"threshold": 1.0, "add_at": 0.3, "full_at": 0.9, "early_stop": False}
    tokens, nfe = expected(plain, ids, settings, shifted=True, cache=(1, 1), new=24, size=8)
    given = {"alg": "entropy_threshold", "max_new_tokens": 24, "block_size": 8}
    given |= {"mask_token_id": MASK, "cache_delay_iter": 1, "refresh_interval": 1}
    x, forwards = d3llm.dream_generate_multi_block(own, ids, **given | renamed(settings))
    assert torch.equal(x[0], tokens) and forwards == nfe


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_rest_without_a_cache(models, temperature):
    """Nothing ends the published loops but their limit; the forwards up to it are not run."""
    ids, _ = prompts(1, 5)
    given = {"max_new_tokens": 9, "block_size": 6, "mask_id": MASK, "temperature": temperature}
    x, forwards = d3llm.generate_multi_block(models["llada"][1], ids, **given)
    assert forwards == 10_001 and x[0, 11:].tolist() == [MASK] * 3


@pytest.mark.parametrize("threshold", [0.0, 0.5, 2.0])
def test_dream_one_block_at_a_time(models, threshold):
    """The published ``diffusion_generate``: the lowest entropy, and all below the threshold."""
    plain, own = models["dream"]
    ids, _ = prompts(1, 5, seed=3)
    x = torch.cat((ids[0], torch.full((12,), MASK)))
    nfe = 0
    for first in (5, 11):
        while (x[first : first + 6] == MASK).any():
            nfe += 1
            _, logits, _ = plain(x)
            logits = torch.cat((logits[:1], logits[:-1]))
            p = logits.softmax(-1)
            entropy = -(p * (p + 1e-8).log()).sum(-1)
            masks = [j for j in range(first + 6) if x[j] == MASK]
            masks.sort(key=lambda j: entropy[j].item())
            for rank, j in enumerate(masks):
                if rank == 0 or entropy[j] < threshold:
                    x[j] = logits[j].argmax()
    given = {"alg": "entropy_threshold", "max_new_tokens": 12, "mask_token_id": MASK, "steps": 12}
    out, forwards = d3llm.dream_diffusion_generate(
        own, ids, block_length=6, threshold=threshold, **given
    )
    assert torch.equal(out[0], x) and forwards == nfe


def test_fixed_profile_fills_behind_the_end(models):
    own = models["llada"][1]
    ids, _ = prompts(1, 5)
    first = d3llm.generate_multi_block(
        own, ids, max_new_tokens=12, block_size=6, mask_id=MASK, compat=None
    )[0]
    end = int(first[0, 8])
    x, _ = d3llm.generate_multi_block(
        own,
        ids,
        max_new_tokens=12,
        block_size=6,
        mask_id=MASK,
        eos_token_id=end,
        early_stop=True,
        compat=None,
    )
    place = (x[0, 5:] == end).nonzero()[0].item()
    assert (x[0, 5 + place :] == end).all()


def test_noise_and_return_types(models):
    module = standin(models["dream"][0])
    ids, _ = prompts(1, 5)
    config = SimpleNamespace(alg="entropy_threshold", return_dict_in_generate=True)
    given = {"max_new_tokens": 8, "mask_token_id": MASK, "block_size": 4, "temperature": 1.0}

    def run(seed):
        torch.manual_seed(seed)
        return d3llm.dream_generate_multi_block(module, ids, config, **given)

    out, nfe = run(0)
    assert type(nfe) is int and out.history is None and out.sequences.shape == (1, 13)
    assert torch.equal(out.sequences, run(0)[0].sequences)
    assert not torch.equal(out.sequences, run(1)[0].sequences)
    given = {"max_new_tokens": 8, "mask_token_id": MASK, "steps": 8, "block_length": 4}
    out, nfe = d3llm.dream_diffusion_generate(module, ids, config, **given)
    assert type(nfe) is int and out.history is None and out.sequences.shape == (1, 13)


def test_signatures():
    original = {
        "steps": 128,
        "max_new_tokens": 512,
        "block_size": 32,
        "temperature": 0.0,
        "remasking": "low_confidence",
        "mask_id": 126336,
        "threshold": 0.5,
        "block_add_threshold": 0.5,
        "decoded_token_threshold": 0.5,
        "eos_token_id": None,
        "early_stop": False,
    }
    cached = {"cache_delay_iter": 10000, "refresh_interval": 10000, "lazy_cache_refresh_num": 0}
    for function, more in (
        (d3llm.generate_multi_block, {}),
        (d3llm.generate_multi_block_kv_cache, cached),
    ):
        parameters = list(inspect.signature(function).parameters.values())[2:-2]
        assert {p.name: p.default for p in parameters} == original | more


def test_bad_arguments(models):
    own, ids = models["llada"][1], prompts(2, 5)[0]
    given = {"max_new_tokens": 12, "block_size": 6, "mask_id": MASK}
    with pytest.raises(ValueError, match=r"one sequence, \(1, P\), got \(2, 5\)"):
        d3llm.generate_multi_block(own, ids, **given)
    with pytest.raises(ValueError, match="block_add_threshold: expected a number in"):
        d3llm.generate_multi_block(own, ids[:1], block_add_threshold=2.0, **given)
    with pytest.raises(ValueError, match="at least one block"):
        d3llm.generate_multi_block(own, ids[:1], **given | {"max_new_tokens": 4})
    own = models["dream"][1]
    given = {"max_new_tokens": 12, "mask_token_id": MASK}
    with pytest.raises(ValueError, match="alg: expected one of entropy_threshold, got 'entropy'"):
        d3llm.dream_generate_multi_block(own, ids[:1], alg="entropy", **given)
    given["alg"] = "entropy_threshold"
    with pytest.raises(ValueError, match=r"one sequence, \(1, P\), got \(2, 5\)"):
        d3llm.dream_generate_multi_block(own, ids, **given)
    with pytest.raises(TypeError, match="expected arguments among"):
        d3llm.dream_generate_multi_block(own, ids[:1], block_length=4, **given)
    with pytest.raises(ValueError, match="divisor of the 12 new, got 5"):
        d3llm.dream_diffusion_generate(own, ids[:1], block_length=5, **given)
    with pytest.raises(PydllmError, match="predicts the mask at every"):
        plain = type(models["dream"][0])(
            models["dream"][0].config, dict(models["dream"][0].weights)
        )
        plain.weights["model.norm.weight"] = torch.zeros_like(plain.weights["model.norm.weight"])
        given |= {"mask_token_id": 0, "steps": 12, "block_length": 6}
        d3llm.dream_diffusion_generate(standin(plain), ids[:1].clamp(min=1), **given)
