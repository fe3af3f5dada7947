"""The definition of ``mixture_accept`` and ``mixture_accept_sparse``."""

from __future__ import annotations

import torch
from torch import Tensor

from pydllm.reference.philox import vocab_gumbel
from pydllm.reference.vocab_stats import apply_softcap, inverse_temperature, suppress

_GATHERED = 2**22  # elements of the verifier's head that are gathered at a time


def mixture_accept(
    logits: Tensor,
    verifier: Tensor,
    token: Tensor,
    length: Tensor,
    mixture: float,
    mixtures: Tensor | None,
    threshold: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    seed: int,
    counter: Tensor | None,
    suppress_ids: Tensor | None,
    shared: int,
    first_free: bool,
    critical: bool,
) -> tuple[Tensor, ...]:
    """Accepted rows and target there for each sequence, target and critical weight for each row."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    x, y = (
        suppress(t[:, :shared].to(dtype, copy=True), suppress_ids, 0) for t in (logits, verifier)
    )
    weight = _weight(mixture, mixtures, token, length, dtype)
    if threshold is not None:
        outside = x < threshold[:, None]
        x.masked_fill_(outside, -torch.inf)
        y.masked_fill_(outside & (weight != 0), -torch.inf)
    inverse, noisy = inverse_temperature(temperature, temperatures, dtype)
    noise: Tensor | float = 0.0
    if temperatures is not None or temperature > 0:
        noise = vocab_gumbel(x.shape[1], counter, seed, noisy=noisy)  # type: ignore[arg-type]
    target = _target(_mix(x, y, weight) * inverse + noise)
    result = _accept(target, token, length, first_free)
    if not critical:
        return *result, x.new_empty(0)
    # Id 0 stands for a draft that is not in the vocabulary.
    known = torch.where((token >= 0) & (token < shared), token, 0)
    return *result, _in_use(_critical(x, y, known[:, None], inverse, noise), length, 0)


def mixture_accept_sparse(
    ids: Tensor,
    logits: Tensor,
    noise: Tensor,
    size: Tensor,
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    token: Tensor,
    length: Tensor,
    mixture: float,
    mixtures: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
    first_free: bool,
    critical: bool,
) -> tuple[Tensor, ...]:
    """``mixture_accept`` over lists of candidates; a row without one has no target."""
    dtype = logits.dtype
    ids = ids.long()
    rows = ids.clamp(0, head.shape[0] - 1)  # of the head: any other id would be read elsewhere
    y = torch.empty_like(logits)
    height = max(1, _GATHERED // max(1, ids.shape[1] * head.shape[1]))
    for low in range(0, len(ids), height):
        part = slice(low, low + height)
        gathered = head[rows[part]].to(dtype)
        y[part] = (gathered @ hidden[part].to(dtype).unsqueeze(-1)).squeeze(-1)
    y = apply_softcap(y if bias is None else y + bias[rows].to(dtype), softcap)
    used = torch.arange(ids.shape[1], device=ids.device) < size[:, None]
    y = y.masked_fill(~used, -torch.inf)
    weight = _weight(mixture, mixtures, token, length, dtype)
    inverse, _ = inverse_temperature(temperature, temperatures, dtype)
    # The list is of the nucleus, which does not count where the draft model does not.
    scores = (_mix(logits, y, weight) * inverse + noise).masked_fill(weight == 0, -torch.inf)
    padded = torch.cat((scores, scores.new_full((len(ids), 1), -torch.inf)), 1)
    slot = _target(padded)
    target = ids.gather(1, slot.clamp(min=0)[:, None]).squeeze(1).where(slot >= 0, -1)
    result = _accept(target, token, length, first_free)
    if not critical:
        return *result, logits.new_empty(0)
    place = ((ids == token[:, None]) & used).int().argmax(1, keepdim=True)
    least = _critical(logits, y, place, inverse, noise).masked_fill(size == 0, torch.inf)
    return *result, _in_use(least, length, 0)


def _weight(
    mixture: float, mixtures: Tensor | None, token: Tensor, length: Tensor, dtype: torch.dtype
) -> Tensor:
    """The weight of the draft model in each row ``(R, 1)``; NaN if it is not in [0, 1]."""
    rows = len(token) // max(1, len(length))
    if mixtures is None:
        return torch.full((len(token), 1), mixture, dtype=dtype, device=token.device)
    weight = mixtures.to(dtype).repeat_interleave(rows)[:, None]
    return weight.masked_fill((weight < 0) | (weight > 1), torch.nan)


def _mix(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """``weight * x + (1 - weight) * y``, such that equal numbers give that number."""
    mix = y + weight * (x - y)
    mix = mix.masked_fill((x == -torch.inf) | (y == -torch.inf), -torch.inf)
    return torch.where(weight == 1, x, torch.where(weight == 0, y, mix))


def _target(scores: Tensor) -> Tensor:
    """Arg-max of each row, the lowest id of a tie; -1 if all is -inf or something NaN or inf."""
    best, target = scores.max(-1)
    return target.where((best > -torch.inf) & (best < torch.inf), -1)


def _accept(
    target: Tensor, token: Tensor, length: Tensor, first_free: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch = len(length)
    target = _in_use(target, length, -1)
    grid = target.view(batch, len(target) // max(1, batch))
    index = torch.arange(grid.shape[1], device=token.device)
    same = ((grid == token.view_as(grid)) & (grid >= 0)) | ((index == 0) & first_free)
    same &= index < length[:, None]
    accepted = same.int().cumprod(1).sum(1)
    ended = accepted >= length.clamp(0, grid.shape[1])
    padded = torch.cat((grid, grid.new_full((batch, 1), -1)), 1)
    correction = padded.gather(1, accepted[:, None]).squeeze(1).masked_fill(ended, -1)
    return accepted.int(), correction, target


def _in_use(values: Tensor, length: Tensor, fill: float) -> Tensor:
    """``fill`` in the rows from ``length`` on."""
    grid = values.view(len(length), len(values) // max(1, len(length)))
    used = torch.arange(grid.shape[1], device=values.device) < length[:, None]
    return grid.masked_fill(~used, fill).view(-1)


def _critical(
    x: Tensor, y: Tensor, chosen: Tensor, inverse: float | Tensor, noise: Tensor | float
) -> Tensor:
    """The smallest weight at which ``chosen`` is the target, ``(R,)``."""
    ahead, below = (
        values.gather(1, chosen) - values for values in (x * inverse + noise, y * inverse + noise)
    )
    need = -below
    ratio = torch.where(need > 0, need / (ahead + need), 0)
    # Nothing is ahead of -inf; below it, no weight below 1 helps.
    ratio = ratio.masked_fill(x == -torch.inf, 0)
    none = y.gather(1, chosen).squeeze(1) == -torch.inf
    return ratio.amax(1).masked_fill(none, 1)
