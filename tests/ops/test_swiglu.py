import math

import pytest
import torch

from pydllm import ops, reference
from pydllm.testing import assert_within_budget, random_normal

KERNELS = ["triton", "cuda"]
BACKENDS = ["torch", *KERNELS]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 2), (3, 14), (2, 5, 256), (4, 2050), (2, 5002), (0, 64), (3, 0), (10,)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_stay_within_the_error_budget(backend, dtype, shape):
    gate_up = 4 * random_normal(*shape, seed=0, dtype=dtype)
    y = ops.swiglu(gate_up, backend=backend)
    assert y.shape == (*shape[:-1], shape[-1] // 2) and y.dtype == dtype and y.is_contiguous()
    assert_within_budget(y, reference.swiglu, gate_up)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_formula(backend):
    gate_up = 8 * random_normal(6, 20, seed=1)
    y = ops.swiglu(gate_up, backend=backend)
    for row, out in zip(gate_up.tolist(), y.tolist(), strict=True):
        for gate, up, got in zip(row[:10], row[10:], out, strict=True):
            expected = gate / (1 + math.exp(-gate)) * up
            assert abs(got - expected) <= 4 * 2**-23 * abs(expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_silu_is_rounded_before_the_product(backend):
    # silu(1.25) = 0.97162 is 0.97266 in bf16; times 2.5 that is 2.4375, unrounded it is 2.4219.
    gate_up = torch.tensor([[1.25, 2.5]], dtype=torch.bfloat16)
    assert ops.swiglu(gate_up, backend=backend).item() == 2.4375


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # NumPy's, in the interpreter
def test_large_gates_saturate(backend):
    gate_up = torch.tensor([[-1e4, 1e4, -20.0, 2.0, 2.0, 2.0]])
    low, high, tail = ops.swiglu(gate_up, backend=backend)[0].tolist()
    assert (low, high) == (0.0, 2e4)
    assert tail == pytest.approx(-40 / (1 + math.exp(20)), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_depends_on_itself_alone(backend):
    gate_up = random_normal(8, 96, seed=2)
    alone = ops.swiglu(gate_up[5:6], backend=backend)
    gate_up[3] = float("nan")
    together = ops.swiglu(gate_up, backend=backend)
    assert torch.equal(alone[0], together[5])
    assert together[3].isnan().all()
    assert not together[[0, 1, 2, 4, 5, 6, 7]].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    gate_up = random_normal(3, 2, 16, seed=3)
    torch.library.opcheck(torch.ops.pydllm.swiglu.default, (gate_up, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_fullgraph_compile(backend):
    gate_up = random_normal(3, 16, seed=4)

    def call(gate_up):
        return ops.swiglu(gate_up, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(gate_up)
    assert torch.equal(compiled, call(gate_up))


def test_a_view_is_read_in_place_by_torch():
    gate_up = random_normal(6, 64, seed=5)[:, :32]
    assert torch.equal(ops.swiglu(gate_up), ops.swiglu(gate_up.contiguous()))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gate_up": torch.ones(3, 5)}, ValueError, r"expected shape \(..., 2H\), got \(3, 5\)"),
        ({"gate_up": torch.tensor(1.0)}, ValueError, r"expected shape \(..., 2H\), got \(\)"),
        ({"gate_up": torch.ones(3, 4).int()}, TypeError, "gate_up: expected dtype .*torch.int32"),
        ({"gate_up": torch.ones(4, requires_grad=True)}, ValueError, "got gate_up with requires_"),
        ({"gate_up": torch.ones(4, 3).t(), "backend": "triton"}, RuntimeError, "must be contig"),
        ({"gate_up": torch.ones(4).double(), "backend": "triton"}, RuntimeError, "takes fp32, fp1"),
        ({"backend": "cuda"}, RuntimeError, "CUDA kernels need a CUDA tensor, got one on cpu"),
        ({"backend": "gpu"}, ValueError, "backend: expected one of auto, cuda, triton, torch"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        ops.swiglu(**{"gate_up": torch.ones(3, 4)} | change)


def test_what_the_cuda_kernel_does_not_take(cuda_on_cpu):
    with pytest.raises(RuntimeError, match="must be contiguous"):
        ops.swiglu(torch.ones(4, 3).t(), backend="cuda")
    with pytest.raises(RuntimeError, match="takes fp32, fp16 and bf16"):
        ops.swiglu(torch.ones(4).double(), backend="cuda")
    # Where memory does not begin at 16 bytes, elements are read one by one.
    gate_up = random_normal(3 * 48 + 1, seed=6)[1:].view(3, 48)
    assert torch.equal(
        ops.swiglu(gate_up, backend="cuda"), ops.swiglu(gate_up.clone(), backend="cuda")
    )
