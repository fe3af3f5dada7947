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


def tiny_model(folder, seed, shift, eos=(EOS,)):
    """A random model that never predicts the mask; tokens depend on each other."""
    model, plain = _random_model(folder, seed, vocab=VOCAB, eos=eos, shift=shift, **TINY)
    for head in (model._head, plain.weights["model.transformer.ff_out.weight"]):
        head[MASK] = 0
        head *= 2
        if eos:
            head[EOS] *= 0.9
    return model, plain


def restated(plain, prompt, shift, **options):
    return multiblock(plain_forward(plain), prompt, mask_id=MASK, eos=EOS, shifted=shift, **options)


@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize("shift", [False, True], ids=["llada", "dream"])
def test_tokens_and_forwards_of_the_published_decoders(tmp_path, shift, cache):
    """48 runs a case: six models, four of eight settings each, ragged batches of two or three."""
    runs, skipped, seen, twice = 0, 0, set(), 0
    grid = itertools.product((0.6, 1.6), (True, False), ((8, 0.1, 0.95), (10, 0.3, 0.5)))
    for seed, (threshold, early_stop, (size, add_at, full_at)) in enumerate(grid):
        model, plain = tiny_model(tmp_path / str(seed), seed, shift)
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
    assert runs == 48 and skipped < 5
    print(runs, skipped, seen, twice)
