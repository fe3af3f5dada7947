import math

import pytest
import torch

from pydllm import ops
from pydllm.ops.vocab_stats import VocabStats
from pydllm.testing import assert_within_budget, random_normal

INF = math.inf
BACKENDS = ["torch", "triton", "cuda"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
STATISTICS = ["prob", "entropy", "margin", "logsumexp"]
# One id, a prime, one tile of the interpreter's table less and more one, several tiles of both its
# rows; 33 rows are one more than a block of them.
SHAPES = [(1, 1), (33, 79), (20, 1023), (20, 1025), (33, 2501), (9, 20000), (0, 64)]


def random_logits(rows, vocab, dtype=torch.float32, seed=0):
    return (random_normal(rows, vocab, seed=seed) * 3).to(dtype)


def counters(rows, position=0, request=7, draw=3):
    fixed = torch.tensor([[position, request, draw]], dtype=torch.int32).repeat(rows, 1)
    fixed[:, 0] += torch.arange(rows, dtype=torch.int32)
    return fixed


def ids(*ids):
    return torch.tensor(ids, dtype=torch.int32)


def by_hand(logits, token=None, temperature=0.0, suppress_ids=(), softcap=None):
    """One row at a time, in Python's floats; ``token`` None takes the arg-max."""
    results = []
    for row in logits.double().tolist():
        x = [value if softcap is None else softcap * math.tanh(value / softcap) for value in row]
        x = [-INF if i in suppress_ids else value for i, value in enumerate(x)]
        x = [value / temperature for value in x] if temperature else x
        best = max(x)
        chosen = x.index(best) if token is None else int(token[len(results)])
        total = sum(math.exp(value - best) for value in x)
        p = [math.exp(value - best) / total for value in x]
        first, second = sorted(p, reverse=True)[:2] if len(p) > 1 else (p[0], 0.0)
        entropy = -sum(each * math.log(each) for each in p if each > 0)
        results.append((chosen, p[chosen], entropy, first - second, best + math.log(total)))
    columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*results, strict=True)]
    return VocabStats(columns[0].long(), *columns[1:])


def assert_same(one, other, rows=slice(None)):
    for name, left, right in zip(VocabStats._fields, one, other, strict=True):
        torch.testing.assert_close(left, right[rows], rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"suppress_ids": (3, 40, 3)},
        {"softcap": 4.0},
        {"softcap": 4.0, "suppress_ids": (0,)},
    ],
    ids=str,
)
@pytest.mark.parametrize("vocab", [1, 2, 79, 300])
def test_the_definition_agrees_with_a_loop(vocab, options):
    if vocab == 1 and "suppress_ids" in options:
        options = options | {"suppress_ids": (9,)}
    logits = random_logits(7, vocab, torch.float64)
    expected = by_hand(logits, **options)
    if "suppress_ids" in options:
        options = options | {"suppress_ids": ids(*options["suppress_ids"])}
    got = ops.vocab_stats(logits, **options)
    assert torch.equal(got.token, expected.token)
    for one, other in zip(got[1:], expected[1:], strict=True):
        assert one.dtype == torch.float64
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def _eager(logits, name, suppress_ids, softcap):
    """What people write, in the dtype of fp32 or fp64 logits."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    x = x if suppress_ids is None else x.index_fill(1, suppress_ids.long(), -INF)
    probs = torch.softmax(x, -1)
    if name == "prob":
        return probs.max(-1).values
    if name == "entropy":
        return -torch.special.xlogy(probs, probs).sum(-1)
    if name == "margin":
        top = probs.topk(min(2, x.shape[1])).values
        return top[:, 0] - (top[:, 1] if x.shape[1] > 1 else 0)
    return torch.logsumexp(x, -1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["plain", "suppress_ids", "softcap"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_stay_within_the_error_budget(backend, mode, dtype, shape):
    logits = random_logits(*shape, dtype)
    suppress_ids = ids(shape[1] // 2) if mode == "suppress_ids" and shape[1] > 1 else None
    softcap = 5.0 if mode == "softcap" else None
    stats = ops.vocab_stats(logits, suppress_ids=suppress_ids, softcap=softcap, backend=backend)
    assert stats.token.dtype == torch.int64
    assert stats.token.shape == shape[:1]
    if softcap is None and shape[0]:
        plain = logits if suppress_ids is None else logits.index_fill(1, suppress_ids.long(), -INF)
        assert torch.equal(stats.token, plain.max(-1).indices)
    for name in STATISTICS:
        got = getattr(stats, name)
        assert got.dtype == torch.float32
        assert got.shape == shape[:1]
        if shape[0]:
            assert_within_budget(got, lambda x, n=name: _eager(x, n, suppress_ids, softcap), logits)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lowest_id(backend):
    vocab = 2501
    logits = torch.randint(-2, 3, (20, vocab), generator=torch.Generator().manual_seed(0)).float()
    logits[0] = 1.0
    logits[1, [1023, 1024, 2500]] = 5.0
    logits[2, [1024, 2048]] = 5.0
    logits[3] = 0.0
    logits[3, 2500] = -0.0
    stats = ops.vocab_stats(logits, backend=backend)
    assert torch.equal(stats.token, by_hand(logits).token)
    assert stats.token[:4].tolist() == [0, 1023, 1024, 0]
    assert (stats.margin == 0).all()
    assert stats.entropy[0] == pytest.approx(math.log(vocab), rel=1e-6)
    # Scores that tie: below one unit of a huge logit the noise is lost.
    huge = torch.full((3, vocab), 1e30)
    sampled = ops.vocab_stats(huge, temperature=1.0, counter=counters(3), backend=backend)
    assert (sampled.token == 0).all()


@pytest.mark.parametrize("temperature", [0.0, 0.5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_distribution_stay_alone(backend, temperature):
    logits = random_logits(8, 1100)
    clean = logits.clone()
    logits[0] = -INF
    logits[1, 1050] = math.nan
    logits[2] = math.nan
    logits[3, 3] = INF
    logits[4, ::2] = -INF
    logits[5] = -INF
    logits[5, 1099] = -2.0
    logits[6] = -INF
    logits[6, 1030] = math.nan
    options = {"temperature": temperature, "counter": counters(8), "backend": backend}
    stats = ops.vocab_stats(logits, **options)
    assert [each[0].item() for each in stats] == [0, 0, 0, 0, -INF]
    for row in (1, 2, 3, 6):
        assert stats.token[row] == 0
        assert all(each[row].isnan() for each in stats[1:])
    for row in (4, 5, 7):
        assert all(each[row].isfinite() for each in stats)
    assert stats.token[4] % 2 == 1
    assert [each[5].item() for each in stats] == [1099, 1, 0, 1, -2]
    assert_same([each[7:] for each in stats], ops.vocab_stats(clean, **options), slice(7, None))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_id(backend):
    logits = torch.tensor([[3.5], [-INF], [math.nan], [INF], [-1e38]])
    stats = ops.vocab_stats(logits, backend=backend)
    assert (stats.token == 0).all()
    for values, expected in zip(
        stats[1:],
        ([1, 0, 1], [0, 0, 0], [1, 0, 1], [3.5, -INF, torch.tensor(-1e38).item()]),
        strict=True,
    ):
        assert values[[0, 1, 4]].tolist() == expected
        assert values[[2, 3]].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_suppressed_ids_count_as_minus_infinity(backend):
    logits = random_logits(6, 1100)
    logits[:, 1090] = 50.0
    logits[1, 1090] = math.nan
    logits[2, 1090] = INF
    logits[3, 0] = 40.0
    removed = logits.clone()
    removed[:, [0, 1090]] = -INF
    options = {"temperature": 0.7, "counter": counters(6), "backend": backend}
    outside = ids(1090, -1, 1100, 0, 2**31 - 1, -(2**31), 1090)
    for kwargs in ({"backend": backend}, options, options | {"tempered": True}):
        stats = ops.vocab_stats(logits, suppress_ids=outside, **kwargs)
        assert_same(stats, ops.vocab_stats(removed, **kwargs))
        assert not torch.isin(stats.token, torch.tensor([0, 1090])).any()
        assert_same(
            ops.vocab_stats(removed, suppress_ids=ids(), **kwargs),
            ops.vocab_stats(removed, **kwargs),
        )
    every = ops.vocab_stats(logits[:, :3], suppress_ids=ids(2, 0, 1), backend=backend)
    assert [each[4].item() for each in every] == [0, 0, 0, 0, -INF]


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_apart_logits_neither_overflow_nor_give_nan(backend):
    largest = torch.finfo(torch.float32).max
    logits = torch.tensor(
        [[largest, -largest, 0.0], [-largest, -largest, -INF], [0.0, -200.0, -90]]
    )
    stats = ops.vocab_stats(logits, backend=backend)
    assert stats.token.tolist() == [0, 0, 0]
    assert stats.prob.tolist() == [1.0, 0.5, 1.0]
    assert stats.margin.tolist() == [1.0, 0.0, 1.0]
    torch.testing.assert_close(stats.entropy, torch.tensor([0.0, math.log(2), 0.0]))
    capped = ops.vocab_stats(torch.tensor([[1e30, -1e30, -INF]]), softcap=2.0, backend=backend)
    assert capped.token.item() == 0
    assert capped.prob.item() == pytest.approx(1 / (1 + math.exp(-4)), rel=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_depends_on_itself_alone(backend, temperature):
    logits, counter = random_logits(37, 1100), counters(37)
    options = {"temperature": temperature, "seed": 9, "suppress_ids": ids(5), "backend": backend}
    together = ops.vocab_stats(logits, counter=counter, **options)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    permuted = ops.vocab_stats(logits[order], counter=counter[order], **options)
    assert_same(permuted, together, order)
    for rows in (slice(0, 1), slice(36, 37), slice(5, 12)):
        alone = ops.vocab_stats(logits[rows], counter=counter[rows], **options)
        assert_same(alone, together, rows)


def test_a_row_depends_on_itself_alone_whatever_the_threads():
    threads = torch.get_num_threads()
    logits = random_logits(3, 70001)
    torch.set_num_threads(1)
    expected = ops.vocab_stats(logits)
    try:
        for count in (2, 3):
            torch.set_num_threads(count)
            assert_same(ops.vocab_stats(logits), expected)
            assert_same(ops.vocab_stats(logits[1:2]), expected, slice(1, 2))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_read_in_place_and_not_written(backend):
    wide, counters = random_logits(6, 200), torch.arange(36, dtype=torch.int32).view(6, 6)
    kept = wide.clone()
    logits, counter = wide[::2, 50:129], counters[::2, ::2]
    options = {"temperature": 0.9, "suppress_ids": ids(7), "backend": backend}
    for tempered in (False, True):
        one = ops.vocab_stats(logits, counter=counter, tempered=tempered, **options)
        other = ops.vocab_stats(
            logits.contiguous(), counter=counter.contiguous(), tempered=tempered, **options
        )
        assert_same(one, other)
    ops.vocab_stats(logits, backend=backend)
    assert torch.equal(wide, kept)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8}], ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_listed_rows_count(backend, dtype, options):
    check_rows(backend, dtype, options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_listed_rows_count_behind_filters(backend):
    check_rows(backend, torch.int32, {"top_k": 9, "top_p": 0.8})


@pytest.mark.parametrize("backend", BACKENDS)
def test_filters_for_each_row_are_those_of_the_row_alone(backend):
    logits, noise = random_logits(7, 300), counters(7)
    logits[3] = logits[3].round()  # ties
    top_k = [5, 1, 300, 2**31 - 1, 40, -3, 7]
    top_p = [0.9, 0.3, 1.0, 0.5, 2.0, 0.8, 0.0]
    both = {
        "top_k": ids(*top_k),
        "top_p": torch.tensor(top_p),
        "temperature": 0.8,
        "counter": noise,
    }
    for names in (("top_k",), ("top_p",), ("top_k", "top_p")):
        options = {
            name: value for name, value in both.items() if name in names or "top" not in name
        }
        got = ops.vocab_stats(logits, backend=backend, **options)
        for row in range(7):
            own = {"top_k": max(top_k[row], 1), "top_p": top_p[row] if 0 < top_p[row] < 1 else None}
            own = {name: own[name] for name in names}
            part = slice(row, row + 1)
            alone = ops.vocab_stats(
                logits[part], temperature=0.8, counter=noise[part], backend=backend, **own
            )
            assert_same(alone, got, part)


def check_rows(backend, dtype, options):
    logits = random_logits(9, 1100)
    kept = logits.clone()
    rows = torch.tensor([8, 0, 0, -1, 5, 9, 2**31 - 1], dtype=dtype)
    options = options | {"counter": counters(7), "backend": backend}
    stats = ops.vocab_stats(logits, rows=rows, **options)
    wanted = logits.new_full((7, 1100), -INF)
    wanted[[0, 1, 2, 4]] = logits[[8, 0, 0, 5]]
    assert_same(stats, ops.vocab_stats(wanted, **options))
    assert [field[3].item() for field in stats] == [0, 0, 0, 0, -INF]
    assert torch.equal(logits, kept)
    none = ops.vocab_stats(logits, rows=rows[:0], backend=backend)
    assert [len(field) for field in none] == [0] * 5


@pytest.mark.parametrize("vocab", [126464, 152064, 262144])
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_vocabularies(backend, vocab):
    logits = random_logits(4, vocab)
    logits[1] = 0.25
    logits[2] = -INF
    logits[2, vocab - 1] = 3.0
    logits[3, 77] = 60.0
    stats, exact = ops.vocab_stats(logits, backend=backend), ops.vocab_stats(logits.double())
    assert torch.equal(stats.token, exact.token)
    assert stats.token[1:].tolist() == [0, vocab - 1, 77]
    assert ((stats.entropy - exact.entropy).abs() < 1e-5).all()
    assert ((stats.prob / exact.prob - 1).abs() < 1e-5).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_entropy_knows_neither_a_constant_nor_the_order(backend):
    logits = random_logits(3, 5003)
    order = torch.randperm(5003, generator=torch.Generator().manual_seed(0))
    expected = ops.vocab_stats(logits.double()).entropy
    for moved in (logits, logits + 7.25, logits - 300, logits[:, order]):
        found = ops.vocab_stats(moved, backend=backend).entropy
        assert ((found - expected).abs() < 1e-4).all()  # the constant rounds the logits themselves


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    op, logits = torch.ops.pydllm.vocab_stats.default, random_logits(3, 16)
    plain = (None, None, None, None, None, None, backend)
    torch.library.opcheck(op, (logits, 0.0, 0, None, None, False, None, *plain))
    torch.library.opcheck(op, (logits, 0.5, -3, counters(3), ids(1), True, 5.0, *plain))
    options = (torch.tensor([0.0, 0.7]), ids(2, 0), 3, 0.9, None, None, backend)
    torch.library.opcheck(op, (logits, 0.0, 1, counters(2), ids(1), False, None, *options))
    each = (None, None, None, None, ids(3, 1, 16), torch.tensor([0.5, 1.0, 0.9]), backend)
    torch.library.opcheck(op, (logits, 0.5, 1, counters(3), None, False, None, *each))


@pytest.mark.parametrize("backend", BACKENDS)
def test_fullgraph_compile(backend):
    torch._dynamo.reset()  # each backend is a compilation of the same function
    logits, counter = random_logits(3, 40), counters(3)

    def call(logits, seed, temperature):
        return ops.vocab_stats(
            logits,
            temperature=temperature,
            seed=seed,
            counter=counter,
            suppress_ids=ids(3),
            backend=backend,
        )

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for seed, temperature in ((0, 0.0), (1, 0.7), (2**64 - 1, 0.9), (5, 1.1)):
        assert_same(compiled(logits, seed, temperature), call(logits, seed, temperature))


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_captured_graph_replays_and_agrees_with_the_cpu(temperature):
    logits, counter = random_logits(32, 126464), counters(32)
    options = {"temperature": temperature, "seed": 3, "backend": "triton"}
    on_gpu, counter_on_gpu = torch.zeros_like(logits).cuda(), torch.zeros_like(counter).cuda()
    ops.vocab_stats(on_gpu, counter=counter_on_gpu, **options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stats = ops.vocab_stats(on_gpu, counter=counter_on_gpu, **options)
    on_gpu.copy_(logits)
    counter_on_gpu.copy_(counter)
    graph.replay()
    expected = ops.vocab_stats(logits, counter=counter, temperature=temperature, seed=3)
    assert torch.equal(stats.token.cpu(), expected.token)
    for one, other in zip(stats[1:], expected[1:], strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=1e-6)
    first = [each.clone() for each in stats]
    for _ in range(50):
        graph.replay()
        assert_same(stats, first)


def test_what_the_cuda_kernel_does_not_take(cuda_on_cpu):
    for change, message in (
        ({"top_k": torch.ones(6).int()[::2]}, "top_k must be contiguous"),
        ({"logits": torch.ones(4, 3).t()}, "must be rows of contiguous"),
        ({"logits": torch.ones(3, 4).double()}, "takes fp32, fp16 and bf16"),
        ({"suppress_ids": torch.zeros(4).int()[::2]}, "suppress_ids must be contiguous"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.vocab_stats(**{"logits": torch.ones(3, 4)} | change, backend="cuda")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.ones(4)}, ValueError, r"logits: expected shape \(R, V\), got \(4,\)"),
        ({"logits": torch.ones(3, 0)}, ValueError, r"at least one id, got shape \(3, 0\)"),
        (
            {"logits": torch.ones(3, 4).int()},
            TypeError,
            "logits: expected dtype .*, got torch.int32",
        ),
        ({"logits": torch.ones(3, 4, requires_grad=True)}, ValueError, "got logits with requires"),
        ({"temperature": -1.0}, ValueError, "temperature: expected a number in .*, got -1.0"),
        (
            {"temperature": math.nan},
            ValueError,
            r"temperature: expected a number in \[0, 1e\+18\], got nan",
        ),
        ({"temperature": INF}, ValueError, r"temperature: expected a number in .*, got inf"),
        ({"temperature": 1e-9}, ValueError, "temperature: expected 0 or at least 1e-6, got 1e-09"),
        ({"temperature": 1.0}, ValueError, r"counter: expected \(R, 3\) int32 at a temperature"),
        ({"seed": -1}, ValueError, r"seed: expected an int in \[0, 2\^64\), got -1"),
        ({"seed": 2**64}, ValueError, "seed: expected an int"),
        (
            {"counter": counters(2)},
            ValueError,
            r"counter: expected shape \(3, 3\), got \(2, 3\)",
        ),
        (
            {"counter": counters(3).long()},
            TypeError,
            "counter: expected dtype torch.int32, got",
        ),
        ({"tempered": True}, ValueError, "tempered: expected False at temperature 0, got True"),
        (
            {"suppress_ids": ids(1)[None]},
            ValueError,
            r"suppress_ids: expected shape \(n\), got \(1, 1\)",
        ),
        (
            {"suppress_ids": ids(1).long()},
            TypeError,
            "suppress_ids: expected dtype torch.int32, got",
        ),
        (
            {"suppress_ids": torch.zeros(17).int()},
            ValueError,
            "suppress_ids: expected at most 16 ids, got 17",
        ),
        ({"softcap": 0.0}, ValueError, "softcap: expected a finite number above 0, got 0.0"),
        ({"softcap": INF}, ValueError, "softcap: expected a finite number above 0, got inf"),
        ({"softcap": math.nan}, ValueError, "softcap: expected a finite number above 0, got nan"),
        ({"temperature": torch.ones(2)}, ValueError, r"temperature: expected shape \(3\), got"),
        ({"temperature": torch.ones(3).double()}, TypeError, "temperature: expected dtype"),
        ({"temperature": torch.ones(3)}, ValueError, r"counter: expected \(R, 3\) int32 at a"),
        ({"banned": None}, TypeError, "banned is no argument any more, use suppress_ids"),
        ({"rows": torch.ones(3)}, TypeError, "rows: expected dtype torch.int32, torch.int64, got"),
        ({"rows": ids(1)[None]}, ValueError, r"rows: expected shape \(N\), got \(1, 1\)"),
        ({"logits": torch.ones(0, 4), "rows": ids(0)}, ValueError, "logits: expected a row"),
        ({"top_k": torch.ones(2, dtype=torch.int32)}, ValueError, r"top_k: expected shape \(3\)"),
        ({"top_p": torch.ones(3).double()}, TypeError, "top_p: expected dtype"),
        ({"top_k": 0}, ValueError, "top_k: expected an int of at least 1, got 0"),
        ({"top_p": 0.0}, ValueError, r"top_p: expected a number in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, ValueError, "top_p: expected a number"),
        ({"top_p": math.nan}, ValueError, "top_p: expected a number"),
        ({"backend": "gpu"}, ValueError, "backend: expected one of auto, cuda, triton, torch"),
        ({"backend": "cuda"}, RuntimeError, "vocab_stats: backend 'cuda' cannot run this call"),
        (
            {"logits": torch.ones(3, 4).double(), "backend": "triton"},
            RuntimeError,
            "takes fp32, fp1",
        ),
        (
            {"logits": torch.ones(4, 3).t(), "backend": "triton"},
            RuntimeError,
            "must be rows of con",
        ),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"logits": torch.ones(3, 4)} | change
    with pytest.raises(error, match=message):
        ops.vocab_stats(**arguments)
