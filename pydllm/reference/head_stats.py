"""The definition of ``head_stats``: ``vocab_stats`` of ``hidden @ weight.T + bias``, in pieces.

The logits are made a piece of the vocabulary at a time, small enough to stay in a CPU's cache, and
each piece is folded into what is known of the pieces before it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pydllm.reference.philox import vocab_gumbel
from pydllm.reference.vocab_stats import apply_softcap, inverse_temperature, suppress

_NEGLIGIBLE = -1e4
_NO_ID = 2**31 - 1
# Bound what is alive at a time to a few MB: rows, logits of a piece (the noise takes more room for
# each), and elements of an operand that is not in the dtype of the sums and has to be converted.
_ROWS, _LOGITS, _SAMPLED_LOGITS, _CONVERTED = 1024, 2**18, 2**16, 2**20
# Rows whose logits are made as weight times rows, from this many weights on.
_FEW, _MANY = range(5, 33), 1024


def head_stats(hidden: Tensor, weight: Tensor, *options) -> tuple[Tensor, ...]:  # noqa: ANN002
    """Token, probability, entropy, margin and log-sum-exp; options as ``head_stats_partial``."""
    return merge_stats(*head_stats_partial(hidden, weight, *options))


def head_stats_partial(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    seed: int,
    counter: Tensor | None,
    suppress_ids: Tensor | None,
    tempered: bool,
    softcap: float | None,
    temperatures: Tensor | None = None,
    rows: Tensor | None = None,
    vocab_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """What ``merge_stats`` takes, for the ids ``vocab_offset + [0, V)``; fp32 or fp64."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    count = hidden.shape[0] if rows is None else rows.shape[0]
    noise = counter if temperatures is not None or temperature > 0 else None
    if count == 0:
        values = hidden.new_empty(4 if noise is None else 6, 0, 1, dtype=dtype)
        return values, hidden.new_empty(1 if noise is None else 2, 0, 1, dtype=torch.int32)
    vocab, width = weight.shape
    convertible = max(_CONVERTED // width, 4) if hidden.dtype != dtype else _LOGITS
    height = min(_ROWS, convertible)
    parts = []
    for start in range(0, count, height):
        block = slice(start, min(start + height, count))
        x, outside = hidden[block], None
        if rows is not None:
            own_rows = rows[block]
            outside = ((own_rows < 0) | (own_rows >= hidden.shape[0]))[:, None]
            x = hidden[own_rows.clamp(0, hidden.shape[0] - 1).long()]
        x = x.to(dtype)
        own = None if temperatures is None else temperatures[block]
        inverse, noisy = inverse_temperature(temperature, own, dtype)
        piece = max((_LOGITS if noise is None else _SAMPLED_LOGITS) // x.shape[0], 4)
        piece = min(piece, convertible) // 4 * 4  # a number of the generator serves four ids
        folded: tuple[Tensor, Tensor] | None = None
        for low in range(0, vocab, piece):
            part = slice(low, min(low + piece, vocab))
            added = None if bias is None else bias[part].to(dtype)
            first = vocab_offset + low
            logits = suppress(_product(x, weight[part].to(dtype), added), suppress_ids, first)
            logits = apply_softcap(logits, softcap)
            if outside is not None:
                logits.masked_fill_(outside, -torch.inf)
            scores = None
            if noise is not None:
                scores = logits * inverse
                logits = scores if tempered else logits
                size = logits.shape[1]
                scores = scores + vocab_gumbel(size, noise[block], seed, first=first, noisy=noisy)
            known = _piece_stats(logits, scores, first)
            if folded is not None:
                values_and_ids = zip(folded, known, strict=True)
                known = fold_stats(*(torch.cat(pair, -1) for pair in values_and_ids))
            folded = known
        parts.append(known)
    if len(parts) == 1:
        return parts[0]
    values, ids = (torch.cat(each, 1) for each in zip(*parts, strict=True))
    return values, ids


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``."""
    if x.shape[0] not in _FEW or weight.shape[0] < _MANY:
        return F.linear(x, weight, bias)
    # A CPU's library copies the right operand first: better these rows than the weights.
    logits = (weight @ x.T.contiguous()).T.contiguous()
    return logits if bias is None else logits + bias


def _piece_stats(x: Tensor, scores: Tensor | None, first: int) -> tuple[Tensor, Tensor]:
    """Best, second, sum and weighted sum, and with scores the best of them and its logit."""
    best, index = x.max(-1, keepdim=True)
    tokens, extra = [index], []
    if scores is not None:
        score, chosen = scores.max(-1, keepdim=True)
        tokens.append(chosen)
        extra = [score, x.gather(1, chosen)]
    # A row is one with no maximum if all is -inf; with +inf or NaN the differences are NaN.
    shift = x - best.masked_fill(best == -torch.inf, 0)
    terms = shift.clamp_(min=_NEGLIGIBLE).exp()
    total = terms.sum(-1, keepdim=True)
    weighted = shift.mul_(terms).sum(-1, keepdim=True)
    second = x.scatter_(1, index, -torch.inf).amax(-1, keepdim=True)
    values = torch.stack((best, second, total, weighted, *extra))
    ids = torch.stack(tokens).int()
    return values, ids + first if first else ids


def fold_stats(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """One piece of all: ``(n, R, S)`` to ``(n, R, 1)``; the lowest id wins a tie."""
    best = values[0].amax(-1, keepdim=True)
    token = ids[0].where(values[0] == best, _NO_ID).amin(-1, keepdim=True)
    second = values[1].where(ids[0] == token, values[0]).amax(-1, keepdim=True)
    shift = (values[0] - best.masked_fill(best == -torch.inf, 0)).clamp_(min=_NEGLIGIBLE)
    factor = shift.exp()
    total = (factor * values[2]).sum(-1, keepdim=True)
    weighted = (factor * (values[3] + shift * values[2])).sum(-1, keepdim=True)
    if values.shape[0] == 4:
        return torch.stack((best, second, total, weighted)), token[None]
    score = values[4].amax(-1, keepdim=True)
    drawn = ids[1].where(values[4] == score, _NO_ID).amin(-1, keepdim=True)
    chosen = values[5].where(ids[1] == drawn, 0).sum(-1, keepdim=True)
    return torch.stack((best, second, total, weighted, score, chosen)), torch.stack((token, drawn))


def merge_stats(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Token, probability, entropy, margin and log-sum-exp of pieces ``(n, R, S)``."""
    if values.shape[-1] > 1:
        values, ids = fold_stats(values, ids)
    values, ids = values.squeeze(-1), ids.squeeze(-1)
    best, second, total, weighted = values[:4].unbind()
    none = best == -torch.inf
    base = best.masked_fill(none, 0)
    total = total.masked_fill(none, 1)
    prob = ((values[5] if len(values) == 6 else best) - base).exp() / total
    log_total = total.log()  # NaN of a row with a NaN, and so is all that follows from it
    entropy = log_total - weighted / total
    margin = (0 - torch.expm1(second - base)).masked_fill(none, 0) / total
    token = ids[-1].long().masked_fill(none | total.isnan(), 0)
    return token, prob, entropy, margin, best + log_total
