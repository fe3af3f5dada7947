"""What ``generate`` draws from, against distributions that are enumerated."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

import pydllm
from pydllm import ops
from pydllm.models import ModelSpec, StaticCache
from tests.decoding.test_apd_laws import Table
from tests.decoding.test_graph import FULL, models, prompts
from tests.decoding.trajectories import random_pair

V, N, DRAWS = 5, 2, 3_000  # tokens, length of an answer; V is also the mask's id


class Toy:
    """A model whose logits depend on the two tokens after the prompt, and on the prompt's."""

    tokenizer, device, dtype = None, torch.device("cpu"), torch.float64

    def __init__(self, attention="full"):
        self.spec = ModelSpec(
            vocab_size=V + 1,
            mask_id=V,
            eos_ids=(0,),  # ignored; an answer with a 0 that is no EOS is looked at for NaN
            shift_logits=False,
            attention=attention,
            block_size=None,
            max_positions=64,
        )
        generator = torch.Generator().manual_seed(3)
        shape = (V + 1, V + 1, V + 1, N + 1, V + 1)
        self.table = torch.randn(shape, generator=generator, dtype=torch.float64) * 1.5
        self.table[..., V] = 9.0  # the mask is what it would say

    def new_cache(self, batch, max_len):
        return StaticCache(*torch.zeros(2, 1, batch, max_len, 1, 1, dtype=torch.float64))

    def forward(self, ids, start, cache, **options):
        whole = ids.unflatten(1, (options.get("branches", 1), -1))
        return self.table[tuple(whole.unbind(-1))].flatten(1, 2)

    def head(self, hidden):
        return hidden

    def head_stats(self, hidden, rows=None, **options):
        return ops.vocab_stats(hidden if rows is None else hidden[rows.long()], **options)

    def logits(self, tokens, place, guidance=0.0):
        """Of an answer's position, given the answer (None: a mask)."""
        seen = [V if token is None else token for token in tokens]
        logits = self.table[0, *seen, place + 1, :V]
        without = self.table[V, *seen, place + 1, :V]
        return without + (1 + guidance) * (logits - without)


def kept(logits, temperature, top_k, top_p):
    """Probabilities at a temperature, and at 1, of the ids that the filters keep."""
    order = (logits / temperature).softmax(-1).tolist()
    ranked = sorted(range(len(order)), key=lambda token: -order[token])
    mass, nucleus = 0.0, []
    for token in ranked:
        nucleus.append(token)
        mass += order[token]
        if top_p is not None and mass > top_p:
            break
    left = set(nucleus) & set(ranked[:top_k])
    hidden = torch.tensor([token not in left for token in range(len(order))])
    logits = logits.masked_fill(hidden, -math.inf)
    return (logits / temperature).softmax(-1).tolist(), logits.softmax(-1).tolist()


def law(model, options, choose):
    """Probability of each answer. ``choose`` says of two confidences, and of the distributions that
    they are from, which positions are written; what is not is drawn again.
    """
    found = dict.fromkeys(itertools.product(range(V), repeat=N), 0.0)
    options = {"temperature": 1.0, "top_k": None, "top_p": None, "guidance": 0.0} | options
    guidance = options.pop("guidance")
    drawn = [kept(model.logits([None] * N, place, guidance), **options) for place in range(N)]
    for pair in found:
        mass = math.prod(p[token] for (p, _), token in zip(drawn, pair, strict=True))
        if mass == 0:
            continue
        confidence = [p[token] for (_, p), token in zip(drawn, pair, strict=True)]
        written = choose(confidence, [p for _, p in drawn])
        first = [token if place in written else None for place, token in enumerate(pair)]
        if None not in first:
            found[pair] += mass
            continue
        place = first.index(None)
        again = kept(model.logits(first, place, guidance), **options)[0]
        for token in range(V):
            answer = [token if place == at else first[at] for at in range(N)]
            found[tuple(answer)] += mass * again[token]
    return found


def best(confidence, chances=None):
    return {0 if confidence[0] >= confidence[1] else 1}


def above(confidence, chances):
    return {place for place in range(N) if confidence[place] >= 0.4} or best(confidence)


def surest(confidence, chances):
    """The position whose distribution has the least entropy."""
    entropy = [-sum(p * math.log(p) for p in chance if p > 0) for chance in chances]
    return {entropy.index(min(entropy))}


ALGORITHMS = {
    "static": (pydllm.Static(block_length=N), best),
    "static-left": (pydllm.Static(block_length=N, score="left_to_right"), lambda *_: {0}),
    "static-both": (pydllm.Static(block_length=N, tokens_per_step=N), lambda *_: {0, 1}),
    "threshold": (pydllm.Threshold(threshold=0.4, block_length=N), above),
    "freedave": (pydllm.FreeDave(draft_steps=2, block_length=N), best),
    "freedave-fresh": (
        pydllm.FreeDave(draft_steps=2, block_length=N, lossless="distribution"),
        best,
    ),
    "freedave-threshold": (
        pydllm.FreeDave(baseline=pydllm.Threshold(threshold=0.4, block_length=N)),
        above,
    ),
    "multiblock": (
        pydllm.MultiBlock(threshold=-math.inf, block_length=N, cache=False),
        surest,
    ),
    "left-to-right": (pydllm.LeftToRight(), lambda *_: {0}),
}
OPTIONS = {
    "plain": {"temperature": 0.7},
    "top-k": {"temperature": 1.3, "top_k": 3},
    "top-p": {"temperature": 0.8, "top_p": 0.75},
    "sdar": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    "both": {"temperature": 1.5, "top_k": 2, "top_p": 0.6},
    "guided": {"temperature": 1.0, "guidance": 0.8, "top_p": 0.9},
}
CASES = [
    *((name, "both") for name in ALGORITHMS if name != "left-to-right"),
    *(("static", options) for options in OPTIONS if options not in ("both", "plain")),
    *(("threshold", options) for options in ("top-p", "guided")),
    ("left-to-right", "top-p"),
]


def bound(probabilities):
    """A total variation distance that a sample exceeds once in a million times (McDiarmid)."""
    mean = sum(math.sqrt(p * (1 - p) / DRAWS) for p in probabilities) / 2
    return mean + math.sqrt(math.log(1e6) / (2 * DRAWS))


@pytest.mark.parametrize(("name", "chosen"), CASES)
def test_answers_follow_the_enumerated_law(name, chosen):
    model, (algorithm, choose), options = Toy(), ALGORITHMS[name], OPTIONS[chosen]
    got = pydllm.generate(
        model,
        [[0]] * DRAWS,
        algorithm,
        max_new_tokens=N,
        seed=5,
        ignore_eos=True,
        graph=False,
        **options,
    )
    answers = torch.stack(got.new_tokens)
    counts = torch.bincount(answers[:, 0] * V + answers[:, 1], minlength=V**N) / DRAWS
    expected = law(model, options, choose)
    mass = torch.tensor([*expected.values()])
    assert abs(mass.sum() - 1) < 1e-6
    assert not counts[mass == 0].any()  # exactly the support
    assert (counts - mass).abs().sum() / 2 < bound(mass.tolist())
    other = law(model, {"temperature": options["temperature"]}, choose)
    if chosen not in ("plain", "sdar"):  # what a sampler without filters would do is far away
        far = (torch.tensor([*other.values()]) - mass).abs().sum() / 2
        assert far > 1.5 * bound(mass.tolist())


class Causal(Table):
    """A causal model whose logits depend on the tokens before."""

    def head_stats(self, hidden, rows=None, **options):
        return ops.vocab_stats(hidden if rows is None else hidden[rows.long()], **options)


@pytest.mark.parametrize("chosen", ["top-p", "both"])
def test_autoregressive_answers_follow_the_enumerated_law(chosen):
    """Four tokens: each drawn from what the filters keep, given those before."""
    model, length, vocab = Causal(True, 2), 4, 3
    options = {"top_k": None, "top_p": None} | OPTIONS[chosen]
    model.spec = dataclasses.replace(model.spec, vocab_size=vocab + 1, eos_ids=(0,))
    got = pydllm.generate(
        model,
        [[0]] * DRAWS,
        pydllm.Autoregressive(),
        max_new_tokens=length,
        suppress_ids=[vocab],
        ignore_eos=True,
        **OPTIONS[chosen],
    )
    answers = torch.stack(got.new_tokens) * torch.tensor([vocab**3, vocab**2, vocab, 1])
    counts = torch.bincount(answers.sum(1), minlength=vocab**length) / DRAWS
    expected = []
    for answer in itertools.product(range(vocab), repeat=length):
        mass = 1.0
        for place, token in enumerate(answer):
            logits = model.table[model.code(answer[:place]), place, :vocab]
            mass *= kept(logits, **options)[0][token]
        expected.append(mass)
    mass = torch.tensor(expected)
    assert abs(mass.sum() - 1) < 1e-6
    assert not counts[mass == 0].any()
    assert (counts - mass).abs().sum() / 2 < bound(expected)


def test_guidance_is_that_of_llada():
    """One step of all masks, as an independent forward with the prompt and without it says."""
    model, plain = random_pair(5, eos=())
    (prompt,) = prompts((6,), 3)
    got = pydllm.generate(
        model, [prompt], pydllm.Static(block_length=8), max_new_tokens=8, guidance=1.5
    )
    x, first = torch.tensor(prompt + [1] * 8), len(prompt)
    for _ in range(8):
        masked = x.clone()
        masked[:first] = 1
        logits, without = (plain.logits(ids)[0] for ids in (x, masked))
        guided = without + 2.5 * (logits - without)
        guided[:, 1] = -math.inf
        chance, token = guided.softmax(-1).max(-1)
        place = chance.masked_fill(x != 1, -1).argmax()
        x[place] = token[place]
    assert got.sequences[0].tolist() == x.tolist()


def test_logprobs_are_of_the_distribution_that_was_drawn_from():
    model, options = Toy(), {"temperature": 1.5, "top_k": 3, "top_p": 0.8, "guidance": 0.5}
    for name in ("static", "static-both", "freedave", "freedave-threshold"):
        got = pydllm.generate(
            model,
            [[0]] * 50,
            ALGORITHMS[name][0],
            max_new_tokens=N,
            logprobs=True,
            ignore_eos=True,
            graph=False,
            **options,
        )
        filters = {key: options[key] for key in ("temperature", "top_k", "top_p")}
        same_time = name == "static-both"
        for row, answer in enumerate(got.new_tokens):
            tokens, chances = answer.tolist(), []
            for order in ((0, 1), (1, 0)):
                seen, chance = [None, None], {}
                for place in order:
                    logits = model.logits(seen, place, options["guidance"])
                    chance[place] = math.log(kept(logits, **filters)[0][tokens[place]] or 1e-30)
                    if not same_time:
                        seen[place] = tokens[place]
                chances.append([chance[0], chance[1]])
            if name == "freedave-threshold":  # or both in one step of the baseline
                both = [
                    kept(model.logits([None] * 2, p, 0.5), **filters)[0][t]
                    for p, t in enumerate(tokens)
                ]
                chances.append([math.log(p or 1e-30) for p in both])
            logprob = got.logprobs[row].tolist()
            assert any(pair == pytest.approx(logprob, abs=1e-5) for pair in chances)


SAMPLED = {"temperature": 0.9, "top_k": 6, "top_p": 0.85}


@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("score", ["confidence", "entropy", "left_to_right", "random"])
def test_freedave_has_its_baselines_tokens(block, score):
    """Also its log-probabilities; with each draft length, cache and mode."""
    for seed in range(1):
        model, _ = random_pair(seed, block=block)
        for cache in ("none",) if block else ("none", "prefix", "dual"):
            baseline = pydllm.Static(block_length=4, score=score, cache=cache)
            options = {"max_new_tokens": 11, "logprobs": True, "seed": seed} | SAMPLED
            given = prompts((3, 6), seed)
            expected = pydllm.generate(model, given, baseline, **options)
            for mode in ("strict", "pipelined") if block else ("strict",):
                algorithm = pydllm.FreeDave(draft_steps=3 + seed, baseline=baseline, mode=mode)
                got = pydllm.generate(model, given, algorithm, **options)
                for one, other in zip(got.sequences, expected.sequences, strict=True):
                    assert torch.equal(one, other)
                for one, other in zip(got.logprobs, expected.logprobs, strict=True):
                    assert torch.allclose(one, other, atol=1e-6)


EACH = {
    "temperature": [0.8, 0.0, 1.2],
    "top_k": [4, None, 3],
    "top_p": [None, 0.5, 0.9],
}


def causal_pair():
    model, _ = random_pair(2)
    model.spec = dataclasses.replace(model.spec, causal="shifted")
    return model


@pytest.mark.parametrize(
    "name", ["static-dual", "threshold", "freedave", "multiblock", "autoregressive", "selfspec"]
)
def test_parameters_per_prompt_are_those_of_the_prompt_alone(name):
    causal = {
        "autoregressive": pydllm.Autoregressive(),
        "selfspec": pydllm.SelfSpeculative(drafts=4),
    }
    model = causal_pair() if name in causal else models()[0]
    algorithm, given = causal.get(name) or FULL[name], prompts((4, 1, 9), 0)
    options = {"max_new_tokens": 10, "ignore_eos": True, "suppress_ids": [3, 7], "logprobs": True}
    together = pydllm.generate(model, given, algorithm, **EACH, **options)
    again = pydllm.generate(model, given, algorithm, **EACH, **options)
    other = pydllm.generate(model, given, algorithm, **EACH, **options, seed=1)
    for row, prompt in enumerate(given):
        own = {key: values[row] for key, values in EACH.items()}
        alone = pydllm.generate(model, [prompt], algorithm, request_ids=[row], **own, **options)
        assert torch.equal(together.sequences[row], alone.sequences[0])
        assert torch.allclose(together.logprobs[row], alone.logprobs[0], atol=1e-6)
        assert torch.equal(together.sequences[row], again.sequences[row])
        assert not set(together.new_tokens[row].tolist()) & {3, 7, model.spec.mask_id}
    assert torch.equal(together.sequences[1], other.sequences[1])
    assert not all(map(torch.equal, together.sequences, other.sequences))


def test_self_speculation_has_the_autoregressive_tokens():
    model, given = causal_pair(), prompts((4, 1, 9), 0)
    options = {"max_new_tokens": 12, "logprobs": True} | SAMPLED
    expected = pydllm.generate(model, given, pydllm.Autoregressive(), **options)
    got = pydllm.generate(model, given, pydllm.SelfSpeculative(drafts=5), **options)
    for one, other in zip(got.sequences, expected.sequences, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(got.logprobs, expected.logprobs, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("name", ["static-dual", "multiblock"])
def test_other_parameters_replay_what_was_recorded(name):
    model, _ = models()
    given = prompts((4, 1, 9), 0)
    options = {"max_new_tokens": 8, "guidance": 0.5, "logprobs": True, "top_p": 0.9}
    for temperature, top_p, suppress_ids in (
        (0.7, 0.9, [3]),
        ([0.0, 1.0, 0.5], [0.5, 0.8, 1], [7]),
    ):
        options |= {"temperature": temperature, "top_p": top_p, "suppress_ids": suppress_ids}
        run, replayed = (
            pydllm.generate(model, given, FULL[name], graph=graph, **options)
            for graph in (False, True)
        )
        for one, other in zip(run.sequences, replayed.sequences, strict=True):
            assert torch.equal(one, other)
        for one, other in zip(run.logprobs, replayed.logprobs, strict=True):
            assert torch.allclose(one, other, atol=1e-6)
    assert len(model.graphs) == 1


def test_warm_steps_serve_calls_with_other_values():
    model, _ = models()
    sampled = {"temperature": 0.7, "top_p": 0.9, "suppress_ids": [3], "stop": [4]}
    captured = pydllm.warmup(model, FULL["static-dual"], 4, 32, max_new_tokens=14, **sampled)
    others = {"temperature": 1.3, "top_p": [0.5, None, 0.8], "suppress_ids": [7], "stop": [2]}
    given = prompts((4, 1, 9), 0)
    pydllm.generate(model, given, FULL["static-dual"], max_new_tokens=14, graph=True, **others)
    assert [len(kept.steps) for kept in model.graphs.values()] == [captured]
    with pytest.raises(TypeError, match=r"warmup\(\) got an unexpected keyword argument 'top'"):
        pydllm.warmup(model, FULL["static-dual"], 4, 32, top=3)


@pytest.mark.parametrize(
    ("algorithm", "options", "message"),
    [
        ("static-dual", {"top_k": 0}, "top_k: expected an int of at least 1, got 0"),
        ("static-dual", {"top_k": [1, 2]}, "top_k: expected 1, one per prompt, got 2"),
        ("static-dual", {"top_p": 1.5}, r"top_p: expected a number in \(0, 1\] or None, got 1.5"),
        ("static-dual", {"suppress_ids": list(range(2, 14)) * 2}, None),
        ("static-dual", {"suppress_ids": 3}, "suppress_ids: expected a list of token ids, got 3"),
        ("static-dual", {"suppress_ids": [99]}, r"suppress_ids: expected an int in \[0, 13\]"),
        ("static-dual", {"guidance": -1}, "guidance: expected a finite number of at least 0"),
        ("static-dual", {"logprobs": 1}, "logprobs: expected True or False, got 1"),
        ("left-to-right", {"top_k": 3}, "top_k: expected None with LeftToRight"),
        ("left-to-right", {"logprobs": True}, "logprobs: expected False with LeftToRight"),
        ("left-to-right", {"guidance": 1}, "guidance: expected 0 with LeftToRight"),
    ],
)
def test_what_is_refused(algorithm, options, message):
    model, _ = models()
    if message is None:
        pydllm.generate(model, [[3]], FULL[algorithm], max_new_tokens=4, **options)
        return
    with pytest.raises((ValueError, TypeError), match=message):
        pydllm.generate(model, [[3]], FULL[algorithm], max_new_tokens=4, **options)
