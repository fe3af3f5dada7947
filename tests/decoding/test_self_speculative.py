"""Self-speculation: its rounds by a replay without a cache, what it stores, masks it predicts."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

import pydllm
from pydllm.decoding import speculative_rounds
from tests.decoding.trajectories import EOS, MASK, random_pair, random_prompt


def readable(seed, **options):
    """A random diffusion model that may be read causally, and the plain one."""
    model, plain = random_pair(seed, **options)
    model.spec = dataclasses.replace(model.spec, causal="shifted")
    return model, plain


def causal(plain, ids):
    """Logits, keys and values of a causal forward."""
    return plain.logits(torch.tensor(ids), blocks=torch.arange(len(ids)))


def replayed(plain, prompt, new, drafts):
    """The greedy answer up to its EOS, one token per forward, and the rounds and forwards that
    drafts of it take: a round keeps the leading drafts that the answer has, and a token more."""
    plain = dataclasses.replace(plain, block=1)  # blocks are then given, or there are none
    x = list(prompt)
    while len(x) < len(prompt) + new and not (len(x) > len(prompt) and x[-1] in EOS):
        x.append(int(causal(plain, x)[0][-1].argmax()))
    cursor, rounds, forwards = len(prompt) + 1, 0, 1
    while cursor < len(x):
        count = min(len(prompt) + new - cursor - 1, drafts)
        rounds, forwards = rounds + 1, forwards + 1
        run = 0
        if count > 0:
            forwards += 1
            before = causal(plain, x[: cursor - 1])[1:] if cursor > 1 else None
            shown = torch.tensor([x[cursor - 1]] + [MASK] * count)
            open_ = torch.zeros(count + 1, dtype=torch.int64)
            logits = plain.logits(shown, cursor - 1, before, blocks=open_)[0]
            guess = logits[1:].argmax(-1).tolist()
            right = [a == b for a, b in zip(guess, x[cursor:], strict=False)]
            run = next((j for j, same in enumerate(right) if not same), len(right))
        cursor += run + 1
    return x[len(prompt) :], rounds, forwards


def check_rounds(seeds):
    """Tokens saved by drafts."""
    saved = 0
    for seed in seeds:
        rng = random.Random(seed)
        model, plain = readable(seed)
        prompts = [random_prompt(10 * seed + row, rng.choice((1, 2, 6, 13))) for row in range(3)]
        new, drafts = rng.choice((1, 2, 8, 15)), rng.choice((1, 3, 7, 20))
        algorithm = pydllm.SelfSpeculative(drafts=drafts)
        got = pydllm.generate(model, prompts, algorithm, max_new_tokens=new)
        for row, prompt in enumerate(prompts):
            answer, rounds, forwards = replayed(plain, prompt, new, drafts)
            assert got.new_tokens[row].tolist()[: len(answer)] == answer
            assert (got.rounds[row], got.nfe[row]) == (rounds, forwards)
            saved += len(answer) - 1 - rounds
    return saved


def test_rounds_are_those_of_a_replay():
    """And forwards: the prompt's, two per round, one where the last token alone is left."""
    assert check_rounds(range(14)) > 6


def test_what_is_stored_is_a_causal_prefill_of_the_answer(monkeypatch):
    model, plain = readable(2, eos=())
    plain = dataclasses.replace(plain, block=1)
    prompts = [random_prompt(row, length) for row, length in enumerate((5, 1, 9))]
    seen = []
    plainly = speculative_rounds.SpeculativeDecoder.step

    def remember(self, state, plan):
        result = plainly(self, state, plan)
        seen.append((state.cache.keys.clone(), state.cursor.clone(), state.x.clone()))
        return result

    monkeypatch.setattr(speculative_rounds.SpeculativeDecoder, "step", remember)
    got = pydllm.generate(model, prompts, pydllm.SelfSpeculative(drafts=4), max_new_tokens=12)
    checked = 0
    for keys, cursor, x in seen:
        for row in range(len(x)) if len(x) == len(prompts) else ():
            known = int(cursor[row]) - 1  # the last token is stored by the next round
            expected = causal(plain, x[row, :known].tolist())[1] if known else None
            if known:
                assert torch.allclose(keys[0, row, :known], expected.transpose(0, 1), atol=1e-12)
                checked += 1
    assert checked > 6 and all(len(tokens) == 12 for tokens in got.new_tokens)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mask_is_never_predicted(temperature):
    model, _ = readable(1)
    model._head_bias = torch.zeros(model.spec.vocab_size, dtype=torch.float64)
    model._head_bias[MASK] = 1e3
    prompts = [random_prompt(row, length) for row, length in enumerate((5, 1, 9))]
    options = {"max_new_tokens": 10, "temperature": temperature, "seed": 2}
    answers = [
        pydllm.generate(model, prompts, algorithm, **options)
        for algorithm in (
            pydllm.Autoregressive(),
            pydllm.SelfSpeculative(drafts=5),
            pydllm.SelfSpeculative(drafts=5, forwards=1),
        )
    ]
    one, *others = (torch.cat(answer.sequences) for answer in answers)
    assert all(torch.equal(one, other) for other in others) and not (one == MASK).any()
