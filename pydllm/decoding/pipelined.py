"""FreeDave's pipelined mode: every forward of a block-causal model verifies.

The window reaches over several blocks, so guesses run on into blocks behind the one being filled:
later blocks never influence earlier ones, and the first step of a block needs nothing but the
blocks before. The keys and values of a block that an accepted candidate completes are that
candidate's own, they are taken from the forward that verified it. So no forward is spent on storing
a finished block or on opening the next one, and each sequence goes its own pace.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from pydllm.decoding.drafts import Carried, Composed, Drafts, Fused
from pydllm.decoding.generation import Decoded, Request, Step
from pydllm.decoding.graph import POLL
from pydllm.decoding.loop import Blockwise
from pydllm.decoding.state import HostNumbers, Selection, State, Window
from pydllm.decoding.step import finish_block, forward, statistics
from pydllm.models import StaticCache
from pydllm.models.protocol import Fresh

Count = TypeVar("Count", int, Tensor)


@dataclass(frozen=True)
class Pipelined(Blockwise):
    """Fills the blocks of a block-causal model, several steps of the baseline a forward."""

    drafts: Drafts
    road: type[Composed] | type[Fused]

    def run(self, request: Request) -> Decoded:
        runner, lead = request.runner, int(request.model.spec.shift_logits)
        whole = runner.hold("state", State.of(request))
        device, size = whole.x.device, self.block_length
        batch, slots = whole.x.shape
        cache = runner.cache("cache", request.model, batch, slots)
        banned = torch.tensor([request.mask_id], dtype=torch.int32, device=device)
        banned = runner.hold("banned", banned)
        numbers = HostNumbers(device, batch)
        road = self.road(request, self.accept, self.drafts, size)
        state, branches = whole, 1
        stored = state.prompt_length // size * size
        end = _whole_blocks(state.prompt_length + request.max_new_tokens, size)
        place = runner.hold("place", Place(stored, end))
        carried: Carried = ()
        # As many as the baseline could need: with logits that are NaN a mask can stay a mask.
        for forwards in range(1, request.max_new_tokens + size):
            # As many blocks of masks as drafts can fill, and one that is complete but not stored.
            reach = min(_whole_blocks(self.drafts.ahead(branches), size) + size, slots)
            first = forwards == 1
            call = _Round(self, request, road, cache, banned, lead, reach, branches, first)
            key = (first, len(state.rows), reach, branches, call.width(slots))
            step = partial(call.run, state, place, carried)
            carried, wish = runner.run(key, step)
            state.write_back(whole)
            request.report(Step(forwards, whole.x, whole.step_map, whole.prompt_length))
            # Where the number of candidates does not depend on them, the host looks now and then.
            if runner.static and not self.drafts.adaptive and forwards % POLL:
                branches = self.drafts.most
                continue
            numbers.post(wish)
            wishes = numbers.read()
            live = [row for row, wanted in enumerate(wishes) if wanted > 0]
            if not live:
                break
            stay = runner.stay(live, len(wishes))
            if stay is not None:
                rows = torch.tensor(stay, device=device)
                state, cache = runner.hold("state", state.keep(rows)), cache.take(stay)
                place = runner.hold("place", Place(place.stored[rows], place.end[rows]))
                carried = road.keep(carried, rows)
            branches = self.drafts.branches(max(wishes), len(live) * (reach + lead))
            branches = self.drafts.bucket(request, branches)
            if runner.static and not self.drafts.adaptive:
                branches = self.drafts.most
        finish_block(whole, request, whole.prompt_length, request.max_new_tokens)
        return Decoded(whole.x, whole.step_map, whole.nfe)


class Place(NamedTuple):
    """Where each sequence is, ``(b,)`` int32."""

    stored: Tensor  # leading slots of the cache that are right
    end: Tensor  # the first position behind the last block


@dataclass(frozen=True)
class _Round:
    """One forward and what it decides; all but the tensors is captured."""

    plan: Pipelined
    request: Request
    road: Composed | Fused
    cache: StaticCache
    banned: Tensor
    lead: int
    reach: int
    branches: int
    first: bool

    def run(self, state: State, place: Place, carried: Carried) -> tuple[Carried, Tensor]:
        """What the next round needs, and the candidates that each sequence wishes for ``(b,)``."""
        request, road, branches, size = (
            self.request,
            self.road,
            self.branches,
            self.plan.block_length,
        )
        drafts, (stored, end) = self.plan.drafts, place
        slots = state.x.shape[1]
        # A sequence that is done may stay: it looks at nothing.
        rows = (end - stored).clamp(max=self.reach).masked_fill(state.done, 0)
        view = Selection(stored.clone(), rows, self.reach)  # stored moves on, the view is kept
        window = self._window(view, slots)
        packed = state if self.first else road.pack(state, carried, branches)
        fresh: Fresh = []
        hidden = forward(request, packed, window, self.cache, branches=branches, fresh=fresh)
        wide = view.repeat(branches)
        start = window.start.repeat_interleave(branches)
        draw = drafts.draw(state, branches)
        looked = statistics(request, packed, hidden, start, wide, banned=self.banned, draw=draw)
        if self.first:
            block = Selection(stored, torch.full_like(stored, size), size)
            carried = road.begin(state, looked, view, block, self.plan.accept)
        else:
            verified, carried = road.follow(state, carried, packed, looked, view, branches)
            request.model.commit_branch(
                fresh,
                self.cache,
                branch=verified.branch,
                start=window.start,
                commit=stored - window.start + verified.complete,
                branches=branches,
                backend=request.backend,
            )
            stored += verified.complete
        done, left = self._finished(state, end)
        state.done |= done
        return carried, torch.where(state.done, 0, drafts.wish(state, left))

    def width(self, slots: int) -> int:
        """Rows of the window."""
        if not self.first:
            return min(self.reach + self.lead, slots)
        size = self.plan.block_length
        width = self.request.longest_prompt // size * size + self.reach
        return self.request.runner.width(min(width, slots), slots)

    def _window(self, view: Selection, slots: int) -> Window:
        """The view, and before it the row that predicts its first position; first all prompts."""
        stop, width = view.start + view.length, self.width(slots)
        if self.first:
            return Window.make(torch.zeros_like(stop), stop, stop, width=width, commit=view.start)
        start = (view.start - self.lead).clamp(min=0)
        return Window.make(start, stop - start, stop, width=width)

    def _finished(self, state: State, end: Tensor) -> tuple[Tensor, Tensor]:
        """Which sequences are done ``(b,)``, and the masks left ``(b,)`` int32.

        One is done with its last mask, or when a block that holds an end of sequence is complete.
        """
        request, size = self.request, self.plan.block_length
        x, position = state.x, torch.arange(state.x.shape[1], device=state.x.device)
        masked = x.eq(request.mask_id) & (position < end[:, None])
        left = masked.sum(1, dtype=torch.int32)
        if request.eos is None:
            return left == 0, left
        front = torch.where(masked, position, x.shape[1]).amin(1)
        front = torch.minimum(front // size * size, end)
        new = (position >= state.prompt_length[:, None]) & (position < state.end[:, None])
        ended = torch.isin(x, request.eos) & new & (position < front[:, None])
        return ended.any(1) | (left == 0), left


def _whole_blocks(count: Count, size: int) -> Count:
    """A number of positions, rounded up to blocks."""
    return (count + size - 1) // size * size
