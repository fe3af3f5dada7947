"""The denoising step and the block loop that the block-wise algorithms share.

A step is: window forward, statistics, accept, commit. All sequences of a batch work on their n-th
block together, each at its own position. Within a step nothing is read on the host. Between steps
the host reads one flag, and only where the number of steps is not known beforehand; at block ends
it reads which sequences are finished, and they leave the batch. With full attention the refresh
that opens the next block rewrites the cache anyway, so leaving copies no keys and values.

A block-causal model's blocks are aligned to position 0: the end of the prompt shares the first one
with masks, and the last one is decoded whole and cut. Keys and values of finished blocks are exact,
they never change again. They are stored by the forward that opens the next block, so a block of m
masks takes m steps of one token, the prompt none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, Self

import torch
from torch import Tensor

from pydllm import ops
from pydllm.decoding.generation import Decoded, Request, Step
from pydllm.models import Model, StaticCache
from pydllm.models.protocol import Fresh

CACHES = ("none", "prefix", "dual")
Accept = Callable[[ops.VocabStats], tuple[Tensor, dict[str, Any]]]


@dataclass(frozen=True)
class Window:
    """A span of positions a sequence that one forward computes; all ``(B,)`` int32 on the device.

    ``width`` is the number of rows of the forward, known to the host; ``index (B, width)`` are the
    positions of the rows, those behind a sequence's length clamped into it.
    """

    start: Tensor
    length: Tensor
    kv_len: Tensor
    commit: Tensor
    index: Tensor
    width: int

    @classmethod
    def make(
        cls,
        start: Tensor,
        length: Tensor,
        kv_len: Tensor,
        *,
        width: int,
        commit: Tensor | None = None,
    ) -> Window:
        offsets = torch.arange(width, device=start.device)
        last = (start + length - 1).clamp(min=0)
        index = torch.minimum(start[:, None] + offsets, last[:, None])
        commit = torch.zeros_like(length) if commit is None else commit
        return cls(start, length, kv_len, commit, index.long(), width)


@dataclass(frozen=True)
class Selection:
    """The positions whose statistics are wanted: ``width`` from ``start``, ``length`` of them
    valid.

    ``start`` and ``length`` are ``(B,)`` int32 on the device.
    """

    start: Tensor
    length: Tensor
    width: int

    def repeat(self, times: int) -> Selection:
        """The selection of ``times`` copies of each sequence, the copies side by side."""
        start, length = (t.repeat_interleave(times) for t in (self.start, self.length))
        return Selection(start, length, self.width)


@dataclass
class State:
    """The sequences still being decoded. All tensors on the device, rows in batch order."""

    rows: Tensor  # (b,) int64: which rows of the request these are
    x: Tensor  # (b, L) int64; with a block-causal model whole blocks, L up to the next multiple
    step_map: Tensor  # (b, L) int32
    nfe: Tensor  # (b,) int32
    decoded: Tensor  # (b,) int32: tokens written so far, the last word of the noise key
    prompt_length: Tensor  # (b,) int32
    request_id: Tensor  # (b,) int32
    steps: Tensor  # (b,) int32: steps of the baseline, where a forward may take several
    run: Tensor  # (b,) fp32: of late, so many steps a forward

    @classmethod
    def of(cls, request: Request) -> State:
        batch = request.x.shape[0]
        device = request.x.device
        x = request.whole_blocks()
        return cls(
            rows=torch.arange(batch, device=device),
            x=x,
            step_map=torch.full_like(x, -1, dtype=torch.int32),
            nfe=torch.zeros(batch, dtype=torch.int32, device=device),
            decoded=torch.zeros(batch, dtype=torch.int32, device=device),
            prompt_length=request.prompt_length,
            request_id=request.request_id,
            steps=torch.zeros(batch, dtype=torch.int32, device=device),
            run=torch.full((batch,), 2.0, device=device),
        )

    @classmethod
    def interleave(cls, states: list[State]) -> State:
        """The states side by side: row ``b * len(states) + j`` is row b of the j-th."""
        fields = zip(*(vars(state).values() for state in states), strict=True)
        return cls(*(torch.stack(field, 1).flatten(0, 1) for field in fields))

    def copy(self) -> State:
        return State(**{name: value.clone() for name, value in vars(self).items()})

    def keep(self, rows: Tensor) -> Self:
        """The state of some of its rows, copied."""
        return type(self)(**{name: value[rows] for name, value in vars(self).items()})

    def write_back(self, target: State) -> None:
        """Copy the rows into the state of the whole request, unless this is that state."""
        if target is self:
            return
        for name in ("x", "step_map", "nfe", "decoded"):
            getattr(target, name)[self.rows] = getattr(self, name)


class HostNumbers:
    """A few integers that travel from the device to the host without a synchronising copy."""

    def __init__(self, device: torch.device, count: int) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        pinned = device.type == "cuda"
        self._values = torch.zeros(count, dtype=torch.int32, pin_memory=pinned)
        self._posted = 0

    def post(self, values: Tensor) -> None:
        """Send a 1-D tensor of at most ``count`` numbers on its way."""
        self._posted = len(values)
        self._values[: self._posted].copy_(values, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def read(self) -> list[int]:
        """Wait until the last posted values have arrived and return them."""
        if self._event is not None:
            self._event.synchronize()
        return self._values[: self._posted].tolist()


class HostFlag:
    """One boolean that travels as ``HostNumbers`` do."""

    def __init__(self, device: torch.device) -> None:
        self._number = HostNumbers(device, 1)

    def post(self, value: Tensor) -> None:
        self._number.post(value.int().view(1))

    def read(self) -> bool:
        return bool(self._number.read()[0])


def fill_holes(live: list[int]) -> list[int]:
    """The live rows in an order that leaves those before ``len(live)`` where they are."""
    last = iter(row for row in live if row >= len(live))
    stay = set(live)
    return [row if row in stay else next(last) for row in range(len(live))]


def select_rows(model: Model, hidden: Tensor, start: Tensor, selection: Selection) -> Tensor:
    """Hidden rows ``(B, S, hidden)`` that predict the selected positions, of windows at ``start``.

    Position p is predicted by row p of an unshifted model and by row p - 1 of a shifted one.
    """
    first = selection.start - start - int(model.spec.shift_logits)
    offsets = torch.arange(selection.width, device=hidden.device)
    index = (first[:, None] + offsets).clamp_(0, hidden.shape[1] - 1)
    return hidden.gather(1, index.long()[..., None].expand(-1, -1, hidden.shape[-1]))


def row_temperatures(request: Request, state: State, width: int) -> float | Tensor:
    """The temperature, or one for each of ``width`` rows of every sequence, ``(b * width,)``."""
    if not isinstance(request.temperature, Tensor):
        return request.temperature
    return request.temperature[state.rows].repeat_interleave(width)


def statistics(
    request: Request,
    state: State,
    hidden: Tensor,
    selection: Selection,
    *,
    banned: Tensor | None,
    draw: Tensor | None = None,
    eligible: Tensor | None = None,
) -> ops.VocabStats:
    """Token and scores of the selected rows, each ``(B, S)``.

    On a GPU every row is computed, so that shapes do not depend on values. On a CPU the rows whose
    position is not masked are left out (token 0, scores 0): the LM head is most of a small step.

    ``draw (B,)`` int32 is the last word of the noise key, by default the tokens decoded so far.
    ``eligible (B, L)`` bool says which rows are needed where that is not the masks.
    """
    batch, width, size = hidden.shape
    offsets = torch.arange(width, device=hidden.device)
    position = selection.start[:, None] + offsets
    rows = hidden.reshape(-1, size)
    counter, temperature = None, row_temperatures(request, state, width)
    if isinstance(temperature, Tensor) or temperature > 0:
        last = state.decoded if draw is None else draw
        words = (t[:, None].expand(-1, width) for t in (state.request_id, last))
        counter = torch.stack((position.int(), *words), -1).reshape(-1, 3)
    live = None
    if hidden.device.type == "cpu":
        inside = position.clamp(max=state.x.shape[1] - 1).long()
        wanted = state.x == request.mask_id if eligible is None else eligible
        wanted = wanted.gather(1, inside) & (offsets < selection.length[:, None])
        live = wanted.flatten().nonzero().squeeze(1)
        counter = None if counter is None else counter[live]
        temperature = temperature[live] if isinstance(temperature, Tensor) else temperature
    stats = request.model.head_stats(
        rows,
        live,
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
        backend=request.backend,
        **rule,
    )
    state.decoded += unmasked.accepted
    return unmasked


def finish_block(state: State, request: Request, start: Tensor, length: int | Tensor) -> Tensor:
    """Fill behind an end of sequence in the block; returns which sequences are done ``(b,)``.

    ``length`` is one number or ``(b, 1)``.
    """
    eos_ids = request.model.spec.eos_ids
    total = state.prompt_length + request.max_new_tokens
    if not eos_ids:
        return torch.zeros_like(total, dtype=torch.bool)
    position = torch.arange(state.x.shape[1], device=state.x.device)
    in_block = (position >= start[:, None]) & (position < start[:, None] + length)
    new = (position >= state.prompt_length[:, None]) & (position < total[:, None])
    ends = in_block & new & torch.isin(state.x, torch.tensor(eos_ids, device=state.x.device))
    behind = (ends.cumsum(1) - ends.int() > 0) & (position < total[:, None])
    state.x.masked_fill_(behind, eos_ids[0])
    state.step_map.masked_fill_(behind, -1)
    return ends.any(1)


@dataclass(frozen=True)
class Blockwise:
    """How a block-wise algorithm fills a block; what differs between the algorithms is ``accept``.

    Attributes:
        accept: takes the statistics, returns the score and the arguments of ``ops.unmask`` that
            state the rule.
        steps: steps that a number of masks takes, or None if that depends on the tokens.
        cache: ``"none"``, ``"prefix"`` or ``"dual"``.
        forced_first: shifted models with a cache: take the block's first token from the refresh,
            whatever its score, and nothing else, as Fast-dLLM and FreeDave do.
        carry_masks: a full forward may also fill masks that earlier blocks were left with, as the
            published loops do. Only possible where the mask id is not banned.
        ban_mask: count the mask id as impossible.
    """

    block_length: int
    accept: Accept
    steps: Callable[[int], int] | None
    cache: str
    forced_first: bool
    carry_masks: bool
    ban_mask: bool

    def run(self, request: Request) -> Decoded:
        whole = State.of(request)
        state = whole
        (batch, slots), exact = whole.x.shape, request.model.spec.block_size is not None
        cache = request.model.new_cache(batch, slots if exact or self.cache != "none" else 0)
        flag = HostFlag(request.x.device)
        banned = None
        if self.ban_mask:
            mask = [request.mask_id]
            banned = torch.tensor(mask, dtype=torch.int32, device=request.x.device)
        forwards = 0
        for index in count():
            block = Block(self, request, state, cache, index, banned)
            for remaining in self.fill(block):
                forwards += 1
                if request.on_step is not None:
                    state.write_back(whole)
                    request.on_step(Step(forwards, whole.x, whole.step_map, whole.prompt_length))
                if remaining is not None:
                    flag.post(remaining.any())
                    if not flag.read():
                        break
            done = finish_block(state, request, block.start, block.size)
            done |= block.start + block.size >= state.prompt_length + request.max_new_tokens
            state.write_back(whole)
            live = [row for row, ended in enumerate(done.tolist()) if not ended]
            if not live:
                break
            if len(live) < len(state.rows):
                rows = torch.tensor(live, device=request.x.device)
                state = state.keep(rows)
                cache = cache.take(live) if exact else cache.first(len(live))
        return Decoded(whole.x, whole.step_map, whole.nfe)

    def fill(self, block: Block) -> Iterator[Tensor | None]:
        """One forward and what it writes at a time; yields the masks left ``(b,)``, for the host to
        look at, or None where the number of steps is known.
        """
        masks = block.size - block.forced
        known = self.steps if block.is_all_masks else None
        steps = block.forced + (masks if known is None else known(masks))
        for index in range(steps):
            remaining = block.step(index)
            yield remaining if known is None else None


class Block:
    """One block of every live sequence: its windows, made once, and its steps.

    Attributes:
        start: ``(b,)`` int32, the block's first position.
        size: its positions.
        is_all_masks: whether all of them are masks in all sequences when the block begins.
        refresh: the window of the first forward.
        window: of the others.
    """

    def __init__(
        self,
        plan: Blockwise,
        request: Request,
        state: State,
        cache: StaticCache,
        index: int,
        banned: Tensor | None,
    ) -> None:
        self.plan, self.request, self.state, self.cache = plan, request, state, cache
        self.banned, self.forced = banned, False
        self.shifted = request.model.spec.shift_logits
        if request.model.spec.block_size is None:
            self._place_behind_the_prompt(index * plan.block_length)
        else:
            self._place_at_multiples(index, request.model.spec.block_size)
        offsets = torch.arange(self.size, device=state.x.device)
        self.index = (self.start[:, None] + offsets).long()

    def _place_behind_the_prompt(self, offset: int) -> None:
        plan, state = self.plan, self.state
        self.forced = self.shifted and plan.forced_first and plan.cache != "none"
        new = self.request.max_new_tokens
        self.size, self.is_all_masks = min(plan.block_length, new - offset), True
        total = state.prompt_length + new
        self.start = state.prompt_length + offset
        block = Selection(self.start, torch.full_like(total, self.size), self.size)
        self.block = self.selection = self.first_selection = block
        commit = None if plan.cache == "none" else total
        width = state.x.shape[1]
        zero = torch.zeros_like(total)
        self.refresh = Window.make(zero, total, total, width=width, commit=commit)
        if plan.carry_masks:
            width = offset + self.size
            length = torch.full_like(total, width)
            self.first_selection = Selection(state.prompt_length, length, width)
        if plan.cache == "none":
            self.window, self.selection = self.refresh, self.first_selection
            return
        if self.forced:
            self.first_selection = Selection(self.start, torch.ones_like(total), 1)
        # A shifted model predicts the block's first position from the row before the block.
        lead = int(self.shifted and not self.forced)
        start = self.start - lead
        width = lead + (self.size if plan.cache == "dual" else new - offset)
        length = torch.full_like(total, width)
        self.window = Window.make(start, length, total, width=width)

    def _place_at_multiples(self, index: int, size: int) -> None:
        prompt = self.state.prompt_length
        self.size, self.is_all_masks = size, index > 0
        self.start = prompt // size * size + index * size
        end, length = self.start + size, torch.full_like(prompt, size)
        self.block = self.selection = self.first_selection = Selection(self.start, length, size)
        # The first forward also stores the block before, or all that the prompt fills.
        longest = self.request.x.shape[1] - self.request.max_new_tokens
        width = (longest // size + 1) * size if index == 0 else 2 * size
        start = torch.zeros_like(prompt) if index == 0 else self.start - size
        stored = self.start - start
        self.refresh = Window.make(start, end - start, end, width=width, commit=stored)
        start = (self.start - int(self.shifted)).clamp(min=0)
        width = min(size + int(self.shifted), self.state.x.shape[1])
        self.window = Window.make(start, end - start, end, width=width)

    def look(
        self,
        state: State,
        window: Window,
        selection: Selection,
        *,
        branches: int = 1,
        draw: Tensor | None = None,
    ) -> ops.VocabStats:
        """One forward of the window and the statistics of the selected positions ``(b, S)``.

        With ``branches``, the state and the selection hold so many copies of each sequence, side by
        side, all at the sequence's window and over its cache.
        """
        request = self.request
        hidden = forward(request, state, window, self.cache, branches=branches)
        start = window.start.repeat_interleave(branches)
        hidden = select_rows(request.model, hidden, start, selection)
        return statistics(request, state, hidden, selection, banned=self.banned, draw=draw)

    def masks_left(self, state: State) -> Tensor:
        """Masks in the block, ``(b,)`` int32."""
        left = state.x.gather(1, self.index).eq(self.request.mask_id)
        return left.sum(1, dtype=torch.int32)

    def step(self, index: int) -> Tensor:
        """One forward and what it writes; returns the masks left in the block, ``(b,)``."""
        plan, request, state = self.plan, self.request, self.state
        window = self.refresh if index == 0 else self.window
        selection = self.first_selection if index == 0 else self.selection
        stats = self.look(state, window, selection)
        accept = force_first if index == 0 and self.forced else plan.accept
        unmasked = write(request, state, stats, selection, accept)
        return unmasked.remaining if selection is self.block else self.masks_left(state)


def force_first(stats: ops.VocabStats) -> tuple[Tensor, dict[str, Any]]:
    quota = torch.ones(stats.prob.shape[0], dtype=torch.int32, device=stats.prob.device)
    return stats.prob, {"rule": "left_to_right", "quota": quota}
