import importlib

import pytest
import torch
from torch.nn import functional as F

from pydllm import ops, reference
from pydllm._backend.cuda import linear as cuda_linear
from pydllm.kernels import _tiles
from pydllm.kernels import linear as kernel
from pydllm.ops import QuantizedWeight
from pydllm.testing import error_budget, max_error, random_normal

KERNELS = ["triton"]
BACKENDS = ["torch", *KERNELS]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KINDS = ["dense", "fp8", "fp8_channel", "int8"]
# Rows, width, depth: one of each, primes, one off a tile in each dimension.
SHAPES = [(1, 1, 1), (3, 7, 17), (33, 129, 257), (65, 200, 520), (2, 384, 128)]


def _operands(kind, dtype, rows, width, depth, seed=0):
    x = random_normal(rows, depth, seed=seed, dtype=dtype)
    weight = random_normal(width, depth, seed=seed + 1) / depth**0.5
    bias = random_normal(width, seed=seed + 2, dtype=dtype)
    return x, weight.to(dtype) if kind == "dense" else ops.quantize(weight, kind), bias


def _exact(x, weight, bias):
    """One multiplication and one sum in fp64; scales are looked up for each element."""
    if isinstance(weight, QuantizedWeight):
        n, k = (torch.arange(size) for size in weight.shape)
        per_block = weight.scale.ndim == 2
        scale = weight.scale[n[:, None] // 128, k // 128] if per_block else weight.scale[:, None]
        weight = weight.values.float().double() * scale.double()
    y = (x.double()[..., None, :] * weight.double()).sum(-1)
    return y if bias is None else y + bias.double()


def _plain(x, weight, bias):
    """F.linear on the dequantised weight, in the dtype of ``x``; as many rows as make it a gemm.

    For few rows a library may have kernels whose sums are shorter, and then more exact.
    """
    count, x = len(x), x.repeat(64, 1)
    if isinstance(weight, QuantizedWeight):
        wide = None if bias is None else bias.float()
        return F.linear(x.float(), weight.dequantize(), wide).to(x.dtype)[:count]
    return F.linear(x, weight, bias)[:count]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_within_the_error_budget(backend, dtype, kind, shape):
    x, weight, bias = _operands(kind, dtype, *shape)
    for added in (bias, None) if shape[1] > 7 else (bias,):
        y = ops.linear(x, weight, added, backend=backend)
        assert y.shape == shape[:2] and y.dtype == dtype and y.is_contiguous()
        exact = _exact(x, weight, added)
        assert max_error(y, exact) <= error_budget(exact, _plain(x, weight, added))


CUDA_SHAPES = [
    (1, 1, 16),
    (3, 7, 32),
    (33, 129, 272),
    (65, 200, 528),
    (17, 70, 1040),
    (2, 384, 128),
]


@pytest.mark.parametrize("shape", CUDA_SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_cuda_within_the_error_budget(cuda_on_cpu, dtype, kind, shape):
    x, weight, bias = _operands(kind, dtype, *shape)
    for added in (bias, None) if shape[0] == 17 else (bias,):
        y = ops.linear(x, weight, added, backend="cuda")
        exact = _exact(x, weight, added)
        assert max_error(y, exact) <= error_budget(exact, _plain(x, weight, added))


@pytest.mark.parametrize(
    "dtype, kind",
    [*[(torch.bfloat16, kind) for kind in KINDS], (torch.float16, "int8")],
    ids=str,
)
def test_a_row_alone_equals_the_row_among_256_in_cuda(cuda_on_cpu, dtype, kind):
    """Two splits; alone a row has a tile of 16 rows, among others one of 64."""
    x, weight, bias = _operands(kind, dtype, 256, 70, 1040)
    assert cuda_linear.splits(70, 1040) == 2
    _assert_rows_stand_alone(x, lambda x: ops.linear(x, weight, bias, backend="cuda"))


def test_splits_in_cuda_come_from_the_weight():
    """Enough blocks for a GPU, and at least eight steps each."""
    for width, depth in ((12288, 4096), (4096, 4096), (4096, 12288), (3584, 18944), (79, 128)):
        count = cuda_linear.splits(width, depth)
        assert count == 1 or depth // 64 // count >= 8
        assert -(-width // 64) * count >= 192 or depth // 64 < 16 * count
    assert cuda_linear.splits(4096, 4096) == 4


def test_what_the_cuda_kernel_does_not_take(cuda_on_cpu):
    x, weight = torch.ones(2, 32).half(), torch.ones(5, 32).half()
    wide = torch.ones(2, 50).half()
    for change, message in (
        ({"x": x.float(), "weight": weight.float()}, "takes fp16 and bf16"),
        ({"x": x[:, :24], "weight": weight[:, :24]}, "depths of a multiple of 16, got 24"),
        ({"x": wide[:, :32]}, "x must be rows at multiples of 16 bytes"),
        ({"x": torch.ones(2, 48).half()[:, 4:36]}, "x must begin at a multiple of 16 bytes"),
        ({"x": torch.ones(2, 2, 48).half()[..., :32]}, "more than two dimensions must be contig"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.linear(**{"x": x, "weight": weight} | change, backend="cuda")
    rows = torch.ones(2, 48).half()[:, 8:40]  # rows with a stride are read in place
    assert torch.equal(ops.linear(rows, weight, backend="cuda"), torch.full((2, 5), 32).half())
    assert ops.linear(x[:0], weight, backend="cuda").shape == (0, 5)


def test_every_byte_is_converted_exactly_in_cuda(cuda_on_cpu):
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    for stored in (torch.float8_e4m3fn, torch.int8):
        values = codes.view(stored)
        values = values[~values.float().isnan()]
        padded = torch.zeros(len(values), 16, dtype=torch.uint8)
        padded[:, 5] = values.view(torch.uint8)
        weight = QuantizedWeight(padded.view(stored), torch.ones(len(values)))
        for dtype in DTYPES[1:]:
            y = ops.linear(torch.ones(1, 16, dtype=dtype), weight, backend="cuda")
            assert torch.equal(y[0].float(), values.float())


def test_the_definition_in_fp64():
    for kind in KINDS:
        x, weight, bias = _operands(kind, torch.float64, 5, 150, 300)
        y = ops.linear(x, weight, bias)
        torch.testing.assert_close(y, _exact(x, weight, bias), rtol=0, atol=1e-13)


def _assert_rows_stand_alone(x, call):
    """``call(x)[i]`` has the same bits in any subset, at any place and beside anything."""
    whole = call(x)
    count = len(x)
    for part in (slice(0, 1), slice(count - 1, count), slice(60, 125)):
        assert torch.equal(call(x[part]), whole[part])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    assert torch.equal(call(x[order]), whole[order])
    others = 100 * random_normal(*x.shape, seed=2, dtype=x.dtype)
    others[17], others[count - 3] = x[17], x[count - 3]
    others[18], others[count - 4] = float("nan"), float("inf")
    mixed = call(others)
    assert torch.equal(mixed[17], whole[17]) and torch.equal(mixed[count - 3], whole[count - 3])
    assert mixed[18].isnan().all()


@pytest.mark.parametrize(
    "dtype, kind",
    [
        *[(torch.bfloat16, kind) for kind in KINDS],
        (torch.float16, "int8"),
        (torch.float32, "dense"),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_alone_equals_the_row_among_256(backend, dtype, kind):
    x, weight, bias = _operands(kind, dtype, 256, 40, 270)
    _assert_rows_stand_alone(x, lambda x: ops.linear(x, weight, bias, backend=backend))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("width, depth", [(384, 128), (1366, 128), (512, 4096), (257, 1000)])
def test_torch_rows_stand_alone_where_the_library_has_many_kernels(dtype, width, depth):
    x, weight, bias = _operands("dense", dtype, 256, width, depth)
    _assert_rows_stand_alone(x, lambda x: ops.linear(x, weight, bias))
    # Rows that begin at any address.
    shifted = torch.cat((x[:, :1], x), 1)[:, 1:]
    assert torch.equal(ops.linear(shifted, weight, bias), ops.linear(x, weight, bias))


def test_the_comparison_of_bits_has_power():
    """F.linear fails it on this machine, or at least another number of splits does."""
    x, weight, _ = _operands("dense", torch.float32, 256, 512, 4096)
    with pytest.raises(AssertionError):
        _assert_rows_stand_alone(x, lambda x: F.linear(x, weight))
    tiles = [_tiles.LinearTile(128, 64, splits, 4, 1) for splits in (2, 4)]
    two, four = (kernel.linear(x[:8], weight, None, None, tile) for tile in tiles)
    assert not torch.equal(two, four)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype, splits", [(torch.float16, 1), (torch.bfloat16, 3)], ids=str)
def test_the_height_of_a_tile_changes_no_bit(dtype, splits, kind):
    x, weight, bias = _operands(kind, dtype, 130, 70, 450)
    parts = (weight, None) if kind == "dense" else (weight.values, weight.scale)
    tile = _tiles.LinearTile(128 if splits == 1 else 64, 64, splits, 4, 1)
    low, *rest = (kernel.linear(x, *parts, bias, tile, height) for height in (64, 128, 256))
    assert all(torch.equal(low, high) for high in rest)
    exact = _exact(x, weight, bias)
    assert max_error(low, exact) <= error_budget(exact, _plain(x, weight, bias))


def test_the_splits_are_added_in_ascending_order():
    # The first split sums to 2^24, which swallows a 1 that is added alone.
    x = torch.ones(1, 3 * 64)
    weight = torch.zeros(1, 3 * 64)
    weight[0, 0], weight[0, 64], weight[0, 128] = 2.0**24, 1.0, 1.0
    tile = _tiles.LinearTile(64, 64, 3, 4, 1)
    assert kernel.linear(x, weight, None, None, tile).item() == 2.0**24
    assert kernel.linear(x, weight.flip(1), None, None, tile).item() == 2.0**24 + 2


@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
def test_what_decides_bits_is_not_the_number_of_rows(monkeypatch, arch):
    monkeypatch.setattr(_tiles, "arch", lambda device: arch)
    heights = {
        size: {_tiles.linear_height(None, rows, size, 2) for rows in range(1, 400)}
        for size in (1, 2)
    }
    # tcgen05.mma is another instruction with 64 rows than with 128.
    assert heights[2] == ({128} if arch == 100 else {64, 128, 256} if arch == 90 else {64, 128})
    assert heights[1] == ({128} if arch == 100 else {64, 128})
    for size in (1, 2):
        for width, depth in ((12288, 4096), (640, 640), (79, 128)):
            tile = _tiles.linear_tile(None, width, depth, size, 2)
            # A tile and a step lie in one block of scales.
            assert 128 % tile.block_n == 0 and 128 % tile.block_k == 0
            assert (tile.splits - 1) * tile.block_k < depth


@pytest.mark.parametrize("kind", KINDS[1:])
def test_quantize(kind):
    weight = random_normal(200, 300, seed=3) * torch.logspace(-3, 3, 200)[:, None]
    weight[130:, 256:] = 0
    weight[7] = 0
    quantized = ops.quantize(weight, kind)
    assert quantized.shape == (200, 300) and quantized.scale.dtype == torch.float32
    assert quantized.scale.shape == ((2, 3) if kind == "fp8" else (200,))
    assert quantized.nbytes == 200 * 300 + 4 * quantized.scale.numel()
    step = (weight - quantized.dequantize()).abs()
    if kind == "int8":  # half a step of 1 / 127 of the row's largest
        assert (step <= weight.abs().amax(1, keepdim=True) / 127 * 0.5001).all()
    else:  # half a unit in the last of 3 bits, or half of the smallest subnormal
        n, k = torch.arange(200)[:, None] // 128, torch.arange(300) // 128
        smallest = (quantized.scale[n, k] if kind == "fp8" else quantized.scale[:, None]) * 2.0**-10
        assert (step <= torch.maximum(weight.abs() * 2.0**-4, smallest) * 1.0001).all()
    # The largest of each block or channel is exact, up to the rounding of its scale.
    largest = quantized.values.float().abs()
    rows = largest.amax(1) if kind != "fp8" else largest[:128, :128].max()[None]
    assert (rows[rows > 0] == (127 if kind == "int8" else 448)).all()
    again = ops.quantize(quantized.dequantize(torch.float64), kind)
    torch.testing.assert_close(again.dequantize(), quantized.dequantize(), rtol=1e-6, atol=0)


def test_every_byte_is_converted_exactly():
    """All values of both types, through both backends, against their fp64 products."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    for dtype in (torch.float8_e4m3fn, torch.int8):
        values = codes.view(dtype)
        values = values[~values.float().isnan()]
        weight = QuantizedWeight(values[:, None].contiguous(), torch.ones(len(values)))
        for x in DTYPES:
            for backend in BACKENDS:
                y = ops.linear(torch.ones(1, 1, dtype=x), weight, backend=backend)
                assert torch.equal(y[0].float(), values.float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_of_x(backend):
    x, weight, bias = _operands("dense", torch.float32, 12, 40, 24)
    flat = ops.linear(x, weight, bias, backend=backend)
    for shape in ((12,), (3, 4), (2, 1, 6)):
        y = ops.linear(x.view(*shape, 24), weight, bias, backend=backend)
        assert y.shape == (*shape, 40) and torch.equal(y.view(12, 40), flat)
    assert torch.equal(ops.linear(x[3], weight, bias, backend=backend), flat[3])
    assert ops.linear(x[:0], weight, bias, backend=backend).shape == (0, 40)
    wide = torch.cat((x, x), 1)  # rows with a stride are read in place
    assert torch.equal(ops.linear(wide[:, 24:], weight, bias, backend=backend), flat)
    columns = torch.cat((weight, weight), 1)[:, 24:]
    assert torch.equal(ops.linear(x, columns, bias, backend=backend), flat)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(backend, kind):
    x, weight, bias = _operands(kind, torch.float32, 3, 16, 32)
    parts = (weight, None) if kind == "dense" else (weight.values, weight.scale)
    # opcheck compares its copies of e4m3 with an operation that PyTorch lacks for it.
    options = {"test_utils": "test_faketensor"} if "fp8" in kind else {}
    torch.library.opcheck(torch.ops.pydllm.linear.default, (x, *parts, bias, backend), **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fullgraph_compile(backend):
    x, weight, bias = _operands("dense", torch.float32, 3, 16, 32)

    def call(x):
        return ops.linear(x, weight, bias, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(compiled, call(x))


def _quantized(values, scale):
    return QuantizedWeight(torch.ones(*values).to(torch.int8), torch.ones(*scale))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.tensor(1.0)}, ValueError, r"x: expected shape \(..., K\), got \(\)"),
        ({"x": torch.ones(2, 4).int()}, TypeError, "x: expected dtype .*torch.int32"),
        ({"weight": torch.ones(5, 3)}, ValueError, r"weight: expected shape \(N, 4\), got \(5, 3"),
        ({"weight": torch.ones(5, 4).half()}, TypeError, "weight: expected dtype torch.float32"),
        ({"weight": torch.ones(0, 4)}, ValueError, "expected N and K of at least 1"),
        ({"weight": _quantized((5, 3), (5,))}, ValueError, r"weight: expected shape \(N, 4\)"),
        ({"bias": torch.ones(4)}, ValueError, r"bias: expected shape \(5\), got \(4,\)"),
        ({"bias": torch.ones(5).double()}, TypeError, "bias: expected dtype torch.float32"),
        ({"weight": torch.ones(5, 4, device="meta")}, ValueError, "weight: expected device cpu"),
        ({"x": torch.ones(2, 4, requires_grad=True)}, ValueError, "got x with requires_grad=True"),
        ({"x": torch.ones(4, 2).t(), "backend": "triton"}, RuntimeError, "x must be rows of conti"),
        ({"x": torch.ones(2, 4).double(), "weight": torch.ones(5, 4).double(), "backend": "triton"},
         RuntimeError, "the kernel takes fp32, fp16 and bf16"),
        ({"backend": "gpu"}, ValueError, "backend: expected one of auto, cuda, triton, torch"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        ops.linear(**{"x": torch.ones(2, 4), "weight": torch.ones(5, 4)} | change)


def test_bad_quantised_weights():
    for values, scale, message in (
        ((5, 4), (4,), r"scale: expected shape \(5,\), got \(4,\)"),
        ((5, 4), (1, 1), r"scale: expected shape \(5,\), got \(1, 1\)"),  # INT8: channels alone
    ):
        with pytest.raises(ValueError, match=message):
            _quantized(values, scale)
    fp8 = torch.ones(130, 4).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"scale: expected shape \(130,\) or \(2, 1\), got \(1,\)"):
        QuantizedWeight(fp8, torch.ones(1))
    with pytest.raises(TypeError, match="values: expected dtype .*torch.uint8"):
        QuantizedWeight(fp8.view(torch.uint8), torch.ones(130))
    with pytest.raises(TypeError, match="scale: expected dtype torch.float32"):
        QuantizedWeight(fp8, torch.ones(130).half())
    with pytest.raises(ValueError, match="kind: expected one of fp8, fp8_channel, int8, got 'int4"):
        ops.quantize(torch.ones(2, 2), "int4")
    with pytest.raises(ValueError, match=r"weight: expected shape \(N, K\), got \(2,\)"):
        ops.quantize(torch.ones(2), "int8")
    for bad in (float("nan"), float("inf")):
        for kind in KINDS[1:]:
            with pytest.raises(ValueError, match="weight: expected finite numbers"):
                ops.quantize(torch.tensor([[1.0, bad]]), kind)


def test_the_reference_multiplies_quantised_weights_piece_by_piece(monkeypatch):
    x, weight, bias = _operands("fp8", torch.float32, 40, 700, 300)
    whole = ops.linear(x, weight, bias)
    module = importlib.import_module("pydllm.reference.linear")  # the function has its name
    monkeypatch.setattr(module, "_PIECE", 1)
    pieces = reference.linear(x, weight.values, weight.scale, bias)
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width, depth", [(12288, 4096), (4096, 4096), (3584, 18944), (640, 1024)])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_rows_stand_alone_on_a_gpu(backend, width, depth, kind):
    x, weight, bias = _operands(kind, torch.bfloat16, 300, width, depth)
    x, bias = x.cuda(), bias.cuda()
    if kind == "dense":
        weight = weight.cuda()
    else:
        weight = QuantizedWeight(weight.values.cuda(), weight.scale.cuda())

    def call(x):
        return ops.linear(x.cuda(), weight, bias, backend=backend).cpu()

    _assert_rows_stand_alone(x.cpu(), call)
    assert all(torch.equal(call(x), call(x)) for _ in range(50))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_captured_graph_replays(backend):
    x, weight, bias = (t.cuda() for t in _operands("dense", torch.bfloat16, 32, 4096, 4096))
    static = torch.zeros_like(x)
    ops.linear(static, weight, bias, backend=backend)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.linear(static, weight, bias, backend=backend)
    static.copy_(x)
    graph.replay()
    assert torch.equal(y, ops.linear(x, weight, bias, backend=backend))
