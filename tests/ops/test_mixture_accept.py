import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from pydllm import ops
from pydllm.reference import philox
from pydllm.testing import random_normal

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
from cases import mixture_accept as accept_case
from cases import mixture_draft as draft_case

INF = math.inf
BACKENDS = ["torch", "triton"]
EMITS = ["draft", "draft_then_target", "target"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _ids(*ids):
    return torch.tensor(ids, dtype=torch.int32)


def _round(batch, rows, vocab, *, top_p=None, temperature=1.0, emit="draft", scale=2.0, **options):
    """Logits of both models that agree often, the draft, and what draft and acceptance share."""
    dtype = options.pop("dtype", torch.float64)
    logits = (random_normal(batch * rows, vocab, seed=0, dtype=torch.float64) * scale).to(dtype)
    verifier = random_normal(batch * rows, vocab, seed=1, dtype=torch.float64) * scale / 2
    start = torch.arange(batch, dtype=torch.int32) * 3 + 5
    counter = ops.round_counter(start, start + 11, rows, emit=emit)
    shared = {"temperature": temperature, "seed": 5, "counter": counter, **options}
    draft = ops.mixture_draft(logits, top_p=top_p, **{"capacity": vocab} | shared)
    return logits, (logits + verifier).to(dtype), draft, shared


def _whole(batch, rows):
    return torch.full((batch,), rows, dtype=torch.int32)


def _accept(logits, verifier, draft, shared, **options):
    options = {"threshold": draft.threshold, **shared, **options}
    return ops.mixture_accept(logits, verifier, draft.token, **options)


def _assert_same(one, other):
    for left, right in zip(one, other, strict=True):
        assert (left is None and right is None) or torch.equal(left, right)


@pytest.mark.parametrize("emit", EMITS)
@pytest.mark.parametrize("top_p", [None, 0.8, 0.95])
@pytest.mark.parametrize("temperature", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("mixture", [0.0, 0.3, 1.0])
def test_against_a_loop(mixture, temperature, top_p, emit):
    batch, rows, vocab = 3, 6, 40
    logits, verifier, draft, shared = _round(
        batch, rows, vocab, top_p=top_p, temperature=temperature, emit=emit, banned=_ids(7)
    )
    length = _ids(6, 4, 1)
    got = _accept(logits, verifier, draft, shared, length=length, mixture=mixture, emit=emit)
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
def test_the_kernel_has_the_bits_of_the_reference(vocab, top_p, emit, dtype):
    temperature = torch.tensor([0.5, 0.0, 1.0, 0.7, 0.7, 0.7, 0.7, 0.7])
    options = {"banned": _ids(3, 40), "dtype": dtype, "capacity": 16}
    options["shared_vocab"] = max(1, vocab - 5)
    found = _round(4, 2, vocab, top_p=top_p, temperature=temperature, emit=emit, **options)
    logits, verifier, draft, shared = found
    shared.pop("capacity")
    wider = torch.nn.functional.pad(verifier, (0, 9), value=1e3)[:, : vocab + 7]
    call = {"length": _ids(2, 1, 2, 0), "emit": emit, "critical": True, **shared}
    for mixture in (0.6, torch.tensor([1.0, 0.0, 0.3, 2.0])):
        one, other = (
            _accept(logits, wider, draft, call, mixture=mixture, backend=backend)
            for backend in BACKENDS
        )
        _assert_same(one[:3], other[:3])
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
def test_equal_models_and_mixture_one_accept_everything(top_p, temperature, emit):
    for backend, dtype in (("torch", torch.float64), ("torch", torch.bfloat16), ("triton", None)):
        batch, rows = (3, 8) if backend == "torch" else (1, 3)
        logits, verifier, draft, shared = _round(
            batch,
            rows,
            70,
            top_p=top_p,
            temperature=temperature,
            emit=emit,
            dtype=dtype or torch.float16,
            backend=backend,
        )
        call = {"length": _whole(batch, rows), "emit": emit}
        for mixture in (0.0, 0.1, 0.3, 0.7, 1.0) if dtype else (0.3,):
            if mixture == 0 and draft.threshold.max() > -INF:
                continue  # there the nucleus does not count
            got = _accept(logits, logits, draft, shared, mixture=mixture, **call)
            assert got.accepted.tolist() == [rows] * batch
            assert torch.equal(got.target, draft.token)
        verifier[:, ::2] = math.nan
        got = _accept(logits, verifier, draft, shared, mixture=1.0, **call)
        assert torch.equal(got.target, draft.token)
        assert got.correction.tolist() == [-1] * batch


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_mixture_zero_is_the_verifiers_own_token(temperature, backend):
    logits, verifier, draft, shared = _round(
        2, 3, 90, top_p=0.8, temperature=temperature, emit="target", dtype=torch.float32
    )
    logits[:, 5] = math.nan  # not looked at
    call = {"length": _whole(2, 3), "emit": "target", "backend": backend}
    got = _accept(logits, verifier, draft, shared, mixture=0.0, **call)
    assert torch.equal(got.target, ops.vocab_stats(verifier, **shared).token)


def test_shifts_of_a_row_change_nothing():
    logits, verifier, draft, shared = _round(4, 8, 60, top_p=0.9, temperature=0.7)
    call = {"length": _whole(4, 8), "mixture": 0.4}
    expected = _accept(logits, verifier, draft, shared, **call)
    assert 1 < expected.accepted.float().mean() < 8
    for one, other in itertools.product((0.0, -3.0, 11.5), repeat=2):
        moved = logits + one
        redrafted = ops.mixture_draft(moved, top_p=0.9, capacity=60, **shared)
        assert torch.equal(redrafted.token, draft.token)
        _assert_same(_accept(moved, verifier + other, redrafted, shared, **call), expected)
        # Equal up to a constant.
        same = _accept(moved, logits + other, redrafted, shared, **call)
        assert same.accepted.tolist() == [8] * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_agreement_and_the_published_rule(backend):
    logits, verifier, draft, shared = _round(4, 5, 30, temperature=0.0, dtype=torch.float32)
    call = {"length": _ids(5, 5, 3, 2), "mixture": 0.4, "backend": backend}
    got = _accept(logits, verifier, draft, shared, **call)
    mixed = (verifier + 0.4 * (logits - verifier)).view(4, 5, 30)
    for b, length in enumerate([5, 5, 3, 2]):
        run = 1
        while run < length and mixed[b, run].argmax() == logits.view(4, 5, 30)[b, run].argmax():
            run += 1
        assert got.accepted[b] == run
    _assert_same(_accept(logits, verifier, draft, shared, rule="reference", **call), got)
    # At a temperature it still has neither noise nor nucleus.
    logits, verifier, draft, shared = _round(
        4, 5, 30, temperature=1.0, top_p=0.3, dtype=torch.float32
    )
    call["length"] = _whole(4, 5)
    published = _accept(logits, verifier, draft, shared, rule="reference", **call)
    assert torch.equal(published.target, (verifier + 0.4 * (logits - verifier)).argmax(-1))
    assert not torch.equal(
        published.target, _accept(logits, verifier, draft, shared, **call).target
    )


@pytest.mark.parametrize("top_p", [None, 0.9])
@pytest.mark.parametrize("temperature", [0.0, 0.2, 1.0])
def test_more_of_the_draft_model_accepts_more(temperature, top_p):
    logits, verifier, draft, shared = _round(40, 8, 30, top_p=top_p, temperature=temperature)
    length = _whole(40, 8)
    call = {"length": length, "critical": True}
    first, before = None, torch.zeros(40)
    for step in range(1, 42):
        mixture = step / 41
        got = _accept(logits, verifier, draft, shared, mixture=mixture, **call)
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


def _heads(batch, rows, vocab, width=24, dtype=torch.float64):
    hidden = random_normal(batch * rows, width, seed=8, dtype=torch.float64).to(dtype)
    weight = (random_normal(vocab, width, seed=9, dtype=torch.float64) / 3).to(dtype)
    return hidden, weight


@pytest.mark.parametrize("emit", EMITS)
@pytest.mark.parametrize("top_p", [0.8, 0.95])
@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_sparse_is_dense(temperature, top_p, emit):
    batch, rows, vocab = 5, 8, 60
    logits, _, draft, shared = _round(
        batch, rows, vocab, top_p=top_p, temperature=temperature, emit=emit, banned=_ids(9)
    )
    hidden, weight = _heads(batch, rows, vocab)
    bias = random_normal(vocab, seed=2, dtype=torch.float64)
    verifier = 3 * torch.tanh((hidden @ weight.T + bias) / 3)
    length = _ids(8, 7, 3, 1, 0)
    call = {"length": length, "emit": emit, "critical": True}
    assert not draft.candidates.overflow.any()
    for mixture in (0.05, 0.5, 1.0, torch.tensor([0.2, 0.9, 1.0, 0.5, math.nan])):
        dense = _accept(logits, verifier, draft, shared, mixture=mixture, **call)
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
        _assert_same(sparse[:3], dense[:3])
        torch.testing.assert_close(sparse.critical, dense.critical, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sparse_in_low_precision_where_the_margin_decides(backend, dtype):
    # The nuclei have about 40 ids, of which the interpreter's pieces take 32.
    batch, rows, vocab = 3, 4, 120
    logits, _, draft, shared = _round(batch, rows, vocab, top_p=0.8, scale=1.0, dtype=dtype)
    hidden, weight = _heads(batch, rows, vocab, 130, dtype)
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
            length=_ids(4, 4, 2),
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
        length=_ids(4, 4, 2),
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
def test_a_run_ends_before_a_row_without_a_list(backend):
    logits, _, draft, shared = _round(2, 4, 60, top_p=0.8, dtype=torch.float32)
    hidden, weight = _heads(2, 4, 60, dtype=torch.float32)
    sizes = draft.candidates.size.tolist()
    room = sorted(sizes)[-2]
    short = ops.mixture_draft(logits, top_p=0.8, capacity=room, **shared).candidates
    lost = sizes.index(max(sizes))
    assert short.overflow.nonzero().flatten().tolist() == [lost]
    call = {"length": _whole(2, 4), "temperature": 1.0, "critical": True, "backend": backend}
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_forbidden_ids_are_never_targets(backend):
    logits, verifier, draft, shared = _round(
        2, 3, 60, top_p=0.9, temperature=0.7, banned=_ids(7), shared_vocab=50, dtype=torch.float32
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
                    length=_whole(2, 3),
                    mixture=mixture,
                    threshold=threshold,
                    backend=backend,
                    **shared,
                )
                assert ((got.target >= 0) & (got.target < 50) & (got.target != 7)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_distribution(backend):
    logits, verifier, draft, shared = _round(
        7, 1, 40, top_p=0.9, temperature=1.0, emit="target", dtype=torch.float32
    )
    listed = draft.candidates.ids[:, 0].long()
    outside = [next(v for v in range(40) if v not in ids) for ids in draft.candidates.ids.tolist()]
    verifier[0, listed[0]] = math.nan
    verifier[1, listed[1]] = INF
    verifier[2] = -INF
    verifier[3, outside[3]] = math.nan  # not in the nucleus: no matter
    verifier[4, draft.token[4]] = -INF
    call = {"length": _whole(7, 1), "mixture": 0.5, "emit": "target", "backend": backend}
    call["critical"] = True
    got = _accept(logits, verifier, draft, shared, **call)
    assert got.target[:3].tolist() == [-1] * 3 and (got.target[3:] >= 0).all()
    assert got.accepted[:3].tolist() == [0] * 3 and got.accepted[4] == 0
    assert got.critical[[2, 4]].tolist() == [1.0, 1.0]
    # A draft model's -inf is no target while it has a weight, and its NaN leaves no target.
    logits[5, draft.token[5]], logits[6, 3] = -INF, math.nan
    got = _accept(logits, verifier, draft._replace(threshold=None), shared, **call)
    assert got.target[5] not in (-1, draft.token[5]) and got.target[6] == -1
    # A draft of -1 is no target's.
    lost = ops.mixture_accept(
        logits[2:3],
        verifier[2:3],
        _ids(-1).long(),
        length=_ids(1),
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
        logits, verifier, token, length=_whole(2, 3), mixture=0.5, backend=backend
    )
    mixed = (logits + verifier).tolist()
    assert got.target.tolist() == [row.index(max(row)) for row in mixed]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_does_not_depend_on_the_others(backend):
    logits, verifier, draft, shared = _round(3, 4, 90, top_p=0.9, dtype=torch.float32)
    mixture, length = torch.tensor([0.5, 0.3, 1.0]), _ids(4, 3, 2)
    hidden, weight = _heads(3, 4, 90, dtype=torch.float32)
    for garbage in (math.nan, 7.0):  # behind the rows in use
        logits[[7, 10, 11]] = verifier[[7, 10, 11]] = hidden[[7, 10, 11]] = garbage
        call = {"critical": True, "backend": backend}
        batch = _accept(logits, verifier, draft, shared, mixture=mixture, length=length, **call)
        call["temperature"] = 1.0
        lists = (draft.candidates, hidden, weight, draft.token)
        sparse = ops.mixture_accept_sparse(*lists, mixture=mixture, length=length, **call)
        for b in range(3):
            part = slice(4 * b, 4 * b + 4)
            one = {"mixture": mixture[b : b + 1], "length": length[b : b + 1], "critical": True}
            alone = ops.mixture_accept(
                logits[part],
                verifier[part],
                draft.token[part],
                threshold=draft.threshold[part],
                backend=backend,
                **one,
                **shared | {"counter": shared["counter"][part]},
            )
            found = ops.Candidates(*(field[part] for field in draft.candidates))
            one |= {"temperature": 1.0, "backend": backend}
            alone_sparse = ops.mixture_accept_sparse(
                found, hidden[part], weight, draft.token[part], **one
            )
            for got, whole in ((alone, batch), (alone_sparse, sparse)):
                _assert_same(got[:2], [field[b : b + 1] for field in whole[:2]])
                _assert_same(got[2:], [field[part] for field in whole[2:]])


def _law(start_logits, next_logits, vocab, size, mixture):
    """Probability of each sequence under emit "draft", a run's expected acceptance included."""

    def shared(p, q):
        return [1 / sum(max(p[u] / p[v], q[u] / q[v]) for u in range(vocab)) for v in range(vocab)]

    def go(start, prefix):
        at = len(prefix)
        if at == size:
            return {prefix: 1.0}
        p = start_logits[start][prefix[:start]][at].softmax(-1).tolist()
        law, parts = {}, []
        if at == start:
            parts = [(p[v], start, (*prefix, v)) for v in range(vocab)]
        else:
            mixed = start_logits[start][prefix[:start]][at] * mixture
            mixed = (mixed + next_logits[prefix] * (1 - mixture)).softmax(-1).tolist()
            both = shared(p, mixed)
            parts = [(both[v], start, (*prefix, v)) for v in range(vocab)]
            parts.append((1 - sum(both), at, prefix))
        for weight, begin, now in parts:
            for sequence, probability in go(begin, now).items():
                law[sequence] = law.get(sequence, 0.0) + weight * probability
        return law

    return go(0, ())


def test_rounds_follow_the_law_and_need_the_draw_of_their_own():
    """Sequences of three ids by whole rounds against enumeration; see ``round_counter``."""
    vocab, size, count, mixture = 3, 3, 40000, 0.4
    generator = torch.Generator().manual_seed(3)

    def table(*shape):
        return torch.randn(*shape, vocab, generator=generator, dtype=torch.float64) * 1.5

    prefixes = {n: list(itertools.product(range(vocab), repeat=n)) for n in range(size)}
    start_logits = {c: {p: table(size) for p in prefixes[c]} for c in range(size)}
    next_logits = {p: table() for n in range(size) for p in prefixes[n]}
    law = _law(start_logits, next_logits, vocab, size, mixture)
    assert sum(law.values()) == pytest.approx(1)
    expected = count * torch.tensor([law[s] for s in sorted(law)], dtype=torch.float64)
    width = vocab**size
    by_start = torch.zeros(size, width, size, vocab, dtype=torch.float64)
    by_prefix = torch.zeros(size, width, vocab, dtype=torch.float64)
    for n in range(size):
        for code, prefix in enumerate(prefixes[n]):
            by_start[n, code] = start_logits[n][prefix]
            by_prefix[n, code] = next_logits[prefix]

    def chi_square(separate):
        c = torch.zeros(count, dtype=torch.int32)
        code = torch.zeros(count, dtype=torch.int64)  # of what has been emitted
        request = torch.arange(count, dtype=torch.int32)
        steps = torch.arange(size)
        for _ in range(size):
            begin = c.clamp(max=size - 1).long()
            position = (c[:, None] + steps).clamp(max=size - 1)
            logits = by_start[begin[:, None], code[:, None], position].view(-1, vocab)
            emit = "draft" if separate else "draft_then_target"
            counter = ops.round_counter(c, request, size, emit=emit)
            options = {"temperature": 1.0, "seed": 17, "counter": counter}
            draft = ops.mixture_draft(logits, **options).token
            grid, codes = draft.view(count, size), [code]
            for j in range(size):
                codes.append(codes[-1] * vocab + grid[:, j])
            seen = torch.stack(codes, 1)
            verifier = by_prefix[position, seen[:, :size].clamp(max=width - 1)].view(-1, vocab)
            accepted = ops.mixture_accept(
                logits, verifier, draft, length=size - c, mixture=mixture, **options
            ).accepted
            code = seen.gather(1, accepted[:, None].long()).squeeze(1)
            c = c + accepted
        assert (c == size).all()
        found = code.bincount(minlength=width).double()
        return ((found - expected) ** 2 / expected).sum().item()

    assert chi_square(True) < 54.1  # 26 degrees of freedom: passed by chance once in a thousand
    assert chi_square(False) > 500


def _loaded(monkeypatch, call):
    """Bytes that the kernels load, lane by lane."""
    total = [0]
    load = InterpreterBuilder.create_masked_load

    def counted(self, pointers, mask, *rest):
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        total[0] += int(mask.data.sum()) * size
        return load(self, pointers, mask, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", counted)
        call()
    return total[0]


def test_each_kernel_reads_its_logits_once(monkeypatch):
    """2 bytes an element for the draft; 4 for the dense acceptance; none for the sparse one."""
    vocab = 5000
    inputs = draft_case.make(torch.float16, "cpu", rows=2, temperature=0.2, vocab=vocab)
    least = draft_case.bytes_moved(inputs)
    assert least == 2 * vocab * 2
    found = _loaded(monkeypatch, lambda: draft_case.call(inputs, "triton"))
    # What is in the scratch is read ten times, as fp32: at most 64 ids a row.
    assert least <= found <= least + 2 * 64 * 4 * 12
    inputs = accept_case.make(torch.float16, "cpu", form="dense", batch=1, rows=2, vocab=vocab)
    head = inputs["weight"].numel() * 2
    least = accept_case.bytes_moved(inputs) - head
    assert least == 2 * vocab * 4
    inputs["threshold"] = torch.full((2,), -INF)
    found = _loaded(monkeypatch, lambda: accept_case.call(inputs, "triton"))
    assert least <= found <= least + 1000
    # Of pieces outside the nucleus only the draft model's logits are read; at mixture 1 of all.
    for change in ({"threshold": torch.full((2,), 1e4)}, {"mixture": 1.0}):
        found = _loaded(monkeypatch, lambda c=change: accept_case.call(inputs | c, "triton"))
        assert least / 2 <= found <= least / 2 + 1000
    inputs = accept_case.make(torch.float16, "cpu", form="sparse", batch=1, rows=2, vocab=vocab)
    least = accept_case.bytes_moved(inputs)
    assert least == inputs["list size"].sum() * (896 * 2 + 12)
    found = _loaded(monkeypatch, lambda: accept_case.call(inputs, "triton"))
    rows_of_hidden = 2 * 896 * 2
    assert least <= found <= least + rows_of_hidden + 1000


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    logits, verifier, draft, shared = _round(2, 2, 50, top_p=0.9, dtype=torch.float32)
    ours, rounds = torch.ops.pydllm, (draft.token, _ids(2, 1))
    options = (shared["counter"], _ids(3), 50, True, False, True, backend)
    arguments = (logits, verifier, *rounds, 0.5, None, draft.threshold, 1.0, None, 5, *options)
    torch.library.opcheck(ours.mixture_accept.default, arguments)
    hidden, weight = _heads(2, 2, 50, dtype=torch.float32)
    options = (0.5, None, 1.0, None, None, True, False, backend)
    arguments = (*draft.candidates[:4], hidden, weight, None, *rounds, *options)
    torch.library.opcheck(ours.mixture_accept_sparse.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fullgraph_compile(backend):
    logits, verifier, draft, shared = _round(2, 2, 50, top_p=0.9, dtype=torch.float32)
    hidden, weight = _heads(2, 2, 50, dtype=torch.float32)

    def call(logits, verifier, mixture):
        length = _ids(2, 1)
        dense = _accept(
            logits, verifier, draft, shared, length=length, mixture=mixture, backend=backend
        )
        lists = (draft.candidates, hidden, weight, draft.token)
        options = {"length": length, "mixture": mixture, "temperature": 1.0, "backend": backend}
        return dense, ops.mixture_accept_sparse(*lists, critical=True, **options)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    mixture = torch.tensor([0.5, 1.0])
    expected = call(logits, verifier, mixture)
    for got, want in zip(compiled(logits, verifier, mixture), expected, strict=True):
        _assert_same(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_graph_replays_and_agrees_with_the_cpu(dtype):
    rows, vocab, temperature = 8, 151936, 0.2
    logits, verifier, draft, shared = _round(
        2, rows, vocab, top_p=0.95, temperature=temperature, dtype=dtype, capacity=128
    )
    shared.pop("capacity")
    call = {"length": _ids(8, 5), "mixture": torch.tensor([0.7, 0.3])}
    expected = _accept(logits, verifier, draft, shared, backend="torch", **call)
    moved = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in (shared | call).items()}
    options = {"threshold": draft.threshold.cuda(), "backend": "triton", **moved}
    static, verifier, token = torch.zeros_like(logits).cuda(), verifier.cuda(), draft.token.cuda()
    ops.mixture_accept(static, verifier, token, **options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.mixture_accept(static, verifier, token, **options)
    static.copy_(logits)
    for _ in range(50):
        graph.replay()
        _assert_same([field.cpu() for field in got[:3]], expected[:3])


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
        ({"shared_vocab": 6}, ValueError, "shared_vocab: expected 1 to 5 ids, got 6"),
        ({"token": torch.zeros(3).long()}, ValueError, r"token: expected shape \(4\), got \(3,\)"),
        ({"token": torch.zeros(4).int()}, TypeError, "token: expected dtype torch.int64"),
        (
            {"length": _ids(1, 1, 1)},
            ValueError,
            "length: expected B that divides the 4 rows, got 3",
        ),
        ({"length": _ids()}, ValueError, "length: expected B that divides the 4 rows, got 0"),
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
        ({"rule": "none"}, ValueError, "rule: expected one of paper, reference, got 'none'"),
        ({"rule": "reference", "critical": True}, ValueError, "critical: expected False with rule"),
        ({"banned": torch.zeros(17).int()}, ValueError, "banned: expected at most 16 ids, got 17"),
        ({"backend": "cuda"}, RuntimeError, "mixture_accept: backend 'cuda' cannot run this call"),
        ({"logits": torch.ones(5, 4).t(), "backend": "triton"}, RuntimeError, "contiguous"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"logits": torch.ones(4, 5), "verifier_logits": torch.ones(4, 5)}
    arguments |= {"token": torch.zeros(4).long(), "length": _ids(2, 2), "mixture": 0.5} | change
    with pytest.raises(error, match=message):
        ops.mixture_accept(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.ones(3, 2)}, ValueError, r"hidden: expected shape \(4, H\), got \(3, 2"),
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
        ({"softcap": 0.0}, ValueError, "softcap: expected a positive number or None, got 0.0"),
        ({"emit": "all"}, ValueError, "emit: expected one of draft"),
        ({"backend": "cuda"}, RuntimeError, "mixture_accept_sparse: backend 'cuda' cannot run"),
    ],
)
def test_bad_lists(change, error, message):
    logits = torch.ones(4, 5)
    draft = ops.mixture_draft(logits, capacity=3)
    arguments = {"candidates": draft.candidates, "hidden": torch.ones(4, 2), "mixture": 0.5}
    arguments |= {"weight": torch.ones(9, 2), "token": draft.token, "length": _ids(2, 2)}
    arguments |= {"temperature": 0.5} | change
    with pytest.raises(error, match=message):
        ops.mixture_accept_sparse(**arguments)
