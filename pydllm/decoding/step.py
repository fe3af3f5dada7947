"""The parts of a denoising step: window forward, statistics, accept and write, end of sequence.

Nothing here reads a value on the host, but for the rows that a CPU leaves out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pydllm import ops
from pydllm.decoding.generation import Request
from pydllm.decoding.state import Selection, State, Window
from pydllm.models import Model, StaticCache
from pydllm.models.protocol import Fresh

Accept = Callable[[ops.VocabStats], tuple[Tensor, dict[str, Any]]]


def row_index(model: Model, start: Tensor, selection: Selection, rows: int) -> Tensor:
    """``(B, S)`` int64: which row of windows at ``start``, of ``rows`` rows, predicts each selected
    position.

    Position p is predicted by row p of an unshifted model and by row p - 1 of a shifted one.
    """
    first = selection.start - start - int(model.spec.shift_logits)
    offsets = torch.arange(selection.width, device=start.device)
    return (first[:, None] + offsets).clamp_(0, rows - 1).long()


def select_rows(model: Model, hidden: Tensor, start: Tensor, selection: Selection) -> Tensor:
    """Hidden rows ``(B, S, hidden)`` that predict the selected positions; windows at ``start``."""
    index = row_index(model, start, selection, hidden.shape[1])
    return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))


def row_temperatures(request: Request, state: State, width: int) -> float | Tensor:
    """The temperature, or one for each of ``width`` rows of every sequence, ``(b * width,)``."""
    if not isinstance(request.temperature, Tensor):
        return request.temperature
    return request.temperature[state.rows].repeat_interleave(width)


def statistics(
    request: Request,
    state: State,
    hidden: Tensor,
    start: Tensor,
    selection: Selection,
    *,
    banned: Tensor | None,
    draw: Tensor | None = None,
    eligible: Tensor | None = None,
) -> ops.VocabStats:
    """Token and scores of the selected positions, each ``(B, S)``, of windows at ``start``.

    ``hidden (B, T, hidden)`` is what the forward returned; the head picks its rows itself. On a GPU
    every selected row is computed, so that shapes do not depend on values. On a CPU the rows whose
    position is not masked are left out (token 0, scores 0): the LM head is most of a small step.

    ``draw (B,)`` int32 is the last word of the noise key, by default the tokens decoded so far.
    ``eligible (B, L)`` bool says which rows are needed where that is not the masks.
    """
    batch, window, size = hidden.shape
    width = selection.width
    offsets = torch.arange(width, device=hidden.device)
    position = selection.start[:, None] + offsets
    first = torch.arange(0, batch * window, window, device=hidden.device)
    index = row_index(request.model, start, selection, window)
    rows = (first[:, None] + index).flatten()
    counter, temperature = None, row_temperatures(request, state, width)
    if isinstance(temperature, Tensor) or temperature > 0:
        last = state.decoded if draw is None else draw
        words = (t[:, None].expand(-1, width) for t in (state.request_id, last))
        counter = torch.stack((position.int(), *words), -1).reshape(-1, 3)
    live = None
    if hidden.device.type == "cpu" and not request.runner.static:
        inside = position.clamp(max=state.x.shape[1] - 1).long()
        wanted = state.x == request.mask_id if eligible is None else eligible
        wanted = wanted.gather(1, inside) & (offsets < selection.length[:, None])
        live = wanted.flatten().nonzero().squeeze(1)
        rows = rows[live]
        counter = None if counter is None else counter[live]
        temperature = temperature[live] if isinstance(temperature, Tensor) else temperature
    stats = request.model.head_stats(
        hidden.reshape(-1, size),
        rows,
        temperature=temperature,
        seed=request.seed,
        counter=counter,
        banned=banned,
        backend=request.backend,
    )
    if live is not None:
        stats = ops.VocabStats(
            *(field.new_zeros(batch * width).index_copy_(0, live, field) for field in stats)
        )
    return ops.VocabStats(*(field.view(batch, width) for field in stats))


def forward(
    request: Request,
    state: State,
    window: Window,
    cache: StaticCache,
    *,
    branches: int = 1,
    fresh: Fresh | None = None,
) -> Tensor:
    """Hidden rows ``(b, width, hidden)`` of the window; commits what the window says.

    With ``branches``, the state holds so many copies of each sequence of the window, side by side.
    ``fresh`` is given what the model's ``commit_branch`` needs.
    """
    index = window.index.repeat_interleave(branches, 0)
    ids = state.x.gather(1, index).unflatten(0, (-1, branches)).flatten(1)
    hidden = request.model.forward(
        ids,
        window.start,
        cache,
        length=window.length,
        kv_len=window.kv_len,
        commit=window.commit,
        branches=branches,
        fresh=fresh,
        backend=request.backend,
    )
    return hidden.unflatten(1, (branches, -1)).flatten(0, 1)


def write(
    request: Request,
    state: State,
    stats: ops.VocabStats,
    selection: Selection,
    accept: Accept,
    *,
    ending: ops.Ending | None = None,
) -> ops.Unmasked:
    """Write what the rule accepts of the selected positions into the state."""
    score, rule = accept(stats)
    unmasked = ops.unmask(
        state.x,
        state.step_map,
        state.nfe,
        stats.token,
        score,
        mask_id=request.mask_id,
        start=selection.start,
        length=selection.length,
        seed=request.seed,
        request=state.request_id,
        ending=ending,
        backend=request.backend,
        **rule,
    )
    state.decoded += unmasked.accepted
    return unmasked


def finish_block(state: State, request: Request, start: Tensor, length: int | Tensor) -> Tensor:
    """Fill behind an end of sequence in the block; returns which sequences are done ``(b,)``.

    ``length`` is one number or ``(b, 1)``.
    """
    total, eos = state.prompt_length + request.max_new_tokens, request.eos
    if eos is None:
        return torch.zeros_like(total, dtype=torch.bool)
    position = torch.arange(state.x.shape[1], device=state.x.device)
    in_block = (position >= start[:, None]) & (position < start[:, None] + length)
    new = (position >= state.prompt_length[:, None]) & (position < total[:, None])
    ends = in_block & new & torch.isin(state.x, eos)
    behind = (ends.cumsum(1) - ends.int() > 0) & (position < total[:, None])
    state.x.copy_(torch.where(behind, eos[0], state.x))
    state.step_map.masked_fill_(behind, -1)
    return ends.any(1)
