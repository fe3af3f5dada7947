"""The block loop that the block-wise algorithms share.

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
from typing import Any

import torch
from torch import Tensor

from pydllm import ops
from pydllm.decoding.generation import Decoded, Request, Step
from pydllm.decoding.state import HostFlag, Selection, State, Window
from pydllm.decoding.step import Accept, finish_block, forward, statistics, write
from pydllm.models import StaticCache

CACHES = ("none", "prefix", "dual")


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
        return statistics(request, state, hidden, start, selection, banned=self.banned, draw=draw)

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
