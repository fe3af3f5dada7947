import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from pydllm import ops
from pydllm.ops.head_stats import StatsPartial
from pydllm.ops.vocab_stats import VocabStats
from pydllm.testing import random_normal

ROOT = Path(__file__).parents[2]
INF = math.inf
BACKENDS = ["torch", "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# One of each, primes, one off the interpreter's tile in each dimension, none.
SHAPES = [(1, 1, 1), (3, 79, 17), (65, 1023, 130), (5, 1025, 127), (64, 2501, 64), (0, 64, 8)]


def _operands(rows, vocab, width, dtype=torch.float32, seed=0):
    hidden = random_normal(rows, width, seed=seed).to(dtype)
    weight = (random_normal(vocab, width, seed=seed + 1) * 3 / width**0.5).to(dtype)
    return hidden, weight


def _counter(rows):
    fixed = torch.tensor([[5, 7, 3]], dtype=torch.int32).repeat(rows, 1)
    fixed[:, 0] += torch.arange(rows, dtype=torch.int32)
    return fixed


def _ids(*ids):
    return torch.tensor(ids, dtype=torch.int32)


def _assert_same(one, other):
    for name, left, right in zip(VocabStats._fields, one, other, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True, msg=name)


def _assert_near(one, other):
    """Equal tokens; floats to what sums of the logits in another order change."""
    assert torch.equal(one.token, other.token)
    for name, left, right in zip(VocabStats._fields[1:], one[1:], other[1:], strict=True):
        # A logit of size 10 summed in another order moves by 1e-6 and takes the rest along.
        torch.testing.assert_close(
            left.double(), right.double(), rtol=1e-5, atol=1e-5, equal_nan=True, msg=name
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_vocab_stats_of_the_logits(backend, dtype, shape):
    hidden, weight = _operands(*shape, dtype)
    logits = hidden.double() @ weight.double().T
    options = {"suppress_ids": _ids(shape[1] // 2, 3) if shape[1] > 3 else None}
    exact = ops.vocab_stats(logits, **options)
    got = ops.head_stats(hidden, weight, backend=backend, **options)
    assert [field.dtype for field in got] == [torch.int64] + [torch.float32] * 4
    _assert_near(got, exact)
    assert ((got.entropy - exact.entropy).abs() < 1e-5).all()
    assert ((got.prob / exact.prob - 1).abs() < 1e-5).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_option_at_once(backend):
    hidden, weight = _operands(9, 1100, 48)
    bias = random_normal(1100, seed=4)
    rows = _ids(8, 0, -1, 3, 3, 9)
    options = {
        "temperature": torch.tensor([0.0, 0.5, 1.0, 2.0, math.nan, 1.0]),
        "seed": 2**63 + 1,
        "counter": _counter(6),
        "suppress_ids": _ids(1090, 4),
        "tempered": True,
        "softcap": 4.0,
    }
    logits = torch.cat((hidden.double() @ weight.double().T + bias, torch.full((1, 1100), -INF)))
    exact = ops.vocab_stats(logits[rows.long().where((rows >= 0) & (rows < 9), 9)], **options)
    for dtype in (torch.int32, torch.int64):
        got = ops.head_stats(
            hidden, weight, bias=bias, rows=rows.to(dtype), backend=backend, **options
        )
        _assert_near(got, exact)
    assert [field[2].item() for field in got] == [0, 0, 0, 0, -INF]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("backend", BACKENDS)
def test_shards_merge_to_the_whole(cuda_on_cpu, backend, temperature):
    hidden, weight = _operands(7, 3000, 32)
    weight[2500:2600] = weight[100:200]  # ties between shards
    bias = random_normal(3000, seed=9)
    options = {
        "temperature": temperature,
        "seed": 11,
        "counter": _counter(7),
        "suppress_ids": _ids(0, 1500, 2999),
        "backend": backend,
    }
    whole = ops.head_stats(hidden, weight, bias=bias, **options)
    cuts = [0, 4, 1024, 2048, 3000]
    partials = [
        ops.head_stats_partial(hidden, weight[a:b], bias=bias[a:b], vocab_offset=a, **options)
        for a, b in zip(cuts, cuts[1:], strict=False)
    ]
    for order in (partials, partials[::-1]):
        _assert_near(ops.merge_stats(*order, backend=backend), whole)
    one = ops.head_stats_partial(hidden, weight, bias=bias, **options)
    _assert_same(ops.merge_stats(one, backend=backend), whole)
    # Folded to one piece, it says the same in fewer numbers.
    assert (one.ids.shape[2] > 1) == (backend == "triton")
    folded = ops.fold_stats(one)
    assert folded.ids.shape[2] == folded.values.shape[2] == 1
    _assert_near(ops.merge_stats(folded, backend=backend), whole)
    # What one backend left behind, the other can merge.
    for other in (*BACKENDS, "cuda"):
        _assert_near(ops.merge_stats(*partials, backend=other), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lowest_id(backend):
    # Integers: every sum is exact, so equal columns tie to the bit.
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randint(-2, 3, (20, 8), generator=generator).float()
    weight = torch.randint(-1, 2, (2501, 8), generator=generator).float()
    hidden[0] = 0
    logits = hidden @ weight.T
    got = ops.head_stats(hidden, weight, backend=backend)
    assert got.token.tolist() == [row.index(max(row)) for row in logits.tolist()]
    top = logits.topk(2).values
    assert torch.equal(got.margin == 0, top[:, 0] == top[:, 1])
    assert got.entropy[0].item() == pytest.approx(math.log(2501), rel=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 0.5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_distribution_stay_alone(backend, temperature):
    hidden, weight = _operands(6, 1100, 16)
    options = {"temperature": temperature, "counter": _counter(6), "backend": backend}
    clean = ops.head_stats(hidden, weight, **options)
    hidden[1, 3], hidden[4, 0] = math.nan, INF
    got = ops.head_stats(hidden, weight, **options)
    for row in (1, 4):
        assert got.token[row] == 0
        assert all(field[row].isnan() for field in got[1:])
    keep = torch.tensor([0, 2, 3, 5])
    _assert_same([field[keep] for field in got], [field[keep] for field in clean])
    every = ops.head_stats(hidden, weight[:2], suppress_ids=_ids(0, 1), **options)
    assert [field[0].item() for field in every] == [0, 0, 0, 0, -INF]
    bias = torch.full((1100,), -INF)
    bias[1050] = 0
    only = ops.head_stats(hidden[:1], weight, bias=bias, **options | {"counter": _counter(1)})
    assert [field.item() for field in only[:4]] == [1050, 1, 0, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_seed_gives_the_tokens_of_vocab_stats(backend):
    hidden, weight = _operands(40, 2501, 24)
    options = {"temperature": 0.9, "seed": 5, "counter": _counter(40)}
    expected = ops.vocab_stats(F.linear(hidden, weight), **options)
    _assert_near(ops.head_stats(hidden, weight, backend=backend, **options), expected)
    some = torch.tensor([30, 2, 17])
    alone = ops.head_stats(
        hidden, weight, rows=some, backend=backend, **options | {"counter": _counter(40)[some]}
    )
    assert torch.equal(alone.token, expected.token[some])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_row_depends_on_itself_alone(temperature, monkeypatch):
    from pydllm.kernels import head_stats as kernel

    hidden, weight = _operands(130, 1100, 33)
    options = {"temperature": temperature, "seed": 9, "backend": "triton"}
    together = ops.head_stats(hidden, weight, counter=_counter(130), **options)
    for rows in (slice(0, 1), slice(129, 130), slice(50, 120)):
        alone = ops.head_stats(hidden[rows], weight, counter=_counter(130)[rows], **options)
        _assert_same(alone, [field[rows] for field in together])
    monkeypatch.setattr(kernel, "_PARTIAL_BYTES", 1)  # a block of rows at a time
    _assert_same(ops.head_stats(hidden, weight, counter=_counter(130), **options), together)
    order = torch.randperm(130, generator=torch.Generator().manual_seed(0))
    mixed = ops.head_stats(hidden, weight, rows=order, counter=_counter(130)[order], **options)
    _assert_same(mixed, [field[order] for field in together])


MEMORY = """
import resource, torch
from pydllm import ops
torch.set_num_threads(1)
hidden, weight = torch.randn(1024, 16), torch.randn(152064, 16)
ids = torch.arange(1024, dtype=torch.int32)[:, None].repeat(1, 3)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
for options in ({}, {"temperature": 1.0, "counter": ids}):
    small = options | {"counter": ids[:64]} if options else {}
    ops.head_stats(hidden[:64], weight[:9000], **small)  # what the first call loads
    before = peak()
    ids_wanted = 8192 if options else len(weight)  # noise is slow here
    ops.head_stats(hidden, weight[:ids_wanted], backend="torch", **options)
    print(peak() - before)
"""


def test_logits_are_never_stored_in_torch():
    """1024 rows of 152064 ids: the logits would take 623 MB."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, cwd=ROOT, check=True
    )
    for extra in map(int, done.stdout.split()):
        assert extra < 16e6


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_are_never_stored_in_triton(monkeypatch, temperature):
    from pydllm.kernels import _row_stats, _tiles
    from pydllm.kernels import head_stats as kernel

    class Launched:
        def __getitem__(self, grid):
            return lambda **arguments: None

    allocated = []

    def empty(*arguments):
        tensors = _row_stats.empty_partial(*arguments)
        allocated.append(sum(t.numel() * t.element_size() for t in tensors))
        return tensors

    monkeypatch.setattr(_tiles, "arch", lambda device: 90)
    monkeypatch.setattr(kernel, "_head_stats_tile_kernel", Launched())
    monkeypatch.setattr(_row_stats, "_row_stats_merge_kernel", Launched())
    monkeypatch.setattr(kernel, "empty_partial", empty)
    for dtype in DTYPES:
        hidden = torch.empty(1024, 64, dtype=dtype, device="meta")
        weight = torch.empty(152064, 64, dtype=dtype, device="meta")
        counter = torch.empty(1024, 3, dtype=torch.int32, device="meta")
        options = (temperature, 0, counter, None, False, None)
        got = kernel.head_stats(hidden, weight, None, *options)
        assert [field.shape for field in got] == [(1024,)] * 5
    # One after the other: the allocator gives each the memory of the one before.
    assert 0 < max(allocated) < 64e6


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    hidden, weight = _operands(3, 20, 8)
    bias, rows = torch.ones(20), _ids(2, 0)
    ours = torch.ops.pydllm
    plain = (None, 0.0, 0, None, None, False, None, None, None)
    full = (bias, 0.0, -5, _counter(2), _ids(1), True, 3.0, torch.tensor([0.0, 1.0]), rows)
    for options in (plain, full):
        torch.library.opcheck(ours.head_stats.default, (hidden, weight, *options, backend))
        arguments = (hidden, weight, *options, 4, backend)
        torch.library.opcheck(ours.head_stats_partial.default, arguments)
        values, ids = ours.head_stats_partial(*arguments)
        torch.library.opcheck(ours.merge_stats.default, (values, ids, backend))


def test_merging_in_cuda(cuda_on_cpu):
    """Many pieces, without a distribution some of them, as the Triton merge has them."""
    hidden, weight = _operands(7, 2400, 16)
    weight[300:340] = weight[2000:2040]
    bias = torch.zeros(2400)
    bias[:1200] = -INF
    for options in ({}, {"temperature": 0.8, "counter": _counter(7), "tempered": True}):
        for shards in (1, 5, 33, 100):
            width = 2400 // shards // 4 * 4
            partials = [
                ops.head_stats_partial(
                    hidden,
                    weight[a : a + width],
                    bias=bias[a : a + width],
                    vocab_offset=a,
                    **options,
                )
                for a in range(0, 2400, width)
            ]
            expected = ops.merge_stats(*partials)
            got = ops.merge_stats(*partials, backend="cuda")
            _assert_near(got, expected)
            partials[-1].values[2, 3] = math.nan
            got = ops.merge_stats(*partials, backend="cuda")
            assert got.token[3] == 0 and all(field[3].isnan() for field in got[1:])
            _assert_near(VocabStats(*(f[:3] for f in got)), VocabStats(*(f[:3] for f in expected)))
    values, ids = torch.full((4, 2, 3), -INF), torch.zeros(1, 2, 3, dtype=torch.int32)
    values[2:] = 0
    got = ops.merge_stats(StatsPartial(values, ids), backend="cuda")
    assert [field[1].item() for field in got] == [0, 0, 0, 0, -INF]
    op = torch.ops.pydllm.merge_stats.default
    torch.library.opcheck(op, (values, ids, "cuda"))
    for partial, message in (
        ((values.double(), ids), "takes fp32 values"),
        ((values.transpose(1, 2), ids.transpose(1, 2)), "values and ids must be contiguous"),
        ((values[..., :0], ids[..., :0]), "takes 1 to 2048 pieces"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.merge_stats(StatsPartial(*partial), backend="cuda")


@pytest.mark.parametrize("backend", BACKENDS)
def test_fullgraph_compile(backend):
    hidden, weight = _operands(3, 40, 8)

    def call(hidden, seed):
        options = {"temperature": 0.7, "counter": _counter(3), "backend": backend}
        whole = ops.head_stats(hidden, weight, seed=seed, **options)
        halves = [
            ops.head_stats_partial(hidden, weight[a : a + 20], vocab_offset=a, seed=seed, **options)
            for a in (0, 20)
        ]
        return whole, ops.merge_stats(*halves, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for seed in (0, 2**64 - 1):
        for got, expected in zip(compiled(hidden, seed), call(hidden, seed), strict=True):
            _assert_same(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_captured_graph_replays_and_agrees_with_the_cpu(temperature):
    hidden, weight = _operands(32, 126464, 256)
    options = {"temperature": temperature, "seed": 3}
    expected = ops.head_stats(hidden, weight, counter=_counter(32), **options)
    weight, counter, static = weight.cuda(), _counter(32).cuda(), torch.zeros(32, 256).cuda()
    call = {"counter": counter, "backend": "triton", **options}
    ops.head_stats(static, weight, **call)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stats = ops.head_stats(static, weight, **call)
    static.copy_(hidden)
    graph.replay()
    _assert_near(VocabStats(*(field.cpu() for field in stats)), expected)
    first = [field.clone() for field in stats]
    for _ in range(50):
        graph.replay()
        _assert_same(stats, first)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.ones(4)}, ValueError, r"hidden: expected shape \(R, D\), got \(4,\)"),
        ({"hidden": torch.ones(3, 4).int()}, TypeError, "hidden: expected dtype"),
        ({"weight": torch.ones(5, 3)}, ValueError, r"weight: expected shape \(V, 4\), got \(5, 3"),
        ({"weight": torch.ones(0, 4)}, ValueError, "weight: expected V and D of at least 1"),
        ({"weight": torch.ones(5, 4).half()}, TypeError, "weight: expected dtype torch.float32"),
        ({"weight": torch.ones(5, 4, requires_grad=True)}, ValueError, "got weight with requires"),
        ({"bias": torch.ones(4)}, ValueError, r"bias: expected shape \(5\), got \(4,\)"),
        ({"bias": torch.ones(5).half()}, TypeError, "bias: expected dtype torch.float32"),
        ({"banned": None}, TypeError, "banned is no argument any more, use suppress_ids"),
        ({"rows": torch.ones(2)}, TypeError, "rows: expected dtype torch.int32, torch.int64"),
        ({"rows": _ids(1)[None]}, ValueError, r"rows: expected shape \(N\), got \(1, 1\)"),
        ({"hidden": torch.ones(0, 4), "rows": _ids(1)}, ValueError, "hidden: expected a row to"),
        ({"temperature": 1.0}, ValueError, r"counter: expected \(R, 3\) int32 at a temperature"),
        ({"temperature": torch.ones(2)}, ValueError, r"temperature: expected shape \(3\), got"),
        (
            {"counter": _counter(3), "rows": _ids(0, 1)},
            ValueError,
            r"counter: expected shape \(2, 3\), got \(3, 3\)",
        ),
        (
            {"suppress_ids": torch.zeros(17).int()},
            ValueError,
            "suppress_ids: expected at most 16 ids, got 17",
        ),
        ({"softcap": -1.0}, ValueError, "softcap: expected a finite number above 0, got -1.0"),
        ({"backend": "cuda"}, RuntimeError, "head_stats: backend 'cuda' cannot run this call"),
        (
            {"weight": torch.ones(4, 5).t(), "backend": "triton"},
            RuntimeError,
            "weight must be rows of contiguous",
        ),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"hidden": torch.ones(3, 4), "weight": torch.ones(5, 4)} | change
    with pytest.raises(error, match=message):
        ops.head_stats(**arguments)


def test_bad_partials():
    hidden, weight = _operands(3, 20, 8)
    for offset in (-4, 2, 2**31 - 8):
        with pytest.raises(ValueError, match="vocab_offset: expected "):
            ops.head_stats_partial(hidden, weight, vocab_offset=offset)
    one = ops.head_stats_partial(hidden, weight)
    other = ops.head_stats_partial(hidden, weight, temperature=1.0, counter=_counter(3))
    fewer = ops.head_stats_partial(hidden[:2], weight)
    with pytest.raises(ValueError, match="partials: expected at least one, got none"):
        ops.merge_stats()
    with pytest.raises(ValueError, match=r"ids: expected shape \(1, R, S\), got \(2, 3, 1\)"):
        ops.merge_stats(one, other)
    with pytest.raises(ValueError, match=r"values: expected shape \(4, 3, 1\), got \(4, 2, 1\)"):
        ops.merge_stats(one, fewer)
