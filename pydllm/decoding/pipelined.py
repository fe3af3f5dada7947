"""FreeDave's pipelined mode: every forward of a block-causal model verifies.

The window reaches over several blocks, so guesses run on into the blocks after the one being
filled: later blocks never influence earlier ones, and the first step of a block needs nothing but
the blocks before. The keys and values of a block that an accepted candidate completes are that
candidate's own, they are taken from the forward that verified it. So no forward is spent on storing
a finished block or on opening the next one, and each sequence goes at its own pace.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from pydllm.decoding.blockwise import BlockwiseAlgorithm
from pydllm.decoding.call import Call
from pydllm.decoding.drafts import (
    Carried,
    DraftBudget,
    Drafter,
    FusedDrafter,
    RuleDrafter,
    draft_fields,
)
from pydllm.decoding.driver import POLL, Counts, Decoded, Decoder, Plan
from pydllm.decoding.state import Selection, State, Window
from pydllm.decoding.step import fill_after_eos, forward, statistics
from pydllm.models.protocol import Fresh

Count = TypeVar("Count", int, Tensor)


@dataclass
class PipelinedState(State):
    """Also where each sequence is, and what both modes of FreeDave carry (``DraftState``).

    Attributes:
        stored: ``(b,)`` int32, leading slots of the cache that are right.
        last_end: ``(b,)`` int32, the end of the sequence's last block.
        branches: candidates of the last round, 0 before the first; on the host.
    """

    baseline_steps: Tensor
    accept_ema: Tensor
    stored: Tensor
    last_end: Tensor
    branches: int = field(default=0, metadata={"rows": False})


@dataclass(frozen=True, kw_only=True)
class PipelinedPlan(Plan):
    """A round of ``branches`` candidates over ``reach`` positions, in ``width`` rows each.

    In the first round the window begins at the prompt, which is stored.
    """

    is_first: bool
    branches: int
    reach: int
    width: int


@dataclass(frozen=True)
class PipelinedDecoder(Decoder):
    """Fills the blocks of a block-causal model, several steps of the baseline per forward.

    The counts have a second row: the candidates that each sequence asks for.
    """

    baseline: BlockwiseAlgorithm
    budget: DraftBudget
    drafter: Drafter
    opens_alone: ClassVar[bool] = True

    @classmethod
    def of(
        cls,
        call: Call,
        baseline: BlockwiseAlgorithm,
        budget: DraftBudget,
        kind: type[RuleDrafter] | type[FusedDrafter],
    ) -> PipelinedDecoder:
        size = baseline.block_length
        widest = _reach(budget.most, size, call.max_len)
        return cls(baseline, budget, kind(baseline.accept, budget, size, widest))

    def most_forwards(self, call: Call) -> int:
        # As many as the baseline could need: NaN logits can leave a mask a mask.
        return max(call.region_lengths) + self.baseline.block_length - 1

    def begin(self, call: Call, prompts: list[int]) -> tuple[PipelinedState, None]:
        size = self.baseline.block_length
        cache = call.runner.cache("cache", call.model, len(prompts), call.max_len)
        lengths = call.prompt_length.new_zeros(2, len(prompts))
        extra = draft_fields(len(prompts), call.device)
        state = PipelinedState.begin(
            call, prompts, cache, stored=lengths[0], last_end=lengths[1], **extra
        )
        state.stored.copy_(state.region_start // size * size)
        state.last_end.copy_(_whole_blocks(state.end, size))
        return state, None

    def plan(self, state: PipelinedState, counts: Counts | None) -> PipelinedPlan:
        call, budget, size = state.call, self.budget, self.baseline.block_length
        runner, slots, lead = call.runner, call.max_len, int(call.model.spec.shift_logits)
        # Where the number of candidates does not depend on the counts, the host looks seldom.
        fixed = runner.fixed_shapes and not budget.adaptive
        poll, first = POLL if fixed else 1, state.branches == 0
        reach = _reach(budget.ahead(max(state.branches, 1)), size, slots)
        if first:
            state.branches = 1
            longest = max(call.first_positions[prompt] for prompt in state.live_prompts)
            width = runner.width(min(longest // size * size + reach, slots), slots)
        else:
            if fixed:
                state.branches = budget.most
            elif counts is not None:
                rows = len(state.prompts) * (reach + lead)
                state.branches = budget.branches(max(counts[1]), rows, runner)
            reach = _reach(budget.ahead(state.branches), size, slots)
            width = min(reach + lead, slots)
        key = (first, reach, state.branches, width)
        return PipelinedPlan(
            key, poll, is_first=first, branches=state.branches, reach=reach, width=width
        )

    def step(self, state: PipelinedState, plan: PipelinedPlan) -> tuple[Tensor, Carried]:
        call, branches, size = state.call, plan.branches, self.baseline.block_length
        # A sequence that is done may stay: it looks at nothing.
        rows = (state.last_end - state.stored).clamp(max=plan.reach).masked_fill(state.done, 0)
        view = Selection(state.stored.clone(), rows, plan.reach)  # stored moves on, the view stays
        window = self._window(state, view, plan)
        packed = state if plan.is_first else self.drafter.pack(state, branches)
        fresh: Fresh = []
        hidden = forward(packed, window, branches=branches, fresh=fresh)
        stats = statistics(
            packed,
            hidden,
            window.start.repeat_interleave(branches),
            view.repeat(branches),
            suppress_ids=call.suppress_ids,
            noise_offset=self.budget.noise_offset(state, branches),
        )
        if plan.is_first:
            block = Selection(state.stored, torch.full_like(state.stored, size), size)
            carried = self.drafter.begin(state, stats, view, block, self.baseline.accept)
        else:
            verified, carried = self.drafter.follow(state, packed, stats, view, branches)
            call.model.commit_branch(
                fresh,
                state.cache,
                branch=verified.branch,
                start=window.start,
                commit=state.stored - window.start + verified.complete,
                branches=branches,
                backend=call.backend,
            )
            state.stored += verified.complete
        done, left = self._finished(state)
        state.done |= done
        wanted = torch.where(state.done, 0, self.budget.num_drafts(state, left))
        return torch.stack((-state.done.int(), wanted.int())), carried

    def finish(self, call: Call, results: Decoded) -> Decoded:
        fill_after_eos(call, results.x, results.step_map)
        return results

    def _window(self, state: PipelinedState, view: Selection, plan: PipelinedPlan) -> Window:
        """The view, and before it the row that predicts its first position; first all prompts."""
        stop, zero = view.start + view.length, torch.zeros_like(view.start)
        if plan.is_first:
            return Window.make(zero, stop, stop, width=plan.width, commit=view.start)
        lead = int(state.call.model.spec.shift_logits)
        start = (view.start - lead).clamp(min=0)
        return Window.make(start, stop - start, stop, width=plan.width)

    def _finished(self, state: PipelinedState) -> tuple[Tensor, Tensor]:
        """Which sequences are done ``(b,)``, and the masks left ``(b,)`` int32.

        One is done with its last mask, or when a block that holds an EOS is complete.
        """
        call, size, end = state.call, self.baseline.block_length, state.last_end
        x, position = state.x, torch.arange(state.x.shape[1], device=state.x.device)
        masked = x.eq(call.mask_id) & (position < end[:, None])
        left = masked.sum(1, dtype=torch.int32)
        if call.eos is None:
            return left == 0, left
        front = torch.where(masked, position, x.shape[1]).amin(1)
        front = torch.minimum(front // size * size, end)
        new = (position >= state.prompt_length[:, None]) & (position < state.end[:, None])
        ended = torch.isin(x, call.eos) & new & (position < front[:, None])
        return ended.any(1) | (left == 0), left


def _reach(ahead: int, size: int, slots: int) -> int:
    """As many blocks of masks as drafts can fill, and one that is complete but not stored."""
    return min(_whole_blocks(ahead, size) + size, slots)


def _whole_blocks(count: Count, size: int) -> Count:
    """A number of positions, rounded up to blocks."""
    return (count + size - 1) // size * size
