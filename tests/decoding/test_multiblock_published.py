"""The compat profile against a restatement of the published decoders."""

from __future__ import annotations

import itertools

import pytest
import torch

import pydllm
from tests.decoding.published_multiblock import multiblock, plain_forward
from tests.decoding.test_static import MASK, _prompt, _random_model

VOCAB, EOS = 24, 3
TINY = {"d_model": 16, "n_layers": 1, "mlp_hidden_size": 24}
CACHES = [None, (0, None), (1, None), (2, None), (2, 3), (1, 1)]


def tiny_model(folder, seed, shift, eos=(EOS,), end=0.9):
    """A random model that never predicts the mask; a greater ``end`` ends sooner."""
    model, plain = _random_model(folder, seed, vocab=VOCAB, eos=eos, shift=shift, **TINY)
    for head in (model._head, plain.weights["model.transformer.ff_out.weight"]):
        head[MASK] = 0
        head *= 2
        if eos:
            head[EOS] *= end
    return model, plain


def restated(plain, prompt, shift, **options):
    return multiblock(plain_forward(plain), prompt, mask_id=MASK, eos=EOS, shifted=shift, **options)


@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize("shift", [False, True], ids=["llada", "dream"])
def test_tokens_and_forwards_of_the_published_decoders(tmp_path, shift, cache):
    """48 runs a case: eight models, each with its settings, six ragged prompts in a batch."""
    runs, skipped, seen, twice, ended = 0, 0, set(), 0, 0
    grid = itertools.product((0.6, 1.6), (True, False), ((8, 0.1, 0.95), (10, 0.3, 0.5)))
    for seed, (threshold, early_stop, (size, add_at, full_at)) in enumerate(grid):
        end = 1.3 if early_stop else 0.9
        model, plain = tiny_model(tmp_path / str(seed), seed, shift, end=end)
        options = {"threshold": threshold, "add_at": add_at, "full_at": full_at}
        options["early_stop"] = early_stop
        new = 4 * size
        delay, refresh = cache or (2, None)
        algorithm = pydllm.MultiBlock(
            block_length=size,
            delay=delay,
            refresh=refresh,
            cache=cache is not None,
            profile="compat",
            **options,
        )
        prompts = [_prompt(seed * 100 + row, 2 + row, VOCAB) for row in range(6)]
        got = pydllm.generate(model, prompts, algorithm, max_new_tokens=new)
        for row, prompt in enumerate(prompts):
            want, nfe, margin, modes, held_twice = restated(
                plain, prompt, shift, new=new, size=size, cache=cache, **options
            )
            runs, seen, twice = runs + 1, seen | set(modes), twice + held_twice
            if margin < 1e-5:
                skipped += 1
                continue
            assert torch.equal(got.sequences[row], want), (seed, row)
            assert got.nfe[row] == nfe, (seed, row)
            ended += early_stop and bool((want[len(prompt) :] == EOS).any())
    assert runs == 48 and skipped < 5 and ended >= 3
    modes = {"commit"} if cache else set()
    modes |= {"refresh"} if cache and cache != (0, None) else set()
    assert seen >= modes
    # Keys in two places need two blocks that wait at a time; with (1, None) none did here.
    assert (twice > 0) == (shift and cache in ((2, None), (2, 3), (1, 1)))


def test_ends_of_sequence_of_the_published_decoders(tmp_path):
    """Tokens that stay behind an end of sequence, and forwards that are counted and not run."""
    leftovers, counts = 0, 0
    # Few random models leave tokens behind an end of sequence; among these most do.
    cases = [(0, True, 0.6), (0, True, 1.8), (5, True, 0.6), (8, True, 0.6), (12, False, 1.8)]
    for seed, shift, threshold in [*cases, (1, False, 0.6), (2, False, 1.8)]:
        model, plain = tiny_model(tmp_path / f"{seed} {threshold}", seed, shift, end=1.6)
        prompts = [_prompt(seed * 10 + row, 2 + row, VOCAB) for row in range(4)]
        options = {"threshold": threshold, "add_at": 0.1, "full_at": 0.95}
        options["early_stop"] = True
        compat, fixed = (
            pydllm.generate(
                model,
                prompts,
                pydllm.MultiBlock(block_length=8, cache=False, profile=profile, **options),
                max_new_tokens=32,
            )
            for profile in ("compat", "fixed")
        )
        for row, prompt in enumerate(prompts):
            want, nfe, margin, *_ = restated(plain, prompt, shift, new=32, size=8, **options)
            if margin < 1e-5:
                continue
            assert torch.equal(compat.sequences[row], want) and compat.nfe[row] == nfe
            answer = want[len(prompt) :]
            leftovers += bool(answer[(answer == EOS).cumsum(0) > 0].ne(EOS).any())
            counts += int(fixed.nfe[row] != nfe)
    assert leftovers >= 5 and counts > 0


def test_keys_held_twice_decide_tokens(tmp_path, monkeypatch):
    """Negative control: zeros in the place of Dream's second keys, and tokens differ."""
    monkeypatch.setattr("pydllm.decoding.multiblock._copy_twice", lambda *_: None)
    with pytest.raises(AssertionError):
        test_tokens_and_forwards_of_the_published_decoders(tmp_path, True, (2, None))


def test_with_one_block_at_a_time_it_is_single_block_decoding(tmp_path):
    """O4: add_at = full_at = 1, unshifted."""
    for seed in range(4):
        model, plain = tiny_model(tmp_path / str(seed), seed, False, eos=())
        prompt = _prompt(seed, 4, VOCAB)
        x, forwards = torch.tensor(prompt + [MASK] * 24), 0
        for start in (4, 12, 20):
            while (x[start : start + 8] == MASK).any():
                logits = plain.forward(x)[0][start : start + 8]
                entropy = torch.distributions.Categorical(logits=logits).entropy()
                entropy[x[start : start + 8] != MASK] = torch.inf
                accept = (entropy <= 1.5).scatter(0, entropy.argmin(), True)
                x[start : start + 8][accept] = logits.argmax(-1)[accept]
                forwards += 1
        algorithm = pydllm.MultiBlock(
            threshold=1.5, block_length=8, add_at=1.0, full_at=1.0, cache=False, profile="compat"
        )
        got = pydllm.generate(model, [prompt], algorithm, max_new_tokens=24)
        assert got.nfe.tolist() == [forwards]
        assert torch.equal(got.sequences[0], x)
