"""The compatible samplers against plain statements of the published functions, loops and all."""

import inspect

import pytest
import torch

from pydllm.integrations import samplers

BATCH, LENGTH, VOCAB, MASK = 5, 12, 40, 39


def make(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(BATCH, LENGTH, 1, generator=generator) * 8
    logits = (torch.randn(BATCH, LENGTH, VOCAB, generator=generator) * scale).to(dtype)
    x = torch.randint(0, MASK, (BATCH, LENGTH), generator=generator)
    share = torch.tensor([0.0, 0.2, 0.5, 0.8, 1.1])[:, None]
    x[torch.rand(BATCH, LENGTH, generator=generator) < share] = MASK
    return logits, x, x == MASK


def proposals(logits, temperature, remasking, dtype=torch.float64, noise=torch.float32):
    """Tokens and confidences as the originals compute them: for every position."""
    noisy = logits
    if temperature > 0:
        u = torch.rand_like(logits, dtype=torch.float64)
        noisy = logits.double().exp() / (-torch.log(u)) ** temperature
    token = noisy.argmax(-1)
    if remasking == "random":
        return token, torch.rand(token.shape, dtype=noise)
    return token, logits.to(dtype).softmax(-1).gather(-1, token[..., None])[..., 0]


def as_mask(rows, chosen):
    return torch.tensor([[j in kept for j in range(LENGTH)] for kept in chosen])


def best(confidence, masks):
    return sorted(masks, key=lambda j: (-confidence[j].item(), j))


def rows_of(mask_index, confidence):
    for b in range(BATCH):
        masks = mask_index[b].nonzero().flatten().tolist()
        yield b, confidence[b], best(confidence[b], masks)


def same(got, expected):
    assert len(got) == 2 and type(got) is tuple
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def seeded(function, *args, **kwargs):
    torch.manual_seed(3)
    return function(*args, **kwargs)


SAMPLING = [(0.0, "low_confidence"), (0.7, "low_confidence"), (0.0, "random"), (0.7, "random")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("temperature", "remasking"), SAMPLING)
@pytest.mark.parametrize("threshold", [None, 0.0, 0.3, 0.9, 1.0, 1.5])
@pytest.mark.parametrize("version", ["a9b81e4", "24cc59e"])
def test_fast_dllm_threshold_and_quota(version, threshold, temperature, remasking, dtype):
    noise = {"a9b81e4": torch.float64, "24cc59e": torch.float32}[version]
    for seed in range(10):
        logits, x, mask_index = make(seed, dtype)
        quota = torch.randint(0, 5, (BATCH,))
        torch.manual_seed(3)
        token, confidence = proposals(logits, temperature, remasking, noise=noise)
        chosen = []
        for b, score, order in rows_of(mask_index, confidence):
            if threshold is None:
                chosen.append(order[: quota[b]])
            else:
                chosen.append(order[:1] + [j for j in order[1:] if score[j] >= threshold])
        expected = torch.where(mask_index, token, x), as_mask(LENGTH, chosen)
        arguments = (logits, temperature, remasking, mask_index, x)
        for given in (quota, quota[:, None]):
            got = seeded(samplers.get_transfer_index, *arguments, given, threshold, version=version)
            same(got, expected)


@pytest.mark.parametrize(("temperature", "remasking"), SAMPLING[:2])
@pytest.mark.parametrize("factor", [0, 0.5, 1, 1.5, 4.0])
def test_fast_dllm_dynamic(factor, temperature, remasking):
    for seed in range(30):
        logits, x, mask_index = make(seed)
        torch.manual_seed(3)
        token, confidence = proposals(logits, temperature, remasking)
        chosen = []
        for _, score, order in rows_of(mask_index, confidence):
            limits = [-1.0] + [1 - factor / (n + 1) for n in range(2, len(order) + 1)]
            top = 0
            for top in range(len(order)):
                if score[order[top]] < limits[top]:
                    break
            chosen.append(order[: top + 1 if top in (0, len(order) - 1) else top])
        expected = torch.where(mask_index, token, x), as_mask(LENGTH, chosen)
        arguments = (logits, temperature, remasking, mask_index, x, None, factor)
        same(seeded(samplers.get_transfer_index_dynamic, *arguments), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_float64", [False, True])
@pytest.mark.parametrize("rm_mask", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_dinfer_threshold(temperature, rm_mask, use_float64, dtype):
    for seed, threshold in ((seed, t) for seed in range(10) for t in (0.0, 0.4, 0.95, 1.0, 2.0)):
        logits, x, mask_index = make(seed, dtype)
        logits[:, ::3, MASK] += 9  # these predict the mask
        torch.manual_seed(3)
        wide = torch.float64 if use_float64 else torch.float32
        token, confidence = proposals(logits, temperature, "low_confidence", wide)
        able = mask_index & (token != MASK) if rm_mask else mask_index
        confidence = torch.where(able, confidence, -torch.inf)
        limit = (confidence.amax(1, keepdim=True) - 1e-5).clamp(-1000, threshold)
        expected = torch.where(able, token, x), confidence >= limit
        arguments = (logits, temperature, mask_index, x, MASK, threshold)
        got = seeded(
            samplers.get_transfer_index_threshold,
            *arguments,
            rm_mask=rm_mask,
            use_float64=use_float64,
            block_end=3,  # the original swallows what it does not know
        )
        same(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 0.6])
@pytest.mark.parametrize("top_p", [None, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("top_k", [None, 1, 3, 99])
def test_dream_tokens(top_k, top_p, temperature, dtype):
    logits = make(1, dtype)[0].flatten(0, 1)
    lowest = torch.finfo(dtype).min
    kept = logits / temperature if temperature else logits.clone()
    if top_p is not None and top_p < 1:
        for row in kept:
            values, ids = row.sort(descending=True)
            spent = values.softmax(-1).cumsum(-1)
            row[ids[1:][spent[:-1] > top_p]] = lowest
    if top_k is not None:
        for row in kept:
            row[row < row.sort(descending=True).values[min(top_k, VOCAB) - 1].clone()] = lowest
    probs = kept.softmax(-1)
    ordered = probs.sort(-1, descending=True).values
    torch.manual_seed(3)
    token = torch.multinomial(probs, 1)[:, 0] if temperature else probs.max(-1).indices
    scores = {
        "": probs.gather(-1, token[:, None])[:, 0],
        "margin_confidence": ordered[:, 0] - ordered[:, 1],
        "neg_entropy": (probs * torch.log(probs + 1e-10)).sum(-1),
    }
    for flag, score in scores.items():
        flags = {flag: True} if flag else {}
        got = seeded(samplers.sample_tokens, logits, temperature, top_p, top_k, **flags)
        same(got, (score, token))


def test_one_read_of_the_logits_gives_the_same_to_rounding():
    for seed in range(10):
        logits, x, mask_index = make(seed)
        for flags in ({}, {"margin_confidence": True}, {"neg_entropy": True}):
            flat = logits.flatten(0, 1)
            score, token = samplers.sample_tokens(flat, **flags)
            fast_score, fast_token = samplers.sample_tokens(flat, **flags, compat=None)
            assert torch.equal(token, fast_token) and fast_score.dtype == score.dtype
            # Of order 1 at most, in fp32; the original's 1e-10 costs 40 * 1e-10 of entropy.
            assert (score - fast_score).abs().max() < 1e-5
        calls = {
            samplers.get_transfer_index: ("low_confidence", mask_index, x, None, 0.6),
            samplers.get_transfer_index_dynamic: ("low_confidence", mask_index, x, None, 1.0),
            samplers.get_transfer_index_threshold: (mask_index, x, MASK, 0.6),
        }
        for function, arguments in calls.items():
            same(
                function(logits, 0.0, *arguments, compat=None),
                function(logits, 0.0, *arguments),
            )


def test_llada_pair():
    mask_index = torch.rand(7, 33, generator=torch.Generator().manual_seed(0)) < 0.5
    mask_index[0] = False
    for steps in (1, 4, 16, 50):
        schedule = samplers.get_num_transfer_tokens(mask_index, steps)
        assert schedule.dtype == torch.int64 and schedule.shape == (7, steps)
        for row, masks in zip(schedule.tolist(), mask_index.sum(1).tolist(), strict=True):
            base, rest = divmod(masks, steps)
            assert row == [base + (i < rest) for i in range(steps)]
    logits = torch.randn(2, 3, 9)
    assert samplers.add_gumbel_noise(logits, 0) is logits
    torch.manual_seed(1)
    u = torch.rand(2, 3, 9, dtype=torch.float64)
    torch.manual_seed(1)
    noisy = samplers.add_gumbel_noise(logits.bfloat16(), 0.5)
    assert torch.equal(noisy, logits.bfloat16().double().exp() / (-torch.log(u)) ** 0.5)


def test_signatures_are_those_of_the_originals():
    expected = {
        "add_gumbel_noise": "logits, temperature",
        "get_num_transfer_tokens": "mask_index, steps",
        "get_transfer_index": "logits, temperature, remasking, mask_index, x, "
        "num_transfer_tokens, threshold",
        "get_transfer_index_dynamic": "logits, temperature, remasking, mask_index, x, "
        "num_transfer_tokens, factor",
        "get_transfer_index_threshold": "logits, temperature, mask_index, x, mask_id, threshold, "
        "rm_mask, use_float64",
        "sample_tokens": "logits, temperature, top_p, top_k, margin_confidence, neg_entropy",
    }
    assert sorted(expected) == samplers.__all__
    for name, wanted in expected.items():
        parameters = inspect.signature(getattr(samplers, name)).parameters.values()
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert ", ".join(positional) == wanted


BAD_SAMPLES = {
    "top_k 0": {"top_k": 0},
    "top_k -1": {"top_k": -1},
    "top_k True": {"top_k": True},
    "top_p": {"top_p": -0.1},
    "temperature": {"temperature": -1.0},
    "temperature NaN": {"temperature": float("nan")},
    "logits": {"logits": torch.zeros(4)},
    "integers": {"logits": torch.zeros(2, 3, dtype=torch.int64)},
}


@pytest.mark.parametrize("case", BAD_SAMPLES.values(), ids=BAD_SAMPLES)
def test_bad_samples_are_refused(case):
    (name,) = case
    with pytest.raises((ValueError, TypeError), match=f"^{name}: expected .*, got "):
        samplers.sample_tokens(**{"logits": torch.zeros(2, 7)} | case)


@pytest.mark.parametrize("name", ["mask_index", "x", "logits", "num_transfer_tokens"])
def test_shapes_that_do_not_fit_are_refused(name):
    logits, x, mask_index = make(0)
    given = {"logits": logits, "x": x, "mask_index": mask_index}
    given["num_transfer_tokens"] = torch.ones(len(x), dtype=torch.int64)
    given[name] = given[name][:, :-1] if given[name].ndim > 1 else given[name][:-1]
    expected = "mask_index" if name == "logits" else name
    for function in (samplers.get_transfer_index, samplers.get_transfer_index_dynamic):
        if name == "num_transfer_tokens" and function is samplers.get_transfer_index_dynamic:
            continue  # which does not read it
        with pytest.raises(ValueError, match=f"^{expected}: expected .*, got "):
            function(temperature=0.0, remasking="low_confidence", **given)


@pytest.mark.parametrize("steps", [0, -1, 2**31, True, 2.0])
def test_schedules_have_a_length(steps):
    with pytest.raises(ValueError, match="^steps: expected an int from 1 to 1048576, got "):
        samplers.get_num_transfer_tokens(torch.ones(2, 4, dtype=torch.bool), steps)


def test_bad_input_is_refused():
    logits, x, mask_index = make(0)
    with pytest.raises(NotImplementedError, match="expected one of low_confidence, random, got"):
        samplers.get_transfer_index(logits, 0.0, "best", mask_index, x, None, 0.5)
    with pytest.raises(ValueError, match="factor: expected a number of at least 0"):
        samplers.get_transfer_index_dynamic(logits, 0.0, "random", mask_index, x, None, -1)
    with pytest.raises(ValueError, match="num_transfer_tokens: expected .B,. integers"):
        samplers.get_transfer_index(logits, 0.0, "random", mask_index, x, None)
    arguments = (logits, 0.0, mask_index, x, 0, 0.9)
    with pytest.raises(TypeError, match="precise is no argument any more, use compat"):
        samplers.get_transfer_index_threshold(*arguments, precise=False)
    with pytest.raises(TypeError, match="compat: expected 'dinfer' or None, got 'dream'"):
        samplers.get_transfer_index_threshold(*arguments, compat="dream")
