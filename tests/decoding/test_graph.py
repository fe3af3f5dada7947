"""Replayed steps decode the same tokens in the same forwards as steps that are run."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from unittest import mock

import pytest
import torch

import pydllm
from bench.recorder import Recording
from pydllm.decoding import graph as graphs
from pydllm.decoding.driver import POLL
from tests.decoding.test_freedave import cast
from tests.decoding.trajectories import random_pair, random_prompt

LENGTHS = (4, 1, 9, 7, 20)
OTHERS = (11, 2, 17)
NEW = 14


def models(*, block=None, shift=False):
    """A random diffusion model and a causal one, fp64."""
    model, _ = random_pair(8, block=block, shift=shift)
    verifier, _ = random_pair(4, block=None, shift=True)
    # Shifted or not does not matter to a causal model: position p is predicted by row p - 1.
    verifier.spec = dataclasses.replace(verifier.spec, attention="causal", shift_logits=False)
    return model, verifier


def prompts(lengths, seed):
    return [random_prompt(seed + row, length) for row, length in enumerate(lengths)]


def decode(model, lengths, algorithm, seed=0, **options):
    options = {"max_new_tokens": NEW} | options
    return pydllm.generate(model, prompts(lengths, seed), algorithm, **options)


def assert_same(got, expected):
    assert torch.equal(torch.cat(got.sequences), torch.cat(expected.sequences))
    for name in ("nfe", "step_map", "tokens_per_forward", "verifier_nfe"):
        one, other = getattr(got, name), getattr(expected, name)
        assert (one is None) == (other is None), name
        assert one is None or torch.equal(one, other), name


FULL = {
    "static": pydllm.Static(block_length=8, tokens_per_step=3),
    "static-prefix": pydllm.Static(block_length=8, cache="prefix"),
    "static-dual": pydllm.Static(block_length=8, tokens_per_step=2, cache="dual", score="entropy"),
    "static-random": pydllm.Static(block_length=4, score="random", cache="dual"),
    "static-carry": pydllm.Static(
        block_length=4, tokens_per_step=2, compat="llada", cache="prefix"
    ),
    "threshold": pydllm.Threshold(threshold=0.3, block_length=4, cache="dual"),
    "threshold-none": pydllm.Threshold(threshold=0.2, block_length=32),
    "threshold-carry": pydllm.Threshold(
        threshold=0.25, block_length=4, compat="fast_dllm", cache="prefix"
    ),
    "factor": pydllm.Factor(factor=1.0, block_length=8, cache="prefix"),
    "entropy-bound": pydllm.EntropyBound(bound=1.5, block_length=8, cache="dual"),
    "freedave": pydllm.FreeDave(draft_steps=4, block_length=8),
    "freedave-auto": pydllm.FreeDave(draft_steps="auto", block_length=8, cache="dual"),
    "freedave-3": pydllm.FreeDave(draft_steps=3, block_length=8, cache="prefix"),
    "freedave-threshold": pydllm.FreeDave(
        draft_steps=3, baseline=pydllm.Threshold(threshold=0.3, block_length=4, cache="dual")
    ),
    "multiblock": pydllm.MultiBlock(threshold=1.5, block_length=4),
    "multiblock-refresh": pydllm.MultiBlock(
        threshold=2.0, block_length=4, refresh=3, delay=1, tail="blocks"
    ),
    "multiblock-plain": pydllm.MultiBlock(
        threshold=1.0, block_length=4, cache=False, early_stop=False
    ),
    "left-to-right": pydllm.LeftToRight(tokens_per_step=2, window=3, lookahead=5),
    "left-to-right-all": pydllm.LeftToRight(tokens_per_step=1),
}
BLOCKS = {
    "static": pydllm.Static(block_length=4, tokens_per_step=2),
    "threshold": pydllm.Threshold(threshold=0.3, block_length=4),
    "freedave": pydllm.FreeDave(draft_steps=4, block_length=4),
    "pipelined": pydllm.FreeDave(draft_steps=4, block_length=4, mode="pipelined"),
    "editing": pydllm.Editing(threshold=0.4, edit_threshold=0.2, max_post_steps=3, block_length=4),
    "levenshtein": pydllm.LevenshteinEditing(threshold=0.4, max_post_steps=3, block_length=4),
    "freedave-editing": pydllm.FreeDave(
        draft_steps=3,
        baseline=pydllm.Editing(
            threshold=0.6, edit_threshold=0.3, max_post_steps=3, block_length=4
        ),
    ),
    "pipelined-auto": pydllm.FreeDave(draft_steps="auto", block_length=4, mode="pipelined"),
    "pipelined-factor": pydllm.FreeDave(
        draft_steps=3, mode="pipelined", baseline=pydllm.Factor(factor=1.0, block_length=4)
    ),
}
FORCED = {
    name: dataclasses.replace(FULL[name], first_token="forced")
    for name in ("static-dual", "threshold", "freedave-auto")
}
VERIFIED = {
    "draft": {"mixture": 0.5, "window": 3, "lookahead": 6},
    "target": {"mixture": [0.0, 0.3, 1.0, 0.7, 0.9], "window": None, "emit": "target"},
    "then": {"mixture": 0.2, "lookahead": [1, None, 4, 2, 7], "emit": "draft_then_target"},
}
CASES = [
    *(("full", False, name, algorithm) for name, algorithm in FULL.items()),
    *(("full", True, name, FULL[name]) for name in ("threshold", "multiblock-refresh")),
    *(("full", True, f"{name}-forced", algorithm) for name, algorithm in FORCED.items()),
    *(("blocks", False, name, algorithm) for name, algorithm in BLOCKS.items()),
    *(("blocks", True, name, BLOCKS[name]) for name in ("static", "pipelined")),
    *(("full", False, f"apd-{name}", settings) for name, settings in VERIFIED.items()),
]
IDS = [f"{kind}-{'shifted-' if shift else ''}{name}" for kind, shift, name, _ in CASES]


@pytest.mark.parametrize(("kind", "shift", "name", "algorithm"), CASES, ids=IDS)
def test_replays_equal_runs(kind, shift, name, algorithm):
    """Ragged batches of five, padded to eight, with early ends; then others over the same steps."""
    model, verifier = models(block=4 if kind == "blocks" else None, shift=shift)
    if isinstance(algorithm, dict):
        algorithm = pydllm.APD(verifier, **algorithm)
    calls = [(LENGTHS, 0), (LENGTHS[::-1], 50), (LENGTHS, 0), (LENGTHS, 80)]
    expected = [decode(model, *call[:1], algorithm, seed=call[1]) for call in calls]
    got = [decode(model, *call[:1], algorithm, seed=call[1], graph=True) for call in calls]
    for one, other in zip(got, expected, strict=True):
        if name == "pipelined-auto":  # how many candidates, and so forwards, depends on the batch
            assert torch.equal(torch.cat(one.sequences), torch.cat(other.sequences))
        else:
            assert_same(one, other)
    (kept,) = model.graphs.values()
    assert kept.steps


def test_the_batches_of_these_tests_have_early_ends():
    model, _ = models()
    got = decode(model, LENGTHS, FULL["static"])
    ends = (got.step_map == -1).any(1)
    assert ends.any() and not ends.all()


@pytest.mark.parametrize("temperature", [0.7, [0.0, 0.5, 1.0, 0.3, 2.0]], ids=["one", "each"])
@pytest.mark.parametrize("name", ["threshold", "freedave", "multiblock", "apd"])
def test_noise_is_that_of_a_run(name, temperature):
    model, verifier = models()
    algorithm = pydllm.APD(verifier, mixture=0.5, window=3) if name == "apd" else FULL[name]
    for seed in (1, 1, 2):
        options = {"temperature": temperature, "seed": seed, "request_ids": [5, 3, 9, 9, 1]}
        expected = decode(model, LENGTHS, algorithm, **options)
        assert_same(decode(model, LENGTHS, algorithm, **options, graph=True), expected)


def test_a_call_of_the_same_kind_captures_nothing_new():
    model, _ = models()
    algorithm = FULL["threshold"]
    decode(model, LENGTHS, algorithm, graph=True)
    (kept,) = model.graphs.values()
    for lengths in ((20, 8, 6, 6, 6), (20, 2, 3, 4, 5, 6, 7, 8), LENGTHS):
        expected = decode(model, lengths, algorithm)
        assert_same(decode(model, lengths, algorithm, graph=True), expected)
    assert [*model.graphs.values()] == [kept]
    # Batches of eight and fewer: a first, a middle and a last step each.
    assert 2 <= len(kept.steps) <= 12


def test_few_kinds_are_kept():
    model, _ = models()
    for length in range(1, 4 * graphs.KINDS):
        decode(model, OTHERS, pydllm.Static(block_length=length), graph=True)
        assert len(model.graphs) <= graphs.KINDS
    model.graphs.clear()
    expected = decode(model, OTHERS, pydllm.Static(block_length=3))
    assert_same(decode(model, OTHERS, pydllm.Static(block_length=3), graph=True), expected)


def test_finished_sequences_leave_by_halves():
    """Eight sequences of which some end early: the batch shrinks to powers of two."""
    model, _ = models()
    lengths = (4, 1, 9, 7, 20, 3, 2, 8)
    algorithm = pydllm.Threshold(threshold=0.3, block_length=4, cache="dual")
    expected = decode(model, lengths, algorithm, max_new_tokens=24)
    assert_same(decode(model, lengths, algorithm, max_new_tokens=24, graph=True), expected)
    (kept,) = model.graphs.values()
    sizes = {key[1] for key in kept.steps}
    assert len(sizes) > 1 and sizes <= {1, 2, 4, 8}


@pytest.mark.parametrize("name", ["threshold", "freedave", "multiblock", "left-to-right"])
def test_on_step_sees_the_same(name):
    model, _ = models()

    def steps(graph):
        seen = []

        def look(step):
            seen.append((step.x.clone(), step.step_map.clone(), step.prompt_length.clone()))

        decode(model, OTHERS, FULL[name], graph=graph, on_step=look)
        return seen

    expected, got = steps(False), steps(True)
    # Steps behind the last token are possible where the host looks now and then.
    assert len(expected) <= len(got) <= len(expected) + POLL
    for one, other in zip(got, expected, strict=False):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_buckets():
    assert [graphs.power_of_two(n) for n in (1, 2, 3, 4, 5, 31, 32)] == [1, 2, 4, 4, 8, 32, 32]
    for n in range(1, 3000):
        assert n <= graphs.bucket(n) < n + 128
        assert graphs.bucket(graphs.bucket(n)) == graphs.bucket(n)
    assert len({graphs.bucket(n) for n in range(1, 2049)}) == 24


def test_active_slots():
    graph = graphs.Graphs(torch.device("cpu"), 8, 16, after=1, strict=True)
    assert graph.active_slots([0, 1, 2, 3, 4], 8) is None
    assert graph.active_slots([5], 8) == [5]
    assert graph.active_slots([1, 5, 7], 8) == [0, 1, 5, 7]
    assert graphs.Eager().active_slots([1, 5, 7], 8) == [1, 5, 7]
    assert graphs.Eager().active_slots([0, 1], 2) is None


def test_bad_arguments():
    model, _ = models()
    with pytest.raises(ValueError, match="graph: expected True, False or 'auto', got 'yes'"):
        decode(model, OTHERS, FULL["static"], graph="yes")

    class Other:
        spec, tokenizer, device = model.spec, None, model.device

    with pytest.raises(ValueError, match="graph: expected a model of pydllm.load for True"):
        decode(Other(), OTHERS, FULL["static"], graph=True)


# The recorder: what it replays, and what it refuses.


def test_a_replay_reads_what_was_there_when_it_was_recorded():
    held, elsewhere = torch.tensor([1.0, 2.0]), {"value": torch.tensor([10.0, 20.0])}
    calls = []

    def step():
        calls.append(1)
        held.add_(1)
        return held * elsewhere["value"], held

    recording = Recording(step)
    first, same = recording.result
    assert first.tolist() == [20.0, 60.0] and same is held
    elsewhere["value"] = torch.tensor([0.0, 0.0])  # another tensor: the recording has the old one
    assert recording.replay()[0] is first and first.tolist() == [30.0, 80.0]
    held.zero_()
    recording.replay()
    assert first.tolist() == [10.0, 20.0] and held.tolist() == [1.0, 1.0] and len(calls) == 1


READS = {
    "item": lambda t: t.sum().item(),
    "bool": lambda t: 1 if t.any() else 0,
    "int": lambda t: int(t[0]),
    "list": lambda t: t.tolist(),
    "numpy": lambda t: t.numpy(),
    "nonzero": lambda t: t.nonzero(),
    "mask": lambda t: t[t > 1],
    "mask-write": lambda t: t.__setitem__(t > 1, t[:1]),
    "select": lambda t: t.masked_select(t > 1),
    "equal": lambda t: torch.equal(t, t),
    "repeats": lambda t: t.repeat_interleave(torch.ones_like(t, dtype=torch.int64)),
    "unique": lambda t: t.unique(),
    "numbers": lambda t: t + torch.tensor([1.0, 2.0, 3.0]),
}


@pytest.mark.parametrize("name", READS)
def test_what_waits_for_the_device_is_refused(name):
    tensor = torch.tensor([1.0, 2.0, 3.0])
    with pytest.raises(pydllm.PydllmError, match="a step must not wait for the device"):
        Recording(lambda: READS[name](tensor))


def test_warmup_makes_buffers_that_smaller_calls_use():
    model, _ = models()
    algorithm = FULL["threshold"]
    captured = pydllm.warmup(model, algorithm, 8, 64, max_new_tokens=NEW)
    (kept,) = model.graphs.values()
    assert captured == len(kept.steps) >= 2
    assert (kept.batch, kept.max_len) == (8, 64)
    for lengths in (LENGTHS, OTHERS, (40,)):
        expected = decode(model, lengths, algorithm)
        for _ in range(3):
            assert_same(decode(model, lengths, algorithm, graph=True), expected)
    assert [*model.graphs.values()] == [kept]
    decode(model, (60,), algorithm, graph=True)  # longer than promised
    assert len(model.graphs) == 2


def test_warmup_decodes_to_the_end_whatever_the_model_says():
    model, _ = models()
    pydllm.warmup(model, pydllm.Static(block_length=4), 2, 32, max_new_tokens=8)
    (kept,) = model.graphs.values()
    # Both blocks have all their steps: a first, others and a last one.
    assert {key[0][0] for key in kept.steps} == {
        (True, False, 4),
        (False, False, 4),
        (False, True, 4),
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 16), "batch: expected an int of at least 1, got 0"),
        ((1, 1), "max_len: expected an int of at least 2, got 1"),
        ((1, 16, 16), r"max_new_tokens: expected an int in \[1, 16\), got 16"),
        ((1, 4096), "prompts: expected at most 256 positions"),
    ],
)
def test_bad_warmup(arguments, message):
    model, _ = models()
    options = dict(zip(("max_new_tokens",), arguments[2:], strict=False))
    with pytest.raises(ValueError, match=message):
        pydllm.warmup(model, pydllm.Static(block_length=4), *arguments[:2], **options)


# The choice between capturing and going on without, as on a GPU.


class Refused:
    def __init__(self, step, pool, stream):
        raise RuntimeError("operation not permitted when stream is capturing")


class Software(Recording):
    """A capture runs no kernels: here the recording's effects are undone."""

    def __init__(self, step, pool, stream):
        self.counter, before = step.__self__, step.__self__.total.clone()
        super().__init__(step)
        self.counter.total.copy_(before)


class Counter:
    def __init__(self):
        self.total, self.calls = torch.zeros(()), 0

    def step(self):
        self.calls += 1
        return self.total.add_(1)


def as_on_gpu(monkeypatch, captured, **options):
    monkeypatch.setattr(graphs, "_Captured", captured)
    monkeypatch.setattr(graphs.torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(graphs.torch.cuda, "Stream", lambda device: f"stream of {device}")
    return graphs.Graphs(torch.device("cuda", 1), 1, 16, **options)


@pytest.mark.parametrize("after", [1, graphs.WORTH_IT])
def test_a_step_is_captured_once_it_has_run(after, monkeypatch):
    runner, counter = as_on_gpu(monkeypatch, Software, after=after, strict=True), Counter()
    for count in range(1, 8):
        assert runner.run("key", counter.step) == count
        assert ("key" in runner.steps) == (count > after)
    assert counter.calls == after + 1


def test_captures_are_on_a_stream_of_the_device_and_of_the_thread(monkeypatch):
    """torch's own capture stream is one a process, of the device that captured first; and other
    threads would not be allowed to use CUDA."""
    seen, signature = [], inspect.signature(torch.cuda.graph)

    @contextlib.contextmanager
    def capture(*arguments, **options):
        seen.append(signature.bind(*arguments, **options).arguments)
        yield

    captured = graphs._Captured
    runner, counter = as_on_gpu(monkeypatch, captured, after=1, strict=True), Counter()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", mock.Mock())
    monkeypatch.setattr(torch.cuda, "graph", capture)
    for key in "aabb":
        runner.run(key, counter.step)
    assert [call["stream"] for call in seen] == ["stream of cuda:1"] * 2
    assert {call["pool"] for call in seen} == {"pool"}
    assert {call["capture_error_mode"] for call in seen} == {"thread_local"}


def test_a_step_that_cannot_be_captured(monkeypatch, caplog):
    counter = Counter()
    runner = as_on_gpu(monkeypatch, Refused, after=1, strict=True)
    runner.run("key", counter.step)
    with pytest.raises(pydllm.PydllmError, match="the step key cannot be captured: operation not"):
        runner.run("key", counter.step)
    runner, counter = as_on_gpu(monkeypatch, Refused, after=1, strict=False), Counter()
    with caplog.at_level("WARNING", logger="pydllm"):
        for count in range(1, 5):
            assert runner.run("key", counter.step) == count
    assert caplog.text.count("cannot be captured") == 1 and not runner.steps


@pytest.mark.parametrize("name", ["threshold", "freedave", "multiblock"])
def test_kernels_are_recorded_as_one_operator_each(name):
    model, _ = random_pair(9)  # of 8, FreeDave's step map depends on a near tie on some CPUs
    model = cast(model, torch.float32)
    # In the same shapes: near ties in fp32 fall as the matrix library rounds.
    expected = decode(model, (3, 1), FULL[name], max_new_tokens=6, graph=True)
    model.graphs.clear()
    for _ in range(2):
        got = decode(model, (3, 1), FULL[name], max_new_tokens=6, graph=True, backend="triton")
        assert_same(got, expected)
    (kept,) = model.graphs.values()
    assert kept.steps
