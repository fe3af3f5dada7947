"""FreeDave's pipelined mode: every forward of a block-causal model verifies.

The window reaches over several blocks, so guesses run on into blocks behind the one being filled:
later blocks never influence earlier ones, and the first step of a block needs nothing but the
blocks before. The keys and values of a block that an accepted candidate completes are that
candidate's own, they are taken from the forward that verified it. So no forward is spent on storing
a finished block or on opening the next one, and each sequence goes its own pace.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pydllm import ops
from pydllm.decoding.drafts import Drafts, advance, candidate, longest_chain
from pydllm.decoding.generation import Decoded, Request, Step
from pydllm.decoding.loop import (
    Blockwise,
    HostNumbers,
    Selection,
    State,
    Window,
    finish_block,
    forward,
    select_rows,
    statistics,
    write,
)
from pydllm.models.protocol import Fresh


@dataclass(frozen=True)
class Pipelined(Blockwise):
    """Fills the blocks of a block-causal model, several steps of the baseline a forward."""

    drafts: Drafts

    def run(self, request: Request) -> Decoded:
        whole = State.of(request)
        spec, device = request.model.spec, whole.x.device
        lead, size = int(spec.shift_logits), self.block_length
        batch, slots = whole.x.shape
        cache = request.model.new_cache(batch, slots)
        banned = torch.tensor([request.mask_id], dtype=torch.int32, device=device)
        numbers = HostNumbers(device, batch)
        longest = (request.x.shape[1] - request.max_new_tokens) // size * size

        state = whole
        stored = state.prompt_length // size * size
        total = state.prompt_length + request.max_new_tokens
        end = (total + size - 1) // size * size
        guess: tuple[ops.VocabStats, Selection] | None = None
        branches = 1
        # As many as the baseline could need: with logits that are NaN a mask can stay a mask.
        for forwards in range(1, request.max_new_tokens + size):
            # As many blocks of masks as drafts can fill, and one that is complete but not stored.
            reach = min((1 + -(-self.drafts.ahead(branches) // size)) * size, slots)
            view = Selection(stored, (end - stored).clamp(max=reach), reach)
            if guess is None:
                start, commit = torch.zeros_like(stored), stored
                width = min(longest + reach, slots)
            else:
                start, commit = (stored - lead).clamp(min=0), None
                width = min(reach + lead, slots)
            stop = stored + view.length
            window = Window.make(start, stop - start, stop, width=width, commit=commit)

            drafted = [candidate(state)]
            for _ in range(branches - 1):
                drafted.append(drafted[-1].copy())
                if guess is not None:
                    self._step(request, drafted[-1], *guess)
            packed = State.interleave(drafted)
            fresh: Fresh = []
            hidden = forward(request, packed, window, cache, branches=branches, fresh=fresh)
            wide = view.repeat(branches)
            hidden = select_rows(request.model, hidden, start.repeat_interleave(branches), wide)
            draw = self.drafts.draw(state, branches)
            looked = statistics(request, packed, hidden, wide, banned=banned, draw=draw)
            stepped = packed.copy()
            self._step(request, stepped, looked, wide)
            branch = longest_chain(packed.x, stepped.x, branches)
            chosen = torch.arange(len(branch), device=device) * branches + branch
            done_blocks = self._complete(packed.x[chosen], stored, view.length, request.mask_id)
            if guess is not None:
                request.model.commit_branch(
                    fresh,
                    cache,
                    branch=branch.int(),
                    start=start,
                    commit=stored - start + done_blocks,
                    branches=branches,
                    backend=request.backend,
                )
            stats = ops.VocabStats(*(field[chosen] for field in looked))
            reached = stepped.keep(chosen)
            advance(state, reached, torch.ones_like(stored))
            stored = stored + done_blocks

            if request.on_step is not None:
                state.write_back(whole)
                request.on_step(Step(forwards, whole.x, whole.step_map, whole.prompt_length))
            done, left = self._finished(request, state, end)
            numbers.post(torch.where(done, 0, self.drafts.wish(state, left)))
            wishes = numbers.read()
            state.write_back(whole)
            live = [row for row, wish in enumerate(wishes) if wish > 0]
            if not live:
                break
            if len(live) < len(wishes):
                rows = torch.tensor(live, device=device)
                state, cache = state.keep(rows), cache.take(live)
                stored, end = stored[rows], end[rows]
                stats = ops.VocabStats(*(field[rows] for field in stats))
                view = Selection(view.start[rows], view.length[rows], reach)
            guess = stats, view
            branches = self.drafts.branches(max(wishes), len(live) * (reach + lead))
        finish_block(whole, request, whole.prompt_length, request.max_new_tokens)
        return Decoded(whole.x, whole.step_map, whole.nfe)

    def _step(
        self, request: Request, state: State, stats: ops.VocabStats, known: Selection
    ) -> None:
        """One step of the baseline: in the first block with masks, if its statistics are known."""
        size = self.block_length
        offsets = torch.arange(known.width, device=state.x.device)
        at = (known.start[:, None] + offsets).clamp(max=state.x.shape[1] - 1)
        masked = state.x.gather(1, at.long()).eq(request.mask_id)
        masked &= offsets < known.length[:, None]
        first = masked.int().argmax(1) // size * size
        index = first[:, None] + torch.arange(size, device=offsets.device)
        index = index.clamp(max=known.width - 1)
        block = ops.VocabStats(*(field.gather(1, index) for field in stats))
        length = masked.any(1).int() * size
        start = known.start + first.int()
        write(request, state, block, Selection(start, length, size), self.accept)

    def _complete(self, x: Tensor, stored: Tensor, length: Tensor, mask_id: int) -> Tensor:
        """Positions ``(b,)`` of the blocks from ``stored`` on that hold no mask."""
        position = torch.arange(x.shape[1], device=x.device)
        masked = x.eq(mask_id) & (position >= stored[:, None])
        first = torch.where(masked, position, x.shape[1]).amin(1)
        first = first // self.block_length * self.block_length
        return torch.minimum(first - stored, length).int()

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
