"""Masks in a prompt are filled in place: python -m tests.decoding.test_infill --cases 1000."""

from __future__ import annotations

import argparse
import dataclasses
import random

import pytest
import torch

import pydllm
from pydllm.demo import WEIGHTS
from tests.decoding.test_graph import models
from tests.decoding.trajectories import EOS, MASK, VOCAB, random_pair

FULL = (
    lambda r: pydllm.Static(
        block_length=r.choice((1, 3, 8, 32)),
        tokens_per_step=1,
        score=r.choice(("confidence", "entropy", "left_to_right", "random")),
        cache=r.choice(("none", "prefix", "dual")),
    ),
    lambda r: pydllm.Threshold(
        threshold=0.3, block_length=r.choice((4, 9)), cache=r.choice(("none", "dual"))
    ),
    lambda r: pydllm.Static(block_length=5, tokens_per_step=3, cache="dual"),
    lambda r: pydllm.EntropyBound(bound=1.0, block_length=6, cache="prefix"),
    lambda r: pydllm.MultiBlock(threshold=1.5, block_length=r.choice((3, 8)), delay=1),
)
BLOCKS = (
    lambda r: pydllm.Static(block_length=4, tokens_per_step=r.choice((1, 2, 4))),
    lambda r: pydllm.Factor(factor=1.0, block_length=4),
)


def random_prompts(r, count):
    for _ in range(count):
        ids = [r.choice([t for t in range(VOCAB) if t != MASK]) for _ in range(r.randint(2, 14))]
        for _ in range(r.randint(0, 2)):
            first = r.randrange(1, len(ids))
            ids[first : first + r.randint(1, 5)] = [MASK] * len(
                ids[first : first + r.randint(1, 5)]
            )
        yield ids


def check(seed):
    """A random batch: no mask is left, what was given stays, and every prompt is as it is alone."""
    r = random.Random(seed)
    block, shift = r.choice(((None, False), (None, True), (4, False), (4, True)))
    model, _ = models(block=block, shift=shift)
    algorithm = r.choice(FULL if block is None else BLOCKS)(r)
    if shift and getattr(algorithm, "cache", None) == "dual" and r.random() < 0.5:
        algorithm = dataclasses.replace(algorithm, first_token="forced")
    given = list(random_prompts(r, r.randint(1, 4)))
    new = [r.randint(0 if MASK in ids else 1, 9) for ids in given]
    options = {"temperature": r.choice((0.0, 0.8)), "seed": seed}
    if isinstance(algorithm, pydllm.MultiBlock):
        options["ignore_eos"] = True
    drafted = None
    if not isinstance(algorithm, pydllm.MultiBlock):
        mode = "pipelined" if block and r.random() < 0.5 else "strict"
        drafted = pydllm.FreeDave(draft_steps=r.choice((2, 4)), baseline=algorithm, mode=mode)
    most = r.choice((None, 1, 2))
    got = pydllm.generate(model, given, algorithm, max_new_tokens=new, max_batch=most, **options)
    for row, ids in enumerate(given):
        sequence = got.sequences[row].tolist()
        assert len(sequence) == len(ids) + new[row]
        assert MASK not in sequence
        assert all(one in (MASK, other) for one, other in zip(ids, sequence, strict=False))
        alone = pydllm.generate(
            model, [ids], algorithm, max_new_tokens=new[row], request_ids=[row], **options
        )
        assert torch.equal(alone.sequences[0], got.sequences[row])
        assert alone.nfe[0] == got.nfe[row]
        assert got.nfe[row] >= 1
    if drafted is not None:
        options["graph"] = seed % 3 == 0
        free = pydllm.generate(model, given, drafted, max_new_tokens=new, **options)
        for one, other in zip(free.sequences, got.sequences, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("seed", range(24))
def test_no_mask_is_left(seed):
    check(seed)


def best_mask(plain, x, shift, stop=None):
    """The most certain mask before ``stop``, and its token; ties go to the lowest position."""
    logits = plain.logits(torch.tensor(x))[0]
    chance, token = logits.softmax(-1).max(-1)
    places = [place for place, value in enumerate(x[:stop]) if value == MASK]
    place = max(places, key=lambda place: (chance[place - shift].item(), -place))
    return place, token[place - shift].item()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shift", [False, True], ids=["llada", "dream"])
def test_the_published_loops_fill_the_same(seed, shift):
    """Dream fills all masks, the best one a step, whether prompt or not. LLaDA does too, but takes
    as many steps as there are masks after the prompt, and leaves the rest.
    """
    model, plain = random_pair(seed, shift=shift, eos=())
    r = random.Random(seed)
    (ids,) = random_prompts(r, 1)
    ids = [ids[0], MASK, *ids[1:], MASK, 3]
    new, x, states = 6, [*ids, *[MASK] * 6], []
    masks = x.count(MASK)
    loop = masks if shift else new
    for _ in range(loop):
        place, token = best_mask(plain, x, int(shift))
        x[place] = token
    pydllm.generate(
        model,
        [ids],
        pydllm.Static(block_length=64),
        max_new_tokens=new,
        on_step=lambda step: states.append(step.x[0].tolist()),
    )
    assert len(states) == masks
    assert states[loop - 1] == x
    assert MASK not in states[-1]


def test_what_a_gap_sees():
    """Full attention: both sides. Block-causal: the blocks up to its own, whatever follows."""
    right = [[2, 3, MASK, MASK, 4, 6, token, 8] for token in (7, 10, 11, 12, 13)]
    for block, counts in ((None, True), (4, False)):
        found = set()
        for seed in range(3):
            model, _ = random_pair(seed, block=block)
            got = pydllm.generate(model, right, pydllm.Static(block_length=4), max_new_tokens=0)
            found.add(len({tuple(row[2:4].tolist()) for row in got.sequences}))
        assert (max(found) > 1) == counts


def test_gaps_in_texts():
    model = pydllm.load(WEIGHTS)
    question = "sam has 7 coins . he finds 5 . he loses 2 . how many coins ? in order"
    text = f"{question} tom 7 + <mask:1> = 12"
    texts = [text, f"{text} ann 12 - 2 = <mask:1> answer <mask:1>"]
    got = pydllm.infill(model, texts, pydllm.Static(block_length=8))
    assert got.text[0] == text.replace("<mask:1>", got.spans[0][0])
    assert [len(spans) for spans in got.spans] == [1, 3]
    assert all(len(span.split()) == 1 for spans in got.spans for span in spans)
    alone = pydllm.infill(model, text, pydllm.FreeDave(block_length=8))
    assert alone.text == got.text[:1]
    more = pydllm.infill(model, text, pydllm.Static(block_length=8), max_new_tokens=24)
    assert more.text[0].startswith("sam has 7")
    assert more.text[0].endswith(f"= 12 {more.generation.text[0]}")


@pytest.mark.parametrize(
    ("algorithm", "options", "message"),
    [
        (pydllm.LeftToRight(), {}, r"prompts\[1\]: expected no mask in a prompt with LeftToRight"),
        (pydllm.Static(), {"guidance": 1.0}, "no mask in a prompt with guidance"),
        (pydllm.MultiBlock(), {}, "with MultiBlock but for ignore_eos=True"),
        (pydllm.Static(), {"max_new_tokens": 0}, "max_new_tokens: expected an int of at least 1"),
    ],
)
def test_what_is_refused(algorithm, options, message):
    model, _ = models()
    options = {"max_new_tokens": 4} | options
    with pytest.raises(ValueError, match=message):
        pydllm.generate(model, [[3], [3, MASK, EOS[0]]], algorithm, **options)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("no gap", ValueError, r"texts\[0\]: expected a gap such as <mask:8>, got 'no gap'"),
        ("a <mask:0>", ValueError, r"texts\[0\]: expected gaps of 1 to 65536 tokens, got 0"),
        ([3], TypeError, r"texts\[0\]: expected a string, got 3"),
        (3, TypeError, "texts: expected a string or a list of them, got 3"),
    ],
)
def test_texts_that_are_refused(text, error, message):
    with pytest.raises(error, match=message):
        pydllm.infill(pydllm.load(WEIGHTS), text, pydllm.Static())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    cases = parser.parse_args().cases
    for case in range(cases):
        check(case)
    print(f"{cases} random batches: no mask left, given tokens kept, alone as in a batch")
