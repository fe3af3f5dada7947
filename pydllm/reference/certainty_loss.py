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
    or fp64 for fp64 logits. Returns ``(cross_entropy, entropy, correct, logsumexp,
    logsumexp_tempered)``, each ``(R,)``, the last two of ``x`` and of ``x / temperature``.
    """
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    tempered = x / temperature
    total, total_tempered = x.logsumexp(-1), tempered.logsumexp(-1)
    cross_entropy = total - x.gather(-1, target[:, None])[:, 0]
    correct = x.max(-1).indices == target
    shift = tempered.sub_(total_tempered[:, None]).clamp_(min=_NEGLIGIBLE)
    entropy = -shift.exp().mul_(shift).sum(-1)
    return cross_entropy, torch.where(correct, entropy, 0.0), correct, total, total_tempered


def certainty_loss_backward(
    logits: Tensor,
    target: Tensor,
    temperature: float,
    grad_cross_entropy: Tensor,
    grad_entropy: Tensor,
    entropy: Tensor,
    correct: Tensor,
    logsumexp: Tensor,
    logsumexp_tempered: Tensor,
) -> Tensor:
    """Gradient of the logits, from the row statistics alone; in the dtype of the logits.

    With ``p = softmax(x)`` and ``q = softmax(x / temperature)``: ``p - onehot(target)`` for the
    cross-entropy, ``-q (log q + entropy) / temperature`` for the entropy of a correct row. Which
    rows are correct is no function of the logits that could be followed.
    """
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    grad = (x - logsumexp[:, None]).exp_()
    grad.scatter_add_(-1, target[:, None], -torch.ones_like(grad[:, :1]))
    grad *= grad_cross_entropy[:, None]
    log_q = (x / temperature).sub_(logsumexp_tempered[:, None]).clamp_(min=_NEGLIGIBLE)
    slope = log_q.exp().mul_(log_q.add_(entropy[:, None]))
    weight = torch.where(correct, grad_entropy / temperature, 0.0)
    return grad.sub_(slope.mul_(weight[:, None])).to(logits.dtype)
