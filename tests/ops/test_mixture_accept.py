import itertools
import math

import pytest
import torch

from pydllm import ops
from pydllm.reference import philox
from pydllm.testing import random_normal

INF = math.inf
KERNELS = ["triton", "cuda"]
BACKENDS = ["torch", *KERNELS]
EMITS = ["draft", "draft_then_target", "target"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def ids(*ids):
    return torch.tensor(ids, dtype=torch.int32)


def make(batch, rows, vocab, *, top_p=None, temperature=1.0, emit="draft", scale=2.0, **options):
    """Logits of both models that agree often, the draft, and what draft and acceptance share."""
    dtype = options.pop("dtype", torch.float64)
    logits = (random_normal(batch * rows, vocab, seed=0, dtype=torch.float64) * scale).to(dtype)
    verifier = random_normal(batch * rows, vocab, seed=1, dtype=torch.float64) * scale / 2
    start = torch.arange(batch, dtype=torch.int32) * 3 + 5
    counter = ops.round_counter(start, start + 11, rows, emit=emit)
    shared = {"temperature": temperature, "seed": 5, "counter": counter, **options}
    draft = ops.mixture_draft(logits, top_p=top_p, **{"capacity": vocab} | shared)
    return logits, (logits + verifier).to(dtype), draft, shared


def all_rows(batch, rows):
    return torch.full((batch,), rows, dtype=torch.int32)


def accept(logits, verifier, draft, shared, **options):
    options = {"threshold": draft.threshold, **shared, **options}
    return ops.mixture_accept(logits, verifier, draft.token, **options)


def assert_same(one, other):
    for left, right in zip(one, other, strict=True):
        assert (left is None and right is None) or torch.equal(left, right)


def heads(batch, rows, vocab, width=24, dtype=torch.float64):
    hidden = random_normal(batch * rows, width, seed=8, dtype=torch.float64).to(dtype)
    weight = (random_normal(vocab, width, seed=9, dtype=torch.float64) / 3).to(dtype)
    return hidden, weight


@pytest.mark.parametrize("emit", EMITS)
@pytest.mark.parametrize("top_p", [None, 0.8, 0.95])
@pytest.mark.parametrize("temperature", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("mixture", [0.0, 0.3, 1.0])
def test_against_a_loop(mixture, temperature, top_p, emit):
    batch, rows, vocab = 3, 6, 40
    logits, verifier, draft, shared = make(
        batch, rows, vocab, top_p=top_p, temperature=temperature, emit=emit, suppress_ids=ids(7)
    )
    length = ids(6, 4, 1)
    got = accept(logits, verifier, draft, shared, length=length, mixture=mixture, emit=emit)
    noise = philox.vocab_gumbel(vocab, shared["counter"], 5).double().tolist()
    x, y, drafts = logits.tolist(), verifier.tolist(), draft.token.tolist()
    for b in range(batch):
        run, open_, correction = 0, True, -1
        for j in range(length[b]):
            row = b * rows + j
            listed = set(draft.candidates.ids[row, : draft.candidates.size[row]].tolist())
            everything = set(range(vocab)) - {7}
            allowed = everything if not listed or mixture == 0 else listed

            def score(v, row=row):
                mixed = mixture * x[row][v] + (1 - mixture) * y[row][v]
                return mixed / temperature + noise[row][v] if temperature else mixed

            target = max(sorted(allowed), key=score)
            assert got.target[row] == target
            accepted = target == drafts[row] or (j == 0 and emit != "target")
            if open_ and not accepted:
                correction = target
            open_ &= accepted
            run += open_
        assert got.accepted[b] == run
        assert got.correction[b] == correction
        assert (got.target[b * rows + length[b] : (b + 1) * rows] == -1).all()


# The interpreter's pieces have 1024 ids.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("vocab", "top_p", "emit"),
    [(1030, 0.9, "draft"), (50, None, "target"), (1, 0.9, "draft_then_target")],
    ids=str,
)
@pytest.mark.parametrize("backend", KERNELS)
def test_a_kernel_has_the_bits_of_the_reference(backend, vocab, top_p, emit, dtype):
    temperature = torch.tensor([0.5, 0.0, 1.0, 0.7, 0.7, 0.7, 0.7, 0.7])
    options = {"suppress_ids": ids(3, 40), "dtype": dtype, "capacity": 16}
    options["shared_vocab"] = max(1, vocab - 5)
    found = make(4, 2, vocab, top_p=top_p, temperature=temperature, emit=emit, **options)
    logits, verifier, draft, shared = found
    shared.pop("capacity")
    wider = torch.nn.functional.pad(verifier, (0, 9), value=1e3)[:, : vocab + 7]
    call = {"length": ids(2, 1, 2, 0), "emit": emit, "critical": True, **shared}
    for mixture in (0.6, torch.tensor([1.0, 0.0, 0.3, 2.0])):
        one, other = (
            accept(logits, wider, draft, call, mixture=mixture, backend=name)
            for name in ("torch", backend)
        )
        assert_same(one[:3], other[:3])
        # Two differences and a quotient, each rounded, of numbers up to 20.
        torch.testing.assert_close(one.critical, other.critical, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    logits, none = torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64)
    for batch in (0, 2):
        length = torch.zeros(batch, dtype=torch.int32)
        call = {"length": length, "mixture": 0.5, "backend": backend}
        got = ops.mixture_accept(logits, logits, none, **call)
        assert got.accepted.tolist() == [0] * batch
        assert got.correction.tolist() == [-1] * batch
        assert got.target.shape == (0,)


@pytest.mark.parametrize("emit", EMITS)
@pytest.mark.parametrize("temperature", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("top_p", [None, 0.8, 0.95])
def test_equal_models_and_mixture_one_accept_everything(top_p, temperature, emit, cuda_on_cpu):
    backends = [("torch", torch.float64), ("torch", torch.bfloat16)]
    backends += [(kernel, None) for kernel in KERNELS]
    for backend, dtype in backends if emit == "draft" else backends[:2]:
        batch, rows = (3, 8) if backend == "torch" else (1, 3)
        logits, verifier, draft, shared = make(
            batch,
            rows,
            70,
            top_p=top_p,
            temperature=temperature,
            emit=emit,
            dtype=dtype or torch.float16,
            backend=backend,
        )
        call = {"length": all_rows(batch, rows), "emit": emit}
        for mixture in (0.0, 0.1, 0.3, 0.7, 1.0) if dtype else (0.3,):
            if mixture == 0 and draft.threshold.max() > -INF:
                continue  # there the nucleus does not count
            got = accept(logits, logits, draft, shared, mixture=mixture, **call)
            assert got.accepted.tolist() == [rows] * batch
            assert torch.equal(got.target, draft.token)
        verifier[:, ::2] = math.nan
        got = accept(logits, verifier, draft, shared, mixture=1.0, **call)
        assert torch.equal(got.target, draft.token)
        assert got.correction.tolist() == [-1] * batch


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_mixture_zero_is_the_verifiers_own_token(temperature, backend):
    logits, verifier, draft, shared = make(
        2, 3, 90, top_p=0.8, temperature=temperature, emit="target", dtype=torch.float32
    )
    logits[:, 5] = math.nan  # not looked at
    call = {"length": all_rows(2, 3), "emit": "target", "backend": backend}
    got = accept(logits, verifier, draft, shared, mixture=0.0, **call)
    assert torch.equal(got.target, ops.vocab_stats(verifier, **shared).token)


def test_shifts_of_a_row_change_nothing():
    logits, verifier, draft, shared = make(4, 8, 60, top_p=0.9, temperature=0.7)
    call = {"length": all_rows(4, 8), "mixture": 0.4}
    expected = accept(logits, verifier, draft, shared, **call)
    assert 1 < expected.accepted.float().mean() < 8
    for one, other in itertools.product((0.0, -3.0, 11.5), repeat=2):
        moved = logits + one
        redrafted = ops.mixture_draft(moved, top_p=0.9, capacity=60, **shared)
        assert torch.equal(redrafted.token, draft.token)
        assert_same(accept(moved, verifier + other, redrafted, shared, **call), expected)
        # Equal up to a constant.
        same = accept(moved, logits + other, redrafted, shared, **call)
        assert same.accepted.tolist() == [8] * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_agreement_and_the_published_rule(backend):
    logits, verifier, draft, shared = make(4, 5, 30, temperature=0.0, dtype=torch.float32)
    call = {"length": ids(5, 5, 3, 2), "mixture": 0.4, "backend": backend}
    got = accept(logits, verifier, draft, shared, **call)
    mixed = (verifier + 0.4 * (logits - verifier)).view(4, 5, 30)
    for b, length in enumerate([5, 5, 3, 2]):
        run = 1
        while run < length and mixed[b, run].argmax() == logits.view(4, 5, 30)[b, run].argmax():
            run += 1
        assert got.accepted[b] == run
    # The published code's target has neither noise nor nucleus, whatever drew the drafts.
    logits, verifier, draft, shared = make(
        4, 5, 30, temperature=1.0, top_p=0.3, dtype=torch.float32
    )
    call["length"] = all_rows(4, 5)
    plain = {"temperature": 0.0, "threshold": None}
    published = accept(logits, verifier, draft, shared, **plain, **call)
    assert torch.equal(published.target, (verifier + 0.4 * (logits - verifier)).argmax(-1))
    assert not torch.equal(published.target, accept(logits, verifier, draft, shared, **call).target)


@pytest.mark.parametrize("top_p", [None, 0.9])
@pytest.mark.parametrize("temperature", [0.0, 0.2, 1.0])
def test_more_of_the_draft_model_accepts_more(temperature, top_p):
    logits, verifier, draft, shared = make(40, 8, 30, top_p=top_p, temperature=temperature)
    length = all_rows(40, 8)
    call = {"length": length, "critical": True}
    first, before = None, torch.zeros(40)
    for step in range(1, 42):
        mixture = step / 41
        got = accept(logits, verifier, draft, shared, mixture=mixture, **call)
        first = got if first is None else first
        assert (got.accepted >= before).all()
        before = got.accepted
        least = first.critical.view(40, 8)
        assert torch.equal(got.critical, first.critical)
        passed = (least <= mixture) | (torch.arange(8) == 0)
        assert torch.equal(passed.int().cumprod(1).sum(1), got.accepted)
        assert torch.equal((got.target == draft.token).view(40, 8), least <= mixture)
    assert (first.accepted < 8).any()
    assert (before == 8).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_forbidden_ids_are_never_targets(backend):
    logits, verifier, draft, shared = make(
        2,
        1,
        60,
        top_p=0.9,
        temperature=0.7,
        emit="target",
        suppress_ids=ids(7),
        shared_vocab=50,
        dtype=torch.float32,
    )
    for value in (1e4, math.nan, INF):
        verifier[:, 7] = verifier[:, 50:] = value
        logits[:, 7] = logits[:, 50:] = value
        for threshold in (draft.threshold, None):
            for mixture in (0.0, 0.5, 1.0):
                got = ops.mixture_accept(
                    logits,
                    verifier,
                    draft.token,
                    length=all_rows(2, 1),
                    mixture=mixture,
                    threshold=threshold,
                    backend=backend,
                    **shared,
                )
                assert ((got.target >= 0) & (got.target < 50) & (got.target != 7)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_distribution(backend):
    logits, verifier, draft, shared = make(
        7, 1, 40, top_p=0.9, temperature=1.0, emit="target", dtype=torch.float32
    )
    listed = draft.candidates.ids[:, 0].long()
    outside = [next(v for v in range(40) if v not in row) for row in draft.candidates.ids.tolist()]
    verifier[0, listed[0]] = math.nan
    verifier[1, listed[1]] = INF
    verifier[2] = -INF
    verifier[3, outside[3]] = math.nan  # not in the nucleus: no matter
    verifier[4, draft.token[4]] = -INF
    call = {"length": all_rows(7, 1), "mixture": 0.5, "emit": "target", "backend": backend}
    call["critical"] = True
    got = accept(logits, verifier, draft, shared, **call)
    assert got.target[:3].tolist() == [-1] * 3 and (got.target[3:] >= 0).all()
    assert got.accepted[:3].tolist() == [0] * 3 and got.accepted[4] == 0
    assert got.critical[[2, 4]].tolist() == [1.0, 1.0]
    # A draft model's -inf is no target while it has a weight, and its NaN leaves no target.
    logits[5, draft.token[5]], logits[6, 3] = -INF, math.nan
    got = accept(logits, verifier, draft._replace(threshold=None), shared, **call)
    assert got.target[5] not in (-1, draft.token[5]) and got.target[6] == -1
    # A draft of -1 is no target's.
    lost = ops.mixture_accept(
        logits[2:3],
        verifier[2:3],
        ids(-1).long(),
        length=ids(1),
        mixture=0.5,
        emit="target",
        backend=backend,
    )
    assert lost.accepted.item() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lowest_id(backend):
    generator = torch.Generator().manual_seed(0)
    logits, verifier = torch.randint(-2, 3, (2, 6, 1100), generator=generator).float().unbind()
    token = torch.zeros(6, dtype=torch.int64)
    got = ops.mixture_accept(
        logits, verifier, token, length=all_rows(2, 3), mixture=0.5, backend=backend
    )
    mixed = (logits + verifier).tolist()
    assert got.target.tolist() == [row.index(max(row)) for row in mixed]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_does_not_depend_on_the_others(backend):
    logits, verifier, draft, shared = make(3, 4, 90, top_p=0.9, dtype=torch.float32)
    mixture, length = torch.tensor([0.5, 0.3, 1.0]), ids(4, 3, 2)
    hidden, weight = heads(3, 4, 90, dtype=torch.float32)
    lists = (draft.candidates, hidden, weight, draft.token)
    call = {"mixture": mixture, "length": length, "critical": True, "backend": backend}
    batch = accept(logits, verifier, draft, shared, **call)
    sparse = ops.mixture_accept_sparse(*lists, temperature=1.0, **call)
    for matrix in (logits, verifier, hidden):
        matrix[[7, 10, 11]] = math.nan  # behind the rows in use
    for b in range(3):
        part = slice(4 * b, 4 * b + 4)
        call |= {"mixture": mixture[b : b + 1], "length": length[b : b + 1]}
        alone = ops.mixture_accept(
            logits[part],
            verifier[part],
            draft.token[part],
            threshold=draft.threshold[part],
            **call,
            **shared | {"counter": shared["counter"][part]},
        )
        found = ops.Candidates(*(field[part] for field in draft.candidates))
        operands = (found, hidden[part], weight, draft.token[part])
        alone_sparse = ops.mixture_accept_sparse(*operands, temperature=1.0, **call)
        for got, together in ((alone, batch), (alone_sparse, sparse)):
            assert_same(got[:2], [field[b : b + 1] for field in together[:2]])
            assert_same(got[2:], [field[part] for field in together[2:]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    logits, verifier, draft, shared = make(2, 2, 50, top_p=0.9, dtype=torch.float32)
    ours, rounds = torch.ops.pydllm, (draft.token, ids(2, 1))
    options = (shared["counter"], ids(3), 50, True, True, backend)
    arguments = (logits, verifier, *rounds, 0.5, None, draft.threshold, 1.0, None, 5, *options)
    torch.library.opcheck(ours.mixture_accept.default, arguments)
    hidden, weight = heads(2, 2, 50, dtype=torch.float32)
    options = (0.5, None, 1.0, None, None, True, False, backend)
    arguments = (*draft.candidates[:4], hidden, weight, None, *rounds, *options)
    torch.library.opcheck(ours.mixture_accept_sparse.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fullgraph_compile(backend):
    logits, verifier, draft, shared = make(2, 2, 50, top_p=0.9, dtype=torch.float32)
    hidden, weight = heads(2, 2, 50, dtype=torch.float32)

    def call(logits, verifier, mixture):
        length = ids(2, 1)
        dense = accept(
            logits, verifier, draft, shared, length=length, mixture=mixture, backend=backend
        )
        lists = (draft.candidates, hidden, weight, draft.token)
        options = {"length": length, "mixture": mixture, "temperature": 1.0, "backend": backend}
        return dense, ops.mixture_accept_sparse(*lists, critical=True, **options)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    mixture = torch.tensor([0.5, 1.0])
    expected = call(logits, verifier, mixture)
    for got, want in zip(compiled(logits, verifier, mixture), expected, strict=True):
        assert_same(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_graph_replays_and_agrees_with_the_cpu(dtype, backend):
    rows, vocab, temperature = 8, 151936, 0.2
    logits, verifier, draft, shared = make(
        2, rows, vocab, top_p=0.95, temperature=temperature, dtype=dtype, capacity=128
    )
    shared.pop("capacity")
    call = {"length": ids(8, 5), "mixture": torch.tensor([0.7, 0.3])}
    expected = accept(logits, verifier, draft, shared, backend="torch", **call)
    moved = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in (shared | call).items()}
    options = {"threshold": draft.threshold.cuda(), "backend": backend, **moved}
    static, verifier, token = torch.zeros_like(logits).cuda(), verifier.cuda(), draft.token.cuda()
    ops.mixture_accept(static, verifier, token, **options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.mixture_accept(static, verifier, token, **options)
    static.copy_(logits)
    for _ in range(50):
        graph.replay()
        assert_same([field.cpu() for field in got[:3]], expected[:3])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.ones(4)}, ValueError, r"logits: expected shape \(R, V\), got \(4,\)"),
        ({"logits": torch.ones(4, 5).int()}, TypeError, "logits: expected dtype"),
        ({"logits": torch.ones(4, 5, requires_grad=True)}, ValueError, "got logits with requires"),
        (
            {"verifier_logits": torch.ones(3, 5)},
            ValueError,
            r"verifier_logits: expected shape \(4, V_A\), got \(3, 5\)",
        ),
        ({"verifier_logits": torch.ones(4, 5).half()}, TypeError, "verifier_logits: expected dtyp"),
        ({"verifier_logits": torch.ones(4, 6)}, ValueError, "shared_vocab: expected a number for"),
        ({"shared_vocab": 6}, ValueError, r"shared_vocab: expected an int in \[1, 5\], got 6"),
        ({"token": torch.zeros(3).long()}, ValueError, r"token: expected shape \(4\), got \(3,\)"),
        ({"token": torch.zeros(4).int()}, TypeError, "token: expected dtype torch.int64"),
        (
            {"length": ids(1, 1, 1)},
            ValueError,
            "length: expected B that divides the 4 rows, got 3",
        ),
        ({"length": ids()}, ValueError, "length: expected B that divides the 4 rows, got 0"),
        ({"length": torch.ones(2)}, TypeError, "length: expected dtype torch.int32"),
        ({"mixture": -0.1}, ValueError, r"mixture: expected a number in \[0, 1\], got -0.1"),
        ({"mixture": 1.5}, ValueError, r"mixture: expected a number in \[0, 1\], got 1.5"),
        ({"mixture": math.nan}, ValueError, "mixture: expected a number"),
        ({"mixture": torch.ones(4)}, ValueError, r"mixture: expected shape \(2\), got \(4,\)"),
        ({"mixture": torch.ones(2).half()}, TypeError, "mixture: expected dtype torch.float32"),
        ({"threshold": torch.ones(2)}, ValueError, r"threshold: expected shape \(4\), got \(2,\)"),
        ({"threshold": torch.ones(4).double()}, TypeError, "threshold: expected dtype torch.flo"),
        ({"temperature": 1.0}, ValueError, r"counter: expected \(R, 3\) int32 at a temperature"),
        ({"emit": "all"}, ValueError, "emit: expected one of draft, draft_then_target, target"),
        ({"rule": "reference"}, TypeError, "rule is no argument any more, use temperature 0"),
        (
            {"suppress_ids": torch.zeros(17).int()},
            ValueError,
            "suppress_ids: expected at most 16 ids, got 17",
        ),
        ({"backend": "cuda"}, RuntimeError, "mixture_accept: backend 'cuda' cannot run this call"),
    ],
)
def test_bad_input(change, error, message):
    refused(change, error, message)


@pytest.mark.parametrize("backend", KERNELS)
def test_what_a_kernel_does_not_take(backend):
    square = torch.ones(4, 4).double()
    for change, message in (
        ({"logits": torch.ones(5, 4).t()}, "contiguous"),
        ({"logits": square, "verifier_logits": square}, "takes fp32, fp16"),
    ):
        refused(change | {"backend": backend}, RuntimeError, message)


def refused(change, error, message):
    arguments = {"logits": torch.ones(4, 5), "verifier_logits": torch.ones(4, 5)}
    arguments |= {"token": torch.zeros(4).long(), "length": ids(2, 2), "mixture": 0.5} | change
    with pytest.raises(error, match=message):
        ops.mixture_accept(**arguments)
