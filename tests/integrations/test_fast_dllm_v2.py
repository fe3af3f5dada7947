"""Fast-dLLM v2's loop: against a restatement over the plain fp64 forward, and its edges."""

import pytest
import torch

import pydllm
from pydllm.integrations.fast_dllm_v2 import generate
from tests.integrations.published_blocks import fast_dllm_v2
from tests.models.plain import RECENT, random_plain, write_checkpoint

MASK, STOP, BLOCK = 60, 59, 8


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three models that predict the stop token never, sometimes and often; the mask never."""
    pairs = []
    for seed, scale in enumerate((0.0, 1.0, 1.5)):
        plain = random_plain(RECENT["fast-dllm-v2"] | {"tie_word_embeddings": False}, seed=seed)
        head = plain.weights["lm_head.weight"]
        head[MASK] = 0
        head[STOP] *= scale
        folder = write_checkpoint(tmp_path_factory.mktemp("v2"), plain)
        pairs.append((pydllm.load(folder, device="cpu", dtype=torch.float64), plain))
    return pairs


RULES = ((8, 0.3, False), (4, 0.9, False), (2, 1, True), (4, 0.2, True), (8, 0.5, True))
# A third of all; `python -m tests.upstream fast-dllm-v2` runs as many as are asked for.
CASES = [
    (seed, length, *rule)
    for seed in range(3)
    for a, length in enumerate((1, 8, 11, 21))
    for b, rule in enumerate(RULES)
    if (seed + a + b) % 3 == 0
]


def test_tokens_are_those_of_the_restatement(models):
    different, stops = [], 0
    for seed, length, small, threshold, keep in CASES:
        model, plain = models[seed]
        generator = torch.Generator().manual_seed(100 * seed + length)
        prompt = torch.randint(0, 57, (1, length), generator=generator)
        got = generate(
            model,
            prompt,
            24,
            mask_id=MASK,
            stop_token=STOP,
            threshold=threshold,
            small_block_size=small,
            block_size=BLOCK,
            use_block_cache=keep,
        )
        expected = fast_dllm_v2(
            plain, prompt[0].tolist(), 24, MASK, STOP, small, threshold, keep, block_size=BLOCK
        )
        stops += expected[-1] == STOP
        if got[0].tolist() != expected:
            different.append((seed, length, small, threshold, keep))
    assert not different, (len(different), len(CASES), different[:3])
    assert 2 < stops < len(CASES) - 2  # answers that end, and that do not


def test_lengths(models):
    """One token more than the blocks hold, less what the prompt fills of its last one."""
    model, _ = models[0]
    for length in (3, 8, 13):
        prompt = torch.zeros(1, length, dtype=torch.int64)
        got = generate(model, prompt, 16, mask_id=MASK, stop_token=STOP, block_size=8)
        assert got.shape[1] - length == 16 - length % 8 + 1
        again = generate(
            model, prompt, max_length=16 + length, mask_id=MASK, stop_token=STOP, block_size=8
        )
        assert torch.equal(got, again)


def test_sampling_draws_from_torchs_generator(models):
    model, _ = models[1]
    prompt = torch.arange(5)[None]
    options = {"mask_id": MASK, "stop_token": STOP, "block_size": 8, "temperature": 1.0}
    torch.manual_seed(3)
    first = generate(model, prompt, 24, **options)
    assert not torch.equal(generate(model, prompt, 24, **options), first)
    torch.manual_seed(3)
    assert torch.equal(generate(model, prompt, 24, **options), first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected an integer of at least 1, got 0"),
        ({"max_new_tokens": None}, "max_new_tokens: expected a number, or max_length, got neither"),
        ({"small_block_size": 3}, "small_block_size: expected a divisor of block_size 8, got 3"),
        ({"threshold": -1}, "threshold: expected a number of at least 0"),
        ({"temperature": -1}, "temperature: expected 0 or at least 1e-6, got -1"),
        ({"top_p": 0}, r"top_p: expected a number in \(0, 1\], got 0"),
        ({"mask_id": 61}, r"mask_id: expected a token id in \[0, 61\), got 61"),
        ({"input_ids": torch.zeros(2, 3, dtype=torch.int64)}, "expected one prompt .* got .2, 3."),
        ({"max_new_tokens": 80}, "expected at most 64 positions, got 3 and 81 new ones"),
    ],
)
def test_bad_arguments(models, changes, message):
    options = {
        "input_ids": torch.zeros(1, 3, dtype=torch.int64),
        "max_new_tokens": 8,
        "mask_id": MASK,
        "stop_token": STOP,
        "block_size": 8,
    }
    with pytest.raises(ValueError, match=message):
        generate(models[0][0], **options | changes)


def test_a_model_that_predicts_masks(models, tmp_path):
    plain = random_plain(RECENT["fast-dllm-v2"] | {"tie_word_embeddings": False})
    plain.weights["model.norm.weight"].zero_()  # all logits are 0: the lowest id wins
    model = pydllm.load(write_checkpoint(tmp_path, plain), device="cpu", dtype=torch.float64)
    prompt = torch.ones(1, 3, dtype=torch.int64)
    options = {"stop_token": STOP, "block_size": 8}
    assert generate(model, prompt, 8, mask_id=MASK, **options)[0, 3:].eq(0).all()
    with pytest.raises(pydllm.PydllmError, match="the model predicts the mask"):
        generate(model, prompt, 8, mask_id=0, **options)
