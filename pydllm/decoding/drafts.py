"""What FreeDave's two modes share: how many candidates to verify, making them, judging them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from pydllm import ops
from pydllm.decoding.blockwise import BlockwiseAlgorithm
from pydllm.decoding.graph import Runner, power_of_two
from pydllm.decoding.state import Selection, State
from pydllm.decoding.step import Accept, write

MOST = 32
# Rows of one forward up to which more rows cost little: below them a bf16 forward on current GPUs
# reads weights longer than it computes (989 TFLOP/s over 3.35 TB/s is about 295 rows).
ROW_BUDGET = 256


# What the next round needs of the last: the drafter's own, in the runner's buffers.
Carried = tuple[Any, ...] | None


class DraftState(Protocol):
    """Fields that the states of both modes have.

    Attributes:
        baseline_steps: ``(b,)`` int32, steps of the baseline taken so far.
        accept_ema: ``(b,)`` fp32, exponential moving average (weight 1/4) of accepted baseline
            steps per forward.
    """

    baseline_steps: Tensor
    accept_ema: Tensor
    carried: Carried


def draft_fields(batch: int, device: torch.device) -> dict[str, Any]:
    """``DraftState`` before the first forward."""
    return {
        "baseline_steps": torch.zeros(batch, dtype=torch.int32, device=device),
        "accept_ema": torch.full((batch,), 2.0, device=device),
    }


@dataclass(frozen=True)
class DraftBudget:
    """How many candidates a forward verifies, and under which noise.

    A fixed number; or with ``adaptive`` what each sequence asks for, and of that the most that the
    row budget allows: candidates are packed, so all sequences of a batch have equally many. A
    sequence asks for twice its mean number of accepted steps, which exceeds 86 % of the runs if
    steps fail independently, and never for more steps than it has masks.
    """

    most: int
    adaptive: bool
    fresh_noise: bool

    def num_drafts(self, state: Any, masks: Tensor) -> Tensor:
        """Candidates ``(b,)`` int32, at least 1 where there are masks, else 0."""
        if not self.adaptive:
            return torch.minimum(masks, torch.full_like(masks, self.most))
        return torch.minimum((2 * state.accept_ema).ceil().int().clamp(1, self.most), masks)

    def ahead(self, branches: int) -> int:
        """Steps that the next forward may verify, after one of ``branches`` candidates."""
        return min(self.most, max(4, 2 * branches)) if self.adaptive else self.most

    def noise_offset(self, state: State, branches: int) -> Tensor | None:
        """The last word of the noise key of each candidate: by default that of static decoding."""
        if not self.fresh_noise:
            return None
        branch = torch.arange(branches, dtype=torch.int32, device=state.nfe.device)
        return (state.nfe[:, None] * MOST + branch).flatten()

    def branches(self, wanted: int, rows: int, runner: Runner) -> int:
        """Candidates where the most that is asked for is ``wanted``; one candidate of all
        sequences has ``rows`` rows."""
        if self.adaptive:
            wanted = min(wanted, max(1, ROW_BUDGET // max(rows, 1)))
        branches = max(1, min(wanted, self.most))
        return min(power_of_two(branches), self.most) if runner.fixed_shapes else branches


class Verified(NamedTuple):
    """What a round came to, ``(b,)`` int32 each."""

    branch: Tensor  # the last accepted candidate
    complete: Tensor  # positions of complete blocks at the start of the window


class RuleDrafter:
    """Candidates and steps by the baseline's own rule (``ops.unmask``): for every baseline.

    A candidate's state counts the baseline's steps in ``nfe``, because a random order is keyed by
    them; the state that is decoded counts forwards there, and the steps in ``baseline_steps``.

    Args:
        block_size: of a window of several blocks, otherwise None.
        width: positions of the widest window of such blocks.
    """

    def __init__(
        self,
        accept: Accept,
        budget: DraftBudget,
        block_size: int | None = None,
        width: int | None = None,
    ) -> None:
        self._accept, self._size, self._width = accept, block_size, width

    def begin(
        self, state: Any, stats: ops.VocabStats, known: Selection, first: Selection, accept: Accept
    ) -> Carried:
        """After a forward of the state alone: the step ``accept`` in the rows ``first``."""
        reached = _at_baseline_step(state)
        write(reached, _columns(stats, first.width), first, accept)
        _advance(state, reached)
        return self._carry(state, stats, known)

    def pack(self, state: Any, branches: int) -> State:
        """Candidates, side by side; the first is the state."""
        drafts = [_at_baseline_step(state)]
        for _ in range(branches - 1):
            drafts.append(replace(drafts[-1].candidate(), nfe=drafts[-1].nfe.clone()))
            self._step(drafts[-1], *state.carried)
        return State.interleave(drafts)

    def follow(
        self, state: Any, packed: State, stats: ops.VocabStats, known: Selection, branches: int
    ) -> tuple[Verified, Carried]:
        """Accept the longest prefix of candidates and take the step after it."""
        stepped = packed.candidate()
        self._step(stepped, stats, known.repeat(branches))
        branch = accepted_prefix(packed.x, stepped.x, branches)
        chosen = torch.arange(len(branch), device=branch.device) * branches + branch
        keep_logprobs(state, packed, branch, branches)
        complete = self._complete(state, packed.x[chosen], known)
        _advance(state, stepped, chosen)
        carried = self._carry(state, ops.VocabStats(*(field[chosen] for field in stats)), known)
        return Verified(branch.int(), complete), carried

    def _carry(self, state: Any, stats: ops.VocabStats, known: Selection) -> Carried:
        # One width for all rounds, so that a recorded round finds it where the last one left it.
        if self._width is not None:
            beyond = (0, self._width - known.width)
            stats = ops.VocabStats(*(F.pad(field, beyond) for field in stats))
            known = replace(known, width=self._width)
        return state.call.runner.static_buffer("state.carried", (stats, known))

    def _step(self, state: State, stats: ops.VocabStats, known: Selection) -> None:
        """One step; of several blocks in the first with masks, if its statistics are known."""
        if self._size is None:
            write(state, stats, known, self._accept)
            return
        offsets = torch.arange(known.width, device=state.x.device)
        at = (known.start[:, None] + offsets).clamp(max=state.x.shape[1] - 1)
        masked = state.x.gather(1, at.long()).eq(state.call.mask_id)
        masked &= offsets < known.length[:, None]
        first = masked.int().argmax(1) // self._size * self._size
        index = first[:, None] + torch.arange(self._size, device=offsets.device)
        index = index.clamp(max=known.width - 1)
        block = ops.VocabStats(*(field.gather(1, index) for field in stats))
        length, start = masked.any(1).int() * self._size, known.start + first.int()
        write(state, block, Selection(start, length, self._size), self._accept)

    def _complete(self, state: State, x: Tensor, known: Selection) -> Tensor:
        if self._size is None:
            return torch.zeros_like(known.start)
        position = torch.arange(x.shape[1], device=x.device)
        masked = x.eq(state.call.mask_id) & (position >= known.start[:, None])
        first = torch.where(masked, position, x.shape[1]).amin(1) // self._size * self._size
        return torch.minimum(first - known.start, known.length).int()


class FusedDrafter:
    """The same by ``ops.draft`` and ``ops.verify``, for one token per step in an order by score."""

    def __init__(
        self,
        accept: Accept,
        budget: DraftBudget,
        block_size: int | None = None,
        width: int | None = None,
    ) -> None:
        self._accept, self._size, self._most = accept, block_size, budget.most

    def begin(
        self, state: Any, stats: ops.VocabStats, known: Selection, first: Selection, accept: Accept
    ) -> Carried:
        """As ``RuleDrafter.begin``."""
        unmasked = write(state, _columns(stats, first.width), first, accept)
        state.baseline_steps += unmasked.accepted
        candidates = ops.draft(
            state.x,
            stats.token,
            self._score(stats),
            mask_id=state.call.mask_id,
            start=known.start,
            length=known.length,
            branches=self._most,
            block_size=self._size,
            backend=state.call.backend,
        )
        return self._carry(state, candidates)

    def pack(self, state: Any, branches: int) -> State:
        """As ``RuleDrafter.pack``; only what a forward and its statistics need is repeated."""
        number = torch.arange(branches, dtype=torch.int32, device=state.x.device)
        logprobs = state.logprobs
        # One candidate of several is a view with gaps, which verify does not take.
        x = state.carried[0][:, :branches].flatten(0, 1).contiguous()
        return replace(
            state.candidate(),
            x=x,
            noise_offset=(state.noise_offset[:, None] + number).flatten(),
            request_id=state.request_id.repeat_interleave(branches),
            logprobs=None if logprobs is None else logprobs.repeat_interleave(branches, 0),
            **state.sampling(branches),
        )

    def follow(
        self, state: Any, packed: State, stats: ops.VocabStats, known: Selection, branches: int
    ) -> tuple[Verified, Carried]:
        """As ``RuleDrafter.follow``."""
        token, score, x = (
            t.unflatten(0, (-1, branches)) for t in (stats.token, self._score(stats), packed.x)
        )
        before = state.nfe.clone()
        done = ops.verify(
            state.x,
            state.step_map,
            state.nfe,
            x,
            token,
            score,
            mask_id=state.call.mask_id,
            start=known.start,
            length=known.length,
            drafts=self._most,
            block_size=self._size,
            backend=state.call.backend,
        )
        keep_logprobs(state, packed, done.branch, branches)
        state.noise_offset += done.accepted
        state.baseline_steps += done.accepted
        state.accept_ema += (done.accepted - state.accept_ema) * ((state.nfe > before) / 4)
        return Verified(done.branch, done.complete), self._carry(state, done.candidates)

    def _carry(self, state: Any, candidates: Tensor) -> Carried:
        return state.call.runner.static_buffer("state.carried", (candidates,))

    def _score(self, stats: ops.VocabStats) -> Tensor:
        score, rule = self._accept(stats)
        return torch.zeros_like(score) if rule["rule"] == "left_to_right" else score


Drafter = RuleDrafter | FusedDrafter


def accepted_prefix(packed: Tensor, stepped: Tensor, branches: int) -> Tensor:
    """Index ``(b,)`` of each sequence's last candidate that is a state of the baseline.

    Candidate 0 is one; candidate j + 1 is if candidate j is and the baseline steps from j to j + 1.
    """
    now, then = (x.unflatten(0, (-1, branches)) for x in (packed, stepped))
    agrees = (then[:, :-1] == now[:, 1:]).all(-1)
    return agrees.cumprod(1).sum(1)


def keep_logprobs(state: Any, packed: State, branch: Tensor, branches: int) -> None:
    """Take each position's log-probability from the last accepted candidate that it is masked in:
    the next one, or the step after the last, has its token.
    """
    if state.logprobs is None or packed.logprobs is None:
        return
    x, values = (t.unflatten(0, (-1, branches)) for t in (packed.x, packed.logprobs))
    number = torch.arange(branches, device=x.device)[None, :, None]
    masked = (x == state.call.mask_id) & (number <= branch[:, None, None])
    last = (masked.sum(1, keepdim=True) - 1).clamp(min=0)
    state.logprobs.copy_(
        torch.where(masked[:, 0], values.gather(1, last).squeeze(1), state.logprobs)
    )


def is_fused(baseline: BlockwiseAlgorithm) -> bool:
    """Whether a step of the baseline is what ``ops.draft`` and ``ops.verify`` compute."""
    return baseline.takes_one_by_score and baseline.block_length <= _FUSED_BLOCK


# The ops rank 128 positions, and a pipelined window has a block more than its drafts.
_FUSED_BLOCK = 64


def _at_baseline_step(state: Any) -> State:
    return replace(state.candidate(), nfe=state.baseline_steps.clone())


def _advance(state: Any, reached: State, rows: Tensor | None = None) -> None:
    """Make ``reached``, or some of its rows, the state; the current forward made what is new in it
    certain."""
    x, nfe, noise_offset = (
        t if rows is None else t[rows] for t in (reached.x, reached.nfe, reached.noise_offset)
    )
    new, steps = state.x != x, nfe - state.baseline_steps
    state.step_map.copy_(torch.where(new, state.nfe[:, None], state.step_map))
    state.accept_ema += (steps - state.accept_ema) * ((steps > 0) / 4)
    state.nfe += steps > 0
    state.x.copy_(x)
    state.noise_offset.copy_(noise_offset)
    state.baseline_steps.copy_(nfe)


def _columns(stats: ops.VocabStats, count: int) -> ops.VocabStats:
    return ops.VocabStats(*(field[:, :count] for field in stats))
