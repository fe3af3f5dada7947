"""``experts`` against each row's own sum, one pair at a time, and the bits of rows among others."""

import pytest
import torch
import torch.nn.functional as F

from pydllm import ops, reference
from pydllm.testing import error_budget, max_error, random_normal

KERNELS = ["triton"]
BACKENDS = ["torch", *KERNELS]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(rows, experts=5, top_k=2, width=48, inner=24, shared=None, dtype=torch.float32, seed=0):
    """Random weights and routes; rows have distinct experts."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(rows, experts, generator=generator).argsort(-1)[:, :top_k].int()
    case = {
        "hidden": random_normal(rows, width, seed=seed, dtype=dtype),
        "gate_up": random_normal(experts, 2 * inner, width, seed=seed + 1, dtype=dtype),
        "down": random_normal(experts, width, inner, seed=seed + 2, dtype=dtype) / inner**0.5,
        "ids": ids,
        "weights": torch.rand(rows, top_k, generator=generator),
    }
    case["gate_up"] /= width**0.5
    if shared is not None:
        case["shared_gate_up"] = random_normal(2 * shared, width, seed=seed + 3, dtype=dtype) / 7
        case["shared_down"] = random_normal(width, shared, seed=seed + 4, dtype=dtype) / 7
    return case


def plain(case, activation="silu", mutant=None):
    """One row and slot at a time, straight from the sentence; in the dtype of the case."""
    act = F.silu if activation == "silu" else lambda g: F.gelu(g, approximate="tanh")

    def mlp(x, gate_up, down):
        gate, up = F.linear(x, gate_up).chunk(2, -1)
        if mutant == "up before gate":
            gate, up = up, gate
        return F.linear(act(gate) * up, down)

    out = torch.zeros_like(case["hidden"])
    count = len(case["gate_up"])
    for i, x in enumerate(case["hidden"]):
        total = torch.zeros(x.shape, dtype=case["weights"].dtype)
        live = [
            (e, w) for e, w in zip(case["ids"][i], case["weights"][i], strict=True) if e < count
        ]
        for e, w in live[:-1] if mutant == "the last slot is lost" else live:
            if mutant == "the next expert":
                e = (e + 1) % count
            w = 1.0 if mutant == "weights are lost" else w
            total = total + mlp(x, case["gate_up"][e], case["down"][e]).to(total.dtype) * w
        out[i] = total.to(x.dtype)
        if live and case.get("shared_down") is not None and mutant != "no shared expert":
            for _ in range(2 if mutant == "the shared expert twice" else 1):
                out[i] += mlp(x, case["shared_gate_up"], case["shared_down"])
    return out


def widened(case):
    return {name: t.double() if t.is_floating_point() else t for name, t in case.items()}


QUANTIZED = {"fp8": "fp8", "fp8 per channel": "fp8_channel", "int8": "int8"}


def quantized(kind, rows=21, dtype=torch.bfloat16, **sizes):
    """A case with quantised experts, and the same with what they stand for in fp64."""
    case = make(rows, dtype=dtype, **sizes)
    small = {name: ops.quantize(case[name].float(), kind) for name in ("gate_up", "down")}
    exact = {name: weight.dequantize(torch.float64) for name, weight in small.items()}
    return case | small, widened({n: t for n, t in case.items() if n not in small}) | exact


def assert_right(got, case, activation="silu"):
    exact = plain(widened(case), activation)
    budget = error_budget(exact, plain(case, activation))
    assert got.shape == case["hidden"].shape and got.dtype == case["hidden"].dtype
    assert max_error(got, exact) <= budget


SIZES = {
    "no shared expert": {},
    "shared folded in": {"shared": 24},
    "shared of another width": {"shared": 40},
    "one expert, one slot": {"experts": 1, "top_k": 1},
    "uneven": {"experts": 3, "top_k": 3, "width": 37, "inner": 19, "shared": 19},
    "several tiles": {"experts": 2, "width": 136, "inner": 72, "shared": 72},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_one_pair_at_a_time(backend, sizes, dtype):
    case = make(21, **SIZES[sizes], dtype=dtype)
    assert_right(ops.experts(**case, backend=backend), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", QUANTIZED.values(), ids=QUANTIZED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_quantised_experts(backend, kind, dtype):
    """Blocks of gate and up in one, several blocks of columns, and a shared expert beside them."""
    case, exact = quantized(kind, dtype=dtype, experts=3, width=136, inner=72, shared=72)
    got, wanted = ops.experts(**case, backend=backend), plain(exact)
    rounded = {n: t.to(dtype) for n, t in exact.items() if t.is_floating_point()}
    same = plain(exact | rounded | {"weights": case["weights"]})
    assert got.dtype == dtype
    assert max_error(got, wanted) <= error_budget(wanted, same)
    if dtype == torch.float32:  # a scale that is wrong by a thousandth is found
        wrong = plain(exact | {"down": exact["down"] * 1.001})
        assert max_error(got, wrong) > error_budget(wanted, same)


@pytest.mark.parametrize("kind", QUANTIZED.values(), ids=QUANTIZED)
def test_quantised_experts_in_fp64(kind):
    case, exact = quantized(kind, dtype=torch.float64, experts=3, width=136, inner=72, shared=40)
    case["weights"] = case["weights"].double()
    assert (ops.experts(**case) - plain(exact)).abs().max() < 1e-13


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("backend", KERNELS)
def test_a_row_has_the_same_bits_among_others_with_quantised_experts(backend, kind):
    case, _ = quantized(kind, 37, shared=24)
    whole = ops.experts(**case, backend=backend)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(1))
    for index in ([5], order, torch.cat((order, order))):
        some = {name: case[name][index] for name in ("hidden", "ids", "weights")}
        assert torch.equal(ops.experts(**case | some, backend=backend), whole[index])


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 257])
@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_of_rows(backend, rows):
    case = make(rows, shared=24)
    got = ops.experts(**case, backend=backend)
    assert_right(got, case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_rows_on_one_expert_and_an_expert_without_rows(backend):
    case = make(40, experts=4, top_k=1, shared=24)
    case["ids"].fill_(2)
    assert_right(ops.experts(**case, backend=backend), case)
    case["gate_up"][3] = float("nan")  # nobody's: not read
    assert_right(ops.experts(**case, backend=backend), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("width, inner", [(48, 24), (520, 24), (24, 520)])
def test_every_small_number_of_rows_of_an_expert(width, inner, dtype):
    """Expert ``e`` has ``e`` rows, the last one a single row; then two rows have no expert."""
    case = make(48, experts=11, top_k=1, width=width, inner=inner)
    case["ids"][:, 0] = torch.tensor([e for e in range(10) for _ in range(e)] + [10, 11, -1])
    case["hidden"][46:] = float("nan")
    case = widened(case) if dtype == torch.float64 else case
    got = ops.experts(**case, backend="torch")
    assert (got[46:] == 0).all()
    case["hidden"][46:], case["ids"][47] = 0, 11
    if dtype == torch.float64:
        assert (got - plain(case)).abs().max() < 1e-12
    else:
        assert_right(got, case)
    close = {"rtol": 0, "atol": 1e-4 if dtype == torch.float32 else 1e-12}
    for rows in (slice(45, 46), slice(0, 46)):  # the single row alone, and as the last one
        some = {name: case[name][rows] for name in ("hidden", "ids", "weights")}
        torch.testing.assert_close(ops.experts(**case | some), got[rows], **close)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # NumPy's
def test_gelu(backend):
    case = make(9, shared=24)
    case["gate_up"] *= 4
    got = ops.experts(**case, activation="gelu_tanh", backend=backend)
    assert_right(got, case, "gelu_tanh")


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp64_and_leading_dimensions(backend):
    case = make(12, shared=24)
    case = widened(case) if backend == "torch" else case
    flat = ops.experts(**case, backend=backend)
    shaped = {
        n: t.unflatten(0, (3, 4)) for n, t in case.items() if n in ("hidden", "ids", "weights")
    }
    assert torch.equal(ops.experts(**case | shaped, backend=backend).flatten(0, 1), flat)
    if backend == "torch":
        assert (flat - plain(case)).abs().max() < 1e-13


MUTANTS = (
    "up before gate",
    "the last slot is lost",
    "the next expert",
    "weights are lost",
    "no shared expert",
    "the shared expert twice",
)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_comparison_finds_a_wrong_layer(mutant):
    case = make(21, shared=24)
    with pytest.raises(AssertionError):
        assert_right(plain(case, mutant=mutant), case)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared", [24, 40])
def test_rows_and_slots_without_an_expert(backend, shared):
    case = make(19, shared=shared)
    case["ids"][[3, 7, 18]] = 5
    case["ids"][4, 0] = 5  # one slot alone
    case["hidden"][7], case["weights"][3] = float("nan"), float("nan")
    case["weights"][4, 0] = float("nan")
    got = ops.experts(**case, backend=backend)
    assert (got[[3, 7, 18]] == 0).all()
    case["hidden"][7] = 0
    assert_right(got, case)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_nan_stays_in_its_row(backend):
    case = make(19, shared=24)
    expected = ops.experts(**case, backend=backend)
    case["hidden"][6, 3] = float("nan")
    got = ops.experts(**case, backend=backend)
    others = torch.arange(19) != 6
    assert got[6].isnan().all() and torch.equal(got[others], expected[others])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [24, 40])
@pytest.mark.parametrize("backend", KERNELS)
def test_a_row_has_the_same_bits_among_others(backend, shared, dtype):
    """Alone, permuted, in a doubled batch, and beside rows that all take its experts."""
    case = make(37, shared=shared, dtype=dtype)
    per_row = ("hidden", "ids", "weights")
    whole = ops.experts(**case, backend=backend)

    def some(index):
        return ops.experts(**case | {n: case[n][index] for n in per_row}, backend=backend)

    for row in (0, 16, 36):
        assert torch.equal(some([row])[0], whole[row])
    order = torch.randperm(37, generator=torch.Generator().manual_seed(1))
    assert torch.equal(some(order), whole[order])
    assert torch.equal(some(torch.cat((order, order))), whole[order].repeat(2, 1))
    crowd = case | {"ids": case["ids"][5:6].expand(37, -1).contiguous()}
    assert torch.equal(ops.experts(**crowd, backend=backend)[5], whole[5])


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_are_equal(backend):
    case = make(17, shared=24, dtype=torch.float16)
    first = ops.experts(**case, backend=backend)
    for _ in range(49 if backend == "torch" else 4):
        assert torch.equal(ops.experts(**case, backend=backend), first)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
def test_fifty_repeats_on_a_gpu(backend):
    case = make(257, experts=64, top_k=8, width=512, inner=128, shared=128, dtype=torch.bfloat16)
    case = {name: t.cuda() for name, t in case.items()}
    first = ops.experts(**case, backend=backend)
    assert all(torch.equal(ops.experts(**case, backend=backend), first) for _ in range(50))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
def test_a_replay_routes_otherwise_than_the_capture(backend):
    case = {n: t.cuda() for n, t in make(33, experts=8, shared=24, dtype=torch.bfloat16).items()}
    other = make(33, experts=8, dtype=torch.bfloat16, seed=9)["ids"].cuda()
    expected = ops.experts(**case | {"ids": other}, backend=backend)
    ops.experts(**case, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.experts(**case, backend=backend)
    case["ids"].copy_(other)
    graph.replay()
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_grouped_product_is_the_loop(dtype):
    """What the torch backend does on a GPU, here on the CPU."""
    case = make(21, width=48, inner=24, dtype=dtype)
    case["ids"][3] = 5
    arguments = [case[name] for name in ("hidden", "gate_up", "down", "ids")]
    got = reference.experts_grouped(*arguments, "silu")
    routed = (case["ids"] < 5)[..., None]
    weighted = got.to(case["weights"].dtype) * case["weights"][..., None]
    assert_right(weighted.sum(1).to(dtype), case)
    assert (got[~routed.expand(got.shape)] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared", [None, 24])
def test_opcheck(backend, shared):
    case = make(6, shared=shared)
    names = ("hidden", "gate_up", "down", "ids", "weights", "shared_gate_up", "shared_down")
    arguments = (*(case.get(name) for name in names), "silu", None, None, backend)
    torch.library.opcheck(torch.ops.pydllm.experts.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_graph_break(backend):
    case = make(6, shared=24)

    def call(hidden):
        return ops.experts(**case | {"hidden": hidden}, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(case["hidden"]), call(case["hidden"]))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"hidden": torch.ones(8)}, ValueError, r"hidden: expected shape \(..., H\), got \(8,\)"),
        ({"down": torch.ones(3, 7, 4)}, ValueError, r"down: expected shape \(E, 8, I\)"),
        ({"gate_up": torch.ones(3, 4, 8)}, ValueError, r"gate_up: expected shape \(3, 8, 8\)"),
        ({"ids": torch.ones(5, 2)}, ValueError, r"ids: expected shape \(6, K\), got \(5, 2\)"),
        ({"ids": torch.ones(6, 2)}, TypeError, "ids: expected dtype torch.int32"),
        ({"ids": torch.ones(6, 0).int(), "weights": torch.ones(6, 0)}, ValueError, "at least 1 ex"),
        ({"weights": torch.ones(6, 3)}, ValueError, r"weights: expected shape \(6, 2\)"),
        ({"weights": torch.ones(6, 2).half()}, TypeError, "weights: expected dtype torch.float32"),
        ({"down": torch.ones(3, 8, 4).half()}, TypeError, "down: expected dtype torch.float32"),
        ({"shared_down": torch.ones(8, 4)}, ValueError, "expected it with shared_gate_up, and"),
        (
            {"shared_down": torch.ones(8, 4), "shared_gate_up": torch.ones(8, 7)},
            ValueError,
            r"shared_gate_up: expected shape \(8, 8\)",
        ),
        ({"activation": "relu"}, ValueError, "expected one of silu, gelu_tanh, got 'relu'"),
        (
            {"down": ops.quantize(torch.ones(3, 8, 4), "int8")},
            TypeError,
            "stored as gate_up, torch.float32, got torch.int8 with a scale per channel",
        ),
        ({"hidden": torch.ones(6, 8, requires_grad=True)}, ValueError, "got hidden with requires_"),
        ({"backend": "cuda"}, RuntimeError, "backend 'cuda' cannot run this call"),
        (
            {"hidden": torch.ones(8, 6).t(), "backend": "triton"},
            RuntimeError,
            "hidden must be contiguous, got strides",
        ),
    ],
)
def test_bad_input(change, error, message):
    case = {"hidden": torch.ones(6, 8), "gate_up": torch.ones(3, 8, 8), "down": torch.ones(3, 8, 4)}
    case |= {"ids": torch.ones(6, 2).int(), "weights": torch.ones(6, 2)}
    with pytest.raises(error, match=message):
        ops.experts(**case | change)
