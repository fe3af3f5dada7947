"""Cross-entropy and certainty of rows of logits, with a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydllm import reference
from pydllm._backend.library import Op
from pydllm._checks import FLOATS, check_number, check_tensor
from pydllm.ops.vocab_stats import MAX_TEMPERATURE, MIN_TEMPERATURE


def certainty_loss(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 0.5,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of each row, and the entropy of the rows that already predict their target.

    ``logsumexp(x) - x[target]``, and ``H(softmax(x / temperature))`` where ``argmax x = target``:
    the two terms of certainty-forcing distillation (dParallel, arXiv 2509.26488; d3LLM, arXiv
    2601.07568), in one read of the logits. Nothing of the size of the logits is kept for the
    backward pass but the logits themselves: it computes both softmaxes again from a row's sums.

    Args:
        logits: ``(R, V)`` fp32, fp16, bf16 or (torch backend) fp64; may require a gradient.
        target: ``(R,)`` int64, ids in [0, V). The cross-entropy of any other id is NaN.
        temperature: of the entropy, in [1e-6, 1e18].
        backend: None (``PYDLLM_BACKEND``), ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        ``cross_entropy (R,)`` in nats, ``entropy (R,)`` in nats, 0 where the arg-max is another id,
        and ``correct (R,)`` bool, where it is the target; the lowest index wins a tie. The first
        two are fp32 (fp64 for fp64 logits) and have a gradient; which rows are correct has none.
        A row with a NaN or +inf or without a finite logit has a cross-entropy of NaN and is not
        correct.
        The loss of a set of rows is then ``cross_entropy.mean() + w * entropy.sum() /
        correct.sum()``.

    Raises:
        ValueError: shapes or devices differ, no vocabulary, a temperature out of its range.
        TypeError: a dtype that is not supported.
        BackendError: the named backend cannot run the call.

    Determinism: a row's bits depend on that row alone, gradient included. CUDA graphs: safe.
    ``torch.compile``: one op forward and one backward.

    Kernels: ``kernels/certainty_loss.py``.

    Example:
        >>> certainty_loss(torch.tensor([[3.0, 1.0]]).log(), torch.tensor([0]))
        (tensor([0.2877]), tensor([0.3251]), tensor([True]))
    """
    check_tensor("logits", logits, ("R", "V"), FLOATS)
    if logits.shape[1] == 0:
        raise ValueError("logits: expected a vocabulary of at least 1 id, got none")
    check_tensor("target", target, logits.shape[:1], torch.int64, logits, "logits")
    check_number("temperature", temperature, MIN_TEMPERATURE, MAX_TEMPERATURE)
    chosen = _FORWARD.choose(logits, target, float(temperature), backend=backend)
    return _CertaintyLoss.apply(logits, target, float(temperature), chosen)


class _CertaintyLoss(torch.autograd.Function):
    """Keeps the logits and six numbers per row; the softmaxes are computed again."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, temperature: float, backend: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        row = _FORWARD.run(backend, logits, target, temperature)
        cross_entropy, entropy, correct, *sums = row
        ctx.save_for_backward(logits, target, entropy, correct, *sums)
        ctx.temperature, ctx.backend = temperature, backend
        ctx.mark_non_differentiable(correct)
        return cross_entropy, entropy, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, *row = ctx.saved_tensors
        terms = (grad.contiguous() for grad in grads[:2])
        grad = _BACKWARD.run(ctx.backend, logits, target, ctx.temperature, *terms, *row)
        return grad, None, None, None


def _fake(logits: Tensor, target: Tensor, temperature: float, backend: str) -> tuple[Tensor, ...]:
    wide = torch.promote_types(logits.dtype, torch.float32)
    rows = [logits.new_empty(logits.shape[0], dtype=wide) for _ in range(5)]
    correct = torch.empty_like(target, dtype=torch.bool)
    return rows[0], rows[1], correct, *rows[2:]


def _fake_backward(logits: Tensor, *_: object) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


_FORWARD = Op(
    "certainty_loss(Tensor logits, Tensor target, float temperature, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
    reference.certainty_loss,
    opaque=True,
)
_BACKWARD = Op(
    "certainty_loss_backward(Tensor logits, Tensor target, float temperature, "
    "Tensor grad_cross_entropy, Tensor grad_entropy, Tensor entropy, Tensor correct, "
    "Tensor largest, Tensor log_sum, Tensor log_sum_tempered, str backend) -> Tensor",
    _fake_backward,
    reference.certainty_loss_backward,
    file="certainty_loss",
    opaque=True,
)
