"""Block-causal models: blocks aligned to position 0, exact keys and values."""

from __future__ import annotations

import pytest
import torch

import pydllm
from tests.decoding.trajectories import EOS, MASK, random_pair, random_prompt, static

LENGTHS = (3, 1, 12, 8, 7, 20, 4, 9)


def decode(model, prompts, algorithm, new=14, **options):
    return pydllm.generate(model, prompts, algorithm, max_new_tokens=new, **options)


@pytest.mark.parametrize("shift", [False, True], ids=["plain", "shifted"])
@pytest.mark.parametrize("block", [4, 8])
@pytest.mark.parametrize("score", ["confidence", "entropy", "margin", "left_to_right"])
def test_static_equals_the_plain_loop(score, block, shift):
    prompts = [random_prompt(seed, length) for seed, length in enumerate(LENGTHS)]
    ended = 0
    for seed in range(3):
        model, plain = random_pair(seed, block=block, shift=shift)
        got = decode(model, prompts, pydllm.Static(block_length=block, score=score))
        for row, prompt in enumerate(prompts):
            path = static(plain, prompt, 14, block=block, score=score)
            assert got.sequences[row].tolist() == path.x
            assert got.nfe[row] == len(path.states)
            steps = [-1] * 14
            for step, state in enumerate(path.states):
                place = state.pick[0] - len(prompt)
                if place < 14 and path.x[state.pick[0]] == state.pick[1]:
                    steps[place] = step
            first = next((p for p, t in enumerate(path.x[len(prompt) :]) if t in EOS), 14)
            assert got.step_map[row].tolist() == steps[: first + 1] + [-1] * (13 - first)
            ended += first < 8
    assert ended


BASELINES = [
    pydllm.Static(block_length=4, tokens_per_step=3),
    pydllm.Static(block_length=4, score="random"),
    pydllm.Threshold(threshold=0.3, block_length=4),
    pydllm.Factor(factor=2.0, block_length=4),
    pydllm.EntropyBound(bound=1.0, block_length=4),
    pydllm.Threshold(threshold=0.3, block_length=4, min_tokens=2),
]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("algorithm", BASELINES, ids=str)
def test_a_ragged_batch_equals_its_sequences_alone(algorithm, temperature):
    options = {"temperature": temperature, "seed": 3}
    prompts = [random_prompt(seed, length) for seed, length in enumerate(LENGTHS[:5])]
    model, _ = random_pair(1, block=4)
    together = decode(model, prompts, algorithm, **options)
    for row, prompt in enumerate(prompts):
        alone = decode(model, [prompt], algorithm, request_ids=[row], **options)
        assert torch.equal(alone.sequences[0], together.sequences[row])
        assert torch.equal(alone.step_map[0], together.step_map[row])
        assert alone.nfe[0] == together.nfe[row]
        assert not (together.sequences[row] == MASK).any()


def test_threshold_equals_the_plain_rule():
    for seed in range(6):
        model, plain = random_pair(seed, block=4, eos=())
        prompt = random_prompt(seed, 1 + seed)
        x = torch.tensor(prompt + [MASK] * (12 + -(len(prompt) + 12) % 4))
        forwards = 0
        for low in range(len(prompt) // 4 * 4, len(x), 4):
            while (x[low : low + 4] == MASK).any():
                p, token = plain.logits(x)[0].softmax(-1).max(-1)
                masks = [j for j in range(low, low + 4) if x[j] == MASK]
                best = max(masks, key=lambda j: (p[j].item(), -j))
                for j in masks:
                    if p[j] >= 0.4 or j == best:
                        x[j] = token[j]
                forwards += 1
        got = decode(model, [prompt], pydllm.Threshold(threshold=0.4, block_length=4), new=12)
        assert got.sequences[0].tolist() == x[: len(prompt) + 12].tolist()
        assert got.nfe.item() == forwards


def test_the_callback_sees_the_region_and_the_rest_of_its_last_block():
    model, _ = random_pair(0, block=8, eos=())
    left = []
    decode(
        model,
        [random_prompt(0, 3)],
        pydllm.Static(block_length=8),
        new=6,
        on_step=lambda step: left.append(int((step.x == MASK).sum())),
    )
    assert left == [12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (pydllm.Static(), "block_length: expected 4, the block of the block-causal model, got 32"),
        (
            pydllm.Static(block_length=4, cache="dual"),
            "cache: expected 'none' with a block-causal model",
        ),
        (
            pydllm.Static(block_length=4, compat="llada"),
            "compat: expected none of llada, fast_dllm",
        ),
        (
            pydllm.FreeDave(draft_steps=4, block_length=8),
            "block_length: expected 4, the block of the block-causal model",
        ),
    ],
    ids=str,
)
def test_bad_input(algorithm, message):
    model, _ = random_pair(0, block=4)
    with pytest.raises(ValueError, match=message):
        decode(model, [[2, 3]], algorithm)
