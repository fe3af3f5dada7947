"""``draft`` against a sort of Python lists; integers are equal, on inputs full of ties."""

import math

import pytest
import torch

from pydllm import ops

MASK = 5
BACKENDS = ["torch", "triton", "cuda"]
# branches, window rows, positions, block_size
SIZES = [
    (1, 1, 1, None),
    (3, 9, 11, None),
    (8, 32, 40, 8),
    (32, 33, 300, 4),
    (5, 64, 64, 32),
    (4, 128, 130, 7),
]


def numbers(*values):
    return torch.tensor(values, dtype=torch.int32)


def make_case(rows, slots, seed=0, dtype=torch.float32, batch=4):
    """Scores of few values, NaN and infinities among them; the last window sticks out."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([0.0, -0.0, 0.25, 0.5, 1.0, math.nan, -math.inf, math.inf])
    spare = slots - rows
    return {
        "x": torch.randint(3, 8, (batch, slots), generator=generator).where(
            torch.rand(batch, slots, generator=generator) < 0.3, torch.tensor(MASK)
        ),
        "token": torch.randint(0, 5, (batch, rows), generator=generator),
        "score": values[torch.randint(0, 8, (batch, rows), generator=generator)].to(dtype),
        "start": numbers(*[(0, spare // 2, spare, spare + 1)[b % 4] for b in range(batch)]),
        "length": numbers(*[(rows, rows // 2, rows, rows)[b % 4] for b in range(batch)]),
    }


def ranked(x, score, start, length, block_size):
    """Positions of one sequence's masks, in the order in which they are filled."""
    inside = range(max(start, 0), min(start + length, len(x)))
    masks = [p for p in inside if x[p] == MASK]

    def cost(p):
        value = score[p - start]
        return math.inf if math.isnan(value) else -value

    return sorted(masks, key=lambda p: (p // (block_size or 1000), cost(p), p))


def expected(case, branches, block_size):
    candidates = []
    for x, token, score, start, length in zip(*(case[n].tolist() for n in case), strict=True):
        order = ranked(x, score, start, length, block_size)
        candidates.append([list(x) for _ in range(branches)])
        for number, candidate in enumerate(candidates[-1]):
            for position in order[:number]:
                candidate[position] = token[position - start]
    return torch.tensor(candidates)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_candidates_are_nested(sizes, backend):
    branches, rows, slots, block_size = sizes
    for dtype in (torch.float32, torch.float16):
        case = make_case(rows, slots, seed=rows, dtype=dtype)
        got = ops.draft(
            **case, mask_id=MASK, branches=branches, block_size=block_size, backend=backend
        )
        assert torch.equal(got, expected(case, branches, block_size))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do(backend):
    case = {name: tensor[:0] for name, tensor in make_case(4, 8).items()}
    assert ops.draft(**case, mask_id=MASK, branches=2, backend=backend).shape == (0, 2, 8)
    case = make_case(4, 8) | {"length": numbers(0, 0, 0, 0)}
    got = ops.draft(**case, mask_id=MASK, branches=2, backend=backend)
    assert torch.equal(got, case["x"][:, None].expand(-1, 2, -1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_compile(backend):
    case = make_case(6, 9)
    arguments = (*[case[n] for n in ("x", "token", "score")], MASK, case["start"], case["length"])
    torch.library.opcheck(torch.ops.pydllm.draft.default, (*arguments, 3, 4, backend))

    def run(case):
        return ops.draft(**case, mask_id=MASK, branches=3, block_size=4, backend=backend)

    got = torch.compile(run, fullgraph=True, backend="aot_eager")(case)
    assert torch.equal(got, expected(case, 3, 4))


BAD = [
    ({"branches": 0}, ValueError, r"branches: expected an int in \[1, 32\], got 0"),
    ({"branches": 33}, ValueError, r"branches: expected an int in \[1, 32\], got 33"),
    ({"block_size": 0}, ValueError, "block_size: expected an int of at least 1, got 0"),
    ({"mask_id": 0.5}, TypeError, "mask_id: expected an int in .*, got 0.5"),
    ({"token": torch.zeros(4, 6)}, TypeError, "token: expected dtype torch.int64"),
    ({"score": torch.zeros(4, 5)}, ValueError, r"score: expected shape \(4, 6\), got \(4, 5\)"),
    ({"start": numbers(0)}, ValueError, r"start: expected shape \(4\), got \(1,\)"),
    ({"x": torch.zeros(4, 5).long()}, ValueError, "token: expected 1 to 5 positions"),
    ({"backend": "cuda"}, RuntimeError, "CUDA kernels need a CUDA tensor"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        ops.draft(**({**make_case(6, 9), "mask_id": MASK, "branches": 2} | change))


def test_what_the_kernel_does_not_take():
    for case, message in (
        (make_case(129, 140), "windows of up to 128 positions, got 129"),
        (make_case(6, 9, dtype=torch.float64), "fp32, fp16 and bf16 scores, got torch.float64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.draft(**case, mask_id=MASK, branches=2, backend="triton")
        got = ops.draft(**case, mask_id=MASK, branches=2)
        assert torch.equal(got, expected(case, 2, None))


def test_windows_that_only_the_cuda_kernel_takes(cuda_on_cpu):
    case = make_case(1000, 1030, batch=2)
    got = ops.draft(**case, mask_id=MASK, branches=32, block_size=50, backend="cuda")
    assert torch.equal(got, expected(case, 32, 50))
    for case, message in (
        (make_case(1025, 1030), "windows of up to 1024 positions, got 1025"),
        (make_case(6, 9, dtype=torch.float64), "fp32, fp16 and bf16 scores, got torch.float64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.draft(**case, mask_id=MASK, branches=2, backend="cuda")
