"""MultiBlock on block-causal models against the published loops, without a cache."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import pydllm
from tests.decoding.trajectories import EOS, MASK, random_pair, random_prompt

LENGTHS = (3, 1, 12, 8, 7, 20, 4, 9)
NEW, BLOCK = 16, 4
D2F = {"score": "confidence", "forced": "ready", "compat": "d2f"}
MULTIBD = {"score": "confidence", "forced": "ready", "compat": "diffulex"}


def decode(model, prompts, algorithm, new=NEW, **options):
    return pydllm.generate(model, prompts, algorithm, max_new_tokens=new, **options)


def at_prompt(seed, **options):
    """A model whose blocks begin at the prompt's end, and that never predicts the mask."""
    model, plain = random_pair(seed, block=BLOCK, **options)
    model._head_bias = torch.zeros(model.spec.vocab_size, dtype=torch.float64)
    model._head_bias[MASK] = -1e9
    model.spec = dataclasses.replace(model.spec, block_origin="prompt")
    return model, plain


def cut(x, prompt, ends, new=NEW):
    """The answer up to its first EOS, and what fills it up."""
    answer = x[len(prompt) : len(prompt) + new]
    first = next((j for j, token in enumerate(answer) if token in ends), None)
    if first is not None:
        answer = answer[: first + 1] + [ends[0]] * (new - first - 1)
    return prompt + answer


def d2f(plain, prompt, *, threshold, add_at, full_at, ends=EOS):
    """D2F's loop for one prompt; its forwards, and the answer."""
    x, blocks, stopped, forwards = list(prompt), 0, False, 0
    state, forced = {0: "to cache"}, set()

    def span(block):
        low = len(prompt) + (block - 1) * BLOCK
        return range(low, low + BLOCK) if block else range(len(prompt))

    def decoded(block):
        masks = sum(x[j] == MASK for j in span(block))
        return 1 - masks / max(len(span(block)), 1)

    while True:
        if blocks < NEW // BLOCK and not stopped and decoded(blocks) >= add_at:
            blocks += 1
            x += [MASK] * BLOCK
            state[blocks] = "active"
        for block in range(blocks):
            if decoded(block) >= full_at:
                forced.add(block + 1)
        if "active" not in state.values():
            return forwards, cut(x, prompt, ends) if len(x) > len(prompt) else None
        numbers = [0] * len(prompt) + [1 + j // BLOCK for j in range(len(x) - len(prompt))]
        logits = plain.logits(torch.tensor(x), blocks=torch.tensor(numbers))[0]
        forwards += 1
        p, token = (t.tolist() for t in logits.softmax(-1).max(-1))
        for block in range(blocks + 1):
            state[block] = "in cache" if state[block] == "to cache" else state[block]
            if state[block] != "active":
                continue
            masked = [j for j in span(block) if x[j] == MASK]
            chosen = [j for j in masked if p[j] > threshold]
            if masked and not chosen and block in forced:
                chosen = [max(masked, key=lambda j: p[j])]
            for j in chosen:
                x[j] = token[j]
                stopped |= token[j] in ends
        for block in range(1, blocks + 1):
            before = [state[b] for b in range(block)]
            if decoded(block) == 1 and state[block] == "active" and "active" not in before:
                state[block] = "to cache"


def multibd(plain, prompt, *, threshold, add_at, full_at, buffer, ends=EOS):
    """Diffulex' loop: blocks aligned to 0, a few at a time, a complete one in the buffer until it
    is stored."""
    first, end = len(prompt) // BLOCK, -(-(len(prompt) + NEW) // BLOCK)
    x = prompt + [MASK] * ((first + 1) * BLOCK - len(prompt))
    resident, forwards, last = [first], 0, end - 1
    if len(prompt) % BLOCK >= add_at * BLOCK and buffer > 1 and first < last:
        resident.append(first + 1)
        x += [MASK] * BLOCK
    stored = set(range(first))

    def masks(block):
        return [j for j in range(block * BLOCK, (block + 1) * BLOCK) if x[j] == MASK]

    while True:
        logits = plain.logits(torch.tensor(x))[0]
        forwards += 1
        p, token = (t.tolist() for t in logits.softmax(-1).max(-1))
        # Complete ones in front were in this forward with their final tokens.
        storing = []
        for block in resident:
            if masks(block):
                break
            storing.append(block)
        ratio = {block: 1 - len(masks(block)) / BLOCK for block in resident}
        for block in resident:
            left = masks(block)
            chosen = [j for j in left if p[j] > threshold]
            ready = block - 1 in stored or block == first or ratio.get(block - 1, 1) >= full_at
            if left and not chosen and ready:
                chosen = [max(left, key=lambda j: p[j])]
            for j in chosen:
                x[j] = token[j]
        stored |= set(storing)
        resident = [block for block in resident if block not in storing]
        seen = range(len(prompt), min(len(x), len(prompt) + NEW))
        if any(x[j] in ends for j in seen):
            last = len(x) // BLOCK - 1
        active = [block for block in resident if masks(block)]
        newest = 1.0 if not active else 1 - len(masks(active[-1])) / BLOCK
        if len(x) // BLOCK <= last and newest >= add_at and len(resident) < buffer:
            resident.append(len(x) // BLOCK)
            x += [MASK] * BLOCK
        elif not active and len(x) // BLOCK > last:
            return forwards, cut(x, prompt, ends)


SETTINGS = [
    {"threshold": 0.4, "add_at": 0.25, "full_at": 0.5},
    {"threshold": 0.6, "add_at": 0.1, "full_at": 0.75},
    {"threshold": 0.3, "add_at": 0.0, "full_at": 1.0},
    {"threshold": 0.9, "add_at": 1.0, "full_at": 0.0},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_it_equals_d2f(setting):
    prompts = [random_prompt(seed, length) for seed, length in enumerate(LENGTHS)]
    ended = several = 0
    for seed in range(3):
        model, plain = at_prompt(seed, rounded=seed == 2)
        got = decode(model, prompts, pydllm.MultiBlock(block_length=BLOCK, **setting, **D2F))
        for row, prompt in enumerate(prompts):
            if seed == 2:
                continue
            forwards, expected = d2f(plain, prompt, **setting)
            assert got.sequences[row].tolist() == expected
            assert got.nfe[row] == forwards + 1  # the prompt's
            ended += EOS[0] in expected[len(prompt) :]
            several += forwards < NEW
    assert ended > 3 and several > 3


@pytest.mark.parametrize("buffer", [1, 2, 4])
@pytest.mark.parametrize("setting", SETTINGS[:3], ids=str)
def test_it_equals_multibd(setting, buffer):
    prompts = [random_prompt(seed, length) for seed, length in enumerate(LENGTHS)]
    options = setting | {"buffer": buffer}
    for seed in range(2):
        model, plain = random_pair(10 + seed, block=BLOCK)
        algorithm = pydllm.MultiBlock(block_length=BLOCK, **options, **MULTIBD)
        got = decode(model, prompts, algorithm)
        for row, prompt in enumerate(prompts):
            forwards, expected = multibd(plain, prompt, **options)
            assert got.sequences[row].tolist() == expected
            assert got.nfe[row] == forwards


@pytest.mark.parametrize("shift", [False, True], ids=["plain", "shifted"])
def test_one_block_at_a_time_is_thresholding(shift):
    """With a buffer of 1 nothing is in the window but the block: the tokens of Threshold."""
    prompts = [random_prompt(seed, length) for seed, length in enumerate(LENGTHS)]
    model, _ = random_pair(1, block=BLOCK, shift=shift)
    options = {"threshold": 0.4, "block_length": BLOCK}
    got = decode(model, prompts, pydllm.MultiBlock(score="confidence", buffer=1, **options))
    expected = decode(model, prompts, pydllm.Threshold(**options))
    assert torch.equal(torch.cat(got.sequences), torch.cat(expected.sequences))


def test_gaps_in_prompts():
    """Masks in a prompt are filled; what is given stays."""
    model, _ = random_pair(4, block=BLOCK)
    prompts = [random_prompt(seed, length) for seed, length in enumerate((9, 4, 13))]
    for prompt, places in zip(prompts, ((1, 2, 7), (3,), (0, 12)), strict=True):
        for place in places:
            prompt[place] = MASK
    options = {"threshold": 0.4, "block_length": BLOCK}
    several = pydllm.MultiBlock(score="confidence", buffer=1, **options)
    got = decode(model, prompts, several, new=6, ignore_eos=True)
    expected = decode(model, prompts, pydllm.Threshold(**options), new=6, ignore_eos=True)
    assert torch.equal(torch.cat(got.sequences), torch.cat(expected.sequences))
    wide = decode(model, prompts, pydllm.MultiBlock(**options), new=6, ignore_eos=True)
    for prompt, sequence in zip(prompts, wide.sequences, strict=True):
        pairs = zip(prompt, sequence.tolist(), strict=False)
        assert all(new == old if old != MASK else new != MASK for old, new in pairs)


CASES = {
    "entropy": {"threshold": 1.2},
    "ready": {"threshold": 1.0, "forced": "ready", "full_at": 0.5},
    "confidence": {"threshold": 0.4, "score": "confidence", "buffer": 3},
    "diffulex": {"threshold": 0.4, "full_at": 0.5, "buffer": 4, **MULTIBD},
    "d2f": {"threshold": 0.4, "full_at": 0.5, **D2F},
    "none": {"threshold": -1.0},
    "never": {"threshold": 1.0, "score": "confidence", "early_stop": False},
}


@pytest.mark.parametrize(
    ("name", "more"),
    [
        *((name, {"max_batch": 2}) for name in CASES),
        *((name, {"graph": True}) for name in ("ready", "confidence", "d2f")),
    ],
    ids=str,
)
def test_a_ragged_batch_equals_its_sequences_alone(name, more):
    model, _ = at_prompt(3) if name == "d2f" else random_pair(3, block=BLOCK, shift=name == "ready")
    prompts = [random_prompt(seed, length) for seed, length in enumerate(LENGTHS[:5])]
    algorithm = pydllm.MultiBlock(block_length=BLOCK, **CASES[name])
    options = {"seed": 3, "temperature": [0.0, 0.9, 0.5, 1.5, 0.0], "new": [14, 5, 9, 14, 1]}
    together = decode(model, prompts, algorithm, **options)
    few = decode(model, prompts, algorithm, **options, **more)
    assert (torch.cat(together.sequences) != MASK).all()
    for row, prompt in enumerate(prompts):
        own = {"temperature": options["temperature"][row], "new": options["new"][row]}
        alone = decode(model, [prompt], algorithm, request_ids=[row], seed=3, **own)
        for got in (together, few):
            assert torch.equal(alone.sequences[0], got.sequences[row])
            steps = got.step_map[row]
            assert torch.equal(alone.step_map[0], steps[: len(alone.step_map[0])])
            assert alone.nfe[0] == got.nfe[row]


def test_keys_of_finished_blocks_are_those_of_a_prefill(monkeypatch):
    """What the last window saw before it is what a forward of the answer stores."""
    from pydllm.decoding import multiblock_exact

    model, _ = random_pair(5, block=BLOCK, eos=())
    states = []
    plainly = multiblock_exact.OpenBlocksDecoder.step

    def remember(self, state, plan):
        result = plainly(self, state, plan)
        states.append((state.cache.keys.clone(), state.stored.clone(), state.x.clone()))
        return result

    monkeypatch.setattr(multiblock_exact.OpenBlocksDecoder, "step", remember)
    prompts = [random_prompt(seed, length) for seed, length in enumerate((6, 3))]
    decode(model, prompts, pydllm.MultiBlock(threshold=1.0, block_length=BLOCK))
    checked = 0
    for keys, stored, x in states:
        length = torch.full((len(x),), x.shape[1], dtype=torch.int32)
        cache = model.new_cache(len(x), x.shape[1])
        zero = torch.zeros_like(length)
        model.forward(x, zero, cache, length=length, kv_len=length, commit=length)
        for row, count in enumerate(stored.tolist()):
            assert torch.allclose(keys[:, row, :count], cache.keys[:, row, :count], atol=1e-12)
            checked += count > len(prompts[row])
    assert checked > 4


@pytest.mark.parametrize(
    ("options", "block", "message"),
    [
        ({"delay": 1}, 4, "delay: expected the default 2 with 'block_causal' attention, got 1"),
        ({"cache": False}, 4, "cache: expected the default True with 'block_causal'"),
        ({"block_length": 8}, 4, "block_length: expected 4, the block of the block-causal model"),
        ({"buffer": 2}, None, "buffer: expected the default None with 'full' attention, got 2"),
        ({"compat": "d2f"}, 4, "compat: expected a model with block_origin 'prompt' for 'd2f'"),
        ({"compat": "d2f"}, None, "compat: expected the default None with 'full' attention"),
    ],
    ids=str,
)
def test_what_is_refused(options, block, message):
    model, _ = random_pair(0, block=block)
    with pytest.raises(ValueError, match=message):
        decode(model, [[2]], pydllm.MultiBlock(**{"block_length": BLOCK} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "margin"}, "score: expected one of entropy, confidence"),
        ({"forced": "all"}, "forced: expected one of first, ready"),
        ({"buffer": 0}, "buffer: expected an int of at least 1"),
        ({"threshold": 1.5, "score": "confidence"}, "threshold: expected a number in"),
        ({"compat": "d3llm"}, "compat: expected one of None, d2f, diffulex"),
    ],
    ids=str,
)
def test_bad_parameters(options, message):
    with pytest.raises(ValueError, match=message):
        pydllm.MultiBlock(**options)
