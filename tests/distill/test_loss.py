import math

import pytest
import torch
from torch.nn import functional as F

from pydllm.distill import Recipe, linear_certainty_loss
from pydllm.distill.masking import Noisy
from pydllm.distill.trainer import Objective
from pydllm.testing import random_normal


def _inputs(rows=11, width=5, vocab=13):
    hidden = random_normal(rows, width, seed=0, dtype=torch.float64)
    weight = random_normal(vocab, width, seed=1, dtype=torch.float64)
    bias = random_normal(vocab, seed=2, dtype=torch.float64)
    target = torch.where(torch.arange(rows) % 2 == 0, (hidden @ weight.T + bias).argmax(-1), 3)
    return [t.requires_grad_() for t in (hidden, weight, bias)], target


@pytest.mark.parametrize("chunk", [None, 1, 4, 11, 100])
def test_chunks_equal_the_whole_with_gradients(chunk):
    leaves, target = _inputs()
    hidden, weight, bias = leaves
    logits = F.linear(*leaves)
    correct = logits.argmax(-1) == target
    q = (logits / 0.5).softmax(-1)
    entropy = torch.distributions.Categorical(q).entropy()[correct].mean()
    expected = F.cross_entropy(logits, target) + 2 * entropy
    wanted = torch.autograd.grad(expected, leaves)
    losses = linear_certainty_loss(hidden, weight, target, bias=bias, chunk=chunk)
    cross_entropy, certainty = losses.means()
    got = torch.autograd.grad(cross_entropy + 2 * certainty, leaves)
    assert torch.equal(losses.correct, correct) and 0 < correct.sum() < 11
    torch.testing.assert_close(cross_entropy + 2 * certainty, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_no_more_rows_of_logits_than_a_chunk_exist(monkeypatch):
    leaves, target = _inputs()
    seen = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: seen.append(len(x)) or linear(x, *rest))
    losses = linear_certainty_loss(leaves[0], leaves[1], target, chunk=4)
    losses.cross_entropy.sum().backward()
    assert seen == [4, 4, 3, 3, 4, 4]  # forward, then again backward, last chunk first


def test_no_rows_are_no_loss_with_a_gradient():
    leaves, target = _inputs()
    losses = linear_certainty_loss(leaves[0][:0], leaves[1], target[:0])
    total = sum(losses.means())
    total.backward()
    assert total.item() == 0 and not leaves[0].grad.any()


def test_bad_chunk():
    leaves, target = _inputs()
    with pytest.raises(ValueError, match="chunk: expected at least 1 row, got 0"):
        linear_certainty_loss(leaves[0], leaves[1], target, chunk=0)


class _Fixed(torch.nn.Module):
    """Stands for a transformer of two tokens whose rows all have the logits (ln 3, 0)."""

    head = (torch.eye(2, dtype=torch.float64), None)

    def __init__(self, shift=False):
        super().__init__()
        self.spec = type("spec", (), {"shift_logits": shift})

    def forward(self, ids, lengths):
        rows = torch.tensor([math.log(3), 0.0], dtype=torch.float64)
        return rows.expand(*ids.shape, 2).clone().requires_grad_()


CE, ENT = 0.287682, 0.325083


@pytest.mark.parametrize(
    ("recipe", "target", "loss"),
    [
        # Nothing is masked in the complement: its cross-entropy is 0.
        (Recipe(entropy_weight=2.0), 0, (CE + 2 * ENT) / 4),
        (Recipe(entropy_weight=0.0), 0, CE / 4),
        (Recipe(entropy_weight=1.0, complement=False), 0, (CE + ENT) / 4),
        (Recipe(entropy_weight=2.0), 1, math.log(4) / 4),  # wrong: no entropy
    ],
)
@pytest.mark.parametrize("shift", [False, True])
def test_hand_computed_objective(recipe, target, loss, shift):
    clean = torch.tensor([[0, target]])
    masked = torch.tensor([[False, True]])
    batch = Noisy(clean, clean, clean, masked, ~masked & masked, torch.tensor([2]))
    model = _Fixed(shift)
    got, parts = Objective(model, recipe, None)(batch)
    assert got.item() == pytest.approx(loss, abs=1e-6)
    assert parts["correct"].item() == (target == 0)
    assert ("cross_entropy_complement" in parts) == recipe.complement


@pytest.mark.parametrize("weighted", [False, True])
def test_the_complement_s_entropy_counts_where_the_recipe_says_so(weighted):
    clean = torch.tensor([[0, 0]])
    masked = torch.tensor([[False, True]])
    batch = Noisy(clean, clean, clean, masked, ~masked, torch.tensor([2]))
    recipe = Recipe(entropy_weight=1.0, complement_entropy=weighted)
    got, _ = Objective(_Fixed(), recipe, None)(batch)
    assert got.item() == pytest.approx((2 * CE + (1 + weighted) * ENT) / 4, abs=1e-6)
