"""``certainty_loss``, forward and backward, at the vocabularies of three models."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from pydllm import ops
from pydllm.testing import random_normal

SHAPES = {
    f"{name}-{rows}": {"rows": rows, "vocab": vocab}
    for name, vocab in (("llada-8b", 126464), ("dream-7b", 152064), ("tiny", 92))
    for rows in (64, 512)
}
TEMPERATURE = 0.5


def make(dtype: torch.dtype, device: str, *, rows: int, vocab: int) -> dict[str, Tensor]:
    logits = random_normal(rows, vocab, seed=0, dtype=dtype, device=device)
    # Every second row predicts its target, so that its entropy counts.
    target = torch.where(torch.arange(rows, device=device) % 2 == 0, logits.argmax(-1), 0)
    return {"logits": logits, "target": target}


def call(inputs: dict[str, Tensor], backend: str) -> Tensor:
    """The gradient: it depends on everything the forward computes."""
    logits = inputs["logits"].detach().requires_grad_()
    cross_entropy, entropy, _ = ops.certainty_loss(
        logits, inputs["target"], temperature=TEMPERATURE, backend=backend
    )
    (grad,) = torch.autograd.grad(cross_entropy.sum() + entropy.sum(), logits)
    return grad


def _separate(inputs: dict[str, Tensor]) -> Tensor:
    """As training code writes it: two softmaxes, the certain rows picked out."""
    logits, target = inputs["logits"].detach().requires_grad_(), inputs["target"]
    certain = logits[logits.argmax(-1) == target].float() / TEMPERATURE
    log_q = certain.log_softmax(-1)
    loss = F.cross_entropy(logits.float(), target, reduction="sum")
    (grad,) = torch.autograd.grad(loss - (log_q.exp() * log_q).sum(), logits)
    return grad


BASELINES: dict[str, Callable[[], Callable[[dict[str, Tensor]], Tensor]]] = {
    "torch cross_entropy + softmax": lambda: _separate
}


def bytes_moved(inputs: dict[str, Tensor]) -> int:
    """Read for the losses, read again for the gradient, written."""
    return 3 * inputs["logits"].numel() * inputs["logits"].element_size()


def operations(inputs: dict[str, Tensor]) -> int:
    """Forward: maximum, difference, exp, two sums; backward: exp, scale, difference, sum."""
    return 10 * inputs["logits"].numel()


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    from pydllm.kernels import certainty_loss as kernel

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for vocab in (92, 126464):
            logits = torch.empty(32, vocab, dtype=dtype, device="meta")
            target = torch.empty(32, dtype=torch.int64, device="meta")
            row = torch.empty(32, dtype=torch.float32, device="meta")
            correct = torch.empty(32, dtype=torch.bool, device="meta")
            yield (
                f"forward {vocab} {dtype}",
                lambda logits=logits, target=target: kernel.certainty_loss(
                    logits, target, TEMPERATURE
                ),
            )
            statistics = (row, row, row, correct, row, row, row)
            yield (
                f"backward {vocab} {dtype}",
                lambda first=(logits, target), rest=statistics: kernel.certainty_loss_backward(
                    *first, TEMPERATURE, *rest
                ),
            )
