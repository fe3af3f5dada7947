"""``experts`` in CUDA, emulated: sizes of a multiple of 16, fp16 and bf16."""

import pytest
import torch

from pydllm import ops
from pydllm.ops import QuantizedWeight
from pydllm.testing import error_budget, max_error
from tests import emulation
from tests.mutants import assert_caught
from tests.ops.test_experts import make, plain, quantized, widened

DTYPES = [torch.float16, torch.bfloat16]
SIZES = {
    "no shared expert": {},
    "shared folded in": {"shared": 48},
    "shared of another width": {"shared": 16},
    "one expert, one slot": {"experts": 1, "top_k": 1},
    "several tiles": {"experts": 2, "width": 208, "inner": 144, "shared": 144},
}


def case_of(rows=21, dtype=torch.bfloat16, **sizes):
    return make(rows, **{"width": 80, "inner": 48, "dtype": dtype} | sizes)


def assert_right(got, case, activation="silu"):
    exact = plain(widened(case), activation)
    assert max_error(got, exact) <= error_budget(exact, plain(case, activation))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES)
def test_against_one_pair_at_a_time(cuda_on_cpu, sizes, dtype):
    case = case_of(**SIZES[sizes], dtype=dtype)
    assert_right(ops.experts(**case, backend="cuda"), case)


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 140])
def test_numbers_of_rows(cuda_on_cpu, rows):
    case = case_of(rows, shared=48)
    got = ops.experts(**case, activation="gelu_tanh", backend="cuda")
    assert got.shape == (rows, 80)
    if rows:
        assert_right(got, case, "gelu_tanh")


def test_rows_that_go_nowhere_and_experts_without_rows(cuda_on_cpu):
    for shared in (48, 16):
        case = case_of(40, experts=4, top_k=1, shared=shared)
        case["ids"].fill_(2)
        case["ids"][[3, 7, 18], 0] = torch.tensor([4, -5, 2**30], dtype=torch.int32)
        case["gate_up"][3] = float("nan")  # nobody's: not read
        case["hidden"][7], case["weights"][3] = float("nan"), float("nan")
        got = ops.experts(**case, backend="cuda")
        assert (got[[3, 7, 18]] == 0).all()
        rows = torch.tensor([row for row in range(40) if row not in (3, 7, 18)])
        kept = {name: case[name][rows] for name in ("hidden", "ids", "weights")}
        assert_right(got[rows], case | kept)


def check_bits(case):
    """Alone, permuted, in a doubled batch, and beside rows that all take its experts."""
    whole = ops.experts(**case, backend="cuda")
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(1))
    for index in ([5], [36], order, torch.cat((order, order))):
        some = {name: case[name][index] for name in ("hidden", "ids", "weights")}
        assert torch.equal(ops.experts(**case | some, backend="cuda"), whole[index])
    crowd = case | {"ids": case["ids"][5:6].expand(len(whole), -1).contiguous()}
    assert torch.equal(ops.experts(**crowd, backend="cuda")[5], whole[5])
    case["hidden"][6, 3] = float("nan")
    others = torch.arange(len(whole)) != 6
    got = ops.experts(**case, backend="cuda")
    assert got[6].isnan().all() and torch.equal(got[others], whole[others])


@pytest.mark.parametrize("kind", [None, "fp8", "int8"])
def test_a_row_has_the_same_bits_among_others(cuda_on_cpu, kind):
    case = case_of(37, shared=48, inner=64)
    if kind is not None:
        case |= {name: ops.quantize(case[name].float(), kind) for name in ("gate_up", "down")}
    check_bits(case)


def check_quantized(kind="fp8", dtype=torch.float16):
    """Several blocks of scales each way; they differ by powers of ten."""
    sizes = {"experts": 2, "width": 208, "inner": 160, "shared": 160}
    case, _ = quantized(kind, 20, dtype, **sizes)
    exact = widened({n: t for n, t in case.items() if isinstance(t, torch.Tensor)})
    for name in ("gate_up", "down"):
        by = torch.linspace(0.1, 3, case[name].scale.numel()).view_as(case[name].scale)
        case[name] = QuantizedWeight(case[name].values, case[name].scale * by)
        exact[name] = case[name].dequantize(torch.float64)
    got, wanted = ops.experts(**case, backend="cuda"), plain(exact)
    rounded = {n: t.to(dtype) for n, t in exact.items() if t.is_floating_point()}
    same = plain(exact | rounded | {"weights": case["weights"]})
    assert max_error(got, wanted) <= error_budget(wanted, same)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["fp8", "fp8_channel", "int8"])
def test_quantised_experts(cuda_on_cpu, kind, dtype):
    check_quantized(kind, dtype)


def test_what_the_kernel_does_not_take(cuda_on_cpu):
    case = case_of(4)
    for change, message in (
        ({n: t.float() for n, t in case.items() if n != "ids"}, "takes fp16 and bf16"),
        (case_of(4, width=72), "multiple of 16 for the width, got 72"),
        (case_of(4, inner=24), "multiple of 16 for the inner width, got 24"),
        (case_of(4, shared=8), "multiple of 16 for the inner width of the shared expert, got 8"),
        (
            quantized("fp8", 4, inner=48, width=80)[0],
            "scales per block with an inner width of a multiple of 32, got 48",
        ),
        ({"hidden": torch.ones(4, 88).bfloat16()[:, :80]}, "hidden must be contiguous"),
        ({"hidden": torch.ones(321).bfloat16()[1:].view(4, 80)}, "hidden must begin at a mult"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.experts(**case | change, backend="cuda")


def test_opcheck(cuda_on_cpu):
    case = case_of(6, shared=48)
    names = ("hidden", "gate_up", "down", "ids", "weights", "shared_gate_up", "shared_down")
    arguments = (*(case[name] for name in names), "silu", None, None, "cuda")
    torch.library.opcheck(torch.ops.pydllm.experts.default, arguments)


def check():
    for name in ("shared folded in", "several tiles", "shared of another width"):
        case = case_of(21, torch.float16, **SIZES[name])
        case["ids"][3] = 99
        assert_right(ops.experts(**case, backend="cuda"), case)
    crowd = case_of(40, torch.float16, experts=2, top_k=1, shared=48)
    crowd["ids"][::3] = -1
    assert_right_rows(crowd)
    check_bits(case_of(37, shared=48))
    check_quantized()
    check_quantized("int8", torch.bfloat16)


def assert_right_rows(case):
    got = ops.experts(**case, backend="cuda")
    live = (case["ids"] >= 0).any(1)
    assert (got[~live] == 0).all()
    kept = {name: case[name][live] for name in ("hidden", "ids", "weights")}
    assert_right(got[live], case | kept)


MUTANTS = {
    "an expert's pairs begin early": ("ids[i] >= 0 && ids[i] < expert", "ids[i] < expert - 1"),
    "a pair twice": ("begin + exclusive_scan(hit)", "begin"),
    "up before gate": ("i / 8 % 2 == 0", "i / 8 % 2 == 1"),
    "row of the slot": ("row / call.top_k", "row % call.rows"),
    "shared pairs from the start": ("row - routed", "row"),
    "another gate": ("rounded<T>(gate)", "gate * 1.01f"),
    "up is lost": ("act * rounded<T>(up)", "act"),
    "no wait for the copy": ("ptx::cp_async_wait<kStages - 2>();", ";"),
    "no barrier after the wait": (
        "    __syncthreads();\n      load(step",
        "    if (!MUTANT) __syncthreads();\n      load(step",
    ),
    "scale of gate for up": ("(kExpand && n == 1 ? call.columns : 0)", "0"),
    "scale of the first step": ("int64_t{step} * kStep / kScaleBlock", "0"),
    "channel of up": ("expert * height + call.columns + column", "expert * height + column"),
    "a slot is lost": ("slot < call.top_k", "slot < call.top_k - 1"),
    "rows that go nowhere are not 0": ("live ? out : 0.f", "out"),
    "weights of the first slot": ("call.weights[pair]", "call.weights[row * call.top_k]"),
    "the last row of a tile": ("own < last", "own < last - 1"),
    "the shared expert's last row": ("routed + call.rows", "routed + call.rows - 1"),
    "half of a tile of columns": ("i / 16 * 8 + i % 8", "i / 16 * 8 + i % 4"),
}


@pytest.mark.slow
@pytest.mark.skipif(emulation.CXX is None, reason="needs a C++ compiler")
def test_planted_bugs_are_found(cuda_folder):
    mutants = {name: ("experts.cu", *change) for name, change in MUTANTS.items()}
    assert_caught({"tests.ops.test_experts_cuda:check": mutants}, cuda_folder)
