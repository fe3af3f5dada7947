"""What APD and LeftToRight refuse, and the vocabulary that two models share."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tokenizers import Tokenizer, models

import pydllm
from pydllm.decoding.apd import shared_vocab
from pydllm.demo import WEIGHTS
from pydllm.demo.task import held_out_problems, read_answer
from tests.decoding.test_apd import CONFIGS, MASK, PROMPTS, VOCAB, Observed, _decode, no_end, trio
from tests.models.plain import random_plain, write_checkpoint

__all__ = ["no_end", "trio"]  # fixtures


def _tokenizer(*words):
    return Tokenizer(models.WordLevel({word: token for token, word in enumerate(words)}))


def test_ids_that_the_models_do_not_share_are_never_drafted(trio, tmp_path, monkeypatch):
    model, plain = trio["plain"]
    config = (
        CONFIGS["verifier"]
        | dict.fromkeys(("mask_token_id", "eos_token_id", "pad_token_id"))
        | {"vocab_size": 10}
    )
    other = random_plain(config, 5)
    verifier = pydllm.load(write_checkpoint(tmp_path / "small", other), dtype=torch.float64)
    bias = torch.zeros(VOCAB, dtype=torch.float64)
    bias[9:] = 1e3  # would always be drafted
    monkeypatch.setattr(model, "_head_bias", bias)
    words = [f"word {token}" for token in range(VOCAB)]
    monkeypatch.setattr(model, "tokenizer", _tokenizer(*words))
    verifier.tokenizer = _tokenizer(*words[:9], "another")
    prompts = [[token % 9 for token in prompt] for prompt in PROMPTS]
    for emit in ("draft", "target"):
        algorithm = pydllm.APD(verifier, mixture=0.5, window=3, lookahead=4, emit=emit)
        with pytest.raises(ValueError, match="token 9 is 'another' instead of 'word 9'"):
            _decode(model, prompts, algorithm)
    monkeypatch.setattr(pydllm.decoding.apd, "_LEAST_SHARED", 0.9)
    for emit in ("draft", "draft_then_target", "target"):
        algorithm = pydllm.APD(verifier, mixture=0.5, window=3, lookahead=4, emit=emit)
        got = _decode(model, prompts, algorithm, temperature=1.0)
        assert (torch.cat(got.sequences) < 9).all()
    with pytest.raises(ValueError, match=r"prompts\[0\]\[1\]: expected an id below 9, .* got 9"):
        _decode(model, [[1, 9]], algorithm)
    model.spec = dataclasses.replace(model.spec, eos_ids=(3, 11))
    with pytest.raises(ValueError, match=r"ends of sequence \[11\], got one that shares .* 9"):
        _decode(model, prompts, algorithm)


@pytest.mark.parametrize(
    ("parameters", "error"),
    [
        ({"mixture": 1.5}, "mixture: expected a number in .* got 1.5"),
        ({"mixture": [0.5, -0.1]}, "mixture: expected a number in .* got -0.1"),
        ({"mixture": float("nan")}, "mixture: expected a number in .* got nan"),
        ({"mixture": "all"}, "mixture: expected a number in .* got 'all'"),
        ({"window": -1}, "window: expected an int of at least 0, got -1"),
        ({"window": [4, 2.5]}, "window: expected an int of at least 0, got 2.5"),
        ({"lookahead": 0}, "lookahead: expected an int of at least 1, got 0"),
        ({"lookahead": [None, -1]}, "lookahead: expected an int of at least 1, got -1"),
        ({"top_p": 0.0}, "top_p: expected a number in .* got 0.0"),
        ({"emit": "both"}, "emit: expected one of draft, .* got 'both'"),
        ({"compat": "published"}, "compat: expected one of None, apd, got 'published'"),
        ({"verifier": None}, "verifier: expected a causal model .* got None with mixture 0.7"),
        ({"verifier": None, "mixture": 1.0, "compat": "apd"}, "got None .* 'apd'"),
        (
            {"verifier": "plain"},
            "verifier: expected a model with causal attention, or .* got 'full'",
        ),
    ],
)
def test_bad_parameters(trio, parameters, error):
    names = {"verifier": "verifier"} | parameters
    verifier = names.pop("verifier")
    with pytest.raises((ValueError, TypeError), match=error):
        pydllm.APD(verifier and trio[verifier][0], **names)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"tokens_per_step": 0}, "tokens_per_step: expected an int of at least 1, got 0"),
        ({"tokens_per_step": 5, "lookahead": 4}, "lookahead: expected at least the 5 .* got 4"),
        ({"tokens_per_step": 3, "lookahead": [9, 2]}, "lookahead: expected at least .* got 2"),
        ({"window": 0}, "window: expected an int of at least 1, got 0"),
        ({"lookahead": 0}, "lookahead: expected an int of at least 1, got 0"),
        ({"top_p": 2}, "top_p: expected a number in .* got 2"),
    ],
)
def test_bad_parameters_of_left_to_right(options, error):
    with pytest.raises(ValueError, match=error):
        pydllm.LeftToRight(**options)


@pytest.mark.parametrize(
    ("change", "prompts", "error"),
    [
        (
            {"model": {"attention": "block_causal", "block_size": 4}},
            [[1]],
            "APD: .* full attention, .* 'block_causal'",
        ),
        ({"model": {"attention": "causal"}}, [[1]], "APD: expected .* full attention, .* 'causal'"),
        ({"model": {"vocab_size": 12}}, [[1]], "vocabularies of one size, got sizes 12 and 13"),
        ({"model": {"shift_logits": True}}, [[1], []], r"prompts\[1\]: expected at least one"),
        ({}, [[1], []], r"prompts\[1\]: expected at least one token \(the verifier"),
        ({}, [[1, MASK]], r"prompts\[0\]: expected no mask"),
        ({"verifier": {"max_positions": 16}}, [[1], [1] * 3], "verifier's 16 positions .* got 17"),
        ({"model": {"max_positions": 16}}, [[1], [1] * 3], "at most 16 positions .* got 17"),
        ({"mixture": [0.5] * 3}, [[1], [2]], "mixture: expected one value for each of 2 prompts"),
        ({"window": [3]}, [[1], [2]], "window: expected one value for each of 2 prompts"),
        ({"lookahead": []}, [[1]], "lookahead: expected one value for each of 1 prompts"),
        (
            {"dtype": torch.float32},
            [[1]],
            "expected dtype torch.float32, .* got torch.float64",
        ),
    ],
)
def test_what_cannot_be_decoded_is_refused(trio, monkeypatch, change, prompts, error):
    """Before any forward."""
    model, verifier = Observed(trio["plain"][0]), trio["verifier"][0]
    monkeypatch.delattr(Observed, "forward")
    for name, each in (("model", model.model), ("verifier", verifier)):
        each.spec = dataclasses.replace(each.spec, **change.get(name, {}))
    model.dtype = change.get("dtype", model.dtype)
    parameters = {
        name: change[name] for name in ("mixture", "window", "lookahead") if name in change
    }
    with pytest.raises(ValueError, match=error):
        _decode(model, prompts, pydllm.APD(verifier, **parameters))
    if "full attention" in error:
        with pytest.raises(ValueError, match=error.replace("APD", "LeftToRight")):
            _decode(model, prompts, pydllm.LeftToRight())


def test_a_temperature_that_cannot_be_squared(trio):
    model, verifier = trio["plain"][0], trio["verifier"][0]
    algorithm = pydllm.APD(verifier, compat="apd")
    for temperature in (1e-4, [0.5, 1e-4]):
        with pytest.raises(ValueError, match="expected 0 or at least 0.001 with compat"):
            _decode(model, [[1], [2]], algorithm, temperature=temperature)


def test_the_bundled_models():
    """They share a tokenizer, and most of what they say."""
    model, verifier = (
        pydllm.load(WEIGHTS.with_name(f"{name}-tiny")) for name in ("llada", "verifier")
    )
    assert shared_vocab(model, verifier) == model.spec.vocab_size
    problems = held_out_problems(8)
    algorithm = pydllm.APD(verifier)
    got = pydllm.generate(model, [p.prompt for p in problems], algorithm, max_new_tokens=48)
    assert [read_answer(text) for text in got.text] == [p.answer for p in problems]
    assert got.tokens_per_forward.mean() > 3
