"""Sampling as the block-causal loops do it: filters, then ``torch.multinomial``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pydllm._checks import check_int


class Drawn(NamedTuple):
    """Token, its probability and the entropy of what it was drawn from, ``(B, S)`` each."""

    token: Tensor
    prob: Tensor
    entropy: Tensor


def check_filters(top_k: int | None, top_p: float | None) -> None:
    if top_k is not None:
        check_int("top_k", top_k, 0)
    if top_p is not None and not (type(top_p) in (int, float) and top_p > 0):
        raise ValueError(f"top_p: expected a positive number or None, got {top_p!r}")


def keep_likely(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """The ``top_k`` best ids and their ties; of these the best up to the one that exceeds
    ``top_p``. The others get -inf."""
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        beyond = F.pad((ordered.softmax(-1).cumsum(-1) > top_p)[..., :-1], (1, 0))
        drop = torch.zeros_like(beyond).scatter(-1, order, beyond)
        logits = logits.masked_fill(drop, -torch.inf)
    return logits


def draw(
    logits: Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Drawn:
    """Tokens for rows ``(B, S, V)``; at temperature 0 the arg-max of the plain distribution."""
    if temperature > 0:
        logits = logits / temperature if temperature != 1.0 else logits
        logits = keep_likely(logits, top_k, top_p)
    probs = logits.softmax(-1)
    if temperature > 0:
        flat = probs.reshape(-1, probs.shape[-1])
        token = torch.multinomial(flat, 1, generator=generator).view(probs.shape[:-1])
    else:
        token = logits.argmax(-1)
    prob = probs.gather(-1, token[..., None]).squeeze(-1)
    return Drawn(token, prob, torch.special.entr(probs).sum(-1))
