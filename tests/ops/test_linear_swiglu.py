"""``linear_swiglu`` is ``linear``, then ``swiglu``, to the bit, where gate and up meet in registers
and where the splits of the depth are merged."""

import pytest
import torch

from pydllm import ops
from pydllm._backend.cuda import linear as cuda_linear
from pydllm.kernels import _tiles
from pydllm.kernels import linear as kernel
from pydllm.kernels import swiglu as swiglu_kernel
from pydllm.testing import error_budget, max_error
from tests import emulation
from tests.mutants import assert_caught
from tests.ops.test_linear import KINDS, _assert_rows_stand_alone, _exact, _operands

KERNELS = ["triton", "cuda"]
BACKENDS = ["torch", *KERNELS]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _parts(weight):
    return (weight, None) if isinstance(weight, torch.Tensor) else (weight.values, weight.scale)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    "dtype, kind",
    [*[(dtype, kind) for kind in KINDS for dtype in DTYPES[1:]], (torch.float32, "dense")],
    ids=str,
)
def test_bits_of_two_launches_in_triton(dtype, kind, splits):
    # A half that begins within a block of scales, one that does not, and half a tile.
    for rows, inner, depth in ((65, 200, 260), (3, 192, 256), (2, 7, 17)):
        x, weight, bias = _operands(kind, dtype, rows, 2 * inner, depth)
        tile = _tiles.LinearTile(128, 128, splits, 4, 1)
        for added in (bias, None) if inner == 7 else (bias,):
            arguments = (x, *_parts(weight), added, tile, 128 if rows > 64 else 64)
            fused = kernel.linear_swiglu(*arguments)
            assert fused.shape == (rows, inner) and fused.dtype == dtype
            assert torch.equal(fused, swiglu_kernel.swiglu(kernel.linear(*arguments)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_bits_of_two_launches_in_cuda(cuda_on_cpu, dtype, kind):
    # One split and two; halves that are no multiple of 8, of 32, and that begin within a block.
    shapes = ((33, 70, 272), (3, 104, 64), (17, 36, 1040), (2, 3, 16), (1, 192, 128))
    assert {cuda_linear.splits(2 * inner, depth) for _, inner, depth in shapes} == {1, 2}
    for rows, inner, depth in shapes:
        x, weight, bias = _operands(kind, dtype, rows, 2 * inner, depth)
        for added in (bias, None) if inner == 3 else (bias,):
            fused = ops.linear_swiglu(x, weight, added, backend="cuda")
            product = ops.linear(x, weight, added, backend="cuda")
            assert torch.equal(fused, ops.swiglu(product, backend="cuda"))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_bits_of_two_calls_in_torch(dtype):
    x, weight, bias = _operands("dense", dtype, 35, 80, 40)
    fused = ops.linear_swiglu(x, weight, bias, backend="torch")
    product = ops.linear(x, weight, bias, backend="torch")
    assert torch.equal(fused, ops.swiglu(product, backend="torch"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_within_the_error_budget(backend, kind):
    x, weight, bias = _operands(kind, torch.float16, 33, 2 * 72, 272)
    y = ops.linear_swiglu(x, weight, bias, backend=backend)
    gate, up = _exact(x, weight, bias).chunk(2, 1)
    exact = gate / (1 + torch.exp(-gate)) * up
    # Gate and up rounded once, as the definition rounds them.
    gate, up = (half.half().float() for half in _exact(x, weight, bias).chunk(2, 1))
    plain = ((gate * torch.sigmoid(gate)).half().float() * up).half()
    assert max_error(y, exact) <= error_budget(exact, plain)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's of infinity, in the interpreter
@pytest.mark.parametrize("kind", ["dense", "fp8"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_alone_equals_the_row_among_256(backend, kind):
    x, weight, bias = _operands(kind, torch.bfloat16, 256, 64, 272)
    _assert_rows_stand_alone(x, lambda x: ops.linear_swiglu(x, weight, bias, backend=backend))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_row_alone_equals_the_row_among_256_in_one_launch():
    x, weight, bias = _operands("dense", torch.float16, 256, 64, 128)
    tile = _tiles.LinearTile(64, 64, 1, 4, 1)

    def call(x):
        height = 64 if len(x) < 100 else 256
        return kernel.linear_swiglu(x, weight, None, bias, tile, height)

    _assert_rows_stand_alone(x, call)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_of_x(backend):
    x, weight, bias = _operands("dense", torch.float16, 12, 40, 48)
    flat = ops.linear_swiglu(x, weight, bias, backend=backend)
    y = ops.linear_swiglu(x.view(3, 4, 48), weight, bias, backend=backend)
    assert y.shape == (3, 4, 20) and torch.equal(y.view(12, 20), flat)
    assert torch.equal(ops.linear_swiglu(x[3], weight, bias, backend=backend), flat[3])
    assert ops.linear_swiglu(x[:0], weight, bias, backend=backend).shape == (0, 20)
    wide = torch.cat((x, x), 1)  # rows with a stride are read in place
    assert torch.equal(ops.linear_swiglu(wide[:, 48:], weight, bias, backend=backend), flat)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_compile(backend):
    x, weight, bias = _operands("dense", torch.float16, 3, 16, 32)
    arguments = (x, weight, None, bias, backend)
    torch.library.opcheck(torch.ops.pydllm.linear_swiglu.default, arguments)

    def call(x):
        return ops.linear_swiglu(x, weight, bias, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(compiled, call(x))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.ones(5, 4)}, ValueError, r"weight: expected shape \(2H, K\), got \(5, 4"),
        ({"weight": torch.ones(6, 3)}, ValueError, r"weight: expected shape \(N, 4\), got \(6, 3"),
        ({"bias": torch.ones(3)}, ValueError, r"bias: expected shape \(6\), got \(3,\)"),
        ({"x": torch.ones(2, 4).int()}, TypeError, "x: expected dtype .*torch.int32"),
        ({"x": torch.ones(2, 4, requires_grad=True)}, ValueError,
         r"linear_swiglu.* got x with requires_grad=True"),
        ({"backend": "cuda"}, RuntimeError, "linear_swiglu: backend 'cuda' cannot run this call"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        ops.linear_swiglu(**{"x": torch.ones(2, 4), "weight": torch.ones(6, 4)} | change)


def check_bits():
    shapes = (
        ("fp8", 3, 104, 160),
        ("fp8", 2, 36, 64),
        ("int8", 17, 36, 1040),
        ("dense", 2, 40, 64),
    )
    for kind, rows, inner, depth in shapes:
        x, weight, bias = _operands(kind, torch.bfloat16, rows, 2 * inner, depth)
        product = ops.linear(x, weight, bias, backend="torch")
        wanted = ops.swiglu(product, backend="torch")
        got = ops.linear_swiglu(x, weight, bias, backend="cuda")
        assert max_error(got, wanted.double()) <= 2**-6 * wanted.abs().max()


MUTANTS = {
    "up begins elsewhere": ("fused ? call.width / 2 : 8;", "fused ? call.width / 2 - MUTANT : 8;"),
    "gate and up change places": (
        "y[row * half + first] = silu_times(gate, up);",
        "y[row * half + first] = silu_times(up, gate);",
    ),
    "the scale of the gate for both": (
        "column_of((warp * kTiles + n) * 8) / kScaleBlock",
        "column_of(warp * kTiles * 8) / kScaleBlock",
    ),
    "the bias of the gate for both": (
        "output(acc[f][1][i], half + first)",
        "output(acc[f][1][i], first)",
    ),
    "a partial's up": ("merged(inner + index % inner)", "merged(index % inner)"),
    "columns past the half": ("first >= half", "first > half"),
    "rows past the weight": (
        "row < call.width && at < call.depth",
        "row < call.width - 1 && at < call.depth",
    ),
}


@pytest.mark.skipif(emulation.CXX is None, reason="needs a C++ compiler")
def test_planted_bugs_are_found(cuda_folder):
    mutants = {name: ("linear.cu", *change) for name, change in MUTANTS.items()}
    assert_caught({"tests.ops.test_linear_swiglu:check_bits": mutants}, cuda_folder)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inner, depth", [(12288, 4096), (18944, 3584), (320, 1024)])
@pytest.mark.parametrize("backend", KERNELS)
def test_bits_of_two_launches_on_a_gpu(backend, inner, depth, kind):
    for rows in (1, 32, 100, 300):
        x, weight, bias = _operands(kind, torch.bfloat16, rows, 2 * inner, depth)
        x, bias = x.cuda(), bias.cuda()
        if kind == "dense":
            weight = weight.cuda()
        else:
            weight = ops.QuantizedWeight(weight.values.cuda(), weight.scale.cuda())
        fused = ops.linear_swiglu(x, weight, bias, backend=backend)
        product = ops.linear(x, weight, bias, backend=backend)
        assert torch.equal(fused, ops.swiglu(product, backend=backend))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
def test_a_captured_graph_replays(backend):
    x, weight, bias = (t.cuda() for t in _operands("dense", torch.bfloat16, 32, 8192, 4096))
    static = torch.zeros_like(x)
    ops.linear_swiglu(static, weight, bias, backend=backend)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.linear_swiglu(static, weight, bias, backend=backend)
    static.copy_(x)
    graph.replay()
    assert torch.equal(y, ops.linear_swiglu(x, weight, bias, backend=backend))
