"""Every kind of round of ``SelfSpeculative`` on models of several layers: the autoregressive
answer, in the rounds and forwards that a replay by plain windows finds."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter

import pytest
import torch

import pydllm
from pydllm.decoding import speculative_rounds
from pydllm.models import ModelSpec
from pydllm.models.families import Sizes
from pydllm.models.native import NativeModel
from pydllm.models.rope import Rope
from tests.decoding.trajectories import EOS, HEADS, HIDDEN, MASK, SIZE, VOCAB, random_prompt
from tests.models import moe_plain

LAYERS, MAX_NEW = 2, (1, 2, 8, 13)


def deep(seed, causal="shifted", *, block=None, eos=EOS, adapter=False, query_scale=None):
    """A random diffusion model in fp64 with grouped heads, which may be read causally."""
    generator = torch.Generator().manual_seed(seed)
    scale = (0.3, 0.5, 0.8)[seed % 3]  # from drafts that are mostly right to ones that are not
    shapes = {"embedding": (VOCAB, HIDDEN), "head": (VOCAB, HIDDEN)}
    weights = {"norm": torch.ones(HIDDEN).double()}
    for layer in range(LAYERS):
        own = f"layers.{layer}."
        shapes |= {own + name: (2 * HIDDEN, HIDDEN) for name in ("qkv", "gate_up")}
        shapes |= {own + name: (HIDDEN, HIDDEN) for name in ("out", "down")}
        weights |= {own + name: weights["norm"] for name in ("attn_norm", "mlp_norm")}
        if adapter:
            shapes |= {own + "out_lora_a": (3, HIDDEN), own + "out_lora_b": (HIDDEN, 3)}
    for name, shape in shapes.items():
        weights[name] = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    spec = ModelSpec(
        vocab_size=VOCAB,
        mask_id=MASK,
        eos_ids=eos,
        shift_logits=False,
        attention="full" if block is None else "block_causal",
        block_size=block,
        max_positions=256,
        causal=causal,
    )
    flags = ("qkv_bias", "out_bias", "mlp_bias", "head_bias", "qk_norm", "tied")
    sizes = Sizes(
        HIDDEN,
        LAYERS,
        HEADS,
        HEADS // 2,
        SIZE,
        HIDDEN,
        VOCAB,
        1e-6,
        Rope(100.0, SIZE),
        **dict.fromkeys(flags, False),
    )
    return NativeModel(spec, dataclasses.replace(sizes, query_scale=query_scale), weights)


def predictions(model, known, shown, adapter):
    """Tokens and probabilities of a window of all its rows over causal keys of ``known``."""
    cache = model.new_cache(1, len(known) + len(shown))
    at = lambda n: torch.tensor([n], dtype=torch.int32)  # noqa: E731
    if known:
        n = at(len(known))
        options = {"length": n, "kv_len": n, "commit": n, "attention": "causal"}
        model.forward(torch.tensor([known]), at(0), cache, **options)
    options = {"length": at(len(shown)), "kv_len": at(len(known) + len(shown)), "commit": at(0)}
    hidden = model.forward(
        torch.tensor([shown]),
        at(len(known)),
        cache,
        attention="full",
        adapter=adapter and model.has_draft_adapter,
        **options,
    )
    logits = model.head(hidden)[0]
    logits[:, MASK] = -torch.inf
    prob, token = logits.softmax(-1).max(-1)
    return token.tolist(), prob.tolist()


def drafted(model, x, cursor, count, algorithm):
    """The drafts of a round, and the forwards that they take."""
    known = x[: cursor - 1]
    if algorithm.forwards == 1:
        shown = [MASK] * (algorithm.drafts + 1)
        return predictions(model, known, shown, algorithm.adapter)[0][1 : count + 1], 0
    shown, forwards = [x[cursor - 1]] + [MASK] * count, 0
    while MASK in shown:
        token, prob = predictions(model, known, shown, algorithm.adapter)
        left = [i for i, old in enumerate(shown) if old == MASK]
        best = max(left, key=lambda i: prob[i])
        least = 0.0 if algorithm.threshold is None else algorithm.threshold
        for i in left:
            if prob[i] >= least or i == best:
                shown[i] = token[i]
        forwards += 1
    return shown[1:], forwards


def replayed(model, prompt, answer, new, algorithm):
    """(rounds, forwards) that lead to an answer."""
    spec, end = model.spec, len(prompt) + new
    x = list(prompt)
    for token in answer:
        x.append(token)
        if token in spec.eos_ids:
            break
    cursor, rounds, forwards = len(prompt) + 1, 0, 1
    while cursor < len(x):
        count = min(end - cursor - 1, algorithm.drafts)
        if algorithm.align:
            count = min(count, spec.block_size - 1 - (cursor - 1) % spec.block_size)
        guess, drafts = drafted(model, x, cursor, count, algorithm)
        right = [a == b for a, b in zip(guess, x[cursor:], strict=False)]
        run = right.index(False) if False in right else len(right)
        rounds, forwards, cursor = rounds + 1, forwards + drafts + 1, cursor + run + 1
    return rounds, forwards


KINDS = {
    "two": ("shifted", {}),
    "one": ("shifted", {"forwards": 1}),
    "threshold": ("shifted", {"threshold": 0.4}),
    "masked": ("masked", {}),
    "masked, aligned": ("masked", {"align": True}),
    "masked, threshold": ("masked", {"threshold": 0.3, "align": True}),
}


def check_kind(kind, seeds):
    """Counts of what was compared, and of tokens that drafts saved."""
    causal, options = KINDS[kind]
    seen = Counter()
    for seed in seeds:
        rng = random.Random(seed)
        model = deep(
            seed,
            causal,
            block=rng.choice((2, 4, 7)) if causal == "masked" else None,
            eos=EOS if seed % 3 else (),
            adapter=seed % 2 == 1,
            query_scale=(0.3, 4) if seed % 5 == 0 else None,
        )
        lengths = [rng.choice((1, 2, 5, 11)) for _ in range(3)]
        prompts = [random_prompt(10 * seed + row, length) for row, length in enumerate(lengths)]
        new, drafts = rng.choice(MAX_NEW), rng.choice((1, 3, 6, 15))
        algorithm = pydllm.SelfSpeculative(drafts=drafts, **options)
        for temperature in (0.0, [0.0, 0.7, 1.5]):
            given = {"max_new_tokens": new, "temperature": temperature, "seed": seed}
            given["request_ids"] = [rng.randrange(50) for _ in prompts]
            want = pydllm.generate(model, prompts, pydllm.Autoregressive(), **given)
            got = pydllm.generate(model, prompts, algorithm, **given)
            assert all(map(torch.equal, got.sequences, want.sequences)), seed
            seen["saved"] += int((want.nfe - 1 - got.rounds).sum())
            if temperature:
                continue
            for row, prompt in enumerate(prompts):
                answer = got.new_tokens[row].tolist()
                counted = replayed(model, prompt, answer, new, algorithm)
                assert (int(got.rounds[row]), int(got.nfe[row])) == counted, (seed, row)
                seen["replayed"] += 1
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_the_autoregressive_answer_in_the_rounds_of_a_replay(kind):
    seen = check_kind(kind, range(6))
    assert seen["replayed"] == 18 and seen["saved"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_alone_in_a_batch_admitted_and_replayed(kind):
    causal, options = KINDS[kind]
    model = deep(3, causal, block=4 if causal == "masked" else None, adapter=True)
    prompts = [random_prompt(row, length) for row, length in enumerate((5, 1, 9, 2))]
    algorithm = pydllm.SelfSpeculative(drafts=4, **options)
    given = {"max_new_tokens": 9, "temperature": 0.6, "seed": 4}
    whole = pydllm.generate(model, prompts, algorithm, **given)
    admitted = pydllm.generate(model, prompts, algorithm, **given, max_batch=2)
    for row, prompt in enumerate(prompts):
        alone = pydllm.generate(model, [prompt], algorithm, **given, request_ids=[row])
        for other in (whole, admitted):
            assert torch.equal(other.sequences[row], alone.sequences[0])
            assert (other.nfe[row], other.rounds[row]) == (alone.nfe[0], alone.rounds[0])
    for _ in range(3):
        recorded = pydllm.generate(model, prompts, algorithm, **given, graph=True)
        assert torch.equal(torch.cat(recorded.sequences), torch.cat(whole.sequences))
        assert torch.equal(recorded.nfe, whole.nfe)


def test_what_is_stored_is_a_causal_prefill_of_the_answer(monkeypatch):
    """Of all layers, with rounds of one forward; leaves are never stored."""
    model = deep(2, eos=(), adapter=True)
    prompts = [random_prompt(row, length) for row, length in enumerate((5, 1, 9))]
    plainly, checked = speculative_rounds.OneForwardDecoder.step, []

    def compare(self, state, plan):
        result = plainly(self, state, plan)
        for row in range(len(state.x)):
            known = int(state.cursor[row]) - 1
            ids, n = state.x[row : row + 1, :known], state.cursor.new_tensor([known])
            cache = model.new_cache(1, state.cache.max_len)
            options = {"length": n, "kv_len": n, "commit": n, "attention": "causal"}
            model.forward(ids, n * 0, cache, **options)
            for layer in range(LAYERS):
                for one, other in ((state.cache.k, cache.k), (state.cache.v, cache.v)):
                    torch.testing.assert_close(
                        one(layer)[row, :known], other(layer)[0, :known], rtol=0, atol=1e-12
                    )
            checked.append(known)
        return result

    monkeypatch.setattr(speculative_rounds.OneForwardDecoder, "step", compare)
    algorithm = pydllm.SelfSpeculative(drafts=4, forwards=1)
    pydllm.generate(model, prompts, algorithm, max_new_tokens=9)
    assert len(checked) > 6


CONTROLS = {
    "a draft too many": lambda final, length: torch.minimum(final + 1, length),
    "all drafts": lambda final, length: length,
}


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("kind", ["two", "one", "masked"])
def test_a_round_that_keeps_too_much_is_noticed(kind, control, monkeypatch):
    causal, options = KINDS[kind]
    plainly = speculative_rounds.run_length

    def eager(guess, picks, length):
        return CONTROLS[control](plainly(guess, picks, length), length)

    monkeypatch.setattr(speculative_rounds, "run_length", eager)
    with pytest.raises(AssertionError):
        check_kind(kind, range(2, 5))


@pytest.mark.parametrize("row", [-1, 1])
def test_drafts_of_the_wrong_leaf_are_noticed(row, monkeypatch):
    """They change no token: the replay of the rounds tells."""
    plainly = speculative_rounds.OneForwardDecoder._next_drafts

    def other(self, state, hidden, at):
        return plainly(self, state, hidden, at + row * (self.drafts + 1))

    monkeypatch.setattr(speculative_rounds.OneForwardDecoder, "_next_drafts", other)
    with pytest.raises(AssertionError):
        check_kind("one", range(3))


def test_all_kinds_draw_from_the_autoregressive_distribution():
    """27 answers at a temperature, 2,000 seeds: chi-square against exact probabilities."""
    model, keep, count = deep(7, eos=()), [2, 3, 4], 2000
    suppress = [token for token in range(VOCAB) if token not in (*keep, MASK)]

    def probabilities(prompt):
        n = torch.tensor([len(prompt)], dtype=torch.int32)
        options = {"length": n, "kv_len": n, "commit": n * 0, "attention": "causal"}
        hidden = model.forward(torch.tensor([prompt]), n * 0, model.new_cache(1, 0), **options)
        return (model.head(hidden)[0, -1, keep] / 4.0).softmax(-1).tolist()

    exact = torch.zeros(3, 3, 3, dtype=torch.float64)
    for a, p in enumerate(probabilities([2, 3])):
        for b, q in enumerate(probabilities([2, 3, keep[a]])):
            for c, r in enumerate(probabilities([2, 3, keep[a], keep[b]])):
                exact[a, b, c] = p * q * r
    for options in ({}, {"forwards": 1}, {"threshold": 0.5}):
        algorithm = pydllm.SelfSpeculative(drafts=2, **options)
        given = {"max_new_tokens": 3, "temperature": 4.0, "seed": 5, "suppress_ids": suppress}
        got = pydllm.generate(model, [[2, 3]] * count, algorithm, **given)
        a, b, c = (torch.stack(got.new_tokens) - 2).T
        found = torch.bincount(9 * a + 3 * b + c, minlength=27).double()
        expected = count * exact.flatten()
        assert expected.min() > 5
        # 26 degrees of freedom: 54.1 has a tail of 0.001.
        assert ((found - expected) ** 2 / expected).sum() < 54.1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"forwards": 3}, ValueError, "forwards: expected an int in .1, 2., got 3"),
        ({"forwards": 1, "threshold": 0.5}, ValueError, "threshold: expected None with forwards=1"),
        ({"forwards": 1, "align": True}, ValueError, "align: expected False with forwards=1"),
        ({"threshold": 2}, ValueError, "threshold: expected .*, got 2"),
        ({"drafts": 0}, ValueError, "drafts: expected an int of at least 1, got 0"),
    ],
)
def test_arguments(options, error, message):
    with pytest.raises(error, match=message):
        pydllm.SelfSpeculative(**options)


def test_models():
    def refused(model, message, prompt=(3,), **options):
        with pytest.raises(ValueError, match=message):
            algorithm = pydllm.SelfSpeculative(**options)
            pydllm.generate(model, [list(prompt)], algorithm, max_new_tokens=4)

    masked = deep(0, "masked", block=4)
    refused(masked, "forwards: expected 2 with a model whose causal forward predicts", forwards=1)
    refused(deep(0), "align: expected False for a model without blocks", align=True)
    refused(deep(0, None), "SelfSpeculative: expected a causal model, or one that can be read")
    refused(masked, r"prompts\[0\]: expected at least one token", prompt=())
    with pytest.raises(ValueError, match=r"prompts\[0\]: expected at least one token"):
        pydllm.generate(deep(0), [[]], pydllm.Autoregressive(), max_new_tokens=4)


def mixture(folder, name, *, admits):
    """A random mixture of experts, read with masks; ``admits``: experts are admitted by block."""
    known = (c for c in moe_plain.CONFIGS.values() if name in c["architectures"])
    config = next(c for c in known if ("expert_capacity" in c) == admits)
    moe_plain.write_moe(folder, config, moe_plain.random_weights(config, 0, torch.float64))
    return pydllm.load(folder, device="cpu", dtype=torch.float64, causal="masked")


def test_experts_route_masks_after_drafts(tmp_path):
    model, saved = mixture(tmp_path / "sdar", "SDARMoeForCausalLM", admits=False), 0
    prompts = [random_prompt(row, length) for row, length in enumerate((5, 1, 9))]
    for options in ({}, {"align": True}):
        given = {"max_new_tokens": 9, "temperature": [0.0, 0.7, 1.0], "seed": 3}
        want = pydllm.generate(model, prompts, pydllm.Autoregressive(), **given)
        algorithm = pydllm.SelfSpeculative(drafts=4, **options)
        got = pydllm.generate(model, prompts, algorithm, **given)
        assert all(map(torch.equal, got.sequences, want.sequences))
        saved += int((want.nfe - 1 - got.rounds).sum())
    assert saved > 0


def test_experts_that_are_admitted_by_block_have_no_leaves(tmp_path):
    model = mixture(tmp_path / "llada2", "LLaDA2MoeModelLM", admits=True)
    with pytest.raises(ValueError, match="SelfSpeculative: expected a model whose experts are not"):
        pydllm.generate(model, [[3]], pydllm.SelfSpeculative(drafts=2), max_new_tokens=4)
    with pytest.raises(ValueError, match="verifier: expected a model whose experts are not admi"):
        pydllm.APD(model, window=0)
    n = torch.ones(1, dtype=torch.int32)
    options = {"length": n, "kv_len": n, "commit": n * 0, "attention": "causal", "leaves": 1}
    with pytest.raises(ValueError, match="leaves: expected 0 with experts that are admitted by bl"):
        model.forward(torch.tensor([[3, MASK]]), n * 0, model.new_cache(1, 4), **options)
