"""Rows that predict masks, and likelihoods, where blocks begin at the prompt's end or have a causal
context: against an independent forward without a cache.
"""

from itertools import combinations
from math import comb

import pytest
import torch

import pydllm
from pydllm.metrics import log_likelihood, matches_greedy
from pydllm.metrics.reading import masked_rows
from tests.models.plain import RECENT, random_plain, write_checkpoint

MASK = 60
FAMILIES = ("nemotron", "diff-encoder", "a2d-bd3lm")


def _make(folder, name, seed=0):
    plain = random_plain(RECENT[name], seed=seed)
    return pydllm.load(write_checkpoint(folder, plain), device="cpu", dtype=torch.float64), plain


def _ids(seed, count):
    return torch.randint(0, 57, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def _log_probs(name, plain, ids, prompt, place):
    """Of the tokens at ``place``; the mask is not predicted."""
    size = plain.config["block_size"]
    start = prompt + (place - prompt) // size * size
    if name == "a2d-bd3lm":
        row = plain(torch.tensor(ids), block=size, offset=-prompt % size)[1][place]
    else:
        _, logits, kept = plain(torch.tensor(ids[:start]), causal=True)
        block = torch.tensor(ids[start : start + size])
        row = logits[-1] if place == start else plain(block, start, kept)[1][place - start]
    row = row.clone()
    row[MASK] = -torch.inf
    return row.log_softmax(-1)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_several_blocks_in_a_ragged_batch(tmp_path, name):
    model, plain = _make(tmp_path, name)
    size = plain.config["block_size"]
    prompts, ids, positions = (3, 1, 8), [], []
    for row, prompt in enumerate(prompts):
        tokens = _ids(row, prompt + 2 * size + row)
        masked = [prompt, prompt + 1, prompt + size, prompt + 2 * size - 1]
        ids.append([MASK if n in masked else token for n, token in enumerate(tokens)])
        positions.append(torch.tensor(masked))
    hidden, index = masked_rows(model, list(map(torch.tensor, ids)), positions, prompts)
    logits = model.head(hidden)
    logits[:, MASK] = -torch.inf
    assert index.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for row, place, got in zip(index, torch.cat(positions), logits.log_softmax(-1), strict=True):
        want = _log_probs(name, plain, ids[row], prompts[row], int(place))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_estimate_is_the_bound(tmp_path, name):
    """Summed over all maskings of each block from the context's end."""
    model, plain = _make(tmp_path, name, seed=1)
    size, context = model.spec.block_size, 3
    whole, total, first = _ids(5, 3 + 5), 0.0, context
    while first < len(whole):
        places = range(first, min(len(whole), first + size))
        for count in range(1, len(places) + 1):
            for masked in combinations(places, count):
                noisy = [MASK if n in masked else t for n, t in enumerate(whole[: places.stop])]
                loss = sum(_log_probs(name, plain, noisy, context, n)[whole[n]] for n in masked)
                total += loss / count / comb(len(places), count)
        first = places.stop
    got = log_likelihood(model, [(whole[:context], whole[context:])], samples=20_000)
    assert got.item() == pytest.approx(total.item(), rel=0.01)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_agreement_is_static_decoding(tmp_path, name):
    model, _ = _make(tmp_path, name, seed=2)
    model = pydllm.load(tmp_path, device="cpu", dtype=torch.float64, eos_ids=())
    size = model.spec.block_size
    pairs = []
    for seed, count in enumerate((3, 8, 10)):
        context = _ids(seed, count)
        algorithm = pydllm.Static(block_length=size)
        result = pydllm.generate(model, [context], algorithm, max_new_tokens=2 * size)
        target = result.sequences[0][count:].tolist()
        pairs.append((context, target))
        for wrong in (0, size, 2 * size - 1):
            other = list(target)
            other[wrong] = (target[wrong] + 1) % 50
            pairs.append((context, other))
    assert matches_greedy(model, pairs, batch_size=5).tolist() == [True, False, False, False] * 3


def test_a_seeded_model_needs_a_context(tmp_path):
    model, _ = _make(tmp_path, "nemotron")
    with pytest.raises(ValueError, match=r"pairs\[1\]: expected a context of at least one token"):
        log_likelihood(model, [([3], [4]), ([], [4])])
