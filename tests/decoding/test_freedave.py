"""FreeDave equals its baseline token for token, in as many forwards as the replay says."""

from __future__ import annotations

import dataclasses
import importlib
import random

import pytest
import torch

import pydllm
from pydllm import reference
from pydllm.decoding import drafts
from pydllm.models.native import NativeModel
from tests.decoding.trajectories import (
    MASK,
    VOCAB,
    random_pair,
    random_prompt,
    replay,
    static,
)

# The package's attribute of that name is the function.
verify_op = importlib.import_module("pydllm.ops.verify")
SCORES = ("confidence", "entropy", "margin", "left_to_right")
PROMPTS = [random_prompt(seed, length) for seed, length in enumerate((4, 1, 9, 7, 20))]


def decode(model, prompts, algorithm, new=13, **options):
    return pydllm.generate(model, prompts, algorithm, max_new_tokens=new, **options)


def same(got, expected):
    return torch.equal(torch.cat(got.sequences), torch.cat(expected.sequences))


KINDS = ("none", "prefix", "dual", "strict", "pipelined")


@pytest.mark.parametrize("shift", [False, True], ids=["plain", "shifted"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_static_decoding(kind, shift):
    """Random models, blocks, scores, drafts, prompts and batches: 108 sequences of each kind.

    Every fourth model has its scores and logits rounded, so that ties abound.
    """
    runs, places, saved = 0, set(), 0
    rng = random.Random(KINDS.index(kind) * 2 + shift)
    causal = kind in ("strict", "pipelined")
    for seed in range(24):
        block, score = rng.choice((2, 4, 8, 16)), rng.choice(SCORES)
        number, new = rng.choice((1, 2, 3, 4, 8, 16, "auto")), rng.randint(9, 17)
        cache = "none" if causal else kind
        prompts = [
            random_prompt(rng.randrange(10**6), rng.randint(1, 40)) for _ in range(1 + seed % 8)
        ]
        model, plain = random_pair(
            rng.randrange(10**6),
            block=block if causal else None,
            shift=shift,
            rounded=seed % 4 == 3,
        )
        baseline = pydllm.Static(block_length=block, score=score, cache=cache)
        mode = "pipelined" if kind == "pipelined" else "strict"
        algorithm = pydllm.FreeDave(draft_steps=number, mode=mode, baseline=baseline)
        got = decode(model, prompts, algorithm, new)
        for row, prompt in enumerate(prompts):
            path = static(plain, prompt, new, block=block, score=score, cache=cache)
            assert got.sequences[row].tolist() == path.x, (algorithm, seed, row)
            nfe, most = got.nfe[row].item(), len(path.states)
            if number == "auto":
                assert nfe <= most
            else:
                across = block if mode == "pipelined" else None
                assert nfe == replay(path, number, block=across) <= most, (algorithm, seed, row)
                assert number > 1 or nfe == most
            written = got.step_map[row][got.step_map[row] >= 0]
            assert len(written) and written.max() < nfe
            steps = [state.pick[0] - len(prompt) for state in path.states]
            order = [got.step_map[row][p].item() for p in steps if p < new]
            order = [step for step in order if step >= 0]
            assert order == sorted(order)  # what static writes first is not certain later
            runs, saved = runs + 1, saved + most - nfe
            if len(path.ends) and len(path.states) < new:
                places.add((path.states[-1].pick[0] - len(prompt)) % block)
    assert runs == 108 and saved > 100 and len(places) > 3


BASELINES = [
    pydllm.Static(block_length=4, tokens_per_step=3, cache="dual", score="margin"),
    pydllm.Static(block_length=8, score="random", cache="dual"),
    pydllm.Static(block_length=4, score="entropy", cache="dual", first_token="forced"),
    pydllm.Threshold(threshold=0.2, block_length=8, cache="dual"),
    pydllm.Factor(factor=2.0, block_length=8),
    pydllm.EntropyBound(bound=2.0, block_length=8, cache="prefix"),
]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("attention", ["full", "strict", "pipelined"])
@pytest.mark.parametrize("baseline", BASELINES, ids=str)
def test_it_equals_any_baseline(baseline, attention, temperature):
    """A step may take several tokens, an order may be random, tokens may be drawn."""
    block, mode = None, "strict"
    if attention != "full":
        block, mode = baseline.block_length, attention
        baseline = dataclasses.replace(baseline, cache="none", first_token="window")
    options = {"temperature": temperature, "seed": 2}
    model, _ = random_pair(4, block=block, shift=True)
    expected = decode(model, PROMPTS, baseline, **options)
    for draft_steps in (1, 6, "auto"):
        algorithm = pydllm.FreeDave(draft_steps=draft_steps, mode=mode, baseline=baseline)
        got = decode(model, PROMPTS, algorithm, **options)
        assert same(got, expected)
        assert (got.nfe <= expected.nfe).all()
        if draft_steps == 1:
            assert torch.equal(got.nfe, expected.nfe)
            assert torch.equal(got.step_map, expected.step_map)


@pytest.mark.parametrize(
    "baseline", [None, pydllm.Threshold(threshold=0.4, block_length=4)], ids=str
)
@pytest.mark.parametrize("mode", ["strict", "pipelined"])
def test_each_prompt_has_its_temperature(mode, baseline):
    model, _ = random_pair(3, block=4)
    own = {"block_length": 4} if baseline is None else {"baseline": baseline}
    drafted = pydllm.FreeDave(draft_steps=4, mode=mode, **own)
    prompts, each = [[5, 6, 7], [8, 9], [4]], [0.0, 0.7, 1.3]
    together = decode(model, prompts, drafted, temperature=each, seed=5)
    for row, (prompt, temperature) in enumerate(zip(prompts, each, strict=True)):
        options = {"temperature": temperature, "seed": 5, "request_ids": [row]}
        alone = decode(model, [prompt], baseline or pydllm.Static(block_length=4), **options)
        assert torch.equal(together.sequences[row], alone.sequences[0])


@pytest.mark.parametrize("mode", ["strict", "pipelined"])
def test_a_sequence_does_not_depend_on_its_batch(mode):
    model, _ = random_pair(1, block=4)
    algorithm = pydllm.FreeDave(draft_steps=6, block_length=4, mode=mode)
    together = decode(model, PROMPTS, algorithm)
    turned = decode(model, PROMPTS[::-1], algorithm)
    for row, prompt in enumerate(PROMPTS):
        alone = decode(model, [prompt], algorithm)
        for other, place in ((together, row), (turned, len(PROMPTS) - 1 - row)):
            assert torch.equal(alone.sequences[0], other.sequences[place])
            assert torch.equal(alone.step_map[0], other.step_map[place])
            assert alone.nfe[0] == other.nfe[place]


@pytest.mark.parametrize("shift", [False, True], ids=["plain", "shifted"])
def test_the_cache_holds_what_a_prefill_would(shift):
    model, plain = random_pair(2, block=4, shift=shift, eos=())
    caches, plain_new = [], model.new_cache
    model.new_cache = lambda *sizes: caches.append(plain_new(*sizes)) or caches[-1]
    for number in (1, 5, 16):
        got = decode(
            model,
            [random_prompt(0, 6)],
            pydllm.FreeDave(draft_steps=number, block_length=4, mode="pipelined"),
            14,
        )
        _, keys, values = plain.logits(got.sequences[0])
        cache = caches.pop()
        for stored, exact in ((cache.k(0), keys), (cache.v(0), values)):
            # The last block is never needed, the one before only if it did not end with the last.
            assert torch.allclose(stored[0, :12], exact.transpose(0, 1)[:12], rtol=0, atol=1e-12)


def test_a_branch_predicts_what_it_would_alone():
    model, plain = random_pair(2, block=4)
    prompt = random_prompt(0, 8)
    candidates = [random_prompt(seed, 8) for seed in range(1, 5)]
    cache = model.new_cache(1, 16)

    def at(number):
        return torch.tensor([number], dtype=torch.int32)

    numbers = {"length": at(8), "kv_len": at(8), "commit": at(8)}
    model.forward(torch.tensor([prompt]), at(0), cache, **numbers)
    numbers = {"length": at(8), "kv_len": at(16), "commit": at(0), "branches": 4}

    def look(parts):
        hidden = model.forward(torch.tensor([sum(parts, [])]), at(8), cache, **numbers)
        return model.head(hidden)[0].unflatten(0, (4, 8))

    logits = look(candidates)
    logits[..., MASK] = -torch.inf
    for branch, candidate in enumerate(candidates):
        alone, _, _ = plain.logits(torch.tensor(prompt + candidate))
        assert torch.allclose(logits[branch], alone[8:], rtol=0, atol=1e-12)
    changed = look([candidates[0], candidates[0], *candidates[2:]])
    changed[..., MASK] = -torch.inf
    assert torch.equal(changed[[0, 2, 3]], logits[[0, 2, 3]])


def greedy_verify(x, step_map, nfe, candidates, token, score, mask_id, start, *rest):
    """Whatever candidate 0 predicts becomes what candidate 1 assumes."""
    for row in range(len(x) if candidates.shape[1] > 1 else 0):
        for place in (candidates[row, 0] != candidates[row, 1]).nonzero().flatten().tolist():
            token[row, 0, place - start[row]] = candidates[row, 1, place]
            score[row, 0, place - start[row]] = 2.0
    return reference.verify(x, step_map, nfe, candidates, token, score, mask_id, start, *rest)


@pytest.mark.parametrize("mode", ["strict", "pipelined"])
@pytest.mark.parametrize(
    "baseline",
    [pydllm.Static(block_length=8), pydllm.Threshold(threshold=1.0, block_length=8)],
    ids=str,
)
def test_a_wrong_acceptance_is_noticed(mode, baseline, monkeypatch):
    """Negative control: accept one candidate too many, and the tokens differ."""
    model, _ = random_pair(3, block=8)
    expected = decode(model, PROMPTS, baseline)
    algorithm = pydllm.FreeDave(draft_steps=4, mode=mode, baseline=baseline)
    assert same(decode(model, PROMPTS, algorithm), expected)
    honest = drafts.accepted_prefix
    monkeypatch.setattr(verify_op._OP, "_reference", greedy_verify)
    monkeypatch.setattr(
        drafts, "accepted_prefix", lambda *args: (honest(*args) + 1).clamp(max=args[-1] - 1)
    )
    assert not same(decode(model, PROMPTS, algorithm), expected)


@pytest.mark.parametrize("mode", ["strict", "pipelined"])
def test_fresh_noise_follows_the_law_of_static_decoding(mode):
    """All continuations of 3 tokens are enumerated; a chi-square test of 4096 samples."""
    model, plain = random_pair(0, block=4, eos=())
    prompt, count = random_prompt(0, 5), 4096
    law = {(): 1.0}
    for _ in range(3):
        longer = {}
        for tokens, p in law.items():
            x = torch.tensor([*prompt, *tokens, *[MASK] * (3 - len(tokens))])
            following = plain.logits(x)[0][len(prompt) + len(tokens)].softmax(-1).tolist()
            longer |= {(*tokens, token): p * q for token, q in enumerate(following)}
        law = longer
    baseline = pydllm.Static(block_length=4, score="left_to_right")
    found = {}
    for lossless in ("distribution", "tokens"):
        algorithm = pydllm.FreeDave(draft_steps=3, mode=mode, baseline=baseline, lossless=lossless)
        got = decode(model, [prompt] * count, algorithm, 3, temperature=1.0, seed=1)
        found[lossless] = [tuple(x[5:].tolist()) for x in got.sequences]
        assert got.nfe.float().mean() < 3
    assert found["tokens"] != found["distribution"]
    expected = decode(model, [prompt] * count, baseline, 3, temperature=1.0, seed=1)
    assert found["tokens"] == [tuple(x[5:].tolist()) for x in expected.sequences]
    for samples in found.values():
        seen = dict.fromkeys(law, 0)
        for sample in samples:
            seen[sample] += 1
        common = [tokens for tokens, p in law.items() if p * count >= 5]
        bins = [(seen[tokens], law[tokens] * count) for tokens in common]
        bins.append((count - sum(o for o, _ in bins), count - sum(e for _, e in bins)))
        chi_square = sum((o - e) ** 2 / e for o, e in bins)
        freedom = len(bins) - 1
        assert freedom > 50
        assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("mode", ["strict", "pipelined"])
def test_logits_that_are_nan_do_not_hang_it(mode):
    model, _ = random_pair(0, block=8)
    model.spec = dataclasses.replace(model.spec, mask_id=0)  # the token of a row of NaN
    model._head = torch.full_like(model._head, float("nan"))
    got = decode(model, [[2, 3]], pydllm.FreeDave(draft_steps=4, block_length=8, mode=mode))
    assert (got.sequences[0][2:] == 0).all()
    assert got.nfe <= 20


def test_automatic_draft_length():
    """More drafts where they are right, fewer where they are not, fewer in a large batch."""
    widths = []
    for seed in (2, 3):
        model, _ = random_pair(seed, block=16, eos=())
        plain, looked = model.forward, []
        model.forward = lambda *args, plain=plain, looked=looked, **options: (
            looked.append(options["branches"]),
            plain(*args, **options),
        )[1]
        decode(
            model,
            PROMPTS[:1],
            pydllm.FreeDave(draft_steps="auto", block_length=16, mode="pipelined"),
            60,
        )
        widths.append(sum(looked) / len(looked))
        looked.clear()
        decode(model, PROMPTS[:1] * 20, pydllm.FreeDave(draft_steps="auto", block_length=16), 16)
        assert set(looked) == {1}
    assert widths[0] > widths[1] + 1


def cast(model, *kind):
    """The model with its weights on another device or in another dtype."""
    weights = {"embedding": model._embedding, "norm": model._norm, "head": model._head}
    layer = vars(model._layers[0])
    weights |= {f"layers.0.{name}": value for name, value in layer.items() if value is not None}
    weights = {name: value.to(*kind) for name, value in weights.items()}
    return NativeModel(model.spec, model.sizes, weights)


@pytest.mark.parametrize("mode", ["strict", "pipelined"])
def test_the_backends_give_the_same_tokens(mode):
    model = cast(random_pair(1, block=4, shift=True)[0], torch.float32)
    algorithm = pydllm.FreeDave(draft_steps=3, block_length=4, mode=mode)
    expected, got = (
        decode(model, PROMPTS[:3], algorithm, 6, backend=backend) for backend in ("torch", "triton")
    )
    assert same(got, expected)
    assert torch.equal(got.nfe, expected.nfe)
    assert torch.equal(got.step_map, expected.step_map)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dual", "strict", "pipelined"])
def test_bf16_is_equal_bit_by_bit_on_a_gpu(kind):
    """The kernels' rows do not depend on what they are batched with, so tokens are equal."""
    block = None if kind == "dual" else 8
    model = cast(random_pair(2, block=block, eos=())[0], "cuda", torch.bfloat16)
    baseline = pydllm.Static(block_length=8, cache="dual" if kind == "dual" else "none")
    mode = "pipelined" if kind == "pipelined" else "strict"
    expected = decode(model, PROMPTS, baseline, 64)
    for number in (1, 4, 16, "auto"):
        algorithm = pydllm.FreeDave(draft_steps=number, mode=mode, baseline=baseline)
        assert same(decode(model, PROMPTS, algorithm, 64), expected)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: pydllm.FreeDave(draft_steps=0),
            ValueError,
            r"draft_steps: expected an int in \[1, 32\], got 0",
        ),
        (
            lambda: pydllm.FreeDave(draft_steps=33),
            ValueError,
            r"draft_steps: .* in \[1, 32\], got 33",
        ),
        (
            lambda: pydllm.FreeDave(draft_steps="all"),
            ValueError,
            "draft_steps: expected one of auto, got 'all",
        ),
        (lambda: pydllm.FreeDave(mode="eager"), ValueError, "mode: expected one of strict, pipel"),
        (lambda: pydllm.FreeDave(lossless="no"), ValueError, "lossless: expected one of tokens, d"),
        (lambda: pydllm.FreeDave(cache="all"), ValueError, "cache: expected one of none"),
        (lambda: pydllm.FreeDave(baseline=3), TypeError, "baseline: expected a block-wise"),
        (
            lambda: pydllm.FreeDave(block_length=8, baseline=pydllm.Static(block_length=8)),
            ValueError,
            "block_length: expected the default 32 beside a baseline",
        ),
        (
            lambda: pydllm.FreeDave(baseline=pydllm.Static(compat="llada")),
            ValueError,
            "baseline: expected compat None",
        ),
        (
            lambda: decode(
                random_pair(0)[0],
                [[VOCAB - 1]],
                pydllm.FreeDave(draft_steps=4, block_length=8, mode="pipelined"),
            ),
            ValueError,
            "mode: expected 'strict' with full attention, where a later block changes",
        ),
    ],
)
def test_bad_parameters(make, error, message):
    with pytest.raises(error, match=message):
        make()
