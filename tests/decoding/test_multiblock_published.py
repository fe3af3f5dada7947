"""MultiBlock with one block at a time is single-block decoding."""

from __future__ import annotations

import torch

import pydllm
from tests.decoding.test_static import MASK, _prompt, _random_model

VOCAB, EOS = 24, 3
TINY = {"d_model": 16, "n_layers": 1, "mlp_hidden_size": 24}


def tiny_model(folder, seed, shift, eos=(EOS,), end=0.9):
    """A random model that never predicts the mask; a greater ``end`` ends sooner."""
    model, plain = _random_model(folder, seed, vocab=VOCAB, eos=eos, shift=shift, **TINY)
    for head in (model._head, plain.weights["model.transformer.ff_out.weight"]):
        head[MASK] = 0
        head *= 2
        if eos:
            head[EOS] *= end
    return model, plain


def test_with_one_block_at_a_time_it_is_single_block_decoding(tmp_path):
    """O4: add_at = full_at = 1, unshifted."""
    for seed in range(4):
        model, plain = tiny_model(tmp_path / str(seed), seed, False, eos=())
        prompt = _prompt(seed, 4, VOCAB)
        x, forwards = torch.tensor(prompt + [MASK] * 24), 0
        for start in (4, 12, 20):
            while (x[start : start + 8] == MASK).any():
                logits = plain.forward(x)[0][start : start + 8]
                logits[:, MASK] = -torch.inf  # never predicted, and no part of the entropy
                entropy = torch.distributions.Categorical(logits=logits).entropy()
                entropy[x[start : start + 8] != MASK] = torch.inf
                accept = (entropy <= 1.5).scatter(0, entropy.argmin(), True)
                x[start : start + 8][accept] = logits.argmax(-1)[accept]
                forwards += 1
        algorithm = pydllm.MultiBlock(
            threshold=1.5, block_length=8, add_at=1.0, full_at=1.0, cache=False
        )
        got = pydllm.generate(model, [prompt], algorithm, max_new_tokens=24)
        assert got.nfe.tolist() == [forwards]
        assert torch.equal(got.sequences[0], x)
