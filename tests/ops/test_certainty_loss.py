import math

import pytest
import torch
from torch.nn import functional as F

from pydllm import ops, reference
from pydllm.testing import assert_within_budget, random_normal

T = 0.5
NAN = math.nan


def _inputs(rows, vocab, dtype=torch.float64, seed=0):
    """Logits, and targets of which every second one is what the row predicts."""
    logits = random_normal(rows, vocab, seed=seed, dtype=dtype) * 3
    other = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(seed))
    return logits, torch.where(torch.arange(rows) % 2 == 0, logits.argmax(-1), other)


def _plain(logits, target, temperature=T):
    """The same in autograd's own words."""
    correct = logits.argmax(-1) == target
    q = (logits / temperature).softmax(-1)
    entropy = torch.distributions.Categorical(q).entropy() * correct
    return F.cross_entropy(logits, target, reduction="none"), entropy, correct


def test_hand_computed_losses():
    logits = torch.tensor([[3.0, 1.0]], dtype=torch.float64).log()
    cross_entropy, entropy, correct = ops.certainty_loss(logits, torch.tensor([0]))
    assert cross_entropy.item() == pytest.approx(math.log(4 / 3))
    assert entropy.item() == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))
    assert correct.item()
    wrong = ops.certainty_loss(logits, torch.tensor([1]))
    assert (wrong[1].item(), wrong[2].item()) == (0, False)
    certain = ops.certainty_loss(torch.tensor([[0.0, -1e30, -torch.inf]]), torch.tensor([0]))
    assert [value.item() for value in certain] == [0, 0, True]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_the_definition_equals_autograd(temperature):
    logits, target = _inputs(9, 31)
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    weights = random_normal(2, 9, seed=4, dtype=torch.float64)
    for leaf, losses in (
        (ours, ops.certainty_loss(ours, target, temperature=temperature)),
        (theirs, _plain(theirs, target, temperature)),
    ):
        (weights[0] * losses[0] + weights[1] * losses[1]).sum().backward()
        assert leaf.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-13)
    for got, expected in zip(
        ops.certainty_loss(logits, target, temperature=temperature),
        _plain(logits, target, temperature),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [1e-6, 1e3, 1e18])
def test_triton_follows_the_definition_at_any_temperature(temperature):
    """A logit of -inf has no share, however flat the distribution; nor have ids past the last."""
    logits, target = _inputs(9, 31, torch.float32)
    logits[:, 4] = -torch.inf
    target[::2] = logits[::2].argmax(-1)
    grads, losses = [], []
    for backend in ("torch", "triton"):
        leaf = logits.clone().requires_grad_()
        terms = ops.certainty_loss(leaf, target, temperature=temperature, backend=backend)
        terms[1].sum().backward()
        losses.append(terms[1].detach())
        grads.append(leaf.grad)
    if temperature > 1:
        assert losses[0].max().item() == pytest.approx(math.log(30), rel=1e-4)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_only_correct_rows_have_a_gradient_of_the_entropy(backend):
    logits, target = _inputs(6, 17, torch.float32)
    logits.requires_grad_()
    _, entropy, correct = ops.certainty_loss(logits, target, backend=backend)
    entropy.sum().backward()
    assert torch.equal(logits.grad.abs().amax(-1) > 0, correct)
    assert 0 < correct.sum() < 6


@pytest.mark.parametrize(
    "shape", [(1, 1), (5, 7), (3, 1000), (2, 16385), (4, 40000), (0, 9)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_triton_stays_within_the_error_budget(dtype, shape):
    logits, target = _inputs(*shape, dtype)
    got = torch.ops.pydllm.certainty_loss(logits, target, T, "triton")
    assert torch.equal(got[2], reference.certainty_loss(logits, target, T)[2])
    for place in (0, 1, 3, 4, 5):
        assert_within_budget(
            got[place], lambda x, p=place: reference.certainty_loss(x, target, T)[p], logits
        )
    weights = random_normal(2, shape[0], seed=5)
    statistics = reference.certainty_loss(logits, target, T)
    kept = statistics[1:]
    grad = torch.ops.pydllm.certainty_loss_backward(logits, target, T, *weights, *kept, "triton")
    assert_within_budget(
        grad,
        lambda x, *rest: reference.certainty_loss_backward(x, target, T, *rest),
        logits,
        *weights,
        *kept,
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_lowest_index_wins_a_tie(backend):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 3, (64, 40000), generator=generator).float()
    logits[32:, :20000] = 0  # the maximum stands in another tile than the first id
    target = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
    assert ops.certainty_loss(logits, target, backend=backend)[2].all()
    last = logits.shape[1] - 1 - logits.flip(-1).argmax(-1)
    assert not ops.certainty_loss(logits, last, backend=backend)[2].any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_row_depends_on_itself_alone(backend):
    logits, target = _inputs(6, 33, torch.float32)
    logits[1] = torch.nan
    logits[2, :20] = -torch.inf
    target[2] = 25
    wide = torch.cat((logits, logits), 1)[:, :33]  # rows at a stride
    results = []
    for part in (wide, wide[2:4]):
        leaf = part.detach().requires_grad_()
        aimed = target if len(part) == 6 else target[2:4]
        losses = ops.certainty_loss(leaf, aimed, backend=backend)
        (losses[0].sum() + losses[1].sum()).backward()
        results.append((*losses, leaf.grad))
    for together, alone in zip(*results, strict=True):
        assert torch.equal(together[2:4], alone)
    assert results[0][0][1].isnan()
    assert torch.isfinite(results[0][3][[0, 2, 3, 4, 5]]).all()


INF, HUGE = float("inf"), 3.3e38


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("row", "target", "cross_entropy", "entropy", "grad"),
    [
        ([-INF, -INF], 0, NAN, 0.0, [NAN, NAN]),
        ([INF, 1.0], 1, NAN, 0.0, [NAN, NAN]),
        ([NAN, 1.0], 1, NAN, 0.0, [NAN, NAN]),
        ([1.0, INF], 1, NAN, 0.0, [NAN, NAN]),
        ([HUGE, -HUGE], 0, 0.0, 0.0, [0.0, 0.0]),
        ([HUGE, HUGE], 0, math.log(2), math.log(2), [-0.5, 0.5]),
        ([1.0, -INF], 0, 0.0, 0.0, [0.0, 0.0]),
        ([1.0, 1.0], 2, NAN, 0.0, [0.5, 0.5]),
        ([1.0, 1.0], -1, NAN, 0.0, [0.5, 0.5]),
        ([1.0, 1.0], 2**40, NAN, 0.0, [0.5, 0.5]),
    ],
    ids=str,
)
def test_rows_at_the_ends_of_the_range(row, target, cross_entropy, entropy, grad, backend):
    logits = torch.tensor([row], requires_grad=True)
    got = ops.certainty_loss(logits, torch.tensor([target]), backend=backend)
    (got[0].sum() + got[1].sum()).backward()
    found = (got[0].item(), got[1].item(), *logits.grad[0].tolist())
    assert found == pytest.approx((cross_entropy, entropy, *grad), nan_ok=True)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck(backend):
    logits, target = _inputs(3, 16, torch.float32)
    torch.library.opcheck(torch.ops.pydllm.certainty_loss.default, (logits, target, T, backend))
    row = reference.certainty_loss(logits, target, T)
    torch.library.opcheck(
        torch.ops.pydllm.certainty_loss_backward.default,
        (logits, target, T, row[0], row[0], *row[1:], backend),
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_fullgraph_compile_with_gradient(backend):
    logits, target = _inputs(3, 16, torch.float32)

    def call(x):
        cross_entropy, entropy, _ = ops.certainty_loss(x, target, backend=backend)
        return cross_entropy.mean() + entropy.sum()

    grads = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaf = logits.clone().requires_grad_()
        function(leaf).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.ones(4)}, ValueError, r"logits: expected shape \(R, V\), got \(4,\)"),
        ({"logits": torch.ones(3, 0)}, ValueError, "vocabulary of at least 1 id, got none"),
        ({"logits": torch.ones(3, 4).int()}, TypeError, "logits: expected dtype .*got torch.int32"),
        ({"target": torch.ones(2).long()}, ValueError, r"target: expected shape \(3\), got \(2,\)"),
        ({"target": torch.ones(3)}, TypeError, "target: expected dtype torch.int64, got"),
        ({"temperature": 0.0}, ValueError, r"number in \[1e-06, 1e\+18\], got 0.0"),
        ({"temperature": 1e-39}, ValueError, r"number in \[1e-06, 1e\+18\], got 1e-39"),
        ({"temperature": float("nan")}, ValueError, r"number in \[1e-06, 1e\+18\], got nan"),
        ({"backend": "cuda"}, RuntimeError, "certainty_loss has no cuda kernel"),
        ({"logits": torch.ones(4, 3).t(), "backend": "triton"}, RuntimeError, "contiguous element"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"logits": torch.ones(3, 4), "target": torch.zeros(3).long()} | change
    with pytest.raises(error, match=message):
        ops.certainty_loss(**arguments)
