"""No value on the device makes an op read or write outside of its tensors.

Metadata is checked on the host; values are not read there. Each case puts one argument's value at
the ends of its range. What an op updates lies between guard zones, and the call runs in a process
of its own, because a wrong read may end it. ``linear``, ``rms_norm`` and ``swiglu`` read no number
that says where.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from pydllm import ops
from pydllm.ops.multiblock_step import ROWS
from tests.isolation import outcome

INT32 = torch.int32
VALUES = (-(2**31), -1000, -1, 0, 1, 3, 1000, 2**31 - 1)
ZONE = 64
B, L, T, V = 2, 6, 4, 5


def at(*values):
    return torch.tensor(values, dtype=INT32)


class Guards:
    """Copies of tensors with memory on both sides that nobody may write to."""

    def __init__(self):
        self._guarded = []

    def __call__(self, tensor):
        flat = torch.full((tensor.numel() + 2 * ZONE,), 77).to(tensor.dtype)
        inner = flat[ZONE:-ZONE].view(tensor.shape)
        inner.copy_(tensor)
        self._guarded.append((flat, flat.clone()))
        return inner

    def intact(self):
        return all(
            torch.equal(flat[:ZONE], before[:ZONE]) and torch.equal(flat[-ZONE:], before[-ZONE:])
            for flat, before in self._guarded
        )


def numbers(changed, **usual):
    """The usual int32 numbers of two sequences, the first of them changed."""
    return {
        name: at(changed.get(name, value), value or 0)
        for name, value in usual.items()
        if value is not None or name in changed
    }


def unmask(guard, backend, changed):
    n = numbers(changed, start=1, length=3, quota=1, end=6, ends_from=0)
    x, steps = guard(torch.zeros(B, L, dtype=torch.int64)), guard(torch.full((B, L), -1).int())
    done = guard(torch.zeros(B, dtype=torch.bool))
    ops.unmask(
        x,
        steps,
        guard(at(changed.get("nfe", 0), 0)),
        torch.ones(B, T, dtype=torch.int64),
        torch.rand(B, T),
        mask_id=0,
        start=n["start"],
        length=n["length"],
        rule="quota",
        quota=n["quota"],
        ending=ops.Ending(done, n["end"], torch.tensor([1]), n["ends_from"]),
        backend=backend,
    )


def draft(guard, backend, changed):
    ops.draft(
        guard(torch.zeros(B, L, dtype=torch.int64)),
        torch.ones(B, T, dtype=torch.int64),
        torch.rand(B, T),
        mask_id=0,
        branches=3,
        block_size=2,
        backend=backend,
        **numbers(changed, start=1, length=3),
    )


def verify(guard, backend, changed):
    candidates = torch.zeros(B, 3, L, dtype=torch.int64)
    candidates[:, 1, 2] = candidates[:, 2, 2:4] = 1
    ops.verify(
        guard(torch.zeros(B, L, dtype=torch.int64)),
        guard(torch.full((B, L), -1).int()),
        guard(at(0, 0)),
        candidates,
        torch.ones(B, 3, T, dtype=torch.int64),
        torch.rand(B, 3, T),
        mask_id=0,
        drafts=3,
        block_size=2,
        backend=backend,
        **numbers(changed, start=1, length=3),
    )


def commit_branch(guard, backend, changed):
    k = torch.randn(B, 4, 1, 64)
    cos = torch.ones(8, 32)
    n = numbers(changed, branch=1, start=1, commit=2, pad=None)
    caches = (guard(torch.zeros(B, 8, 1, 64)) for _ in range(2))
    ops.commit_branch(k, k, *caches, cos=cos, sin=cos, branches=2, backend=backend, **n)


def window_attention(guard, backend, changed):
    dtype = torch.float16 if backend == "cuda" else torch.float32
    k = torch.randn(B, 4, 1, 64).to(dtype)
    cos = torch.ones(8, 32)
    n = numbers(changed, start=1, length=2, kv_len=5, commit=2, pad=None)
    caches = (guard(torch.zeros(B, 8, 1, 64, dtype=dtype)) for _ in range(2))
    ops.window_attention(k, k, k, *caches, cos=cos, sin=cos, backend=backend, **n)


def window_attention_leaves(guard, backend, changed):
    dtype = torch.float16 if backend == "cuda" else torch.float32
    k = torch.randn(B, 3 + 3 * 2, 1, 64).to(dtype)
    cos = torch.ones(10, 32)
    n = numbers(changed, start=1, length=2, kv_len=0, commit=2, pad=None)
    caches = (guard(torch.zeros(B, 8, 1, 64, dtype=dtype)) for _ in range(2))
    tree = {"causal": True, "leaves": 3, "leaf_rows": 2}
    ops.window_attention(k, k, k, *caches, cos=cos, sin=cos, backend=backend, **n, **tree)


def _paged(guard, changed, dtype):
    """Two sequences of two pages of four slots each; an entry of the first is another number."""
    caches = [guard(torch.zeros(5, 4, 1, 64, dtype=dtype)) for _ in range(2)]
    table = at(0, 1, 2, 3).view(2, 2)
    table[0, changed.pop("column")] = changed.pop("block_table")
    return caches, table


def paged_commit_branch(guard, backend, changed):
    for column in range(2):
        caches, table = _paged(guard, changed | {"column": column}, torch.float32)
        k, cos, n = torch.randn(B, 4, 1, 64), torch.ones(8, 32), at(2, 2)
        tables = {"cos": cos, "sin": cos, "block_table": table, "branches": 1}
        given = {"branch": at(0, 0), "start": n, "commit": at(4, 4)}
        ops.commit_branch(k, k, *caches, **given, **tables, backend=backend)


def paged_window_attention(guard, backend, changed):
    dtype = torch.float16 if backend == "cuda" else torch.float32
    for column in range(2):
        caches, table = _paged(guard, changed | {"column": column}, dtype)
        k, cos, n = torch.randn(B, 4, 1, 64).to(dtype), torch.ones(8, 32), at(4, 4)
        given = {"start": at(2, 2), "length": n, "kv_len": at(2, 2), "commit": n}
        tables = {"cos": cos, "sin": cos, "block_table": table}
        ops.window_attention(k, k, k, *caches, **given, **tables, backend=backend)


def route(guard, backend, changed):
    n = numbers(changed, start=0, length=3)
    hidden, router, bias = torch.randn(B, 4, 16), torch.randn(4, 16), torch.randn(4)
    options = {"top_k": 2, "score": "sigmoid", "capacity": 3, "block_size": 2}
    got = ops.route(hidden, router, bias, **options, **n, backend=backend)
    if not ((got.ids >= 0) & (got.ids <= 4)).all():
        raise AssertionError(got.ids)


def experts(guard, backend, changed):
    hidden, gate_up, down = torch.randn(3, 16), torch.randn(4, 16, 16), torch.randn(4, 16, 8)
    ids = torch.tensor([[changed["ids"], 1], [2, 3], [0, 4]], dtype=INT32)
    ops.experts(hidden, gate_up, down, ids, torch.rand(3, 2), backend=backend)


def multiblock_step(guard, backend, changed):
    x = guard(torch.zeros(B, L + 4, dtype=torch.int64))
    state = ops.MultiBlockState.make(x, 4, 2)
    for name, value in changed.items():
        if name in ROWS:
            state.numbers[ROWS.index(name), 0] = value
    state.eligible.fill_(True)
    ops.multiblock_step(
        x,
        guard(torch.full(x.shape, -1).int()),
        ops.MultiBlockState(*map(guard, state)),
        torch.ones(B, 3, dtype=torch.int64),
        torch.rand(B, 3),
        mask_id=0,
        prompt_length=at(changed.get("prompt_length", 2), 2),
        max_new_tokens=4,
        block_length=2,
        threshold=0.5,
        cached=True,
        eos_ids=None if "nfe" in changed else torch.tensor([1]),  # counted where a mask is left
        backend=backend,
    )


def mixture_accept(guard, backend, changed):
    logits = torch.randn(4, V)
    ops.mixture_accept(
        logits,
        logits.clone(),
        torch.full((4,), changed.get("token", 1)),
        length=at(changed.get("length", 2), 2),
        mixture=0.5,
        temperature=1.0,
        counter=torch.zeros(4, 3, dtype=INT32),
        critical=True,
        backend=backend,
    )


def mixture_accept_sparse(guard, backend, changed):
    counter = torch.zeros(4, 3, dtype=INT32)
    drafted = ops.mixture_draft(
        torch.randn(4, V), temperature=1.0, counter=counter, top_p=0.9, capacity=4, backend="torch"
    )
    lists = {
        name: torch.full_like(getattr(drafted.candidates, name), value)
        for name, value in changed.items()
        if name in ("ids", "size")
    }
    ops.mixture_accept_sparse(
        drafted.candidates._replace(**lists),
        torch.randn(4, 8),
        torch.randn(V, 8),
        torch.full((4,), changed.get("token", 1)),
        bias=torch.randn(V),
        length=at(changed.get("length", 2), 2),
        mixture=0.5,
        temperature=1.0,
        critical=True,
        backend=backend,
    )


def _row_options(changed):
    return {
        "rows": at(changed.get("rows", 0), 1),
        "suppress_ids": at(changed.get("suppress_ids", 1)),
        "counter": torch.full((2, 3), changed.get("counter", 0), dtype=INT32),
        "temperature": 1.0,
    }


def vocab_stats(guard, backend, changed):
    ops.vocab_stats(torch.randn(4, V), backend=backend, **_row_options(changed))


def head_stats(guard, backend, changed):
    ops.head_stats(torch.randn(4, 8), torch.randn(V, 8), backend=backend, **_row_options(changed))


def certainty_loss(guard, backend, changed):
    target = torch.tensor([changed["target"], 1])
    ops.certainty_loss(torch.randn(2, V), target, backend=backend)


def renoise(guard, backend, changed):
    n = numbers(changed, request=1, step=2)
    ops.renoise(
        guard(torch.zeros(B, T, dtype=torch.int64)),
        torch.ones(B, T, dtype=torch.int64),
        torch.rand(B, T),
        bound=0.5,
        vocab_size=9,
        seed=1,
        backend=backend,
        **n,
    )


def edit_tokens(guard, backend, changed):
    n = numbers(changed, start=1, length=3, editable_from=2)
    ops.edit_tokens(
        guard(torch.full((B, L), int("post_steps" in changed))),  # counted where no mask is left
        guard(torch.full((B, L), -1).int()),
        *(guard(at(changed.get(name, 0), 0)) for name in ("nfe", "post_steps")),
        guard(torch.zeros(B, dtype=torch.bool)),
        torch.ones(B, T, dtype=torch.int64),
        torch.rand(B, T),
        mask_id=0,
        threshold=0.5,
        edit_threshold=0.0,
        max_post_steps=1,
        backend=backend,
        **n,
    )


def edit_block(guard, backend, changed):
    n = numbers(changed, start=1, length=4, editable_from=2)
    edits = ops.BlockEdits.make(B, T, 1)
    counters = {
        name: at(changed.get(name, usual), 0) for name, usual in (("post_steps", 0), ("updates", 1))
    }
    edits = edits._replace(written=edits.written + changed.get("written", 0), **counters)
    ops.edit_block(
        guard(torch.zeros(B, L, dtype=torch.int64)),
        guard(torch.full((B, L), -1).int()),
        guard(at(changed.get("nfe", 0), 0)),
        ops.BlockEdits(*map(guard, edits)),
        torch.rand(B, T, V),
        mask_id=0,
        delete_id=3,
        split_id=2,
        threshold=0.5,
        edit_threshold=0.0,
        max_post_steps=1,
        backend=backend,
        **n,
    )


class Case(NamedTuple):
    call: Callable
    arguments: tuple[str, ...]
    backends: tuple[str, ...] = ("torch", "triton", "cuda")


CASES = (
    Case(unmask, ("start", "length", "quota", "end", "ends_from", "nfe")),
    Case(draft, ("start", "length")),
    Case(verify, ("start", "length")),
    Case(commit_branch, ("branch", "start", "commit", "pad")),
    Case(window_attention, ("start", "length", "kv_len", "commit", "pad")),
    Case(window_attention_leaves, ("start", "length", "commit", "pad")),
    Case(paged_commit_branch, ("block_table",)),
    Case(paged_window_attention, ("block_table",)),
    Case(route, ("start", "length")),
    Case(experts, ("ids",), ("torch", "triton")),
    Case(multiblock_step, ("prompt_length", *ROWS)),
    Case(mixture_accept, ("token", "length")),
    Case(mixture_accept_sparse, ("ids", "size", "token", "length")),
    Case(vocab_stats, ("rows", "suppress_ids", "counter")),
    Case(head_stats, ("rows", "suppress_ids", "counter"), ("torch", "triton")),
    Case(certainty_loss, ("target",), ("torch", "triton")),
    Case(renoise, ("request", "step"), ("torch", "triton")),
    Case(
        edit_tokens,
        ("start", "length", "editable_from", "nfe", "post_steps"),
    ),
    Case(
        edit_block,
        ("start", "length", "editable_from", "nfe", "post_steps", "updates", "written"),
        ("torch", "triton"),
    ),
)
RUNS = [
    pytest.param(case, backend, id=f"{case.call.__name__}-{backend}")
    for case in CASES
    for backend in case.backends
]


@pytest.mark.parametrize("case, backend", RUNS)
def test_values_out_of_range_stay_inside(case, backend):
    def run(argument):
        for value in VALUES:
            guard = Guards()
            case.call(guard, backend, {argument: value})
            if not guard.intact():
                return 2
        return 0

    ends = {argument: outcome(lambda name=argument: run(name)) for argument in case.arguments}
    assert set(ends.values()) == {0}, ends


def test_a_write_outside_is_found():
    guard = Guards()
    inner = guard(torch.zeros(4))
    assert guard.intact()
    torch.as_strided(inner, (1,), (1,), ZONE + 4).fill_(1.0)
    assert not guard.intact()
