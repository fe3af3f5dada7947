"""``linear_rms_norm`` is ``linear``, then ``rms_norm`` with the residual, to the bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pydllm import ops
from pydllm._backend.cuda import linear as cuda_linear
from pydllm.kernels import _tiles
from pydllm.kernels import linear as kernel
from pydllm.kernels import rms_norm as norm_kernel
from pydllm.testing import random_normal
from tests import emulation
from tests.mutants import assert_caught
from tests.ops.test_linear import KINDS, _assert_rows_stand_alone, _operands

KERNELS = ["triton", "cuda"]
BACKENDS = ["torch", *KERNELS]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5


def _norm_operands(dtype, rows, width):
    return random_normal(width, seed=7, dtype=dtype), random_normal(
        rows, width, seed=8, dtype=dtype
    )


def assert_same(backend, x, weight, bias, norm, residual):
    """One call and two: the rows, and the residual that they leave."""
    kept, expected = residual.clone(), residual.clone()
    y = ops.linear_rms_norm(x, weight, norm, EPS, kept, bias, backend=backend)
    product = ops.linear(x, weight, bias, backend=backend)
    wanted = ops.rms_norm(product, norm, EPS, residual=expected, backend=backend)
    assert y.dtype == x.dtype and y.is_contiguous()
    assert torch.equal(y, wanted) and torch.equal(kept, expected)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    "dtype, kind",
    [*[(dtype, kind) for kind in KINDS for dtype in DTYPES[1:]], (torch.float32, "dense")],
    ids=str,
)
def test_bits_of_two_launches_in_triton(dtype, kind, splits):
    for rows, width, depth in ((33, 200, 300), (2, 7, 17)):
        x, weight, bias = _operands(kind, dtype, rows, width, depth)
        norm, residual = _norm_operands(dtype, rows, width)
        parts = (weight, None) if kind == "dense" else (weight.values, weight.scale)
        tile = _tiles.LinearTile(64, 64, splits, 4, 1)
        for added in (bias, None) if width == 7 else (bias,):
            kept, expected = residual.clone(), residual.clone()
            y = kernel.linear_rms_norm(x, *parts, added, norm, EPS, kept, tile)
            product = kernel.linear(x, *parts, added, tile)
            assert torch.equal(y, norm_kernel.rms_norm(product, norm, EPS, expected))
            assert torch.equal(kept, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_bits_of_two_launches_in_cuda(cuda_on_cpu, dtype, kind):
    # One split and two; rows that are aligned to vectors and rows that are not.
    shapes = ((3, 72, 1040), (2, 77, 1040), (5, 64, 64))
    assert {cuda_linear.splits(width, depth) for _, width, depth in shapes} == {1, 2}
    for rows, width, depth in shapes:
        x, weight, bias = _operands(kind, dtype, rows, width, depth)
        norm, residual = _norm_operands(dtype, rows, width)
        for added in (bias, None) if width == 77 else (bias,):
            assert_same("cuda", x, weight, added, norm, residual)
        wide = torch.zeros(rows, width + 5, dtype=dtype)
        wide[:, :width] = residual  # rows with a stride are updated in place
        assert_same("cuda", x, weight, bias, norm, wide[:, :width])


def test_rows_that_are_too_long_to_merge_in_cuda(cuda_on_cpu, monkeypatch):
    monkeypatch.setattr(cuda_linear.rms_norm, "MAX_MERGED_WIDTH", 71)
    x, weight, bias = _operands("int8", torch.float16, 2, 72, 1040)
    launched = []
    launch = cuda_linear.rms_norm.launch
    monkeypatch.setattr(
        cuda_linear.rms_norm,
        "launch",
        lambda *args, partial=None, **more: (
            launched.append(partial) or launch(*args, partial=partial, **more)
        ),
    )
    assert_same("cuda", x, weight, bias, *_norm_operands(torch.float16, 2, 72))
    assert launched == [None, None]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_bits_of_two_calls_in_torch(dtype):
    x, weight, bias = _operands("dense", dtype, 35, 80, 40)
    assert_same("torch", x, weight, bias, *_norm_operands(dtype, 35, 80))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_formula(backend):
    x, weight, bias = _operands("int8", torch.float16, 6, 40, 1040)
    norm, residual = _norm_operands(torch.float16, 6, 40)
    kept = residual.clone()
    y = ops.linear_rms_norm(x, weight, norm, EPS, kept, bias, backend=backend)
    h = x.double() @ weight.dequantize(torch.float64).T + bias.double() + residual.double()
    exact = h / (h.square().mean(1, keepdim=True) + EPS).sqrt() * norm.double()
    torch.testing.assert_close(kept.double(), h, rtol=2**-10, atol=2**-9)
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=2**-9)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's of infinity, in the interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_alone_equals_the_row_among_256(backend):
    depth = 1040 if backend == "cuda" else 260  # two splits
    x, weight, bias = _operands("dense", torch.bfloat16, 256, 70, depth)
    norm, residual = _norm_operands(torch.bfloat16, 1, 70)

    def call(x):
        rows = residual.repeat(len(x), 1)
        y = ops.linear_rms_norm(x, weight, norm, EPS, rows, bias, backend=backend)
        return torch.cat((y, rows), 1)

    _assert_rows_stand_alone(x, call)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_of_x(backend):
    x, weight, bias = _operands("dense", torch.float16, 12, 40, 1040)
    norm, residual = _norm_operands(torch.float16, 12, 40)

    def call(x, residual):
        kept = residual.clone()
        y = ops.linear_rms_norm(x, weight, norm, EPS, kept, bias, backend=backend)
        assert y.shape == residual.shape
        return torch.cat((y, kept), -1)

    flat = call(x, residual)
    assert torch.equal(call(x.view(3, 4, 1040), residual.view(3, 4, 40)).view(12, 80), flat)
    assert torch.equal(call(x[3], residual[3]), flat[3])
    assert call(x[:0], residual[:0]).shape == (0, 80)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_compile(backend):
    x, weight, bias = _operands("dense", torch.float16, 3, 16, 1040)
    norm, residual = _norm_operands(torch.float16, 3, 16)
    arguments = (x, weight, None, bias, norm, EPS, residual, backend)
    torch.library.opcheck(torch.ops.pydllm.linear_rms_norm.default, arguments)

    def call(x, residual):
        return ops.linear_rms_norm(x, weight, norm, EPS, residual, bias, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    one, other = residual.clone(), residual.clone()
    assert torch.equal(compiled(x, one), call(x, other)) and torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"norm": torch.ones(4)}, ValueError, r"norm: expected shape \(6\), got \(4,\)"),
        ({"norm": torch.ones(6).half()}, TypeError, "norm: expected dtype torch.float32"),
        ({"residual": torch.ones(2, 4)}, ValueError, r"residual: expected shape \(2, 6\), got"),
        ({"residual": torch.ones(6).expand(2, 6)}, ValueError, "residual: expected a tensor to "),
        ({"eps": -1.0}, ValueError, "eps: expected .* got -1.0"),
        ({"weight": torch.ones(6, 3)}, ValueError, r"weight: expected shape \(N, 4\), got \(6, 3"),
        ({"residual": torch.ones(2, 6, requires_grad=True)}, ValueError, "residual with requires_"),
        ({"residual": torch.ones(6, 2).t(), "backend": "triton"}, RuntimeError,
         "x must be rows of contiguous"),
        ({"backend": "cuda"}, RuntimeError, "linear_rms_norm: backend 'cuda' cannot run this call"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    valid = {"x": torch.ones(2, 4), "weight": torch.ones(6, 4), "norm": torch.ones(6)}
    valid |= {"eps": EPS, "residual": torch.ones(2, 6)}
    with pytest.raises(error, match=message):
        ops.linear_rms_norm(**valid | change)


COMPILE = """
import json, re, sys
import torch
from bench.gpu import resources
from pydllm.kernels import linear, rms_norm

def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")

for arch in (80, 90):
    for stored, width, depth in ((torch.bfloat16, 3584, 18944), (torch.int8, 4096, 4096)):
        y, norm, weight = meta(32, width), meta(width), meta(width, depth, dtype=stored)
        scale = None if stored == torch.bfloat16 else meta(width, dtype=torch.float32)
        x = meta(32, depth)
        launches = {
            "alone": lambda: rms_norm.rms_norm(y, norm, 1e-5, y),
            "merged": lambda: linear.linear_rms_norm(x, weight, scale, norm, norm, 1e-5, y),
        }
        for name, launch in launches.items():
            recorded = resources.record(launch, arch)
            code = resources.compile_kernel(recorded[-1], arch)
            text = code.asm["ttgir"]
            (reduced,) = set(re.findall(r"\\}\\) : \\(tensor<\\d+xf32, (#\\w+)>", text))
            print(json.dumps({
                "name": name, "kernels": [each.kernel.__name__ for each in recorded],
                "layout": re.search(re.escape(reduced) + " = (.*)", text)[1],
                "moved": text.count("convert_layout"), "spills": code.spills,
            }))
"""


def test_a_row_of_the_norm_is_summed_alike_whether_it_merges_or_not():
    """The same layout of the sum's operand, so the same order; and nothing but two launches."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=root,
        env=environment | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 8
    for alone, merged in zip(rows[::2], rows[1::2], strict=True):
        assert (alone["name"], merged["name"]) == ("alone", "merged")
        assert merged["kernels"] == ["_linear_tile_kernel", "_rms_norm_kernel"]
        assert merged["layout"] == alone["layout"]
        assert merged["moved"] == alone["moved"] == 0 and merged["spills"] == 0


def check_norm():
    for kind, width in (("dense", 72), ("int8", 77), ("fp8", 72)):
        x, weight, bias = _operands(kind, torch.bfloat16, 3, width, 1040)
        assert_same("cuda", x, weight, bias, *_norm_operands(torch.bfloat16, 3, width))
        norm, residual = _norm_operands(torch.bfloat16, 3, width)
        got = ops.linear_rms_norm(x, weight, norm, EPS, residual.clone(), bias, backend="cuda")
        wanted = ops.linear_rms_norm(x, weight, norm, EPS, residual, bias, backend="torch")
        torch.testing.assert_close(got.float(), wanted.float(), rtol=2**-5, atol=2**-5)


MUTANTS = {
    "the merge's row": (
        "rms_norm.cu",
        "partial.load(row, first, aligned, kept[v].lane);",
        "partial.load(0, first, aligned, kept[v].lane);",
    ),
    "a split is lost": ("linear_merge.cuh", "split < splits", "split < splits - 1"),
    "the bias is scaled": (
        "linear_merge.cuh",
        "fmaf(sum, factor, bias == nullptr ? -0.f : to_float(bias[column]))",
        "(sum + (bias == nullptr ? -0.f : to_float(bias[column]))) * factor",
    ),
    "blocks' scales once more": (
        "linear.cu",
        "call.per_block ? nullptr : call.scale",
        "call.scale",
    ),
}


@pytest.mark.skipif(emulation.CXX is None, reason="needs a C++ compiler")
def test_planted_bugs_are_found(cuda_folder):
    assert_caught({"tests.ops.test_linear_rms_norm:check_norm": MUTANTS}, cuda_folder)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width, depth", [(4096, 4096), (4096, 12288), (3584, 18944), (640, 1024)])
@pytest.mark.parametrize("backend", KERNELS)
def test_bits_of_two_launches_on_a_gpu(backend, width, depth, kind):
    for rows in (1, 32, 100, 300):
        x, weight, bias = _operands(kind, torch.bfloat16, rows, width, depth)
        if kind == "dense":
            weight = weight.cuda()
        else:
            weight = ops.QuantizedWeight(weight.values.cuda(), weight.scale.cuda())
        norm, residual = (t.cuda() for t in _norm_operands(torch.bfloat16, rows, width))
        assert_same(backend, x.cuda(), weight, bias.cuda(), norm, residual)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
def test_a_captured_graph_replays(backend):
    x, weight, bias = (t.cuda() for t in _operands("dense", torch.bfloat16, 32, 4096, 4096))
    norm, residual = (t.cuda() for t in _norm_operands(torch.bfloat16, 32, 4096))
    static, kept = torch.zeros_like(x), residual.clone()

    def call():
        return ops.linear_rms_norm(static, weight, norm, EPS, kept, bias, backend=backend)

    call()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    static.copy_(x)
    kept.copy_(residual)
    graph.replay()
    again = y.clone()
    kept.copy_(residual)
    assert torch.equal(again, call())
