import pytest
import torch

from pydllm import ops, reference
from pydllm.testing import assert_within_budget, random_normal

KERNELS = ["triton", "cuda"]
BACKENDS = ["torch", *KERNELS]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (3, 7), (2, 5, 128), (4, 129), (1, 1000), (0, 64)]
# One off what a block of each size of the CUDA kernel holds.
WIDE = [(2, 4100), (1, 8192), (1, 16388), (2, 4097), (1, 32768)]


def _inputs(shape, dtype, with_residual):
    x = random_normal(*shape, seed=0, dtype=dtype)
    weight = random_normal(shape[-1], seed=1, dtype=dtype)
    residual = random_normal(*shape, seed=2, dtype=dtype) if with_residual else None
    return x, weight, residual


@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_stay_within_the_error_budget(backend, dtype, shape, with_residual):
    check_budget(backend, dtype, shape, with_residual)


@pytest.mark.parametrize("shape", WIDE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_wide_rows_in_cuda(cuda_on_cpu, dtype, shape):
    check_budget("cuda", dtype, shape, with_residual=True)


def check_budget(backend, dtype, shape, with_residual):
    x, weight, residual = _inputs(shape, dtype, with_residual)
    kept = None if residual is None else residual.clone()
    y = ops.rms_norm(x, weight, 1e-5, residual=kept, backend=backend)
    if residual is None:
        assert_within_budget(y, lambda x, w: reference.rms_norm(x, w, 1e-5, None), x, weight)
        return
    assert torch.equal(kept, x + residual)
    # The sum is rounded to the dtype before it is normalised, on every road: start from it.
    assert_within_budget(y, lambda x, w: reference.rms_norm(x, w, 1e-5, None), kept, weight)


def test_the_definition_agrees_with_torch():
    x, weight, _ = _inputs((4, 33), torch.float64, False)
    expected = torch.nn.functional.rms_norm(x, (33,), weight, 1e-6)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-6), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("backend", KERNELS)
def test_rows_with_a_stride_are_read_in_place(backend, offset):
    wide = random_normal(6, 64, seed=3)
    x, weight = wide[:, offset : 32 + offset], random_normal(32, seed=4)
    kept, whole = random_normal(6, 70, seed=5), random_normal(6, 70, seed=5)
    residual = kept[:, offset : 32 + offset]
    y = ops.rms_norm(x, weight, 1e-5, residual=residual, backend=backend)
    expected = whole[:, offset : 32 + offset].contiguous()
    again = ops.rms_norm(x.contiguous(), weight, 1e-5, residual=expected, backend=backend)
    assert torch.equal(y, again) and torch.equal(residual, expected)
    whole[:, offset : 32 + offset] = expected
    assert torch.equal(kept, whole)  # nothing beside the rows is written


@pytest.mark.parametrize("backend", KERNELS)
def test_a_row_depends_on_itself_alone(backend):
    x, weight, _ = _inputs((8, 96), torch.float32, False)
    alone = ops.rms_norm(x[5:6], weight, 1e-5, backend=backend)
    x[3] = float("nan")
    together = ops.rms_norm(x, weight, 1e-5, backend=backend)
    assert torch.equal(alone[0], together[5])
    assert together[3].isnan().all()
    assert not together[[0, 1, 2, 4, 5, 6, 7]].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    x, weight, residual = _inputs((3, 16), torch.float32, True)
    op = torch.ops.pydllm.rms_norm.default
    torch.library.opcheck(op, (x, weight, 1e-5, residual, backend))
    torch.library.opcheck(op, (x, weight, 1e-5, None, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_fullgraph_compile(backend):
    x, weight, residual = _inputs((3, 16), torch.float32, True)
    eager_residual = residual.clone()

    def call(x, residual):
        return ops.rms_norm(x, weight, 1e-5, residual=residual, backend=backend)

    expected = call(x, eager_residual)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(x, residual)
    assert torch.equal(compiled, expected)
    assert torch.equal(residual, eager_residual)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.ones(5)}, ValueError, r"weight: expected shape \(4\), got \(5,\)"),
        ({"weight": torch.ones(4).half()}, TypeError, "weight: expected dtype torch.float32, got"),
        ({"residual": torch.ones(2, 4)}, ValueError, r"residual: expected shape \(3, 4\), got"),
        ({"x": torch.ones(3, 4).int()}, TypeError, "x: expected dtype .*, got torch.int32"),
        ({"backend": "cuda"}, RuntimeError, "CUDA kernels need a CUDA tensor, got one on cpu"),
        ({"backend": "gpu"}, ValueError, "backend: expected one of auto, cuda, triton, torch"),
        ({"x": torch.ones(3, 4, requires_grad=True)}, ValueError, "got x with requires_grad=True"),
        ({"x": torch.ones(4, 3).t(), "backend": "triton"}, RuntimeError, "x must be rows of"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"x": torch.ones(3, 4), "weight": torch.ones(4), "eps": 1e-5} | change
    with pytest.raises(error, match=message):
        ops.rms_norm(**arguments)


def test_what_the_cuda_kernel_does_not_take(cuda_on_cpu):
    for change, message in (
        ({"x": torch.ones(4, 3).t()}, "x must be rows of contiguous elements"),
        ({"x": torch.ones(3, 4).double(), "weight": torch.ones(4).double()}, "takes fp32, fp16"),
        ({"x": torch.ones(1, 32769), "weight": torch.ones(32769)}, "up to 32768 elements"),
    ):
        arguments = {"x": torch.ones(3, 4), "weight": torch.ones(4), "eps": 1e-5} | change
        with pytest.raises(RuntimeError, match=message):
            ops.rms_norm(**arguments, backend="cuda")
