"""What the host reads between the first forward of a call and its result."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import pydllm
from bench.recorder import HOST_METHODS, reads_host
from pydllm.decoding import graph as graphs
from pydllm.decoding.driver import POLL
from tests.decoding.test_graph import BLOCKS, FULL, LENGTHS, VERIFIED, models, prompts

# Where a call is set up and its result taken; and how sequences that are done are dropped.
OUTSIDE = {"generate", "apd.py:_check_prompts", "finite.py:check_finite"}
OUTSIDE |= {"finite.py:_is_finite"}
# What a CPU does and a GPU does not: leave out rows, and draft in chunks.
CPU_ONLY = {"step.py:pick", "state.py:_values", "rounds.py:_decide", "draft_chunks.py:following"}
CPU_ONLY |= {"rounds.py:_verifier_logits", "draft_chunks.py:next_chunk"}
LEAVING = {"cache.py:take"}
READ = "driver.py:read"


def where():
    """The innermost function of decoding or models that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.parent.name in ("decoding", "models") and "pydllm" in path.parts:
            if path.name in ("generate.py", "generation.py", "arguments.py", "call.py"):
                return "generate"
            if path.name != "recorder.py" and frame.f_code.co_name != "<lambda>":
                return f"{path.name}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "outside"


class Reads(TorchFunctionMode):
    """Counts where values are read, and how many reads of the ``Mailbox`` there were."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()
        self.operators = _Operators(self.seen)

    def __enter__(self):
        self.operators.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.operators.__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in HOST_METHODS and args[0].numel():
            self.seen[where()] += 1
        return function(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if reads_host(function, args) and "lift_fresh" not in function.name():
            self.seen[where()] += 1
        return function(*args, **(kwargs or {}))


def count(kind, algorithm, *, static, monkeypatch):
    model, verifier = models(block=4 if kind == "blocks" else None)
    if isinstance(algorithm, dict):
        algorithm = pydllm.APD(verifier, **algorithm)
    # Every step runs as it is: nothing may hide in a replay.
    monkeypatch.setattr(graphs.Graphs, "run", lambda self, key, step: step())
    options = {"max_new_tokens": 14, "graph": static}
    forwards = []
    with Reads() as reads:
        got = pydllm.generate(model, prompts(LENGTHS, 0), algorithm, **options)
    pydllm.generate(
        model, prompts(LENGTHS, 0), algorithm, **options, on_step=lambda s: forwards.append(s.index)
    )
    return got, reads.seen, len(forwards)


CASES = {
    "static": ("full", FULL["static"]),
    "static-dual": ("full", FULL["static-dual"]),
    "threshold": ("full", FULL["threshold"]),
    "threshold-carry": ("full", FULL["threshold-carry"]),
    "freedave": ("full", FULL["freedave"]),
    "freedave-composed": ("full", FULL["freedave-threshold"]),
    "pipelined": ("blocks", BLOCKS["pipelined"]),
    "levenshtein": ("blocks", BLOCKS["levenshtein"]),
    "multiblock": ("full", FULL["multiblock"]),
    "apd": ("full", VERIFIED["draft"]),
    "left-to-right": ("full", FULL["left-to-right"]),
}


@pytest.mark.parametrize("static", [False, True], ids=["runs", "replays"])
@pytest.mark.parametrize("name", CASES)
def test_the_host_reads_the_flags_alone(name, static, monkeypatch):
    kind, algorithm = CASES[name]
    _, seen, forwards = count(kind, algorithm, static=static, monkeypatch=monkeypatch)
    allowed = OUTSIDE | LEAVING | {READ, "outside"} | (set() if static else CPU_ONLY)
    assert set(seen) <= allowed, seen
    blocks = 14 // 4 + 1
    most = {
        "static": 2,  # a read a block: which sequences are done
        "static-dual": 2,
        "threshold": forwards + blocks,
        "threshold-carry": forwards + blocks,
        "freedave": forwards + blocks,
        "freedave-composed": forwards + blocks,
        "pipelined": forwards,
        "levenshtein": forwards + 1,
        "multiblock": forwards + 1,
        "apd": forwards + 1,
        "left-to-right": forwards + 1,
    }[name]
    if static and name in ("pipelined", "apd", "left-to-right"):
        most = forwards // POLL  # the host looks at every fourth round
    assert 1 <= seen[READ] <= most, (seen, forwards)


def test_a_read_too_many_is_seen(monkeypatch):
    """The count counts: a loop that looks at its tokens is found."""
    from pydllm.decoding import blockwise

    plain = blockwise.write

    def curious(state, *rest, **options):
        int(state.x.sum())
        return plain(state, *rest, **options)

    monkeypatch.setattr(blockwise, "write", curious)
    _, seen, forwards = count("full", FULL["static"], static=False, monkeypatch=monkeypatch)
    assert seen["blockwise.py:step"] >= forwards


GPU_CASES = ("static-dual", "threshold", "freedave", "multiblock", "left-to-right")


def on_gpu():
    from pydllm.demo import WEIGHTS

    return pydllm.load(WEIGHTS, device="cuda", dtype=torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_CASES)
def test_a_step_never_synchronises(name, monkeypatch):
    model = on_gpu()
    plain = graphs.Eager.run
    given = {"max_new_tokens": 32, "graph": False}
    asked = [list(range(3, 3 + length)) for length in (5, 9, 2)]
    expected = pydllm.generate(model, asked, FULL[name], **given)  # compiles

    def watched(self, key, step):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return plain(self, key, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(graphs.Eager, "run", watched)
    got = pydllm.generate(model, asked, FULL[name], **given)
    assert torch.equal(torch.cat(got.sequences), torch.cat(expected.sequences))


@pytest.mark.gpu
@pytest.mark.parametrize("name", FULL)
def test_captured_steps_equal_runs(name):
    model = on_gpu()
    asked = [list(range(3, 3 + length)) for length in (5, 9, 2)]
    expected = pydllm.generate(model, asked, FULL[name], max_new_tokens=32, graph=False)
    for _ in range(3):
        got = pydllm.generate(model, asked, FULL[name], max_new_tokens=32, graph=True)
        assert torch.equal(torch.cat(got.sequences), torch.cat(expected.sequences))
        assert torch.equal(got.step_map, expected.step_map)
    (kept,) = model.graphs.values()
    assert kept.steps
