"""The block loop that the block-wise algorithms share.

A step is: window forward, statistics, accept, commit. All sequences of a batch work on their n-th
block together, each at its own position. Within a step nothing is read on the host, so a step may
be replayed as a CUDA graph. Between steps the host reads one flag, and only where the number of
steps is not known beforehand; at block ends it reads which sequences are finished, and they leave
the batch. That an end of sequence was written, the step finds out itself (``ops.Ending``). With
full attention the refresh that opens the next block rewrites the cache anyway, so leaving copies no
keys and values.

A block-causal model's blocks are aligned to position 0: the end of the prompt shares the first one
with masks, and the last one is decoded whole and cut. Keys and values of finished blocks are exact,
they never change again. They are stored by the forward that opens the next block, so a block of m
masks takes m steps of one token, the prompt none.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeVar

import torch
from torch import Tensor

from pydllm import ops
from pydllm.decoding.generation import Decoded, Request, Step
from pydllm.decoding.state import HostNumbers, Selection, State, Window
from pydllm.decoding.step import Accept, forward, statistics, write
from pydllm.models import StaticCache

CACHES = ("none", "prefix", "dual")
Result = TypeVar("Result")


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
        runner = request.runner
        whole = state = runner.hold("state", State.of(request))
        (batch, slots), exact = whole.x.shape, request.model.spec.block_size is not None
        kept = slots if exact or self.cache != "none" else 0
        cache = runner.cache("cache", request.model, batch, kept)
        numbers = HostNumbers(request.x.device, batch)
        banned = None
        if self.ban_mask:
            mask = [request.mask_id]
            banned = torch.tensor(mask, dtype=torch.int32, device=request.x.device)
            banned = runner.hold("banned", banned)
        forwards = 0
        for index in count():
            block = Block(self, request, state, cache, index, banned)
            for _ in self.fill(block, numbers):
                forwards += 1
                if request.on_step is not None:
                    state.write_back(whole)
                    request.report(Step(forwards, whole.x, whole.step_map, whole.prompt_length))
            state.write_back(whole)
            numbers.post(state.done)
            live = [row for row, ended in enumerate(numbers.read()) if not ended]
            if not live:
                break
            stay = runner.stay(live, len(state.rows))
            if stay is not None:
                rows = torch.tensor(stay, device=request.x.device)
                state = runner.hold("state", state.keep(rows))
                cache = cache.take(stay) if exact else cache.first(len(stay))
        return Decoded(whole.x, whole.step_map, whole.nfe)

    def fill(self, block: Block, numbers: HostNumbers) -> Iterator[None]:
        """One forward and what it writes at a time, until the block is complete.

        The host looks at whether masks are left, unless the number of steps is known. The last step
        says which sequences are done.
        """
        masks = block.size - block.forced
        known = self.steps if block.is_all_masks else None
        steps = block.forced + (masks if known is None else known(masks))
        for index in range(steps):
            left = block.step(index, last=index == steps - 1)
            yield
            if known is None and index < steps - 1:
                numbers.post(left)
                if not numbers.read()[0] and not block.request.warm:
                    return


class Block:
    """One block of every live sequence: its windows, made once, and its steps.

    Attributes:
        size: its positions.
        is_all_masks: whether all of them are masks in all sequences when the block begins.
        refresh: the window of the first forward.
        window: of the others.
        block: its positions, with more rows where shapes are static; ``first_selection`` and
            ``selection`` are the positions that the first step and the others decide.
        ends_from: ``(b,)`` int32, where an end of sequence may be.
    """

    size: int
    is_all_masks: bool
    refresh: Window
    window: Window
    block: Selection
    selection: Selection
    first_selection: Selection
    ends_from: Tensor

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
        ends_from = torch.maximum(self.block.start, state.prompt_length)
        selections = (self.block, self.selection, self.first_selection)
        placed = (self.refresh, self.window, ends_from, *selections)
        self.refresh, self.window, self.ends_from, *held = request.runner.hold("block", placed)
        # The block itself is known by its identity.
        self.selection, self.first_selection = (
            held[0] if old is self.block else new
            for old, new in zip(selections[1:], held[1:], strict=True)
        )
        self.block = held[0]

    def _place_behind_the_prompt(self, offset: int) -> None:
        plan, state = self.plan, self.state
        self.forced = self.shifted and plan.forced_first and plan.cache != "none"
        new = self.request.max_new_tokens
        self.size, self.is_all_masks = min(plan.block_length, new - offset), True
        total = state.prompt_length + new
        self.start = state.prompt_length + offset
        runner, slots = self.request.runner, state.x.shape[1]
        padded = min(plan.block_length, new) if runner.static else self.size
        block = Selection(self.start, torch.full_like(total, self.size), padded)
        self.block = self.selection = self.first_selection = block
        commit = None if plan.cache == "none" else total
        zero = torch.zeros_like(total)
        width = self.request.width
        self.refresh = Window.make(zero, total, total, width=width, commit=commit)
        if plan.carry_masks:
            width = offset + self.size
            length = torch.full_like(total, width)
            width = runner.width(width, slots)
            self.first_selection = Selection(state.prompt_length, length, width)
        if plan.cache == "none":
            self.window, self.selection = self.refresh, self.first_selection
            return
        if self.forced:
            self.first_selection = Selection(self.start, torch.ones_like(total), 1)
        # A shifted model predicts the block's first position from the row before the block.
        lead = int(self.shifted and not self.forced)
        start = self.start - lead
        rows = lead + (self.size if plan.cache == "dual" else new - offset)
        length = torch.full_like(total, rows)
        width = lead + padded if plan.cache == "dual" else runner.width(rows, slots)
        self.window = Window.make(start, length, total, width=width)

    def _place_at_multiples(self, index: int, size: int) -> None:
        prompt, slots = self.state.prompt_length, self.state.x.shape[1]
        self.size, self.is_all_masks = size, index > 0
        # A sequence that is done may stay, and has no block any more.
        self.start = (prompt // size * size + index * size).clamp(max=slots - size)
        end = self.start + size
        # Masks behind the end of a sequence that is done stay masks.
        length = torch.full_like(prompt, size).masked_fill(self.state.done, 0)
        self.block = self.selection = self.first_selection = Selection(self.start, length, size)
        # The first forward also stores the block before, or all that the prompt fills.
        width = 2 * size
        if index == 0:
            width = (self.request.longest_prompt // size + 1) * size
            width = self.request.runner.width(width, slots)
        start = torch.zeros_like(prompt) if index == 0 else self.start - size
        stored = self.start - start
        self.refresh = Window.make(start, end - start, end, width=width, commit=stored)
        start = (self.start - int(self.shifted)).clamp(min=0)
        width = min(size + int(self.shifted), slots)
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
        return statistics(request, state, hidden, start, selection, banned=self.banned, draw=draw)

    def masks_left(self, state: State) -> Tensor:
        """Masks in the block, ``(b,)`` int32."""
        offsets = torch.arange(self.block.width, device=state.x.device)
        index = (self.block.start[:, None] + offsets).clamp(max=state.x.shape[1] - 1).long()
        left = state.x.gather(1, index).eq(self.request.mask_id)
        left &= offsets < self.block.length[:, None]
        return left.sum(1, dtype=torch.int32)

    def ending(self, *, last: bool) -> ops.Ending:
        """An end of sequence is looked for when the block is complete."""
        state = self.state
        return ops.Ending(state.done, state.end, self.request.eos, self.ends_from, last)

    def run(self, kind: Hashable, window: Window, step: Callable[[], Result]) -> Result:
        """Do a step of a kind that is the same in every block."""
        shape = (len(self.state.rows), window.width, self.block.width)
        return self.request.runner.run((kind, *shape), step)

    def step(self, index: int, *, last: bool) -> Tensor:
        """One forward and what it writes; returns whether masks are left in the block, ``(1,)``."""
        first = index == 0
        window = self.refresh if first else self.window
        selection = self.first_selection if first else self.selection
        forced = first and self.forced

        def step() -> Tensor:
            stats = self.look(self.state, window, selection)
            accept = force_first if forced else self.plan.accept
            # One forced token is no block.
            ending = None if forced and not last else self.ending(last=last)
            unmasked = write(self.request, self.state, stats, selection, accept, ending=ending)
            left = unmasked.remaining
            if selection is not self.block:
                left = self.masks_left(self.state)
            return left.any().int().view(1)

        return self.run((first, last, selection.width), window, step)


def force_first(stats: ops.VocabStats) -> tuple[Tensor, dict[str, Any]]:
    quota = torch.ones(stats.prob.shape[0], dtype=torch.int32, device=stats.prob.device)
    return stats.prob, {"rule": "left_to_right", "quota": quota}
