"""The sampling functions of published loops: the same names, arguments and results.

For code that wants this piece alone::

    from pydllm.integrations.samplers import get_transfer_index  # instead of Fast-dLLM's

What is random is drawn with torch, in the order of the original, so a ``torch.manual_seed`` gives
the tokens it gave. Choices are made on the device: no Python loop over sequences or positions, no
value read on the host. Two things differ, on purpose: among equal confidences the lowest position
is taken (``torch.topk`` leaves that open), and a position that is not a mask is never marked for
transfer (the originals mark some and then copy them onto themselves).

Every function that scores tokens has one argument more, keyword-only: ``compat``, by default the
name of the code that it is from: confidences come from the softmax of the original, in its
precision. ``compat=None`` takes them from ``pydllm.ops.vocab_stats``, which reads the logits once
and stores no distribution. They are right to fp32, so another position is chosen only where two
confidences, or one and the threshold, are that close.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pydllm import ops
from pydllm._checks import FLOATS, check_int, check_number, check_tensor, renamed
from pydllm.integrations._arguments import follows
from pydllm.integrations._rules import by_factor, by_threshold, first, near_best

__all__ = [
    "add_gumbel_noise",
    "get_num_transfer_tokens",
    "get_transfer_index",
    "get_transfer_index_dynamic",
    "get_transfer_index_threshold",
    "sample_tokens",
]
MAX_STEPS = 2**20  # a schedule is a list


def add_gumbel_noise(logits: Tensor, temperature: float) -> Tensor:
    """LLaDA's noise: the arg-max of the result is a sample at ``temperature``.

    Args:
        logits: any shape and floating dtype.
        temperature: 0 returns ``logits`` itself.

    Returns:
        fp64 of the same shape, ``exp(logits) / (-log u) ** temperature``, u from ``torch.rand``.
    """
    if temperature == 0:
        return logits
    logits = logits.to(torch.float64)
    noise = torch.rand_like(logits)
    return logits.exp() / (-noise.log()) ** temperature


def get_num_transfer_tokens(mask_index: Tensor, steps: int) -> Tensor:
    """LLaDA's schedule: the masks of each sequence spread over the steps, the remainder first.

    Args:
        mask_index: ``(B, L)`` bool.
        steps: at least 1.

    Returns:
        ``(B, steps)`` int64.
    """
    check_tensor("mask_index", mask_index, ("B", "L"), torch.bool)
    if type(steps) is not int or not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps: expected an int from 1 to {MAX_STEPS}, got {steps!r}")
    masks = mask_index.sum(dim=1, keepdim=True)
    step = torch.arange(steps, device=mask_index.device)
    return masks // steps + (step < masks % steps)


@renamed(precise="compat")
@torch.no_grad()
def get_transfer_index(
    logits: Tensor,
    temperature: float,
    remasking: str,
    mask_index: Tensor,
    x: Tensor,
    num_transfer_tokens: Tensor | None,
    threshold: float | None = None,
    *,
    version: str = "a9b81e4",
    compat: str | None = "fast_dllm",
) -> tuple[Tensor, Tensor]:
    """Fast-dLLM's choice of a step: a quota, or all above a threshold and at least one.

    Args:
        logits: ``(B, L, V)``.
        temperature: of the tokens; confidences are those of the plain logits.
        remasking: ``"low_confidence"``, or ``"random"``: confidences from ``torch.rand``.
        mask_index: ``(B, L)`` bool: the positions that may be written.
        x: ``(B, L)`` int64.
        num_transfer_tokens: ``(B,)`` or ``(B, 1)`` integers; not read if there is a threshold.
        threshold: a probability, or None.
        version: the commit of NVlabs/Fast-dLLM: random confidences are fp64 in ``"a9b81e4"`` and
            fp32 in ``"24cc59e"``.
        compat: see the module; fp64.

    Returns:
        ``x0 (B, L)`` int64, ``x`` with every mask replaced by its token, and
        ``transfer_index (B, L)`` bool, the positions to take over.
    """
    _check_step(logits, mask_index, x)
    if num_transfer_tokens is None:
        if threshold is None:
            raise ValueError("num_transfer_tokens: expected (B,) integers or a threshold, got None")
    elif num_transfer_tokens.numel() != len(x):
        raise ValueError(
            f"num_transfer_tokens: expected one per sequence, {len(x)}, "
            f"got {tuple(num_transfer_tokens.shape)}"
        )
    noise = torch.float32 if version == "24cc59e" else torch.float64
    x0, confidence = propose(
        logits,
        temperature,
        remasking,
        mask_index,
        torch.float64,
        follows(compat, "fast_dllm"),
        noise,
    )
    if threshold is None and num_transfer_tokens is not None:
        chosen = first(confidence, mask_index, num_transfer_tokens.reshape(-1, 1))
    else:
        chosen = by_threshold(confidence, mask_index, threshold or 0.0)
    return torch.where(mask_index, x0, x), chosen


@renamed(precise="compat")
@torch.no_grad()
def get_transfer_index_dynamic(
    logits: Tensor,
    temperature: float,
    remasking: str,
    mask_index: Tensor,
    x: Tensor,
    num_transfer_tokens: Tensor | None = None,
    factor: float = 1,
    *,
    compat: str | None = "fast_dllm",
) -> tuple[Tensor, Tensor]:
    """Fast-dLLM's dynamic choice: rank r is taken while its confidence is at least
    ``1 - factor / (r + 1)``; where all but the last pass, that one is taken too.

    Arguments and results as ``get_transfer_index``; ``num_transfer_tokens`` is not read.
    """
    _check_step(logits, mask_index, x)
    check_number("factor", factor, 0, infinite=True)
    x0, confidence = propose(
        logits, temperature, remasking, mask_index, torch.float64, follows(compat, "fast_dllm")
    )
    return torch.where(mask_index, x0, x), by_factor(confidence, mask_index, factor)


@renamed(precise="compat")
@torch.no_grad()
def get_transfer_index_threshold(
    logits: Tensor,
    temperature: float,
    mask_index: Tensor,
    x: Tensor,
    mask_id: int,
    threshold: float,
    rm_mask: bool = True,
    use_float64: bool = False,
    *,
    compat: str | None = "dinfer",
    **kwargs: object,
) -> tuple[Tensor, Tensor]:
    """dInfer's choice of a step: all whose confidence reaches ``min(threshold, best - 1e-5)``.

    Args:
        logits: ``(B, L, V)``.
        temperature: of the tokens; confidences are those of the plain logits.
        mask_index: ``(B, L)`` bool: the positions that may be written.
        x: ``(B, L)`` int64.
        mask_id: the mask's token id.
        threshold: a probability.
        rm_mask: leave out positions that predict ``mask_id``.
        use_float64: confidences in fp64, otherwise fp32.
        compat: see the module.
        kwargs: ignored, as in the original.

    Returns:
        ``x0 (B, L)`` int64 and ``transfer_index (B, L)`` bool. A position that predicts the mask
        keeps its id in ``x0`` where ``rm_mask`` is set.
    """
    _check_step(logits, mask_index, x)
    dtype = torch.float64 if use_float64 else torch.float32
    x0, confidence = propose(
        logits, temperature, "low_confidence", mask_index, dtype, follows(compat, "dinfer")
    )
    if rm_mask:
        mask_index = mask_index & (x0 != mask_id)
    chosen = near_best(confidence, mask_index, threshold)
    return torch.where(mask_index, x0, x), chosen


@renamed(precise="compat")
@torch.no_grad()
def sample_tokens(
    logits: Tensor,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    margin_confidence: bool = False,
    neg_entropy: bool = False,
    *,
    compat: str | None = "dream",
) -> tuple[Tensor, Tensor]:
    """Dream's token and confidence of each row, in the dtype of the logits.

    Args:
        logits: ``(..., V)``.
        temperature: 0 takes the best; otherwise ``torch.distributions.Categorical`` draws.
        top_p: keep the ids up to and including the one that exceeds this probability.
        top_k: keep the ids with the k largest logits, and those that tie with the last of them.
        margin_confidence: confidence is the gap between the two best probabilities.
        neg_entropy: confidence is the negative entropy, with 1e-10 inside the logarithm.
        compat: see the module; None matters at temperature 0 without ``top_p`` and ``top_k``.

    Returns:
        ``confidence (R,)`` and ``x0 (R,)`` int64. Without the two flags the confidence is the
        probability of the token.
    """
    rows = logits.flatten(0, -2) if isinstance(logits, Tensor) and logits.ndim > 2 else logits
    check_tensor("logits", rows, ("R", "V"), FLOATS)
    check_number("temperature", temperature, 0)
    if top_k is not None:
        check_int("top_k", top_k, 1)
    if top_p is not None:
        check_number("top_p", top_p, 0)
    nucleus = top_p is not None and top_p < 1
    if not follows(compat, "dream") and temperature == 0 and not nucleus and top_k is None:
        stats = ops.vocab_stats(logits)
        confidence = stats.margin if margin_confidence else stats.prob
        confidence = -stats.entropy if neg_entropy else confidence
        return confidence.to(logits.dtype), stats.token
    if temperature > 0:
        logits = logits / temperature
    logits = keep_likely(logits, top_p, top_k)
    probs = logits.softmax(-1)
    if temperature > 0:
        x0 = torch.distributions.Categorical(probs=probs).sample()
        confidence = probs.gather(-1, x0.unsqueeze(-1)).squeeze(-1)
    else:
        confidence, x0 = probs.max(-1)
    if margin_confidence:
        best = probs.topk(2).values
        confidence = best[..., 0] - best[..., 1]
    if neg_entropy:
        confidence = (probs * (probs + 1e-10).log()).sum(-1)
    return confidence, x0


def keep_likely(logits: Tensor, top_p: float | None, top_k: int | None) -> Tensor:
    """Dream's filters, the nucleus first; the other ids get the lowest number of the dtype."""
    lowest = torch.finfo(logits.dtype).min
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        beyond = ordered.softmax(-1).cumsum(-1) > top_p
        # The first id beyond the limit is kept, and the best in any case.
        drop = F.pad(beyond[..., :-1], (1, 0))
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), lowest)
    if top_k is not None:
        last = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < last, lowest)
    return logits


def _check_step(logits: Tensor, mask_index: Tensor, x: Tensor) -> None:
    """``logits (B, L, V)``, ``mask_index (B, L)`` bool and ``x (B, L)`` int64."""
    check_tensor("logits", logits, ("B", "L", "V"), FLOATS)
    for name, value, dtype in (("mask_index", mask_index, torch.bool), ("x", x, torch.int64)):
        check_tensor(name, value, tuple(logits.shape[:2]), dtype, logits, "logits")


def propose(
    logits: Tensor,
    temperature: float,
    remasking: str,
    mask_index: Tensor,
    dtype: torch.dtype,
    precise: bool,
    noise: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """A token for every position and its confidence, ``(B, L)`` each; both count at masks alone."""
    if remasking not in ("low_confidence", "random"):
        raise NotImplementedError(
            f"remasking: expected one of low_confidence, random, got {remasking!r}"
        )
    if remasking == "low_confidence" and not precise and temperature == 0:
        stats = ops.vocab_stats(logits.flatten(0, 1))
        return stats.token.view(mask_index.shape), stats.prob.view(mask_index.shape)
    x0 = add_gumbel_noise(logits, temperature).argmax(dim=-1)
    if remasking == "random":
        return x0, torch.rand(x0.shape, dtype=noise, device=x0.device)
    if logits.device.type != "cpu":  # every row: shapes must not depend on values
        probs = logits.to(dtype).softmax(-1)
        return x0, probs.gather(-1, x0.unsqueeze(-1)).squeeze(-1)
    probs = logits[mask_index].to(dtype).softmax(-1)
    confidence = torch.zeros(x0.shape, dtype=dtype)
    confidence[mask_index] = probs.gather(-1, x0[mask_index].unsqueeze(-1)).squeeze(-1)
    return x0, confidence
