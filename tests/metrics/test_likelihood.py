"""The Monte-Carlo bound against the bound summed over all maskings, and greedy agreement."""

import dataclasses
from itertools import combinations
from math import comb

import pytest
import torch

import pydllm
from pydllm.metrics import log_likelihood, matches_greedy
from tests.decoding.trajectories import MASK, VOCAB, random_pair, random_prompt

KINDS = {"full": {}, "shifted": {"shift": True}, "block-causal": {"block": 4}}


def _log_prob(plain, ids, place, token):
    logits, _, _ = plain.logits(torch.tensor(ids))
    return logits[place - int(plain.shift)].log_softmax(-1)[token].item()


def _exact(plain, context, target):
    """The bound itself: the mean over the numbers of masks and over all maskings of a number."""
    whole, total, first = [*context, *target], 0.0, len(context)
    while first < len(whole):
        end = len(whole)
        if plain.block is not None:
            end = min(end, (first // plain.block + 1) * plain.block)
        places = range(first, end)
        for count in range(1, len(places) + 1):
            for masked in combinations(places, count):
                noisy = [MASK if i in masked else whole[i] for i in range(end)]
                loss = sum(_log_prob(plain, noisy, i, whole[i]) for i in masked)
                total += loss / count / comb(len(places), count)
        first = end
    return total


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_the_estimate_is_the_bound(kind):
    model, plain = random_pair(3, **kind)
    pairs = [(random_prompt(i, 2 + i), random_prompt(10 + i, 1 + i)) for i in range(4)]
    want = torch.tensor([_exact(plain, *pair) for pair in pairs], dtype=torch.float64)
    got = log_likelihood(model, pairs, samples=40_000)
    # Maskings are spread evenly over the numbers of masks; what is left is which ones are drawn.
    torch.testing.assert_close(got, want, rtol=0.01, atol=0)
    assert abs(got[0] - want[0]) < 1e-9  # one token: exact


def test_one_token_a_block_is_the_chain_rule():
    model, plain = random_pair(5, block=1)
    context, target = random_prompt(0, 3), random_prompt(1, 5)
    whole, want = [*context, *target], 0.0
    for place in range(3, 8):
        want += _log_prob(plain, [*whole[:place], MASK], place, whole[place])
    got = log_likelihood(model, [(context, target)], samples=3)
    assert abs(got.item() - want) < 1e-9


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_a_pair_does_not_depend_on_its_batch(kind):
    model, _ = random_pair(4, **kind)
    pairs = [(random_prompt(i, 1 + 2 * i), random_prompt(20 + i, 9 - 2 * i)) for i in range(4)]
    together = log_likelihood(model, pairs, samples=20, batch_size=7, seed=3)
    alone = torch.cat([log_likelihood(model, [p], samples=20, seed=3) for p in pairs[::-1]])
    torch.testing.assert_close(together, alone.flip(0), rtol=1e-12, atol=0)
    other = log_likelihood(model, pairs, samples=20, seed=4)
    assert not torch.equal(together, other)


def test_an_empty_target_and_an_empty_context():
    model, plain = random_pair(1)
    got = log_likelihood(model, [([11, 12], []), ([], [13])], samples=2)
    assert got[0] == 0
    assert abs(got[1].item() - _log_prob(plain, [MASK], 0, 13)) < 1e-9
    assert matches_greedy(model, [([11, 12], [])]).tolist() == [True]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_greedy_agreement_is_static_decoding(kind):
    model, _ = random_pair(6, eos=(), **kind)
    pairs, want = [], []
    for seed in range(6):
        context, length = random_prompt(seed, 2 + seed), 4 + seed
        algorithm = pydllm.Static(block_length=kind.get("block", length))
        result = pydllm.generate(model, [context], algorithm, max_new_tokens=length)
        target = result.sequences[0][len(context) :].tolist()
        wrong = list(target)
        wrong[seed % length] = next(t for t in range(2, VOCAB) if t != wrong[seed % length])
        pairs += [(context, target), (context, wrong)]
        want += [True, False]
    if "block" in kind:  # what stands behind the target in its last block is seen by decoding
        pairs = [p for p in pairs if (len(p[0]) + len(p[1])) % 4 == 0]
        want = [True, False] * (len(pairs) // 2)
    assert len(pairs) >= 2
    assert matches_greedy(model, pairs, batch_size=5).tolist() == want
    assert [matches_greedy(model, [pair]).item() for pair in pairs] == want


@pytest.mark.parametrize(
    ("change", "pairs", "options", "message"),
    [
        ({"mask_id": None}, [([3], [4])], {}, "expected a masked diffusion model"),
        ({"attention": "causal"}, [([3], [4])], {}, "expected full or block-causal"),
        ({"max_positions": 3}, [([3, 3], [4, 4])], {}, r"pairs\[0\]: expected at most 3 tokens"),
        ({"shift_logits": True}, [([3], [4]), ([], [4])], {}, r"pairs\[1\]: expected a context"),
        ({}, [([3], [VOCAB])], {}, r"expected token ids in \[0, 14\), got 14"),
        ({}, [([3], [MASK])], {}, "expected no mask, got the mask id 1"),
        ({}, [([3], [4])], {"samples": 0}, "samples: expected an int of at least 1"),
        ({}, [([3], [4])], {"seed": -1}, "seed: expected an int in"),
    ],
)
def test_bad_input(change, pairs, options, message):
    model, _ = random_pair(0)
    model.spec = dataclasses.replace(model.spec, **change)
    with pytest.raises(ValueError, match=message):
        log_likelihood(model, pairs, **options)
