import math

import pytest
import torch

from pydllm import ops
from pydllm.reference import philox
from pydllm.testing import random_normal

INF = math.inf
KERNELS = ["triton", "cuda"]
BACKENDS = ["torch", *KERNELS]
VOCAB, SHARED = 152064, 151665  # Dream-7B, and what Qwen2.5-0.5B shares


def _counter(rows, first=7):
    counter = torch.full((rows, 3), 7, dtype=torch.int32)
    counter[:, 0] = first + torch.arange(rows, dtype=torch.int32)
    counter[:, 2] = 0
    return counter


def _ids(*ids):
    return torch.tensor(ids, dtype=torch.int32)


def _assert_same(one, other):
    for name in ("token", "logsumexp", "threshold"):
        left, right = getattr(one, name), getattr(other, name)
        assert torch.equal(left.nan_to_num(), right.nan_to_num()), name
        assert torch.equal(left.isnan(), right.isnan()), name
    for left, right in zip(one.candidates, other.candidates, strict=True):
        assert torch.equal(left, right)


def _assert_near(one, other):
    """Equal but for the log-sum-exp, a sum of exponentials in another order."""
    # A sum of n exponentials near 1 has an error of a few rounding steps; its log is up to 30.
    near = {"rtol": 1e-5, "atol": 1e-5, "equal_nan": True}
    torch.testing.assert_close(one.logsumexp.double(), other.logsumexp.double(), **near)
    _assert_same(one, other._replace(logsumexp=one.logsumexp))


@pytest.mark.parametrize("top_p", [0.3, 0.8, 0.95])
def test_nucleus_and_draft_against_a_loop(top_p):
    logits = random_normal(20, 97, seed=0, dtype=torch.float64) * 2
    noise = philox.vocab_gumbel(97, _counter(20), 5)
    draft = ops.mixture_draft(
        logits,
        temperature=0.7,
        seed=5,
        counter=_counter(20),
        top_p=top_p,
        capacity=97,
    )
    for row, x in enumerate((logits / 0.7).tolist()):
        total = math.fsum(math.exp(v) for v in x)
        nucleus, mass = [], 0.0
        for v in sorted(range(97), key=lambda v: -x[v]):
            nucleus.append(v)
            mass += math.exp(x[v]) / total
            if mass > top_p:
                break
        size = len(nucleus)
        assert draft.candidates.size[row] == size
        assert draft.candidates.ids[row].tolist() == sorted(nucleus) + [0] * (97 - size)
        listed = logits[row, sorted(nucleus)].tolist() + [-INF] * (97 - size)
        assert draft.candidates.logits[row].tolist() == listed
        drawn = noise[row, sorted(nucleus)].tolist() + [0.0] * (97 - size)
        assert draft.candidates.noise[row].tolist() == drawn
        assert draft.threshold[row] == min(logits[row, v] for v in nucleus)
        assert draft.logsumexp[row].item() == pytest.approx(math.log(total), rel=1e-12)
        assert draft.token[row] == max(nucleus, key=lambda v: (x[v] + noise[row, v].item(), -v))


# The interpreter's scratch has 64 ids and its piece 1024: the third shape overflows the one, the
# second needs two of the other.
@pytest.mark.parametrize(
    ("dtype", "shape", "top_p", "scale", "overflows"),
    [
        (torch.float32, (5, 1, 1), 0.95, 1.0, False),
        (torch.float32, (4, 1031, 1025), 0.95, 4.0, False),
        (torch.float32, (4, 300, 299), 0.8, 0.5, True),
        (torch.float16, (4, 1031, 1030), 0.95, 4.0, False),
        (torch.bfloat16, (4, 300, 300), 0.8, 4.0, False),
        (torch.bfloat16, (4, 300, 300), 0.95, 0.5, True),
        (torch.float32, (0, 64, 64), 0.95, 1.0, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", KERNELS)
def test_a_kernel_agrees_with_the_reference(backend, dtype, shape, top_p, scale, overflows):
    rows, vocab, shared = shape
    logits = (random_normal(rows, vocab, seed=1) * scale).to(dtype)
    options = {"temperature": 0.7, "counter": _counter(rows), "top_p": top_p, "seed": 2**63 + 5}
    options |= {"shared_vocab": shared, "capacity": 40}
    options["suppress_ids"] = _ids(vocab // 2, 3) if vocab > 3 else None
    one = ops.mixture_draft(logits, backend=backend, **options)
    other = ops.mixture_draft(logits, backend="torch", **options)
    _assert_near(one, other)
    exact = ops.mixture_draft(logits.double(), **options)
    assert torch.equal(one.token, exact.token)
    assert one.candidates.overflow.tolist() == [overflows] * rows


@pytest.mark.parametrize("backend", KERNELS)
def test_a_kernel_agrees_with_the_reference_on_every_option(backend):
    logits = random_normal(8, 150, seed=3) * 3
    logits[6] = -INF
    rows = _ids(7, 0, -1, 3, 3, 8, 2, 6)
    options = {
        "temperature": torch.tensor([0.5, 0.0, 0.7, math.nan, 1.0, 0.2, 2.0, 0.5]),
        "top_p": torch.tensor([0.9, 0.9, 0.9, 0.8, 1.0, 0.9, 0.99, 0.9]),
        "seed": 3,
        "counter": _counter(8),
        "suppress_ids": _ids(5, 149, 1000),
        "shared_vocab": 149,
        "capacity": 21,
    }
    drafts = [
        ops.mixture_draft(logits, rows=rows.to(dtype), backend=name, **options)
        for name, dtype in (("torch", torch.int32), (backend, torch.int64))
    ]
    _assert_near(*drafts)
    none = drafts[0].candidates.size[6] == 0
    overflow = drafts[0].candidates.overflow.tolist()
    assert overflow == [False, True, True, True, True, True, none, True]
    assert drafts[0].logsumexp[[2, 5, 7]].tolist() == [-INF] * 3
    assert drafts[0].token[[2, 5, 7]].tolist() == [0] * 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.0, 0.2, 1.0])
def test_without_a_nucleus_it_is_the_token_of_vocab_stats(temperature, backend):
    hidden, weight = random_normal(6, 8, seed=0), random_normal(90, 8, seed=1)
    logits = hidden @ weight.T
    options = {"seed": 9, "counter": _counter(6), "suppress_ids": _ids(4)}
    for top_p in (None, 1.0) if temperature else (None, 1.0, 0.9):
        draft = ops.mixture_draft(
            logits,
            temperature=temperature,
            top_p=top_p,
            shared_vocab=80,
            backend=backend,
            **options,
        )
        stats = ops.head_stats(hidden, weight[:80], temperature=temperature, **options)
        assert torch.equal(draft.token, stats.token)
        x = logits[:, :80].double().index_fill(1, torch.tensor([4]), -INF) / (temperature or 1)
        assert (draft.logsumexp - x.logsumexp(-1)).abs().max() < 1e-5
        assert draft.threshold.tolist() == [-INF] * 6
        assert draft.candidates is None
    listed = ops.mixture_draft(logits, capacity=5, backend=backend).candidates
    assert listed.overflow.all() and (listed.size == 0).all() and (listed.logits == -INF).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_limit_in_a_tensor_is_no_limit(backend):
    logits = random_normal(4, 90, seed=0)
    options = {"temperature": 0.8, "counter": _counter(4), "backend": backend}
    free = ops.mixture_draft(logits, **options)
    for value in (1.0, 0.0, -1.0, 2.0, math.nan):
        draft = ops.mixture_draft(logits, top_p=torch.full((4,), value), capacity=90, **options)
        assert torch.equal(draft.token, free.token)
        assert draft.threshold.tolist() == [-INF] * 4
        assert draft.candidates.overflow.all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_at_the_cut_are_in_the_nucleus_and_the_lowest_id_wins(backend):
    logits = torch.full((3, 70), -9.0)
    logits[:, [11, 40, 60]] = torch.tensor([1.0, 0.0, 0.0])  # masses .58, .21, .21
    options = {"counter": _counter(3), "capacity": 8, "backend": backend}
    draft = ops.mixture_draft(logits, temperature=1.0, top_p=0.7, **options)
    assert draft.candidates.ids[0].tolist() == [11, 40, 60, 0, 0, 0, 0, 0]
    assert draft.threshold.tolist() == [0.0] * 3
    # So cold that the noise does not change the scores: those of 40 and 60 tie.
    logits[:, [11, 40, 60]] = torch.tensor([1.0, 2.0, 2.0])
    draft = ops.mixture_draft(
        logits * 1e8, temperature=torch.full((3,), 1e-6), top_p=0.9, **options
    )
    assert draft.token.tolist() == [40] * 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_list_of_just_the_capacity(backend):
    logits = random_normal(1, 300, seed=4)
    options = {"temperature": 1.0, "top_p": 0.8, "counter": _counter(1), "backend": backend}
    whole = ops.mixture_draft(logits, capacity=300, **options)
    size = whole.candidates.size.item()
    assert 64 < size < 300  # more than the interpreter's scratch
    exact = ops.mixture_draft(logits, capacity=size, **options).candidates
    assert exact.size.item() == size and not exact.overflow
    assert torch.equal(exact.ids, whole.candidates.ids[:, :size])
    short = ops.mixture_draft(logits, capacity=size - 1, **options)
    assert short.candidates.overflow and short.candidates.size == 0
    assert (short.candidates.ids == 0).all() and (short.candidates.logits == -INF).all()
    assert (short.candidates.noise == 0).all()
    assert short.token == whole.token and short.threshold == whole.threshold


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_distribution_stay_alone(backend):
    logits = random_normal(6, 80, seed=5)
    options = {"temperature": 0.5, "top_p": 0.9, "counter": _counter(6), "capacity": 60}
    clean = ops.mixture_draft(logits, backend=backend, **options)
    logits[1, 3], logits[2, 79], logits[3], logits[4, ::2] = math.nan, INF, -INF, -INF
    got = ops.mixture_draft(logits, backend=backend, **options)
    for left, right in zip((*got[:3], *got[3]), (*clean[:3], *clean[3]), strict=True):
        assert torch.equal(left[[0, 5]], right[[0, 5]])
    assert got.token[1:4].tolist() == [0, 0, 0]
    assert got.logsumexp[1:3].isnan().all() and got.logsumexp[3] == -INF
    assert got.threshold[1:3].isnan().all() and got.threshold[3] == -INF
    assert got.candidates.overflow.tolist() == [False, True, True, True, False, False]
    assert got.token[4] % 2 == 1
    # What is forbidden may hold anything.
    logits = logits.nan_to_num(0, 0, 0)
    expected = ops.mixture_draft(
        logits, suppress_ids=_ids(3), shared_vocab=79, backend=backend, **options
    )
    logits[:, 3], logits[:, 79] = math.nan, INF
    got = ops.mixture_draft(
        logits, suppress_ids=_ids(3), shared_vocab=79, backend=backend, **options
    )
    _assert_same(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("top_p", [None, 0.8, 0.95])
def test_forbidden_ids_are_never_drafted(top_p, temperature, backend):
    logits = random_normal(4, 60, seed=6)
    logits[:, 7] = logits[:, 50:] = 1e4  # the mask id, and what the verifier does not know
    options = {"temperature": temperature, "top_p": top_p, "counter": _counter(4)}
    options |= {"suppress_ids": _ids(7), "shared_vocab": 50, "capacity": 50, "backend": backend}
    draft = ops.mixture_draft(logits, **options)
    assert (draft.token < 50).all() and (draft.token != 7).all()
    assert (draft.candidates.ids < 50).all() and (draft.candidates.ids != 7).all()
    assert (draft.logsumexp < 100).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_depend_on_the_batch(backend):
    logits = random_normal(5, 333, seed=7) * 3
    options = {"temperature": 0.7, "top_p": 0.9, "capacity": 32, "backend": backend}
    batch = ops.mixture_draft(logits, counter=_counter(5), **options)
    fields = (*batch[:3], *batch.candidates)
    order = [3, 0, 4]
    shuffled = ops.mixture_draft(logits[order], counter=_counter(5)[order], **options)
    strided = torch.zeros(5, 400).copy_(torch.nn.functional.pad(logits, (0, 67)))[:, :333]
    wide = ops.mixture_draft(strided, counter=_counter(5), **options)
    alone = ops.mixture_draft(logits[2:3], counter=_counter(1, 9), **options)
    for field, *others in zip(
        fields,
        (*shuffled[:3], *shuffled.candidates),
        (*wide[:3], *wide.candidates),
        (*alone[:3], *alone.candidates),
        strict=True,
    ):
        for got, expected in zip(others, (field[order], field, field[2:3]), strict=True):
            assert torch.equal(got, expected)


def test_drafts_follow_the_law_of_the_nucleus():
    rows = 40000
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0]]).expand(rows, 5)
    temperature, top_p = 0.8, 0.93
    mass = (logits[0].double() / temperature).softmax(0)
    assert mass[:2].sum() < top_p < mass[:3].sum()
    law = (logits[0, :3].double() / temperature).softmax(0)
    draft = ops.mixture_draft(logits, temperature=temperature, top_p=top_p, counter=_counter(rows))
    counts = draft.token.bincount(minlength=5).double()
    assert counts[3:].sum() == 0
    chi_square = ((counts[:3] - rows * law) ** 2 / (rows * law)).sum()
    assert chi_square < 13.8  # 2 degrees of freedom: passed by chance once in a thousand
    wrong = (logits[0, :3].double() / temperature**2).softmax(0)
    assert ((counts[:3] - rows * wrong) ** 2 / (rows * wrong)).sum() > 100


def test_seed_request_position_and_draw_each_change_the_draft():
    logits = torch.zeros(1, 1000)
    base = {"temperature": 1.0, "top_p": 0.95, "seed": 5, "counter": _counter(1)}
    tokens = [ops.mixture_draft(logits, **base).token.item()] * 2
    assert ops.mixture_draft(logits, **base).token.item() == tokens[0]
    tokens = [tokens[0], ops.mixture_draft(logits, **base | {"seed": 6}).token.item()]
    for word in range(3):
        counter = _counter(1)
        counter[0, word] += 1
        tokens.append(ops.mixture_draft(logits, **base | {"counter": counter}).token.item())
    assert len(set(tokens)) == 5


def test_fp32_drafts_are_fp64_drafts_at_full_size():
    """Of 300 rows, two at a time; in fp64 only ids that can win at all are drawn for."""
    equal = rows = 0
    for part in range(150):
        logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(part)) * 6
        temperature, counter = (0.2, 1.0)[part % 2], _counter(2, 1000 * part)
        options = {"temperature": temperature, "seed": 7, "counter": counter, "backend": "torch"}
        token = ops.mixture_draft(logits, shared_vocab=SHARED, **options).token
        for row in range(2):
            x = logits[row, :SHARED].double() / temperature
            # Noise is in (-2.9, 22.9).
            ids = (x > x.max() - 25.8).nonzero().squeeze(1)
            words = philox.philox(ids >> 2, *counter[row], 7).gather(1, (ids & 3)[:, None])
            scores = x[ids] + philox.gumbel(words.squeeze(1)).double()
            equal += int(token[row] == ids[scores.argmax()])
            rows += 1
    assert (equal, rows) == (300, 300)


def test_round_counter():
    start, request = _ids(7, 30), _ids(3, 2**31 - 1)
    counter = ops.round_counter(start, request, 3)
    assert counter.dtype == torch.int32
    assert counter.tolist() == [
        *([7, 3, 1], [8, 3, 0], [9, 3, 0]),
        *([30, 2**31 - 1, 1], [31, 2**31 - 1, 0], [32, 2**31 - 1, 0]),
    ]
    for emit in ("draft_then_target", "target"):
        assert ops.round_counter(start, request, 3, emit=emit)[:, 2].tolist() == [0] * 6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"temperatures": True, "rows": True}], ids=["one", "each"])
def test_opcheck(options, backend):
    each = torch.tensor([0.5, 0.0, 1.0]) if options else None
    rows = _ids(2, -1, 0) if options else None
    where = (_counter(3), _ids(3), each, rows, 40)
    arguments = (random_normal(3, 50, seed=0), 0.5, 3, *where, 0.9, None, 8, backend)
    torch.library.opcheck(torch.ops.pydllm.mixture_draft.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fullgraph_compile(backend):
    logits = random_normal(4, 50, seed=0)

    def call(logits, start, seed):
        counter = ops.round_counter(start, start, 2)
        options = {"counter": counter, "seed": seed, "capacity": 8, "backend": backend}
        return [
            ops.mixture_draft(logits, temperature=0.7, top_p=top_p, **options)
            for top_p in (0.9, None)
        ]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for got, expected in zip(
        compiled(logits, _ids(3, 4), 5), call(logits, _ids(3, 4), 5), strict=True
    ):
        _assert_same(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_a_captured_graph_replays_and_agrees_with_the_cpu(temperature, backend):
    logits = (random_normal(16, VOCAB, seed=0) * 3).bfloat16()
    options = {"temperature": temperature, "top_p": 0.95, "capacity": 128, "shared_vocab": SHARED}
    expected = ops.mixture_draft(logits, counter=_counter(16), **options)
    static, counter = torch.zeros_like(logits).cuda(), _counter(16).cuda()
    call = {"counter": counter, "backend": backend, **options}
    ops.mixture_draft(static, **call)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        draft = ops.mixture_draft(static, **call)
    static.copy_(logits)
    for _ in range(50):
        graph.replay()
        found = ops.Candidates(*(field.cpu() for field in draft.candidates))
        moved = ops.MixtureDraft(*(field.cpu() for field in draft[:3]), found)
        _assert_near(moved, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.ones(4)}, ValueError, r"logits: expected shape \(R, V\), got \(4,\)"),
        ({"logits": torch.ones(3, 0)}, ValueError, "logits: expected at least one id, got none"),
        ({"logits": torch.ones(3, 4).int()}, TypeError, "logits: expected dtype"),
        ({"logits": torch.ones(3, 4, requires_grad=True)}, ValueError, "got logits with requires"),
        ({"temperature": -1.0}, ValueError, "temperature: expected a number in .*, got -1.0"),
        ({"temperature": torch.ones(2)}, ValueError, r"temperature: expected shape \(3\)"),
        ({"counter": None}, ValueError, r"counter: expected \(R, 3\) int32 at a temperature"),
        ({"counter": torch.ones(3, 3)}, TypeError, "counter: expected dtype torch.int32"),
        ({"seed": -1}, ValueError, r"seed: expected an int in \[0, 2\^64\), got -1"),
        ({"top_p": 0.0}, ValueError, r"top_p: expected a number in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, ValueError, r"top_p: expected a number in \(0, 1\], got 1.5"),
        ({"top_p": math.nan}, ValueError, "top_p: expected a number"),
        ({"top_p": torch.ones(2)}, ValueError, r"top_p: expected shape \(3\), got \(2,\)"),
        ({"top_p": torch.ones(3).double()}, TypeError, "top_p: expected dtype torch.float32"),
        ({"shared_vocab": 0}, ValueError, r"shared_vocab: expected an int in \[1, 4\], got 0"),
        ({"shared_vocab": 5}, ValueError, r"shared_vocab: expected an int in \[1, 4\], got 5"),
        ({"capacity": -1}, ValueError, r"capacity: expected an int in \[0, 1024\], got -1"),
        ({"capacity": 1025}, ValueError, r"capacity: expected an int in \[0, 1024\], got 1025"),
        ({"rule": "reference"}, TypeError, "rule is no argument any more, use the square of"),
        (
            {"suppress_ids": torch.zeros(17).int()},
            ValueError,
            "suppress_ids: expected at most 16 ids, got 17",
        ),
        ({"rows": torch.ones(3)}, TypeError, "rows: expected dtype torch.int32, torch.int64"),
        ({"backend": "cuda"}, RuntimeError, "mixture_draft: backend 'cuda' cannot run this call"),
    ],
)
def test_bad_input(change, error, message):
    refused(change, error, message)


@pytest.mark.parametrize("backend", KERNELS)
def test_what_a_kernel_does_not_take(backend):
    for logits, message in (
        (torch.ones(4, 3).t(), "contiguous"),
        (torch.ones(3, 4).double(), "takes fp32, fp16"),
    ):
        refused({"logits": logits, "backend": backend}, RuntimeError, message)


def refused(change, error, message):
    arguments = {"temperature": 0.5, "top_p": 0.9, "counter": _counter(3)}
    arguments |= {"logits": torch.ones(3, 4)} | change
    with pytest.raises(error, match=message):
        ops.mixture_draft(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"start": _ids(1)[None]}, ValueError, r"start: expected shape \(B\), got \(1, 1\)"),
        ({"start": torch.ones(2)}, TypeError, "start: expected dtype torch.int32"),
        ({"request": _ids(1)}, ValueError, r"request: expected shape \(2\), got \(1,\)"),
        ({"rows": 0}, ValueError, r"rows: expected an int of at least 1, got 0"),
        ({"emit": "all"}, ValueError, "emit: expected one of draft, draft_then_target, target"),
    ],
)
def test_bad_round(change, error, message):
    with pytest.raises(error, match=message):
        ops.round_counter(**{"start": _ids(1, 2), "request": _ids(1, 2), "rows": 3} | change)
