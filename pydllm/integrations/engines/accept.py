"""One accept rule on the logits of whole blocks: what all the engines' plug-ins do."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pydllm import ops

ENTROPIES = ("entropy", "entropy_bound")


def decide(logits: Tensor, x: Tensor, *, mask_id: int, rule: str, **options: Any) -> ops.Unmasked:
    """Write what a rule accepts into blocks of token ids.

    One pass over the logits and one launch that writes; nothing is read on the host.

    Args:
        logits: ``(B * L, V)`` fp32, fp16 or bf16, of every position.
        x: ``(B, L)`` int64, **updated in place**.
        rule, options: as in ``ops.unmask``.
    """
    token, prob, entropy = propose(logits, x)
    score = entropy if rule in ENTROPIES else prob
    return write(x, token, score, mask_id=mask_id, rule=rule, **options)


def propose(logits: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token, probability and entropy of every position, ``(B, L)`` each.

    Probabilities are rounded to the dtype of the logits, as a softmax of them is; entropies are
    fp32.
    """
    stats = ops.vocab_stats(logits)
    fields = (stats.token, stats.prob.to(logits.dtype), stats.entropy)
    token, prob, entropy = (field.view(x.shape) for field in fields)
    return token, prob, entropy


def above(limit: float, x: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """The rule of ``ops.unmask`` for probabilities that exceed a limit, at least one of ``x``."""
    if limit >= 1:  # no probability does
        return {"rule": "quota", "quota": torch.ones_like(x[:, 0], dtype=torch.int32)}
    info = torch.finfo(dtype)
    limit = max(limit, 0.0)
    # Rounded to the dtype, as the limit would be; then the next number.
    step = _spacing(limit, info)
    limit = round(limit / step) * step
    return {"rule": "threshold", "threshold": limit + _spacing(limit, info)}


def _spacing(number: float, info: torch.finfo) -> float:
    exponent = math.frexp(number)[1] - 1 if number > 0 else -1074
    return info.eps * max(2.0**exponent, info.tiny)


def write(
    x: Tensor, token: Tensor, score: Tensor, *, mask_id: int, rule: str, **options: Any
) -> ops.Unmasked:
    """``ops.unmask`` of whole blocks ``(B, L)`` for engines that keep no step map."""
    batch, width = x.shape
    zeros = torch.zeros(2, batch, dtype=torch.int32, device=x.device)
    return ops.unmask(
        x,
        torch.empty_like(x, dtype=torch.int32),
        zeros[0],
        token,
        score,
        mask_id=mask_id,
        start=zeros[1],
        length=torch.full_like(zeros[0], width),
        rule=rule,
        **options,
    )
