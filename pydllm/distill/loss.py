"""The distillation loss: cross-entropy and certainty of chosen rows, without all their logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pydllm import ops

# Elements of a chunk of logits, at most: 64 Mi are 530 rows of LLaDA's vocabulary.
CHUNK = 2**26


class RowLosses(NamedTuple):
    """``(R,)`` each: cross-entropy, entropy where correct (else 0), and which rows are correct."""

    cross_entropy: Tensor
    entropy: Tensor
    correct: Tensor

    def means(self) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of the rows and mean entropy of the correct ones; of none, 0."""
        rows, correct = self.correct.numel(), self.correct.sum()
        return self.cross_entropy.sum() / max(rows, 1), self.entropy.sum() / correct.clamp(min=1)


def linear_certainty_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 0.5,
    chunk: int | None = None,
    backend: str | None = None,
) -> RowLosses:
    """``pydllm.ops.certainty_loss`` of ``hidden @ weight.T + bias``, a chunk of rows at a time.

    The logits of more rows than a chunk never exist at once, forward or backward: where there are
    several chunks, the backward pass computes the logits of each again, which is one more product
    than storing them.

    Args:
        hidden: ``(R, D)``, the rows of the tokens that count and no others.
        weight: ``(V, D)`` of the head; cast to the dtype of ``hidden`` where it has another.
        target: ``(R,)`` int64, ids in [0, V).
        bias: ``(V,)`` or None.
        temperature: of the entropy, in [1e-6, 1e18].
        chunk: rows of a chunk; None: as many as 64 Mi logits hold.
        backend: as in ``pydllm.ops``.

    Returns:
        The losses of the rows; ``hidden``, ``weight`` and ``bias`` have gradients.

    Raises:
        ValueError, TypeError: as ``pydllm.ops.certainty_loss``; a chunk below 1.
    """
    if chunk is None:
        chunk = max(1, CHUNK // max(1, weight.shape[0]))
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1 row, got {chunk}")

    def losses(rows: Tensor, aimed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bias_cast = None if bias is None else bias.to(rows.dtype)
        logits = F.linear(rows, weight.to(rows.dtype), bias_cast)
        return ops.certainty_loss(logits, aimed, temperature=temperature, backend=backend)

    if len(target) <= chunk:
        # Nothing to save: at most a chunk of logits is there when its gradient is taken, too.
        return RowLosses(*losses(hidden, target))
    pairs = zip(hidden.split(chunk), target.split(chunk), strict=True)
    parts = [checkpoint(losses, *p, use_reentrant=False, preserve_rng_state=False) for p in pairs]
    return RowLosses(*(torch.cat(column) for column in zip(*parts, strict=True)))
