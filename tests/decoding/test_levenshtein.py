"""Levenshtein editing against the restated blocks, on forwards of the whole sequence."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

import pydllm
from pydllm.models import load
from tests.decoding.trajectories import random_pair, random_prompt
from tests.models.moe_plain import CONFIGS, forward, random_weights, write_moe
from tests.ops.levenshtein import Block

MASK, EOS, DELETE, SPLIT, BLOCK, NEW = 60, 58, 7, 8, 4, 11
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_experts": 8}
IDS = {"delete_token_id": DELETE, "split_token_id": SPLIT}
LENGTHS = (3, 1, 12, 8, 7, 4)
ALGORITHM = pydllm.LevenshteinEditing(max_post_steps=3, block_length=BLOCK)


def prompts():
    rng = random.Random(1)
    return [[rng.randrange(9, 57) for _ in range(length)] for length in LENGTHS]


def pair(folder, seed):
    """A model with block routing, and its forward without a cache."""
    config = CONFIGS["llada2.2"] | SMALL | IDS | {"expert_capacity": 5, "block_size": BLOCK}
    weights = random_weights(config, seed, torch.float64)
    # Ids that delete, split or end are as likely as in a model that was trained to use them.
    weights["lm_head.weight"][[DELETE, SPLIT, MASK, EOS]] *= 1.7
    model = load(write_moe(folder / f"{seed}", config, weights), device="cpu", dtype=torch.float64)
    return model, lambda ids: forward(config, weights, torch.tensor(ids))[1]


def published(logits, prompt, **option):
    """The answer, the forwards, their step map, and how many blocks were rebuilt."""
    length = len(prompt)
    x = prompt + [MASK] * (NEW + -(length + NEW) % BLOCK)
    steps, forwards, rebuilt = [-1] * len(x), 0, 0
    for low in range(length // BLOCK * BLOCK, len(x), BLOCK):
        ids = (MASK, DELETE, SPLIT)
        own = slice(low, low + BLOCK)
        block = Block(x[own], max(0, length - low), ids=ids, **option)
        while not block.complete:
            block.step(logits(x[: low + BLOCK])[own].tolist())
            x[own] = block.x
        steps[own] = [s if s < 0 else s + forwards for s in block.steps]
        forwards += block.updates
        rebuilt += block.rebuilds > 0
        ends = [j for j in range(max(low, length), min(low + BLOCK, length + NEW)) if x[j] == EOS]
        if ends:
            fill = length + NEW - ends[0] - 1
            x = x[: ends[0] + 1] + [EOS] * fill
            steps = steps[: ends[0] + 1] + [-1] * fill
            break
    return x[: length + NEW], forwards, steps[length : length + NEW], rebuilt


SETTINGS = [
    {"threshold": 0.1, "edit_threshold": 0.0, "max_post_steps": 3},
    {"threshold": 0.3, "edit_threshold": 0.1, "max_post_steps": 0},
    {"threshold": 0.05, "edit_threshold": 0.05, "max_post_steps": 16},
    {"threshold": 0.2, "edit_threshold": None, "max_post_steps": 2},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_ragged_batch_equals_the_restated_blocks(setting, tmp_path):
    algorithm, rebuilt, ended = pydllm.LevenshteinEditing(block_length=BLOCK, **setting), 0, 0
    for seed in range(2):
        model, logits = pair(tmp_path, seed)
        got = pydllm.generate(model, prompts(), algorithm, max_new_tokens=NEW)
        few = pydllm.generate(model, prompts(), algorithm, max_new_tokens=NEW, max_batch=2)
        for row, prompt in enumerate(prompts()):
            tokens, forwards, steps, count = published(logits, prompt, **setting)
            for one in (got, few):
                assert one.sequences[row].tolist() == tokens
                assert one.nfe[row] == forwards
                assert one.step_map[row].tolist() == steps
            rebuilt += count
            ended += EOS in tokens
            assert not {MASK, DELETE, SPLIT} & set(tokens[len(prompt) :])
    assert rebuilt > 4 and ended > 1


def editable(seed):
    return random_pair(seed, block=BLOCK)[0]


def test_groups_of_sequences_change_nothing(monkeypatch):
    """Logits of few sequences are stored at a time."""
    from pydllm.decoding import levenshtein

    given = [random_prompt(seed, length) for seed, length in enumerate(LENGTHS)]
    model = editable(1)
    expected = pydllm.generate(model, given, ALGORITHM, max_new_tokens=NEW)
    monkeypatch.setattr(levenshtein, "TILE_ROWS", 2 * BLOCK + 1)
    got = pydllm.generate(model, given, ALGORITHM, max_new_tokens=NEW)
    assert torch.equal(torch.cat(got.sequences), torch.cat(expected.sequences))
    assert torch.equal(got.step_map, expected.step_map)


def test_suppressed_ids_are_not_written(tmp_path):
    model, _ = pair(tmp_path, 1)
    plain = pydllm.generate(model, prompts(), ALGORITHM, max_new_tokens=NEW)
    used = sorted({t for row in plain.new_tokens for t in row.tolist()} - {EOS})[:10]
    got = pydllm.generate(model, prompts(), ALGORITHM, max_new_tokens=NEW, suppress_ids=used)
    assert not {t for row in got.new_tokens for t in row.tolist()} & {*used, DELETE, SPLIT, MASK}


def test_streamed_text_is_final():
    from tests.decoding.test_streaming import byte_level

    model = editable(2)
    model.tokenizer = byte_level(model)
    given = [random_prompt(seed, length) for seed, length in enumerate(LENGTHS[:4])]
    run = pydllm.stream(model, given, ALGORITHM, max_new_tokens=20, ignore_eos=True)
    joined = [""] * len(given)
    for index, text in run:
        joined[index] += text
    assert joined == run.generation.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.5}, "temperature: expected 0 with LevenshteinEditing, which takes the"),
        ({"top_k": [None, 4]}, "top_k: expected None with LevenshteinEditing"),
        ({"top_p": 0.9}, "top_p: expected None with LevenshteinEditing"),
        ({"logprobs": True}, "logprobs: expected False with LevenshteinEditing"),
        ({"guidance": 1.0}, "guidance: "),
    ],
    ids=str,
)
def test_it_is_greedy(options, message):
    with pytest.raises(ValueError, match=message):
        pydllm.generate(editable(0), [[11], [12]], ALGORITHM, max_new_tokens=4, **options)


def test_models_that_are_refused():
    model = editable(0)
    model.spec = dataclasses.replace(model.spec, delete_id=None, split_id=None)
    with pytest.raises(ValueError, match="expected a model with ids that delete and split, got"):
        pydllm.generate(model, [[11]], ALGORITHM, max_new_tokens=4)
    model, _ = random_pair(0)
    with pytest.raises(ValueError, match="LevenshteinEditing: expected a block-causal model"):
        pydllm.generate(model, [[11]], ALGORITHM, max_new_tokens=4)
    masked = [11, 1, 12]
    with pytest.raises(ValueError, match=r"expected no mask in a prompt with LevenshteinEditing"):
        pydllm.generate(editable(0), [masked], ALGORITHM, max_new_tokens=4)


def test_nan_ends():
    model = editable(0)
    plainly = model.head
    model.head = lambda hidden: plainly(hidden) * torch.nan
    got = pydllm.generate(model, [random_prompt(0, 3)], ALGORITHM, max_new_tokens=NEW)
    assert not torch.isin(got.new_tokens[0], torch.tensor([1, 3, 4])).any()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"split_token_id": None}, "split_token_id: expected an id beside delete_token_id, found"),
        ({"delete_token_id": MASK}, "delete_token_id: expected one token id, not the mask's"),
        ({"split_token_id": DELETE}, "split_token_id: expected one token id, not the mask's and"),
        ({"delete_token_id": [3, 4]}, "delete_token_id: expected one token id"),
        ({"split_token_id": 64}, r"split_token_id: expected token ids in \[0, "),
    ],
    ids=str,
)
def test_configurations_that_are_refused(keys, message, tmp_path):
    config = CONFIGS["llada2.2"] | SMALL | IDS | keys
    folder = write_moe(tmp_path, config, random_weights(config, 0))
    with pytest.raises(pydllm.CheckpointError, match=message):
        load(folder, device="cpu")
