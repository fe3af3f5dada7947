"""The distribution of what APD writes, against the exact law of a toy that can be enumerated.

Two tables take the place of the models; every request of a large batch is one draw.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy
import pytest
import torch

import pydllm
from pydllm import ops
from pydllm.decoding import rounds
from pydllm.decoding.call import Call
from pydllm.decoding.driver import drive
from pydllm.models import ModelSpec, StaticCache

V, N = 3, 4  # tokens, and length of what is written; V is also the mask's id
LAW = 100_000  # draws of a test that has to find nothing
CONTROL = 30_000  # draws of one that has to find a defect


class Table:
    """A model whose logits are looked up by what it sees; its cache holds the tokens."""

    tokenizer, device, dtype = None, torch.device("cpu"), torch.float64

    def __init__(self, causal, seed):
        self.causal = causal
        self.spec = ModelSpec(
            vocab_size=V + 1,
            mask_id=None if causal else V,
            eos_ids=(),
            shift_logits=False,
            attention="causal" if causal else "full",
            block_size=None,
            max_positions=64,
        )
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(
            (V + 1) ** N, N + 1, V + 1, generator=generator, dtype=torch.float64
        )
        self.table *= 1.5
        self.table[..., V] = 9.0  # the mask is what both would say

    def code(self, tokens):
        """One number for the tokens behind the prompt, as far as they go."""
        return sum((token + 1) * (V + 1) ** place for place, token in enumerate(tokens))

    def new_cache(self, batch, max_len):
        # Without slots each forward starts at 0 and its own tokens are all there is.
        return StaticCache(*torch.zeros(2, 1, batch, max_len, 1, 1, dtype=torch.float64))

    def forward(self, ids, start, cache, *, length, commit, **options):
        slots = torch.arange(N + 1)
        row = slots - start[:, None]
        inside = (row >= 0) & (row < length[:, None])
        fresh = ids.gather(1, row.clamp(0, ids.shape[1] - 1))
        seen = fresh.where(inside, V)
        if cache.max_len:
            stored = cache.keys[0, :, : N + 1, 0, 0]
            seen = torch.where(slots < start[:, None], stored.long(), seen)
            kept = inside & (row < commit[:, None])
            stored.copy_(torch.where(kept, fresh.double(), stored))
        digits = (seen[:, 1:] + 1) * (seen[:, 1:] < V)
        powers = (V + 1) ** torch.arange(N)
        if self.causal:  # row i has seen the tokens up to position i
            prefixes = torch.nn.functional.pad((digits * powers).cumsum(1), (1, 0))
        else:
            prefixes = (digits * powers).sum(1, keepdim=True).expand(-1, N + 1)
        at = (start[:, None] + torch.arange(ids.shape[1])).clamp(max=N)
        places = at.clamp(max=N - 1) if self.causal else (at - 1).clamp(min=0)
        # Hidden states are logits: of position i (position 0 is the prompt), or what follows it.
        return self.table[prefixes.gather(1, at), places]

    def head(self, hidden):
        return hidden


DLLM, VERIFIER = Table(False, 1), Table(True, 2)


def _law(emit, mixture, temperature, lookahead, dllm=DLLM, verifier=VERIFIER):
    """Probability of each sequence, by recursion over rounds and positions; and expected rounds."""
    law, expected = dict.fromkeys(itertools.product(range(V), repeat=N), 0.0), [0.0]

    def round_at(prefix, mass):
        if mass < 1e-14:
            return
        if len(prefix) == N:
            law[prefix] += mass
            return
        expected[0] += mass
        go(prefix, len(prefix), mass)

    def go(prefix, start, mass):
        place = len(prefix)
        if place == min(start + lookahead, N):
            round_at(prefix, mass)
            return
        drafter = dllm.table[dllm.code(prefix[:start]), place, :V]
        expert = verifier.table[verifier.code(prefix), place, :V]
        p = (drafter / temperature).softmax(-1)
        q = ((mixture * drafter + (1 - mixture) * expert) / temperature).softmax(-1)
        ratios = torch.maximum(p / p[:, None], q / q[:, None])
        same = 1 / ratios.sum(1)  # P(draft = target = v)
        if place == start and emit != "target":
            same = p
        for token in range(V):
            go((*prefix, token), start, mass * same[token].item())
        if emit == "draft" and place > start:
            round_at(prefix, mass * max(0.0, 1 - same.sum().item()))
        elif emit == "target" or place > start:
            for token in range(V):
                round_at((*prefix, token), mass * (q - same)[token].clamp(min=0).item())

    round_at((), 1.0)
    return numpy.array([*law.values()]), expected[0]


def _draw(count, algorithm, temperature):
    """Frequencies of the sequences, and mean rounds."""
    algorithm.check(DLLM, N)
    x = torch.full((count, N + 1), V)
    x[:, 0] = 0
    call = Call(  # without the lists that generate takes and returns
        model=DLLM,
        mask_id=V,
        x=x,
        prompt_length=torch.ones(count, dtype=torch.int32),
        end=torch.full((count,), N + 1, dtype=torch.int32),
        request_id=torch.arange(count, dtype=torch.int32),
        eos=None,
        suppress_ids=torch.tensor([V], dtype=torch.int32),
        prompt_lengths=[1] * count,
        ends=[N + 1] * count,
        temperature=temperature,
        seed=11,
        backend=None,
    )
    got = drive(algorithm.decoder(call), call)
    code = (got.x[:, 1:] * V ** torch.arange(N - 1, -1, -1)).sum(1)
    frequency = torch.bincount(code, minlength=V**N).numpy() / count
    return frequency, got.counters["nfe"].double().mean().item()


def _distance(one, other):
    return 0.5 * numpy.abs(one - other).sum()


def _floor(law, count):
    """More than the distance of 200 true samples."""
    samples = numpy.random.default_rng(0).multinomial(count, law / law.sum(), 200) / count
    return 1.15 * max(_distance(sample, law) for sample in samples)


@pytest.mark.parametrize(
    "emit, mixture, temperature, lookahead",
    [
        ("draft", 0.5, 0.7, 4),
        ("draft", 0.3, 1.0, 2),
        ("draft", 0.0, 0.7, 3),
        ("draft", 1.0, 1.0, 3),
        ("draft_then_target", 0.5, 0.7, 4),
        ("draft_then_target", 0.2, 1.0, 2),
        ("target", 0.5, 0.7, 4),
        ("target", 0.2, 1.0, 2),
    ],
)
def test_what_is_written_has_the_law_of_the_recursion(emit, mixture, temperature, lookahead):
    law, expected = _law(emit, mixture, temperature, lookahead)
    assert law.sum() == pytest.approx(1.0, abs=1e-9)
    algorithm = pydllm.APD(VERIFIER, mixture=mixture, window=None, lookahead=lookahead, emit=emit)
    frequency, mean = _draw(LAW, algorithm, temperature)
    assert _distance(frequency, law) < _floor(law, LAW)
    assert mean == pytest.approx(expected, abs=0.01)


def test_the_law_s_own_limits():
    """Target at mixture 0 is the verifier; a lookahead of 1 is the model, token by token."""
    for table, emit, mixture, lookahead in (
        (VERIFIER, "target", 0.0, 3),
        (DLLM, "draft", 0.4, 1),
    ):
        law, _ = _law(emit, mixture, 0.7, lookahead)
        plain = []
        for tokens in itertools.product(range(V), repeat=N):
            rows = [table.table[table.code(tokens[:i]), i, :V] for i in range(N)]
            steps = [(row / 0.7).softmax(-1)[t] for row, t in zip(rows, tokens, strict=True)]
            plain.append(torch.stack(steps).prod().item())
        assert _distance(law, numpy.array(plain)) < 1e-12


def _no_round_start(patch):
    def counter(*arguments, emit, **options):
        return ops.round_counter(*arguments, emit="target", **options)

    patch.setattr(rounds, "ops", SimpleNamespace(**vars(ops) | {"round_counter": counter}))


def _accept_with(**changes):
    def change(patch):
        def accept(*arguments, **options):
            return ops.mixture_accept(*arguments, **options | changes)

        patch.setattr(rounds, "ops", SimpleNamespace(**vars(ops) | {"mixture_accept": accept}))

    return change


def _temperature_twice(patch):
    def draft(*arguments, temperature, **options):
        return ops.mixture_draft(*arguments, temperature=temperature**2, **options)

    patch.setattr(rounds, "ops", SimpleNamespace(**vars(ops) | {"mixture_draft": draft}))


def _count_all_agreements(patch):
    """No cumulative product: a draft that agrees behind a mismatch counts."""

    def accept(logits, expert, token, *, length, **options):
        verdict = ops.mixture_accept(logits, expert, token, length=length, **options)
        batch = len(length)
        same = (verdict.target == token).view(batch, -1)
        same[:, 0] = True
        inside = torch.arange(same.shape[1]) < length[:, None]
        return verdict._replace(accepted=(same & inside).sum(1).int())

    patch.setattr(rounds, "ops", SimpleNamespace(**vars(ops) | {"mixture_accept": accept}))


def _roll_the_verifier(patch):
    def head(hidden):
        return hidden.roll(1, 1)

    patch.setattr(VERIFIER, "head", head, raising=False)


def _forget_the_tokens(patch):
    """The verifier's later rounds see a cache that was wiped."""
    honest = rounds.DraftVerifyDecoder._verifier_logits

    def logits(self, state, *arguments):
        expert = honest(self, state, *arguments)
        state.verifier_cache.keys[0, :, 1:N] = 0.0
        return expert

    patch.setattr(rounds.DraftVerifyDecoder, "_verifier_logits", logits)


def _window_of_nothing(patch):
    """The first token of a run keeps the keys that it had as a mask."""

    def spans(self, state, honest=rounds.DraftVerifyDecoder._spans):
        span = honest(self, state)
        return span._replace(left=torch.where(state.previous > 0, state.previous + 1, span.left))

    patch.setattr(rounds.DraftVerifyDecoder, "_spans", spans)


DEFECTS = {
    "noise without the round start": _no_round_start,
    "noise of its own for the target": _accept_with(seed=12),
    "temperature twice": _temperature_twice,
    "greedy target": _accept_with(temperature=0.0, threshold=None),
    "agreements behind a mismatch": _count_all_agreements,
    "verifier one row late": _roll_the_verifier,
    "verifier's cache is lost": _forget_the_tokens,
    "other mixture": _accept_with(mixture=0.7),
    "window of nothing": _window_of_nothing,
}


@pytest.mark.parametrize("window", [None, 1])
def test_no_defect_no_finding(window):
    law, _ = _law("draft", 0.5, 0.7, 4)
    frequency, _ = _draw(
        CONTROL, pydllm.APD(VERIFIER, mixture=0.5, window=window, lookahead=4), 0.7
    )
    assert _distance(frequency, law) < _floor(law, CONTROL)


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_found(monkeypatch, defect):
    law, _ = _law("draft", 0.5, 0.7, 4)
    DEFECTS[defect](monkeypatch)
    window = 1 if defect == "window of nothing" else None
    frequency, _ = _draw(
        CONTROL, pydllm.APD(VERIFIER, mixture=0.5, window=window, lookahead=4), 0.7
    )
    assert _distance(frequency, law) > 1.5 * _floor(law, CONTROL)


@pytest.mark.parametrize(
    "options", [{"compat": "apd"}, {"emit": "draft_then_target"}, {"emit": "target"}], ids=str
)
def test_the_other_rules_have_other_laws(options):
    law, _ = _law("draft", 0.5, 0.7, 4)
    frequency, _ = _draw(
        CONTROL, pydllm.APD(VERIFIER, mixture=0.5, window=None, lookahead=4, **options), 0.7
    )
    assert _distance(frequency, law) > 1.5 * _floor(law, CONTROL)
