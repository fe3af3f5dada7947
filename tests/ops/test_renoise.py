"""``renoise`` against a plain statement of it."""

import math

import pytest
import torch

from pydllm import ops
from tests.ops.test_unmask import MASK, integers, numbers, philox_word
from tests.ops.test_unmask_min_tokens import grid_case

BACKENDS = ["torch", "triton"]


def random_word(position, request, nfe, seed):
    """The second word of Philox: those of the library are checked word by word elsewhere."""
    from pydllm.reference.philox import philox

    words = [torch.tensor([word]) for word in (0xFFFFFFFF, position, request, nfe)]
    got = philox(*words, seed)[0].tolist()
    assert got[0] == philox_word(0xFFFFFFFF, position, request, nfe, seed)
    return got[1]


def make(batch, rows, seed):
    """Entropies smooth, full of ties, or close to a tie; some not numbers, infinite or -0."""
    case = grid_case(batch, rows, seed, torch.float32, True)
    entropy = case["score"]
    for value, column in ((math.nan, 0), (math.inf, 1), (-0.0, 2)):
        entropy[::5, column % rows] = value
    request = numbers(integers(batch, low=-5, high=99, seed=seed))
    return {
        "x": case["x"][:, :rows].contiguous(),
        "token": case["token"],
        "entropy": entropy,
        "seed": 2**64 - 1 - seed,
        "request": request,
        "step": case["nfe"],
    }


def expect(case, bound):
    """The ids after the step, and what was accepted, one Python number at a time."""
    x, token, entropy = (case[name].tolist() for name in ("x", "token", "entropy"))
    accepted = []
    for b, row in enumerate(x):
        cost = [math.inf if math.isnan(value) else value for value in entropy[b]]
        spent, keep = 0.0, set()
        for j in sorted(range(len(row)), key=lambda j: (cost[j], j)):
            if spent <= bound and cost[j] < math.inf:
                keep.add(j)
            spent += min(cost[j], 128.0)
        for j in range(len(row)):
            counter = j, case["request"][b].item(), case["step"][b].item()
            noise = random_word(*counter, case["seed"]) * 40 >> 32
            row[j] = token[b][j] if j in keep else noise
        accepted.append([j in keep for j in range(len(row))])
    return torch.tensor(x), torch.tensor(accepted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_equals_its_statement(backend):
    for index, (rows, bound) in enumerate((r, b) for r in (1, 5, 33) for b in (0.0, 0.25, 2.0, 30)):
        case = make(40, rows, 100 * index)
        expected = expect(case, bound)
        accepted = ops.renoise(**case, bound=bound, vocab_size=40, backend=backend)
        assert torch.equal(case["x"], expected[0]) and torch.equal(accepted, expected[1])


@pytest.mark.parametrize("rows", [300, 2048])
def test_long_canvases_on_both_backends(rows):
    results = []
    for backend in BACKENDS:
        case = make(4, rows, 7)
        accepted = ops.renoise(**case, bound=30.0, vocab_size=2**31 - 1, backend=backend)
        results.append((case["x"], accepted))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert 0 < results[0][1].sum() < 4 * rows


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_is_uniform_and_keyed_by_sequence_and_position(backend):
    batch, rows, vocab = 64, 64, 16
    given = {"seed": 0, "request": numbers(range(batch)), "step": numbers([3] * batch)}

    def noise(**changes):
        x = torch.zeros(batch, rows, dtype=torch.int64)
        token, entropy = torch.zeros_like(x), torch.full((batch, rows), 100.0)
        options = given | changes
        accepted = ops.renoise(
            x, token, entropy, bound=0.0, vocab_size=vocab, backend=backend, **options
        )
        # The first is taken whatever its entropy: nothing was spent before it.
        assert accepted[:, 0].all() and accepted.sum() == batch
        return x[:, 1:]

    x = noise()
    assert x.min() >= 0 and x.max() < vocab
    counts = torch.bincount(x.flatten(), minlength=vocab).double()
    statistic = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert statistic < 37.7  # 15 degrees of freedom, p = 0.001
    assert not torch.equal(x, noise(seed=1)) and not torch.equal(x, noise(step=given["step"] + 1))
    assert torch.equal(x.flip(0), noise(request=given["request"].flip(0)))


def test_opcheck_and_compile():
    case = make(3, 9, 1)
    tensors = {k: v for k, v in case.items() if k != "seed"}
    names = ("x", "token", "entropy")
    order = (*(case[name] for name in names), 0.5, 40, 1, case["request"], case["step"], "torch")
    torch.library.opcheck(torch.ops.pydllm.renoise.default, order)
    eager = {name: value.clone() for name, value in tensors.items()}
    expected = ops.renoise(**eager, seed=1, bound=0.5, vocab_size=40)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(**tensors):
        return ops.renoise(**tensors, seed=1, bound=0.5, vocab_size=40)

    assert torch.equal(run(**tensors), expected) and torch.equal(tensors["x"], eager["x"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bound": -1.0}, ValueError, "bound: expected a number of at least 0, got -1.0"),
        ({"bound": math.nan}, ValueError, "bound: expected a number of at least 0, got nan"),
        ({"vocab_size": 2**31}, ValueError, "vocab_size: expected an int"),
        ({"seed": -1}, ValueError, "seed: expected an int"),
        ({"x": torch.ones(2, 3)}, TypeError, "x: expected dtype torch.int64"),
        ({"token": torch.ones(2, 4).long()}, ValueError, r"token: expected shape \(2, 3\)"),
        ({"entropy": torch.ones(2, 3).long()}, TypeError, "entropy: expected dtype"),
        ({"request": numbers([1])}, ValueError, r"request: expected shape \(2\)"),
        ({"step": torch.ones(2)}, TypeError, "step: expected dtype torch.int32"),
        ({"entropy": torch.ones(2, 3, requires_grad=True)}, ValueError, "requires_grad"),
        (
            {"entropy": torch.ones(2, 3).double(), "backend": "triton"},
            RuntimeError,
            "takes fp32, fp16 and bf16 entropies",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(change, error, message):
    given = {
        "x": torch.full((2, 3), MASK),
        "token": torch.ones(2, 3, dtype=torch.int64),
        "entropy": torch.ones(2, 3),
        "bound": 0.1,
        "vocab_size": 9,
        "seed": 0,
        "request": numbers([0, 0]),
        "step": numbers([0, 0]),
    } | change
    before = given["x"].clone()
    with pytest.raises(error, match=message):
        ops.renoise(**given)
    assert torch.equal(given["x"], before)
