import math

import pytest
import torch

from pydllm import ops
from pydllm.reference import philox
from pydllm.testing import random_normal
from tests.ops.test_mixture_accept import (
    BACKENDS,
    DTYPES,
    EMITS,
    INF,
    accept,
    all_rows,
    assert_same,
    heads,
    ids,
    make,
)


@pytest.mark.parametrize("emit", EMITS)
@pytest.mark.parametrize("top_p", [0.8, 0.95])
@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_sparse_is_dense(temperature, top_p, emit):
    batch, rows, vocab = 5, 8, 60
    logits, _, draft, shared = make(
        batch, rows, vocab, top_p=top_p, temperature=temperature, emit=emit, suppress_ids=ids(9)
    )
    hidden, weight = heads(batch, rows, vocab)
    bias = random_normal(vocab, seed=2, dtype=torch.float64)
    verifier = 3 * torch.tanh((hidden @ weight.T + bias) / 3)
    length = ids(8, 7, 3, 1, 0)
    call = {"length": length, "emit": emit, "critical": True}
    assert not draft.candidates.overflow.any()
    for mixture in (0.05, 0.5, 1.0, torch.tensor([0.2, 0.9, 1.0, 0.5, math.nan])):
        dense = accept(logits, verifier, draft, shared, mixture=mixture, **call)
        sparse = ops.mixture_accept_sparse(
            draft.candidates,
            hidden,
            weight,
            draft.token,
            mixture=mixture,
            temperature=temperature,
            bias=bias,
            softcap=3.0,
            **call,
        )
        assert_same(sparse[:3], dense[:3])
        torch.testing.assert_close(sparse.critical, dense.critical, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sparse_in_low_precision_where_the_margin_decides(backend, dtype):
    # The nuclei have about 40 ids, of which the interpreter's pieces take 32.
    batch, rows, vocab = 3, 4, 120
    logits, _, draft, shared = make(batch, rows, vocab, top_p=0.8, scale=1.0, dtype=dtype)
    hidden, weight = heads(batch, rows, vocab, 130, dtype)
    bias = random_normal(vocab, seed=2).to(dtype)
    exact = hidden.double() @ weight.double().T + bias.double()
    assert draft.candidates.size.max() > 32
    noise = philox.vocab_gumbel(vocab, shared["counter"], 5).double()
    mixed = (exact + 0.5 * (logits.double() - exact)) / shared["temperature"] + noise
    mixed[logits.float() < draft.threshold[:, None]] = -INF
    top = mixed.topk(2).values
    decided = top[:, 0] - top[:, 1] > 1e-4
    assert decided.all()
    for critical in (False, True):
        got = ops.mixture_accept_sparse(
            draft.candidates,
            hidden,
            weight,
            draft.token,
            length=ids(4, 4, 2),
            mixture=torch.full((3,), 0.5),
            temperature=torch.ones(12),
            bias=bias,
            critical=critical,
            backend=backend,
        )
        assert torch.equal(got.target[:10], mixed.argmax(-1)[:10])
        assert got.target[10:].tolist() == [-1, -1]
    found = draft.candidates
    dense = ops.mixture_accept(
        logits.double(),
        exact,
        draft.token,
        length=ids(4, 4, 2),
        mixture=0.5,
        threshold=draft.threshold.double(),
        critical=True,
        **shared,
    )
    assert torch.equal(got.accepted, dense.accepted)
    assert torch.equal(got.correction, dense.correction)
    # Differences of numbers up to 10 with fp32's rounding, over a sum that may be small.
    torch.testing.assert_close(got.critical.double(), dense.critical, rtol=1e-3, atol=1e-3)
    assert found.ids.dtype == torch.int32


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_draft_that_is_no_int32_is_in_no_list(backend):
    """Its low 32 bits are an id of the list."""
    counter = torch.arange(12, dtype=torch.int32).view(4, 3)
    options = {"temperature": 1.0, "counter": counter, "top_p": 0.9, "capacity": 40}
    drafted = ops.mixture_draft(random_normal(4, 40, seed=1), **options, backend="torch")
    hidden, weight = random_normal(4, 16, seed=2), random_normal(40, 16, seed=3)
    sizes = drafted.candidates.size.long()
    last = drafted.candidates.ids.gather(1, sizes[:, None] - 1)[:, 0]
    assert (sizes > 1).all()
    length, rest = torch.tensor([4], dtype=torch.int32), {"mixture": 0.5, "temperature": 1.0}
    given = {"length": length, **rest, "critical": True, "emit": "target"}
    got, expected = (
        ops.mixture_accept_sparse(
            drafted.candidates, hidden, weight, last.long() + 2**32, **given, backend=b
        )
        for b in (backend, "torch")
    )
    assert got.accepted.item() == expected.accepted.item() == 0
    torch.testing.assert_close(got.critical, expected.critical, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_ends_before_a_row_without_a_list(backend):
    logits, _, draft, shared = make(2, 4, 60, top_p=0.8, dtype=torch.float32)
    hidden, weight = heads(2, 4, 60, dtype=torch.float32)
    sizes = draft.candidates.size.tolist()
    room = sorted(sizes)[-2]
    short = ops.mixture_draft(logits, top_p=0.8, capacity=room, **shared).candidates
    lost = sizes.index(max(sizes))
    assert short.overflow.nonzero().flatten().tolist() == [lost]
    call = {"length": all_rows(2, 4), "temperature": 1.0, "critical": True, "backend": backend}
    whole, cut = (
        ops.mixture_accept_sparse(found, hidden, weight, draft.token, mixture=1.0, **call)
        for found in (draft.candidates, short)
    )
    assert whole.accepted.tolist() == [4, 4]
    b, j = divmod(lost, 4)
    assert cut.accepted[b] == (j or 4)  # the first row is free
    assert cut.accepted[1 - b] == 4
    assert cut.correction.tolist() == [-1, -1]
    assert cut.target[lost] == -1 and cut.critical[lost] == INF
    others = torch.arange(8) != lost
    assert torch.equal(cut.target[others], whole.target[others])
    # A mixture of 0 looks outside of the lists: it has no target either.
    mixture = torch.tensor([0.0, 1.0])
    none = ops.mixture_accept_sparse(
        draft.candidates, hidden, weight, draft.token, mixture=mixture, **call
    )
    assert none.accepted.tolist() == [1, 4]
    assert none.target[:4].tolist() == [-1] * 4
    torch.testing.assert_close(none.critical, whole.critical)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"hidden": torch.ones(3, 2)},
            ValueError,
            r"candidates.ids: expected shape \(3, C\), got \(4, 3",
        ),
        ({"hidden": torch.ones(4, 2).int()}, TypeError, "hidden: expected dtype"),
        ({"hidden": torch.ones(4, 2).double()}, TypeError, "candidates.logits: expected dtype"),
        (
            {"weight": torch.ones(9, 3)},
            ValueError,
            r"weight: expected shape \(V_A, 2\), got \(9, 3",
        ),
        ({"weight": torch.ones(9, 2).half()}, TypeError, "weight: expected dtype torch.float32"),
        ({"weight": torch.ones(0, 2)}, ValueError, "weight and candidates: expected V_A, H and C"),
        ({"bias": torch.ones(8)}, ValueError, r"bias: expected shape \(9\), got \(8,\)"),
        ({"mixture": 0.0}, ValueError, r"mixture: expected a number in \(0, 1\] for a list"),
        ({"temperature": 0.0}, ValueError, "temperature: expected one above 0 for a list"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature: expected shape \(4\)"),
        ({"softcap": 0.0}, ValueError, "softcap: expected a finite number above 0, got 0.0"),
        ({"emit": "all"}, ValueError, "emit: expected one of draft"),
        ({"backend": "cuda"}, RuntimeError, "mixture_accept_sparse: backend 'cuda' cannot run"),
    ],
)
def test_bad_lists(change, error, message):
    logits = torch.ones(4, 5)
    draft = ops.mixture_draft(logits, capacity=3)
    arguments = {"candidates": draft.candidates, "hidden": torch.ones(4, 2), "mixture": 0.5}
    arguments |= {"weight": torch.ones(9, 2), "token": draft.token, "length": ids(2, 2)}
    arguments |= {"temperature": 0.5} | change
    with pytest.raises(error, match=message):
        ops.mixture_accept_sparse(**arguments)
