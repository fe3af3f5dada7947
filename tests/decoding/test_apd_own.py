"""APD whose verifier is a diffusion model read causally, most of all the one that drafts."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import pydllm
from tests.decoding.apd_oracle import decode
from tests.decoding.test_apd import EACH, MASK, NEW, PROMPTS, _check, _decode, no_end, trio
from tests.decoding.trajectories import random_pair, random_prompt

__all__ = ["no_end", "trio"]  # fixtures


@pytest.fixture
def readable(trio, monkeypatch):
    """The diffusion models, read causally as well."""
    for kind in ("plain", "shifted"):
        spec = dataclasses.replace(trio[kind][0].spec, causal="shifted")
        monkeypatch.setattr(trio[kind][0], "spec", spec)
    return trio


@pytest.mark.parametrize(
    ("kind", "window", "emit", "temperature", "more"),
    [
        ("plain", 0, "draft", 0.0, {}),
        ("shifted", 0, "draft", 1.5, {"max_batch": 2}),
        ("plain", 0, "target", 1.5, {}),
        ("shifted", 0, "draft_then_target", 0.0, {"graph": True}),
        ("plain", 0, "draft_then_target", 1.5, {"deterministic": True}),
        ("shifted", EACH["window"], "draft", 1.5, {}),
        ("plain", EACH["window"], "target", 0.0, {"graph": True}),
    ],
)
def test_a_model_verifies_its_own_drafts(readable, kind, window, emit, temperature, more):
    """Read causally; with window 0 its masks see the causal forwards' keys."""
    model, plain = readable[kind]
    algorithm = pydllm.APD(model, **EACH | {"window": window}, emit=emit)
    eos = (3, 11) if emit == "draft" else ()
    model.spec = dataclasses.replace(model.spec, eos_ids=eos)
    options = {"temperature": temperature, "seed": 5}
    expected = [
        decode(
            plain,
            plain,
            prompt,
            new=NEW,
            mask=MASK,
            emit=emit,
            request=row,
            eos=eos,
            shifted=kind == "shifted",
            **options,
            **{name: values[row] for name, values in EACH.items() if name != "window"},
            window=0 if window == 0 else window[row],
        )
        for row, prompt in enumerate(PROMPTS)
    ]
    assert len({rounds for _, _, rounds in expected}) > 2
    got = _decode(model, PROMPTS, algorithm, **options, **more)
    _check(got, expected)
    if window == 0:  # every round is stored, and every prompt of more than a token
        more_than_one = torch.tensor([len(prompt) > 1 for prompt in PROMPTS])
        assert torch.equal(got.verifier_nfe, got.nfe + more_than_one)


def test_a_verifier_of_another_size_that_is_read_causally(readable):
    (model, plain), (verifier, plain_verifier) = readable["plain"], readable["shifted"]
    got = _decode(model, PROMPTS, pydllm.APD(verifier, mixture=0.5, window=2))
    expected = [
        decode(
            plain,
            plain_verifier,
            prompt,
            new=NEW,
            mask=MASK,
            mixture=0.5,
            window=2,
            lookahead=64,
            request=row,
        )
        for row, prompt in enumerate(PROMPTS)
    ]
    _check(got, expected)


@pytest.mark.parametrize(("kind", "window"), [("plain", 0), ("shifted", 0), ("plain", 2)])
def test_mixture_0_is_the_model_s_own_autoregressive_answer(readable, kind, window):
    model, _ = readable[kind]
    algorithm = pydllm.APD(model, mixture=0.0, window=window, lookahead=5, emit="target")
    got = _decode(model, PROMPTS, algorithm)
    expected = _decode(model, PROMPTS, pydllm.Autoregressive())
    assert torch.equal(torch.cat(got.sequences), torch.cat(expected.sequences))
    drafted = _decode(model, PROMPTS, pydllm.SelfSpeculative(drafts=4))
    assert torch.equal(torch.cat(got.sequences), torch.cat(drafted.sequences))


def test_window_0_of_block_causal_models():
    """Nemotron's kind: cached keys are those of causal forwards, other windows are refused."""
    model, _ = random_pair(3, block=4)
    model.spec = dataclasses.replace(model.spec, causal="shifted", context="causal")
    prompts = [random_prompt(seed, length) for seed, length in enumerate((5, 1, 9))]
    answer = _decode(model, prompts, pydllm.Autoregressive())
    for mixture in (0.0, 0.5, 1.0):
        algorithm = pydllm.APD(model, mixture=mixture, window=0, lookahead=4, emit="target")
        got = _decode(model, prompts, algorithm)
        same = torch.equal(torch.cat(got.sequences), torch.cat(answer.sequences))
        assert same == (mixture == 0)
    with pytest.raises(ValueError, match="APD: expected a model with full attention"):
        _decode(model, prompts, pydllm.APD(model))


def test_verifiers_and_windows_that_are_refused(trio, readable):
    (model, _), (verifier, _) = readable["plain"], trio["verifier"]
    with pytest.raises(ValueError, match="window: expected at least 1 or None with a verifier"):
        _decode(model, PROMPTS, pydllm.APD(verifier, window=0))
    with pytest.raises(ValueError, match="window: expected 0 for all prompts or for none"):
        pydllm.APD(model, window=[0, 1])
    model.spec = dataclasses.replace(model.spec, causal=None)
    with pytest.raises(ValueError, match="verifier: expected a model with causal attention, o"):
        pydllm.APD(model)


class Masked:
    """A plain model read with a mask after each prefix: row p predicts position p + 1."""

    def __init__(self, plain):
        self.plain = plain

    def __call__(self, ids, block):
        shown = [torch.cat((ids[: n + 1], torch.tensor([MASK]))) for n in range(len(ids))]
        return None, torch.stack([self.plain(each, block=block)[1][-1] for each in shown]), None


@pytest.mark.parametrize(
    ("window", "emit", "temperature", "more"),
    [
        (0, "draft", 1.5, {}),
        (0, "target", 0.0, {"max_batch": 2}),
        (EACH["window"], "draft_then_target", 1.5, {}),
        (EACH["window"], "draft", 0.0, {"graph": True}),
    ],
)
def test_a_model_that_predicts_at_masks_verifies(trio, window, emit, temperature, more):
    """SDAR's kind: a lone mask after each draft says what comes there."""
    model, plain = trio["plain"]
    model.spec = dataclasses.replace(model.spec, causal="masked")
    algorithm = pydllm.APD(model, **EACH | {"window": window}, emit=emit)
    options = {"temperature": temperature, "seed": 5}
    expected = []
    for row, prompt in enumerate(PROMPTS):
        own = {name: values[row] for name, values in EACH.items() if name != "window"}
        own |= {"window": 0 if window == 0 else window[row], "request": row}
        shown = {"new": NEW, "mask": MASK, "emit": emit, **options}
        expected.append(decode(plain, Masked(plain), prompt, **shown, **own))
    _check(_decode(model, PROMPTS, algorithm, **options, **more), expected)


@pytest.mark.parametrize("window", [0, 2])
def test_mixture_0_is_the_answer_of_blocks_of_one(trio, window):
    model, _ = trio["plain"]
    model.spec = dataclasses.replace(model.spec, causal="masked")
    algorithm = pydllm.APD(model, mixture=0.0, window=window, lookahead=5, emit="target")
    got = _decode(model, PROMPTS, algorithm)
    for other in (pydllm.Autoregressive(), pydllm.SelfSpeculative(drafts=4)):
        expected = _decode(model, PROMPTS, other)
        assert torch.equal(torch.cat(got.sequences), torch.cat(expected.sequences))
