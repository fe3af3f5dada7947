"""FreeDave equals its baseline token for token, in as many forwards as the replay says."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import pydllm
from pydllm.decoding import freedave
from tests.decoding.test_static import _prompt, _random_model

BASELINES = [
    pydllm.Static(8),
    pydllm.Static(8, cache="prefix"),
    pydllm.Static(8, cache="dual"),
    pydllm.Static(8, 3, cache="dual", score="margin"),
    pydllm.Static(8, score="left_to_right"),
    pydllm.Static(8, score="random", cache="dual"),
    pydllm.Static(4, score="entropy", cache="dual", first_token="forced"),
    pydllm.Threshold(0.1, 8, cache="dual"),
    pydllm.Factor(2.0, 8),
    pydllm.EntropyBound(2.0, 8, cache="prefix"),
]


def _decode(model, prompts, algorithm, **options):
    return pydllm.generate(model, prompts, algorithm, max_new_tokens=16, **options)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("shift", [False, True], ids=["plain", "shifted"])
@pytest.mark.parametrize("baseline", BASELINES, ids=str)
def test_it_equals_its_baseline(tmp_path, baseline, shift, temperature):
    prompts = [_prompt(seed, length) for seed, length in enumerate((4, 1, 9))]
    options = {"temperature": temperature, "seed": 2}
    for seed in range(3):
        model, _ = _random_model(tmp_path / str(seed), seed, eos=(7, 9), shift=shift)
        expected = _decode(model, prompts, baseline, **options)
        for draft_steps in (1, 2, 4, 32):
            algorithm = pydllm.FreeDave(draft_steps, baseline=baseline)
            got = _decode(model, prompts, algorithm, **options)
            assert torch.equal(torch.cat(got.sequences), torch.cat(expected.sequences))
            assert (got.nfe <= expected.nfe).all()
            if draft_steps == 1:
                assert torch.equal(got.nfe, expected.nfe)
                assert torch.equal(got.step_map, expected.step_map)


def _replay(plain, prompt, new, block, draft_steps):
    """Forwards that FreeDave has to take, from the static trajectory alone."""
    mask_id = plain.config["mask_token_id"]
    x = torch.tensor(prompt + [mask_id] * new)
    forwards = 0
    for start in range(len(prompt), len(x), block):
        picks, stale = [], []
        for _ in range(block):
            logits, _ = plain.forward(x)
            logits[:, mask_id] = -torch.inf
            confidence, token = logits.softmax(-1)[start : start + block].max(-1)
            masked = (x[start : start + block] == mask_id).nonzero().flatten().tolist()
            ranked = sorted(masked, key=lambda p, c=confidence: (-c[p].item(), p))
            stale.append([(p, token[p].item()) for p in ranked])
            picks.append(stale[-1][0])
            x[start + ranked[0]] = token[ranked[0]]
        step, forwards = 0, forwards + 1
        while step + 1 < block:
            guesses = zip(stale[step][1:draft_steps], picks[step + 1 :], strict=False)
            right = [guess == pick for guess, pick in guesses]
            step += 1 + (right.index(False) if False in right else len(right))
            forwards += 1
    return x, forwards


def test_it_takes_the_forwards_of_the_replay(tmp_path):
    for seed in range(8):
        model, plain = _random_model(tmp_path / str(seed), seed)
        prompt = _prompt(seed, 3 + seed)
        for draft_steps in (1, 2, 4, 8):
            expected, forwards = _replay(plain, prompt, 16, 8, draft_steps)
            got = _decode(model, [prompt], pydllm.FreeDave(draft_steps, 8))
            assert torch.equal(got.sequences[0], expected)
            assert got.nfe.item() == forwards


def test_it_saves_forwards(tmp_path):
    model, _ = _random_model(tmp_path / "model", 0)
    prompts = [_prompt(seed, 4) for seed in range(8)]
    nfe = [
        _decode(model, prompts, pydllm.FreeDave(draft_steps, 8)).nfe.sum().item()
        for draft_steps in (1, 4)
    ]
    assert nfe[0] == 8 * 16
    assert nfe[1] < nfe[0]


def test_a_wrong_acceptance_is_noticed(tmp_path, monkeypatch):
    """Negative control: accept one candidate too many, and the tokens differ."""
    honest = freedave._longest_chain

    def greedy(packed, stepped, branches):
        return torch.where(
            (honest(packed, stepped, branches) + 1) % branches == 0,
            honest(packed, stepped, branches),
            honest(packed, stepped, branches) + 1,
        )

    model, _ = _random_model(tmp_path / "model", 1)
    prompts = [_prompt(seed, 4) for seed in range(8)]
    expected = _decode(model, prompts, pydllm.Static(8))
    monkeypatch.setattr(freedave, "_longest_chain", greedy)
    got = _decode(model, prompts, pydllm.FreeDave(4, 8))
    assert not torch.equal(torch.cat(got.sequences), torch.cat(expected.sequences))


def test_logits_that_are_nan_do_not_hang_it(tmp_path):
    model, _ = _random_model(tmp_path / "model", 0)
    model.spec = dataclasses.replace(model.spec, mask_id=0)  # the token of a row of NaN
    model._head.fill_(float("nan"))
    got = _decode(model, [[2, 3]], pydllm.FreeDave(4, 8))
    expected = _decode(model, [[2, 3]], pydllm.Static(8))
    assert torch.equal(got.sequences[0], expected.sequences[0])
    assert (got.nfe <= expected.nfe).all()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: pydllm.FreeDave(0), ValueError, "draft_steps: expected an int of at least 1"),
        (lambda: pydllm.FreeDave(33), ValueError, "draft_steps: .* at most 32, got 33"),
        (lambda: pydllm.FreeDave(mode="eager"), ValueError, "mode: expected one of strict"),
        (lambda: pydllm.FreeDave(cache="all"), ValueError, "cache: expected one of none"),
        (lambda: pydllm.FreeDave(baseline=3), TypeError, "baseline: expected a block-wise"),
        (
            lambda: pydllm.FreeDave(block_length=8, baseline=pydllm.Static(8)),
            ValueError,
            "block_length: expected the default 32 beside a baseline",
        ),
        (
            lambda: pydllm.FreeDave(baseline=pydllm.Static(semantics="llada")),
            ValueError,
            "baseline: expected semantics 'exact'",
        ),
    ],
)
def test_bad_parameters(make, error, message):
    with pytest.raises(error, match=message):
        make()
