"""FreeDave over token editing: several steps of ``Editing`` verified by one forward.

A state of editing is the tokens, the count of post steps and whether the block is complete; a step
is a function of it and of its statistics. Drafts apply the step again and again to the statistics
of the last forward. A draft is a state of the baseline where the step before it, on statistics of
its own, arrives there in all of these.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pydllm import ops
from pydllm.decoding.blockwise import BlockPlan, begin_blocks, masks_left
from pydllm.decoding.call import Call
from pydllm.decoding.drafts import DraftBudget, draft_fields
from pydllm.decoding.driver import Counts, Decoder
from pydllm.decoding.editing import (
    Editing,
    EditingDecoder,
    EditingState,
    edit,
    finish_blocks,
    open_rows,
    predict,
)
from pydllm.decoding.state import Selection, State


@dataclass
class DraftedState(EditingState):
    """Also what FreeDave carries, see ``DraftState``."""

    baseline_steps: Tensor = None  # type: ignore[assignment]
    accept_ema: Tensor = None  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class DraftedPlan(BlockPlan):
    """A step that verifies ``branches`` states; the first of a block has one."""

    branches: int


@dataclass(frozen=True)
class DraftedEditingDecoder(Decoder):
    """The tokens of ``Editing``, several of its steps per forward.

    The counts have a second row: the states that each sequence wants verified.
    """

    algorithm: Editing
    budget: DraftBudget

    def begin(self, call: Call, prompts: list[int]) -> tuple[DraftedState, None]:
        if call.has_infill:
            raise ValueError(
                "prompts: expected no mask in a prompt with Editing, which writes after the prompt "
                "alone"
            )
        zero = torch.zeros(len(prompts), dtype=torch.int32, device=call.device)
        extra = {"post_steps": zero, "complete": zero.bool()}
        extra |= draft_fields(len(prompts), call.device)
        state = begin_blocks(DraftedState, self.algorithm.layout, call, prompts, **extra)
        # Admitted sequences bring what the others carry; a block's first step does not read it.
        shape, wide = (len(prompts), self.algorithm.block_length), call.model.dtype
        wide = torch.promote_types(wide, torch.float32)
        state.carried = (state.x.new_zeros(shape), state.x.new_zeros(shape, dtype=wide))
        return state, None

    def plan(self, state: DraftedState, counts: Counts | None) -> DraftedPlan:
        plan = EditingDecoder(self.algorithm).plan(state, counts)
        branches = 1
        if not plan.is_first:
            wanted = 1 if counts is None else max(counts[1])
            if state.call.warm:
                wanted = 1 + (state.steps_done - 2) % self.budget.most
            rows = plan.block.window.width * len(state.prompts)
            branches = self.budget.branches(max(wanted, 1), rows, state.call.runner)
        return DraftedPlan(
            (plan.key, branches),
            block=plan.block,
            is_first=plan.is_first,
            is_last=plan.is_last,
            branches=branches,
        )

    def step(self, state: DraftedState, plan: DraftedPlan) -> tuple[Tensor, Any]:
        window, selection = open_rows(state, plan)
        branches, active = plan.branches, ~state.complete
        many = selection.repeat(branches)
        packed = self._pack(state, plan, selection)
        stats = predict(
            self.algorithm,
            packed,
            window,
            many,
            branches=branches,
            noise_offset=self.budget.noise_offset(state, branches),
        )
        stepped = _copy(packed)
        ends_from = plan.block.ends_from.repeat_interleave(branches)
        edit(self.algorithm, stepped, many, ends_from, stats)
        branch = _accepted_prefix(packed, stepped, branches)
        _keep_logprobs(state, many, packed, stepped, stats, branch, branches)
        first = torch.arange(0, len(packed.x), branches, device=branch.device)
        _advance(state, stepped, first + branch, active)
        kept = tuple(field[first + branch] for field in (stats.token, stats.prob))
        finish_blocks(state, plan)
        # A step per mask, and one that finds nothing to change.
        left = (masks_left(state, plan.block) + 1).masked_fill(state.complete, 0)
        standing = torch.where(state.done, -1, left)
        counts = torch.stack((standing, self.budget.num_drafts(state, left))).int()
        return counts, state.call.runner.static_buffer("state.carried", kept)

    def settled(self, state: DraftedState) -> Tensor:
        return EditingDecoder(self.algorithm).settled(state)

    def _pack(self, state: DraftedState, plan: DraftedPlan, selection: Selection) -> DraftedState:
        """The state and drafts after it, side by side; they count the baseline's steps."""
        drafts = [replace(_copy(state), nfe=state.baseline_steps.clone())]
        if plan.branches > 1:
            token, prob = state.carried
            guess = ops.VocabStats(token, prob, prob, prob, prob)
            for _ in range(plan.branches - 1):
                drafts.append(_copy(drafts[-1]))
                edit(self.algorithm, drafts[-1], selection, plan.block.ends_from, guess)
        return _interleave(drafts)


def _copy(state: DraftedState) -> DraftedState:
    """One that a draft may write to."""
    names = ("x", "step_map", "nfe", "noise_offset", "post_steps", "complete")
    own: dict[str, Any] = {name: getattr(state, name).clone() for name in names}
    return replace(state, **own)


def _interleave(states: list[DraftedState]) -> DraftedState:
    """``State.interleave``, with what editing adds."""
    together: Any = State.interleave(list(states))
    for name in ("post_steps", "complete"):
        parts = torch.stack([getattr(state, name) for state in states], 1)
        setattr(together, name, parts.flatten())
    return together


def _accepted_prefix(packed: DraftedState, stepped: DraftedState, branches: int) -> Tensor:
    """Index ``(b,)`` of each sequence's last draft that is a state of the baseline."""
    agrees = torch.ones(len(packed.x), dtype=torch.bool, device=packed.x.device)
    agrees = agrees.view(-1, branches)[:, 1:]
    for name in ("x", "post_steps", "complete"):
        now, then = (getattr(s, name).unflatten(0, (-1, branches)) for s in (packed, stepped))
        same = now[:, 1:] == then[:, :-1]
        agrees = agrees & (same.all(-1) if same.ndim == 3 else same)
    return agrees.cumprod(1).sum(1)


def _advance(state: DraftedState, stepped: DraftedState, rows: Tensor, active: Tensor) -> None:
    """Make some rows of ``stepped`` the state; the current forward made what is new certain."""
    x, steps = stepped.x[rows], stepped.nfe[rows] - state.baseline_steps
    state.step_map.copy_(torch.where(state.x != x, state.nfe[:, None], state.step_map))
    state.accept_ema += (steps - state.accept_ema) * (active / 4)
    state.nfe += active
    state.x.copy_(x)
    for name in ("noise_offset", "post_steps", "complete"):
        getattr(state, name).copy_(getattr(stepped, name)[rows])
    state.baseline_steps.copy_(stepped.nfe[rows])


def _keep_logprobs(
    state: DraftedState,
    selection: Selection,
    packed: DraftedState,
    stepped: DraftedState,
    stats: ops.VocabStats,
    branch: Tensor,
    branches: int,
) -> None:
    """Take each position's log-probability from the last accepted step that wrote it."""
    if state.logprobs is None:
        return
    slots = state.x.shape[1]
    offset = torch.arange(slots, device=state.x.device) - selection.start[:, None]
    value = stats.prob.log().float().gather(1, offset.clamp(0, selection.width - 1).long())
    written = (packed.x != stepped.x).unflatten(0, (-1, branches))
    number = torch.arange(branches, device=branch.device)[None, :, None]
    last = torch.where(written & (number <= branch[:, None, None]), number, -1).amax(1)
    value = value.unflatten(0, (-1, branches)).gather(1, last.clamp(min=0)[:, None]).squeeze(1)
    state.logprobs.copy_(torch.where(last >= 0, value, state.logprobs))
