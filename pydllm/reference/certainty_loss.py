"""The definition of ``certainty_loss``, and of its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

# e to this power is 0 in fp32 and fp64, and times it is 0 too, which of -inf would be NaN.
_NEGLIGIBLE = -1e4


def certainty_loss(logits: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """Cross-entropy of each row, its entropy at a temperature, and what the gradient needs.

    ``cross_entropy = logsumexp(x) - x[target]``; ``entropy = H(softmax(x / temperature))`` where
    the arg-max is the target, the lowest index winning a tie, and 0 elsewhere. Arithmetic in fp32,
    or fp64 for fp64 logits. A row with a NaN or +inf, without a finite logit or with a target
    outside the vocabulary has a cross-entropy of NaN and is not correct. Returns ``(cross_entropy,
    entropy, correct, largest, log_sum, log_sum_tempered)``, each ``(R,)``: the largest logit and
    the log-sum-exp of ``x - largest`` and of ``(x - largest) / temperature``; neither overflows.
    """
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest, best = x.max(-1)
    shift = x - largest[:, None]
    log_sum = shift.logsumexp(-1)
    at, inside = _clamp_ids(target, x.shape[1])
    aimed = largest - x.gather(-1, at[:, None])[:, 0]
    cross_entropy = torch.where(inside, log_sum + aimed, torch.nan)
    correct = (best == target) & log_sum.isfinite()
    tempered = shift.div_(temperature)
    log_sum_tempered = tempered.logsumexp(-1)
    log_q = tempered.sub_(log_sum_tempered[:, None]).clamp_(min=_NEGLIGIBLE)
    entropy = 0 - log_q.exp().mul_(log_q).sum(-1)
    entropy = torch.where(correct, entropy, 0.0)
    return cross_entropy, entropy, correct, largest, log_sum, log_sum_tempered


def certainty_loss_backward(
    logits: Tensor,
    target: Tensor,
    temperature: float,
    grad_cross_entropy: Tensor,
    grad_entropy: Tensor,
    entropy: Tensor,
    correct: Tensor,
    largest: Tensor,
    log_sum: Tensor,
    log_sum_tempered: Tensor,
) -> Tensor:
    """Gradient of the logits, from the row statistics alone; in the dtype of the logits.

    With ``p = softmax(x)`` and ``q = softmax(x / temperature)``: ``p - onehot(target)`` for the
    cross-entropy, ``-q (log q + entropy) / temperature`` for the entropy of a correct row. Which
    rows are correct is no function of the logits that could be followed.
    """
    shift = logits.to(torch.promote_types(logits.dtype, torch.float32)) - largest[:, None]
    grad = (shift - log_sum[:, None]).exp_()
    at, inside = _clamp_ids(target, logits.shape[1])
    grad.scatter_add_(-1, at[:, None], -inside.to(grad.dtype)[:, None])
    grad *= grad_cross_entropy[:, None]
    log_q = shift.div_(temperature).sub_(log_sum_tempered[:, None]).clamp_(min=_NEGLIGIBLE)
    slope = log_q.exp().mul_(log_q.add_(entropy[:, None]))
    weight = torch.where(correct, grad_entropy / temperature, 0.0)
    return grad.sub_(slope.mul_(weight[:, None])).to(logits.dtype)


def _clamp_ids(target: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Ids that may be read, and where they are the given ones."""
    at = target.clamp(0, vocab - 1)
    return at, at == target
