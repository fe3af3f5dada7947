"""The parts of a denoising step: window forward, statistics, accept and write.

Nothing here reads a value on the host, except to find the rows that a CPU leaves out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pydllm import ops
from pydllm.decoding.call import Call
from pydllm.decoding.state import Places, Selection, State, Window
from pydllm.models import Model
from pydllm.models.protocol import Fresh

TILE_ROWS = 256  # of logits that are stored at a time where they are filtered
# Statistics to the score and the arguments of ``ops.unmask`` that state the rule.
Accept = Callable[[ops.VocabStats], tuple[Tensor, dict[str, Any]]]


def select_rows(model: Model, hidden: Tensor, start: Tensor, selection: Selection) -> Tensor:
    """Hidden rows ``(b, S, hidden)`` that predict the selected positions; windows at ``start``."""
    first = selection.start - start - int(model.spec.shift_logits)
    index = first[:, None] + torch.arange(selection.width, device=start.device)
    index = index.clamp_(0, hidden.shape[1] - 1)
    return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))


def forward(
    state: State,
    window: Window,
    *,
    branches: int = 1,
    fresh: Fresh | None = None,
    attention: str | None = None,
    adapter: bool = False,
    pad: Tensor | None = None,
    rows: Tensor | None = None,
    leaves: int = 0,
    leaf_rows: int = 1,
) -> Tensor:
    """Hidden rows ``(b, width, hidden)`` of the window; commits what the window says.

    With ``rows``, ``(n,)`` int64, those alone: ``(n, hidden)``.

    With ``branches``, the state holds that number of copies of each sequence of the window, side by
    side, over one row of the cache. ``fresh`` is a list that receives what the model's
    ``commit_branch`` needs. ``attention``, ``adapter`` and ``pad`` as in ``Model.forward``.

    With ``leaves`` rows of masks follow, ``(b, width + leaves * leaf_rows, hidden)``.
    """
    spec, options = state.call.model.spec, _options(attention, adapter)
    if pad is not None:
        options["pad"] = pad
    if state.call.guidance > 0:
        options["prompt_length"] = _prompt_lengths(state, window)
    if spec.block_origin == "prompt" and attention is None:
        lengths = _prompt_lengths(state, window)
        options["block_offset"] = (-lengths).remainder(spec.block_size or 1)
    elsewhere = state.x.device.type != "cpu" or state.call.runner.fixed_shapes
    if not elsewhere and state.call.guidance == 0:
        options["whole"] = window.is_whole(state.cache.max_len)
        options["read_only"] = window.is_read_only
    if rows is not None:
        options["rows"] = rows
    index = window.index if branches == 1 else window.index.repeat_interleave(branches, 0)
    ids = state.x.gather(1, index)
    ids = ids if branches == 1 else ids.unflatten(0, (-1, branches)).flatten(1)
    if leaves:
        options |= {"leaves": leaves, "leaf_rows": leaf_rows}
        masks = ids.new_full((len(ids), leaves * leaf_rows), state.call.mask_id)
        ids = torch.cat((ids, masks), 1)
    hidden = state.call.model.forward(
        ids,
        window.start,
        state.cache,
        length=window.length,
        kv_len=window.kv_len,
        commit=window.commit,
        branches=branches,
        fresh=fresh,
        backend=state.call.backend,
        **options,
    )
    if branches == 1 or rows is not None:
        return hidden
    return hidden.unflatten(1, (branches, -1)).flatten(0, 1)


def _prompt_lengths(state: State, window: Window) -> Tensor:
    """Of the window's sequences: a state of candidates may have a row for each, or one for all."""
    return state.prompt_length[:: len(state.prompt_length) // len(window.start)]


def _options(attention: str | None, adapter: bool) -> dict[str, Any]:
    """What a model need not know that is only ever read one way."""
    return {} if attention is None else {"attention": attention, "adapter": adapter}


class Picked(NamedTuple):
    """The rows of windows that predict the selected positions, and how they are sampled.

    Attributes:
        rows: ``(n,)`` int64, counted through the batch.
        live: ``(n,)`` int64, which of the ``b * S`` positions these are; None: all in order.
        sampling: ``counter``, ``temperature``, ``top_k`` and ``top_p`` of ``ops.vocab_stats``.
    """

    rows: Tensor
    live: Tensor | None
    sampling: dict[str, Any]


def pick(
    state: State,
    width: int,
    start: Tensor,
    selection: Selection,
    *,
    noise_offset: Tensor | None = None,
    eligible: Tensor | None = None,
    shifted: bool | None = None,
    places: Places | None = None,
) -> Picked:
    """What ``statistics`` needs of windows of ``width`` rows at ``start``; arguments as there.

    ``shifted``: as in a forward that predicts the next token; by default the model's. ``places``:
    the windows', where they were made before.
    """
    call, batch, size = state.call, start.shape[0], selection.width
    if places is None:
        lead = int(call.model.spec.shift_logits if shifted is None else shifted)
        places = Places.of(start, width, selection, lead)
    (position, rows), sampling = places, {"counter": None, **state.sampling(size)}
    if state.draws:
        last = state.noise_offset if noise_offset is None else noise_offset
        words = (t.view(batch, -1).expand(-1, size) for t in (state.request_id, last))
        sampling["counter"] = torch.stack((position.int(), *words), -1).reshape(-1, 3)
    if start.device.type != "cpu" or call.runner.fixed_shapes:
        return Picked(rows, None, sampling)
    inside = position.clamp(max=state.x.shape[1] - 1)
    wanted = state.x == call.mask_id if eligible is None else eligible
    offsets = torch.arange(size, device=start.device)
    wanted = wanted.gather(1, inside) & (offsets < selection.length[:, None])
    live = wanted.flatten().nonzero().squeeze(1)
    sampling = {n: v[live] if isinstance(v, Tensor) else v for n, v in sampling.items()}
    return Picked(rows[live], live, sampling)


def statistics(
    state: State,
    hidden: Tensor,
    start: Tensor,
    selection: Selection,
    *,
    suppress_ids: Tensor | None,
    noise_offset: Tensor | None = None,
    eligible: Tensor | None = None,
    shifted: bool | None = None,
    tempered: bool = False,
    picked: Picked | None = None,
) -> ops.VocabStats:
    """Token and scores of the selected positions, each ``(b, S)``, of windows at ``start``.

    The head picks its rows of ``hidden (b, T, hidden)``; ``hidden (n, hidden)`` has those that were
    ``picked`` before. On a GPU every selected row is computed, so that shapes do
    not depend on values. On a CPU the rows whose position is not masked are left out (token 0,
    scores 0): the LM head is most of a small step.

    ``noise_offset``, ``(b,)`` or ``(b, S)`` int32, is the last word of the noise key, by default
    the state's. ``shifted`` as in ``pick``, ``tempered`` as in ``ops.vocab_stats``.
    ``eligible (b, L)`` bool says which rows are needed where that is not the masks.
    """
    call, rows = state.call, None
    if picked is None:
        own: dict[str, Any] = {"noise_offset": noise_offset, "eligible": eligible}
        picked = pick(state, hidden.shape[1], start, selection, **own, shifted=shifted)
    if hidden.ndim == 3:
        rows, hidden = picked.rows, hidden.reshape(-1, hidden.shape[2])
    options = {
        "seed": call.seed,
        "suppress_ids": suppress_ids,
        "tempered": tempered,
        **picked.sampling,
    }
    shape, live = (start.shape[0], selection.width), picked.live

    def in_place(stats: ops.VocabStats) -> ops.VocabStats:
        if live is not None:
            scores, count = torch.stack(stats[1:]), shape[0] * shape[1]
            scores = scores.new_zeros(4, count).index_copy_(1, live, scores)
            token = stats.token.new_zeros(count).index_copy_(0, live, stats.token)
            stats = ops.VocabStats(token, *scores.unbind())
        return ops.VocabStats(*(field.view(shape) for field in stats))

    stats = in_place(_row_stats(call, hidden, rows, options))
    if state.logprobs is not None:
        drawn = stats
        if options["counter"] is not None:  # its probability at the temperature it was drawn at
            drawn = in_place(_row_stats(call, hidden, rows, options | {"tempered": True}))
        note_logprobs(state, selection, drawn.prob.log(), state.x == call.mask_id)
    return stats


def _row_stats(
    call: Call, hidden: Tensor, rows: Tensor | None, options: dict[str, Any]
) -> ops.VocabStats:
    """Statistics of rows of ``hidden``; the fused head has neither filters nor guidance.

    With either the logits of ``TILE_ROWS`` rows are stored at a time: as the head's weights are
    read once for each such tile, a step of up to that many rows costs one read, as without.
    """
    backend = call.backend
    filtered = options["top_k"] is not None or options["top_p"] is not None
    if not filtered and call.guidance == 0:
        known = {name: options[name] for name in options if name not in ("top_k", "top_p")}
        return call.model.head_stats(hidden, rows, backend=backend, **known)
    tiles = []
    for first in range(0, max(len(hidden if rows is None else rows), 1), TILE_ROWS):
        part = slice(first, first + TILE_ROWS)
        own: dict[str, Any] = {
            name: value[part] if isinstance(value, Tensor) and name != "suppress_ids" else value
            for name, value in options.items()
        }
        logits = call.model.head(hidden[part] if rows is None else hidden[rows[part]])
        tiles.append(ops.vocab_stats(logits, backend=backend, **own))
    return ops.VocabStats(*map(torch.cat, zip(*tiles, strict=True)))


def note_logprobs(state: State, selection: Selection, logprob: Tensor, noted: Tensor) -> None:
    """Write ``logprob (b, S)`` at those of the selected positions that ``noted (b, L)`` says."""
    if state.logprobs is None:
        return
    slots = state.x.shape[1]
    offset = torch.arange(slots, device=state.x.device) - selection.start[:, None]
    inside = (offset >= 0) & (offset < selection.length[:, None]) & (offset < selection.width)
    new = logprob.float().gather(1, offset.clamp(0, selection.width - 1).long())
    state.logprobs.copy_(torch.where(inside & noted, new, state.logprobs))


def write(
    state: State,
    stats: ops.VocabStats,
    selection: Selection,
    accept: Accept,
    *,
    ending: ops.Ending | None = None,
) -> ops.Unmasked:
    """Write what the rule accepts of the selected positions into the state."""
    score, rule = accept(stats)
    block_end = None
    if state.call.has_infill and ending is not None and not ending.last:
        # The op's end of a sequence does not look at masks in its prompt.
        never = torch.full_like(state.end, 2**30)
        block_end, ending = ending, ops.Ending(state.done, never)
    unmasked = ops.unmask(
        state.x,
        state.step_map,
        state.nfe,
        stats.token,
        score,
        mask_id=state.call.mask_id,
        start=selection.start,
        length=selection.length,
        seed=state.call.seed,
        request=state.request_id,
        ending=ending,
        backend=state.call.backend,
        **rule,
    )
    if block_end is not None:
        position = torch.arange(state.x.shape[1], device=state.x.device)
        masked = (state.x == state.call.mask_id) & (position < state.prompt_length[:, None])
        length = selection.length.masked_fill(masked.any(1), 0)
        close(state, replace(selection, length=length), block_end)
    if state.draws:
        state.noise_offset += unmasked.accepted
    return unmasked


def write_run(state: State, token: Tensor, start: Tensor, length: Tensor) -> ops.Unmasked:
    """Write the first ``length (b,)`` of ``token (b, S)`` at ``start``, as far as an EOS.

    A run that is complete ends a sequence where it reaches its end.
    """
    return ops.unmask(
        state.x,
        state.step_map,
        state.nfe,
        token,
        torch.zeros_like(token, dtype=torch.float32),
        mask_id=state.call.mask_id,
        start=start,
        length=length,
        rule="left_to_right",
        quota=length,
        ending=ops.Ending(state.done, state.end, state.call.eos),
        backend=state.call.backend,
    )


def close(state: State, selection: Selection, ending: ops.Ending) -> None:
    """Say which sequences are done, and fill after their ends: a step that writes no tokens."""
    shape = (len(state.x), selection.width)
    ops.unmask(
        state.x,
        state.step_map,
        torch.zeros_like(state.nfe),  # not a forward
        state.x.new_zeros(shape),
        state.x.new_zeros(shape, dtype=torch.float32),
        mask_id=state.call.mask_id,
        start=selection.start,
        length=selection.length,
        rule="threshold",
        threshold=1.0,  # no score of 0 reaches it
        min_tokens=0,
        ending=ending,
        backend=state.call.backend,
    )


def busy(state: State, count: Tensor) -> Tensor:
    """Counts for the host ``(1, b)`` int32: ``count``, or -1 for a sequence that is done."""
    return torch.where(state.done, -1, count)[None]


def fill_after_eos(call: Call, x: Tensor, step_map: Tensor) -> None:
    """Fill the rest of each prompt's generation region with EOS after its first EOS, in place."""
    if call.eos is None:
        return
    position = torch.arange(x.shape[1], device=x.device)
    new = (position >= call.prompt_length[:, None]) & (position < call.end[:, None])
    ends = new & torch.isin(x, call.eos)
    after = new & (ends.cumsum(1) - ends.int() > 0)
    x.copy_(torch.where(after, call.eos[0], x))
    step_map.masked_fill_(after, -1)
