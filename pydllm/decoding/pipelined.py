"""FreeDave's pipelined mode: every forward of a block-causal model verifies.

The window reaches over several blocks, so guesses run on into blocks behind the one being filled:
later blocks never influence earlier ones, and the first step of a block needs nothing but the
blocks before. The keys and values of a block that an accepted candidate completes are that
candidate's own, they are taken from the forward that verified it. So no forward is spent on storing
a finished block or on opening the next one, and each sequence goes its own pace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from pydllm.decoding.drafts import Composed, Drafts, Fused
from pydllm.decoding.generation import Decoded, Request, Step
from pydllm.decoding.loop import Blockwise
from pydllm.decoding.state import HostNumbers, Selection, State, Window
from pydllm.decoding.step import finish_block, forward, statistics
from pydllm.models.protocol import Fresh

Count = TypeVar("Count", int, Tensor)


@dataclass(frozen=True)
class Pipelined(Blockwise):
    """Fills the blocks of a block-causal model, several steps of the baseline a forward."""

    drafts: Drafts
    road: type[Composed] | type[Fused]

    def run(self, request: Request) -> Decoded:
        whole = State.of(request)
        device, size = whole.x.device, self.block_length
        batch, slots = whole.x.shape
        lead = int(request.model.spec.shift_logits)
        cache = request.model.new_cache(batch, slots)
        banned = torch.tensor([request.mask_id], dtype=torch.int32, device=device)
        numbers = HostNumbers(device, batch)
        road = self.road(request, self.accept, self.drafts, size)
        state, branches = whole, 1
        stored = state.prompt_length // size * size
        end = _whole_blocks(state.prompt_length + request.max_new_tokens, size)
        # As many as the baseline could need: with logits that are NaN a mask can stay a mask.
        for forwards in range(1, request.max_new_tokens + size):
            # As many blocks of masks as drafts can fill, and one that is complete but not stored.
            reach = min(_whole_blocks(self.drafts.ahead(branches), size) + size, slots)
            view = Selection(stored, (end - stored).clamp(max=reach), reach)
            first = forwards == 1
            window = self._window(request, view, lead, slots, first)
            packed = state if first else road.pack(state, branches)
            fresh: Fresh = []
            hidden = forward(request, packed, window, cache, branches=branches, fresh=fresh)
            wide = view.repeat(branches)
            start = window.start.repeat_interleave(branches)
            draw = self.drafts.draw(state, branches)
            looked = statistics(request, packed, hidden, start, wide, banned=banned, draw=draw)
            if first:
                block = Selection(stored, torch.full_like(stored, size), size)
                road.begin(state, looked, view, block, self.accept)
            else:
                branch, complete = road.follow(state, packed, looked, view, branches)
                request.model.commit_branch(
                    fresh,
                    cache,
                    branch=branch,
                    start=window.start,
                    commit=stored - window.start + complete,
                    branches=branches,
                    backend=request.backend,
                )
                stored = stored + complete
            state.write_back(whole)
            if request.on_step is not None:
                request.on_step(Step(forwards, whole.x, whole.step_map, whole.prompt_length))
            done, left = self._finished(request, state, end)
            numbers.post(torch.where(done, 0, self.drafts.wish(state, left)))
            wishes = numbers.read()
            live = [row for row, wish in enumerate(wishes) if wish > 0]
            if not live:
                break
            if len(live) < len(wishes):
                rows = torch.tensor(live, device=device)
                state, cache = state.keep(rows), cache.take(live)
                stored, end = stored[rows], end[rows]
                road.keep(rows)
            branches = self.drafts.branches(max(wishes), len(live) * (reach + lead))
        finish_block(whole, request, whole.prompt_length, request.max_new_tokens)
        return Decoded(whole.x, whole.step_map, whole.nfe)

    def _window(
        self, request: Request, view: Selection, lead: int, slots: int, first: bool
    ) -> Window:
        """The view, and before it the row that predicts its first position; first all prompts."""
        stop = view.start + view.length
        if first:
            longest = (request.x.shape[1] - request.max_new_tokens) // self.block_length
            width = min(longest * self.block_length + view.width, slots)
            return Window.make(torch.zeros_like(stop), stop, stop, width=width, commit=view.start)
        start = (view.start - lead).clamp(min=0)
        return Window.make(start, stop - start, stop, width=min(view.width + lead, slots))

    def _finished(self, request: Request, state: State, end: Tensor) -> tuple[Tensor, Tensor]:
        """Which sequences are done ``(b,)``, and the masks left ``(b,)`` int32.

        One is done with its last mask, or when a block that holds an end of sequence is complete.
        """
        x, position = state.x, torch.arange(state.x.shape[1], device=state.x.device)
        masked = x.eq(request.mask_id) & (position < end[:, None])
        front = torch.where(masked, position, x.shape[1]).amin(1)
        front = torch.minimum(front // self.block_length * self.block_length, end)
        total = state.prompt_length + request.max_new_tokens
        eos = torch.tensor(request.model.spec.eos_ids, dtype=x.dtype, device=x.device)
        new = (position >= state.prompt_length[:, None]) & (position < total[:, None])
        ended = torch.isin(x, eos) & new & (position < front[:, None])
        left = masked.sum(1, dtype=torch.int32)
        return ended.any(1) | (left == 0), left


def _whole_blocks(count: Count, size: int) -> Count:
    """A number of positions, rounded up to blocks."""
    return (count + size - 1) // size * size
