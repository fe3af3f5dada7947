"""One accept rule on the logits of whole blocks: what all the engines' plug-ins do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydllm import ops

ENTROPIES = ("entropy", "entropy_bound")


def decide(
    logits: Tensor,
    x: Tensor,
    *,
    mask_id: int,
    rule: str,
    length: Tensor | None = None,
    precise: bool = False,
    **options: Any,
) -> ops.Unmasked:
    """Write what a rule accepts into blocks of token ids.

    One pass over the logits and one launch that writes; nothing is read on the host.

    Args:
        logits: ``(B * L, V)`` fp32, fp16 or bf16, of every position.
        x: ``(B, L)`` int64, **updated in place**.
        rule, options: as in ``ops.unmask``. Probabilities are rounded to the dtype of the logits,
            as a softmax of them is, unless they are to be ``precise`` (fp32); entropies are fp32.
        length: ``(B,)`` int32, how many positions of each block may change; default: all.

    Returns:
        ``ops.Unmasked``.
    """
    batch, width = x.shape
    stats = ops.vocab_stats(logits)
    score = stats.entropy if rule in ENTROPIES else stats.prob
    if rule not in ENTROPIES and not precise:
        score = score.to(logits.dtype)
    return write(x, stats.token.view(batch, width), score.view(batch, width), mask_id=mask_id,
                 rule=rule, length=length, **options)  # fmt: skip


def write(
    x: Tensor,
    token: Tensor,
    score: Tensor,
    *,
    mask_id: int,
    rule: str,
    length: Tensor | None = None,
    **options: Any,
) -> ops.Unmasked:
    """``ops.unmask`` of whole blocks ``(B, L)`` for engines that keep no step map."""
    batch, width = x.shape
    zeros = torch.zeros(2, batch, dtype=torch.int32, device=x.device)
    if length is None:
        length = torch.full_like(zeros[0], width)
    return ops.unmask(
        x,
        torch.empty_like(x, dtype=torch.int32),
        zeros[0],
        token,
        score,
        mask_id=mask_id,
        start=zeros[1],
        length=length,
        rule=rule,
        **options,
    )
