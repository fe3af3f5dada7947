"""The block schedulers against plain statements of diffusers' own."""

from types import SimpleNamespace

import pytest
import torch

from pydllm.integrations.diffusers import BlockRefinementScheduler, EntropyBoundScheduler
from tests.integrations.published_blocks import ranked

BATCH, LENGTH, VOCAB, MASK = 4, 9, 30, 29
INF = float("inf")


def make(seed):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(BATCH, LENGTH, 1, generator=generator) * 8
    logits = torch.randn(BATCH, LENGTH, VOCAB, generator=generator) * scale
    sample = torch.randint(0, MASK, (BATCH, LENGTH), generator=generator)
    share = torch.tensor([0.0, 0.4, 0.8, 1.1])[:, None]
    sample[torch.rand(BATCH, LENGTH, generator=generator) < share] = MASK
    return logits, sample


def propose(logits, generator, temperature=0.0, top_k=None, top_p=None):
    flat = logits.reshape(-1, VOCAB)
    if temperature == 0:
        p = flat.softmax(-1)
        token = flat.argmax(-1, keepdim=True)
    else:
        flat = flat / temperature
        if top_k:
            flat = torch.where(flat < flat.sort(-1, True).values[:, top_k - 1, None], -INF, flat)
        if top_p is not None:
            for row in flat:
                q, mass = row.softmax(-1), 0.0
                for token in q.argsort(descending=True).tolist():
                    row[token] = row[token] if mass <= top_p else -INF
                    mass += q[token].item()
        p = flat.softmax(-1)
        token = torch.multinomial(p, 1, generator=generator)
    prob = p.gather(1, token)
    return token.view(BATCH, LENGTH), prob.view(BATCH, LENGTH)


def generators():
    return torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)


DRAWS = {
    "greedy": {},
    "temperature": {"temperature": 0.7},
    "filters": {"temperature": 1.3, "top_k": 6, "top_p": 0.8},
}


@pytest.mark.parametrize("method", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("editing", [None, 0.3, -1.0])
@pytest.mark.parametrize("steps", [3, 9, 20])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.95, 2.0])
def test_refinement(threshold, steps, editing, method):
    scheduler = BlockRefinementScheduler(block_length=LENGTH, editing_threshold=editing)
    scheduler.set_timesteps(steps)
    prompt = torch.arange(LENGTH) < 2
    for seed, step in ((0, 0), (1, 1), (2, steps + 4)):
        logits, sample = make(seed)
        one, two = generators()
        token, prob = propose(logits.clone(), one, **method)
        quotas = [LENGTH // steps + (i < LENGTH % steps) for i in range(steps)]
        least = quotas[min(step, steps - 1)]
        written = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
        for b in range(BATCH):
            score = torch.where(sample[b] == MASK, prob[b], -INF)
            sure = [j for j in range(LENGTH) if score[j] > threshold]
            for j in sure if len(sure) >= least else ranked(score)[:least]:
                written[b, j] = True
        edited = torch.zeros_like(written)
        if editing is not None and editing > 0:
            edited = (sample != MASK) & ~prompt & (prob > editing) & (token != sample)
        out = scheduler.step(
            logits,
            torch.tensor(step),
            sample,
            mask_token_id=MASK,
            threshold=threshold,
            prompt_mask=prompt,
            generator=two,
            **method,
        )
        assert torch.equal(out.transfer_index, written)
        assert torch.equal(out.editing_transfer_index, edited)
        assert torch.equal(out.prev_sample, torch.where(written | edited, token, sample))
        assert torch.equal(out.sampled_tokens, token)
        assert out.sampled_probs.dtype == torch.float32
        assert torch.allclose(out.sampled_probs, prob) and out.pred_logits is logits


@pytest.mark.parametrize("method", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("editing", [None, 0.2])
@pytest.mark.parametrize("threshold", [0.6, 0.99])
def test_refinement_without_a_mask(threshold, editing, method):
    steps = 4
    scheduler = BlockRefinementScheduler(LENGTH, steps, threshold, editing)
    one, two = generators()
    for _ in range(2):  # a second block begins anew
        committed = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
        sample = torch.randint(0, VOCAB, (BATCH, LENGTH))
        for step in range(steps):
            logits = make(step)[0]
            token, prob = propose(logits.clone(), one, **method)
            written = torch.zeros_like(committed)
            due = -(-(step + 1) * LENGTH // steps)
            for b in range(BATCH):
                needed = max(due - int(committed[b].sum()), 0)
                score = torch.where(committed[b], -INF, prob[b])
                for rank, j in enumerate(ranked(score)):
                    written[b, j] = rank < needed or prob[b, j] > threshold
            edited = torch.zeros_like(written)
            if editing is not None:
                edited = committed & (token != sample) & (prob > editing)
            committed = committed | written
            random = torch.randint(0, VOCAB, sample.shape, generator=one)
            expected = torch.where(written | edited, token, sample)
            expected = torch.where(committed, expected, random)
            out = scheduler.step(logits, step, sample, generator=two, **method)
            assert torch.equal(out.prev_sample, expected)
            assert torch.equal(out.transfer_index, written)
            assert torch.equal(out.editing_transfer_index, edited)
            sample = expected
        assert committed.all()


@pytest.mark.parametrize("bound", [None, 0.0, 1.0, 50.0])
def test_entropy_bound(bound):
    scheduler = EntropyBoundScheduler(entropy_bound=0.3, t_max=1.1, t_min=0.5)
    scheduler.set_timesteps(5)
    for step in range(5):
        logits, sample = make(step)
        one, two = generators()
        warm = logits / (0.5 + 0.6 * (5 - step) / 5)
        token, prob = propose(warm, one, temperature=1.0)
        entropy = torch.distributions.Categorical(logits=warm).entropy()
        accepted = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
        for b in range(BATCH):
            total = 0.0
            for j in ranked(-entropy[b]):
                accepted[b, j] = total <= (0.3 if bound is None else bound)
                total += entropy[b, j].item()
        random = torch.randint(0, VOCAB, sample.shape, generator=one)
        out = scheduler.step(logits, step, sample, entropy_bound=bound, generator=two)
        assert torch.equal(out.accepted_index, accepted)
        assert torch.equal(out.prev_sample, torch.where(accepted, token, random))
        assert torch.equal(out.sampled_tokens, token) and torch.allclose(out.sampled_probs, prob)
        assert torch.allclose(out.pred_logits, warm)
        fields = scheduler.step(logits, step, sample, generator=two, return_dict=False)
        assert type(fields) is tuple and len(fields) == 5


def test_our_noise():
    """Another draw from the same distribution, by the generator's seed."""
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0)).expand(100, 50, -1)
    sample = torch.full((100, 50), MASK)
    scheduler = BlockRefinementScheduler()

    def drawn(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        given = {"mask_token_id": MASK, "temperature": 0.8, "generator": generator}
        return scheduler.step(logits, 0, sample, compat=None, **given, **options)

    out = drawn(1)
    assert torch.equal(out.sampled_tokens, drawn(1).sampled_tokens)
    assert not torch.equal(out.sampled_tokens, drawn(2).sampled_tokens)
    p = (logits[0, 0] / 0.8).softmax(-1)
    assert torch.allclose(out.sampled_probs, p[out.sampled_tokens], rtol=1e-5)
    seen = torch.bincount(out.sampled_tokens.flatten(), minlength=VOCAB) / 5000
    mean = ((p * (1 - p) / 5000).sqrt().sum() / 2).item()
    # Off the mean by 0.04 once in exp(-2 n 0.04^2) < 2e-7 (McDiarmid).
    assert (seen - p).abs().sum().item() / 2 < mean + 0.04
    bound = EntropyBoundScheduler().step(logits, 3, sample, compat=None)
    assert bound.accepted_index.any()


def test_configuration():
    scheduler = BlockRefinementScheduler.from_config(
        {
            "_class_name": "BlockRefinementScheduler",
            "block_length": 16,
            "threshold": 0.8,
            "other": 1,
        }
    )
    assert scheduler.config.block_length == 16 and scheduler.config["threshold"] == 0.8
    assert scheduler.config.editing_threshold is None and scheduler.order == 1
    other = BlockRefinementScheduler.from_config(SimpleNamespace(config=scheduler.config))
    assert other.config == scheduler.config
    assert (
        BlockRefinementScheduler.from_config(scheduler.config, threshold=0.1).config.threshold
        == 0.1
    )
    assert scheduler.timesteps.tolist() == list(range(31, -1, -1))
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [4, 3, 2, 1, 0]
    assert scheduler.get_num_transfer_tokens(16, 5).tolist() == [4, 3, 3, 3, 3]
    assert scheduler.get_num_transfer_tokens(16, 0).tolist() == []
    bound = EntropyBoundScheduler.from_config({"t_max": 1.0})
    assert bound.timesteps.tolist() == list(range(32)) and bound.config.t_max == 1.0


def test_nothing_is_committed_before_the_steps_are_set():
    logits, sample = make(0)
    out = BlockRefinementScheduler().step(logits, 0, sample, mask_token_id=MASK, threshold=0.0)
    assert not out.transfer_index.any() and torch.equal(out.prev_sample, sample)
    assert list(out) == [
        *("prev_sample", "transfer_index", "editing_transfer_index"),
        *("sampled_tokens", "sampled_probs", "pred_logits"),
    ]


def test_the_end_of_a_sequence():
    check = BlockRefinementScheduler.check_eos_finished
    x = torch.tensor([[1, 2, 5, 7], [5, 2, 5, 7], [1, 2, MASK, 5], [1, 2, 3, 5], [1, 2, 5, 4]])
    sampled = x[:, 2:].clone()
    wrote = torch.tensor([[1, 0], [1, 0], [0, 1], [0, 1], [0, 1]]).bool()
    finished = torch.tensor([False, False, False, False, True])
    got = check(x, sampled, wrote, finished, 5, MASK, 2)
    # Its first end is in the prompt; a mask is left before it; and one was finished before.
    assert got is finished and got.tolist() == [True, False, False, True, True]


def test_whether_a_block_goes_on():
    scheduler = BlockRefinementScheduler(num_inference_steps=4)
    none, some = torch.zeros(1, 3, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool)
    live, done = torch.tensor([False, True]), torch.tensor([True, True])

    def go(step=0, masks=True, editing=True, edits=some, post=0, finished=live):
        return scheduler.check_block_should_continue(step, masks, editing, edits, post, 2, finished)

    assert go() and go(step=3) and not go(step=4) and not go(finished=done)
    assert go(masks=False, step=9, post=2) and not go(masks=False, post=3)
    assert not go(masks=False, editing=False) and not go(masks=False, edits=none)
    assert go(edits=none, editing=False)


def test_noise_for_training():
    scheduler = BlockRefinementScheduler()
    x = torch.randint(0, MASK, (3, 11))
    valid = torch.ones_like(x)
    valid[1, 8:] = 0
    options = {"prompt_length": 2, "block_length": 4, "mask_token_id": MASK}
    one, two = generators()
    noisy, reverse, masked, rest = scheduler.add_noise(x, valid, generator=one, **options)
    expected = torch.zeros_like(x, dtype=torch.bool)
    for first in range(2, 11, 4):
        last = min(first + 4, 11)
        part = torch.rand(3, 1, generator=two)
        expected[:, first:last] = torch.rand(3, last - first, generator=two) < part
    assert torch.equal(masked, expected & valid.bool())
    inside = valid.bool() & (torch.arange(11) >= 2)
    assert torch.equal(rest, inside & ~masked)
    assert torch.equal(noisy, torch.where(masked, MASK, x))
    assert torch.equal(reverse, torch.where(rest, MASK, x))


BAD = {
    "method": ({"sampling_method": "best"}, "auto, greedy, multinomial, got 'best'"),
    "temperature": ({"temperature": -1.0}, "temperature: expected 0"),
    "top_p": ({"top_p": 0.0}, "top_p: expected a positive number"),
    "sample": ({"sample": torch.zeros(3, dtype=torch.int64)}, r"sample: expected \(B, T\) int64"),
    "logits": ({"model_output": torch.zeros(4, 8, VOCAB)}, r"expected \(4, 9, 'V'\), got"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_arguments(case):
    options, message = case
    logits, sample = make(0)
    given = {"model_output": logits, "timestep": 0, "sample": sample, "mask_token_id": MASK}
    with pytest.raises(ValueError, match=message):
        BlockRefinementScheduler().step(**given | options)


def test_bad_configuration():
    with pytest.raises(ValueError, match="num_inference_steps: expected an int of at least 1"):
        EntropyBoundScheduler().set_timesteps(0)
    with pytest.raises(ValueError, match="block_length: expected an int of at least 1"):
        BlockRefinementScheduler().set_timesteps(4, block_length=0)
    with pytest.raises(TypeError, match="config: expected a mapping, got int"):
        EntropyBoundScheduler.from_config(3)
    with pytest.raises(TypeError, match="config: expected entropy_bound, t_max"):
        EntropyBoundScheduler.from_config({}, bound=3)
    with pytest.raises(ValueError, match="entropy_bound: expected a number"):
        logits, sample = make(0)
        EntropyBoundScheduler().step(logits, 0, sample, entropy_bound=-1)
