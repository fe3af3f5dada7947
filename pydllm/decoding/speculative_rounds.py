"""The rounds of ``SelfSpeculative``: what a draft forward and a verify forward are, and how one
forward can be both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pydllm import ops
from pydllm.decoding.autoregressive import (
    CursorPlan,
    CursorState,
    begin_at_prompt,
    commit_tokens,
    prompt_width,
    write_next,
)
from pydllm.decoding.call import Call
from pydllm.decoding.driver import POLL, Counts, Decoder
from pydllm.decoding.state import Selection, Window
from pydllm.decoding.step import forward, statistics


@dataclass
class SpeculativeState(CursorState):
    """Also the rounds so far, and the next drafts.

    Attributes:
        rounds: ``(b,)`` int32.
        guess: ``(b, drafts)`` int64, from the cursor on; the mask id where nothing is drafted.
    """

    rounds: Tensor
    guess: Tensor

    def counters(self) -> dict[str, Tensor]:
        return super().counters() | {"rounds": self.rounds}


@dataclass(frozen=True, kw_only=True)
class RoundPlan(CursorPlan):
    """Also which forwards the step has: a draft, a verification, leaves of one that is both."""

    drafts: bool
    verifies: bool
    leaves: bool = False


@dataclass(frozen=True, kw_only=True)
class SpeculativeDecoder(Decoder):
    """A draft forward and a verify forward per step; the first step forwards the prompt alone.

    The counts have another row, drafts of the next round; with a ``threshold`` a third, masks that
    are left of them.

    Attributes:
        drafts: at most, of a round.
        adapter: whether drafts use the model's draft adapter.
        threshold: drafts of at least this probability are kept, and the best one; the others are
            drafted again, before they are verified. None: one forward drafts all.
        aligned: whether a draft forward ends where a block of the model does.
        is_masked: whether the causal forward predicts a token at a mask, and not after a token.
    """

    opens_alone: ClassVar[bool] = True

    drafts: int
    adapter: bool
    threshold: float | None = None
    aligned: bool = False
    is_masked: bool = False

    def begin(self, call: Call, prompts: list[int]) -> tuple[SpeculativeState, None]:
        rounds = torch.zeros(len(prompts), dtype=torch.int32, device=call.device)
        guess = torch.full((len(prompts), self.drafts), call.mask_id, device=call.device)
        state = begin_at_prompt(SpeculativeState, call, prompts, rounds=rounds, guess=guess)
        return state, None

    def most_forwards(self, call: Call) -> int | None:
        if self.threshold is None:
            return None
        return 1 + (self.drafts + 1) * max(call.region_lengths)

    def plan(self, state: SpeculativeState, counts: Counts | None) -> RoundPlan:
        first, fixed = not any(state.forwards), state.call.runner.fixed_shapes
        if first:
            width = prompt_width(state)
        else:
            drafts = self.drafts if fixed or counts is None else max(counts[1])
            width = min(drafts + 1, state.call.max_len)
        poll = POLL if fixed and self.threshold is None else 1
        # Counts that are read now and then are not those of the last step.
        parts = self.parts(first, width, counts if poll == 1 else None)
        return RoundPlan(
            (first, width, *parts.values()), poll, is_first=first, width=width, **parts
        )

    def parts(self, first: bool, width: int, counts: Counts | None) -> dict[str, bool]:
        """Which forwards the next step has."""
        if self.threshold is None or counts is None or first:
            return {"drafts": width > 1, "verifies": True}
        # Sequences whose drafts are there wait for the others: a step is one forward.
        drafts = max(counts[2]) > 0
        return {"drafts": drafts, "verifies": not drafts}

    def step(self, state: SpeculativeState, plan: RoundPlan) -> tuple[Tensor, None]:
        if plan.is_first:
            self.first(state, plan)
        else:
            count = self.num_drafts(state, plan.width - 1)
            guess = None
            if plan.drafts:
                guess = self._draft(state, plan.width, count)
            if plan.verifies:
                self.verify(state, plan, count, guess)
        wanted = self.num_drafts(state, self.drafts)
        busy = -state.done.int()
        if self.threshold is None:
            return torch.stack((busy, wanted)), None
        left = self._left(state, wanted).sum(1, dtype=torch.int32)
        return torch.stack((busy + torch.where(left < wanted, left, 0), wanted, left)), None

    def first(self, state: SpeculativeState, plan: RoundPlan) -> None:
        """Forward the prompt and write the token that follows."""
        if not self.is_masked:
            write_next(state, first=True, width=plan.width)
            return
        length = state.cursor.masked_fill(state.done, 0)
        window = Window.make(
            torch.zeros_like(length), length, length, width=plan.width, commit=length
        )
        hidden = forward(state, window, attention="causal", leaves=1)
        live = (~state.done).int()
        row = torch.full_like(length, plan.width)
        commit_tokens(state, self.pick(state, hidden, row, live, 1), live)

    def verify(
        self, state: SpeculativeState, plan: RoundPlan, count: Tensor, guess: Tensor | None
    ) -> None:
        """Write what the causal forward picks, as far as the drafts before it are right.

        ``guess (b, width - 1)``: drafts of this step; None: the state's, if any.
        """
        width = plan.width
        guess = state.guess[:, : width - 1] if guess is None else guess
        window = self.verified(state, width, count)
        leaves, row = 0, torch.zeros_like(count)
        if self.is_masked:
            leaves, row = width, 2 * width - window.length
        placed = self.placed(state, guess, count)
        hidden = forward(placed, window, attention="causal", leaves=leaves)
        picks = self.pick(state, hidden, row, window.length, width)
        state.rounds += ~state.done
        commit_tokens(state, picks, run_length(guess, picks, window.length))
        if self.threshold is not None:
            state.guess.fill_(state.call.mask_id)

    def num_drafts(self, state: SpeculativeState, most: int) -> Tensor:
        """The verifier's own token fills the last place."""
        count = (state.end - state.cursor - 1).clamp(0, most).masked_fill(state.done, 0)
        if self.aligned:
            spec = state.call.model.spec
            size, last = spec.block_size or 1, state.cursor - 1
            first = state.prompt_length if spec.block_origin == "prompt" else 0
            count = torch.minimum(count, size - 1 - (last - first).remainder(size))
        return count

    def verified(self, state: SpeculativeState, width: int, count: Tensor) -> Window:
        """The last token and the drafts, which are stored."""
        last, length = state.cursor - 1, (count + 1).masked_fill(state.done, 0)
        return Window.make(last, length, last + length, width=width, commit=length)

    def pick(
        self, state: SpeculativeState, hidden: Tensor, row: Tensor, length: Tensor, width: int
    ) -> Tensor:
        """Tokens ``(b, width)`` from the cursor on, predicted by the rows from ``row (b,)`` on."""
        return self._statistics(state, hidden, row, length, width).token

    def placed(self, state: SpeculativeState, guess: Tensor, count: Tensor) -> SpeculativeState:
        """The state with the first ``count (b,)`` of ``guess (b, n)`` in place of masks."""
        offsets = torch.arange(guess.shape[1], device=guess.device)
        places = (state.cursor[:, None] + offsets).clamp(max=state.call.max_len - 1).long()
        kept = torch.where(offsets < count[:, None], guess, state.x.gather(1, places))
        return replace(state, x=state.x.scatter(1, places, kept))

    def _left(self, state: SpeculativeState, count: Tensor) -> Tensor:
        """``(b, drafts)`` which of the next drafts are masks."""
        offsets = torch.arange(self.drafts, device=count.device)
        return (state.guess == state.call.mask_id) & (offsets < count[:, None])

    def _statistics(
        self, state: SpeculativeState, hidden: Tensor, row: Tensor, length: Tensor, width: int
    ) -> ops.VocabStats:
        """Of rows as ``pick`` has them. A draft is drawn under the noise of the token that
        autoregressive decoding would write."""
        call, noise_offset = state.call, None
        first = state.cursor.clamp(max=call.max_len - 1)
        if state.draws:
            offsets = torch.arange(width, dtype=torch.int32, device=first.device)
            noise_offset = (state.cursor - state.prompt_length)[:, None] + offsets
        return statistics(
            state,
            hidden,
            first - row,
            Selection(first, length, width),
            suppress_ids=call.suppress_ids,
            noise_offset=noise_offset,
            shifted=False,
        )

    def _draft(self, state: SpeculativeState, width: int, count: Tensor) -> Tensor:
        """Predict the masks that are left of the next drafts, from the last token and all others.

        Every mask predicts its own position. Nothing is stored.
        """
        start, row = state.cursor - 1, torch.ones_like(count)
        length, drafted = count, replace(state, logprobs=None)
        if self.threshold is not None:
            length = torch.where(self._left(state, count).any(1), count, 0)
            drafted = self.placed(drafted, state.guess[:, : width - 1], count)
        shown = torch.where(length > 0, length + 1, 0)
        window = Window.make(start, shown, start + shown, width=width)
        hidden = forward(drafted, window, attention="full", adapter=self.adapter)
        stats = self._statistics(drafted, hidden, row, length, width - 1)
        if self.threshold is None:
            state.nfe += length > 0
            return stats.token
        guess = state.guess[:, : width - 1].contiguous()
        ops.unmask(
            guess,
            torch.zeros_like(guess, dtype=torch.int32),
            state.nfe,
            stats.token,
            stats.prob,
            mask_id=state.call.mask_id,
            start=torch.zeros_like(length),
            length=length,
            rule="threshold",
            threshold=self.threshold,
            backend=state.call.backend,
        )
        state.guess[:, : width - 1] = guess
        return guess


def run_length(guess: Tensor, picks: Tensor, length: Tensor) -> Tensor:
    """``(b,)`` how many of ``length (b,)`` picks ``(b, n + 1)`` are final: as many as there are
    right drafts ``guess (b, n)`` before the first wrong one, and one more."""
    width = picks.shape[1] - 1
    offsets = torch.arange(width, device=picks.device)
    right = (guess == picks[:, :width]) & (offsets < length[:, None] - 1)
    return torch.minimum(right.cumprod(1).sum(1, dtype=torch.int32) + 1, length)


@dataclass(frozen=True, kw_only=True)
class OneForwardDecoder(SpeculativeDecoder):
    """Rounds of one forward: it verifies the drafts and drafts the next round for every outcome.

    Each verified row has a leaf: masks that attend to the tokens up to that row and to each other.
    The next drafts are in the leaf of the last accepted row. The leaf's first mask is at the
    position of the verifier's own token and is not used.
    """

    def parts(self, first: bool, width: int, counts: Counts | None) -> dict[str, bool]:
        leaves = first or counts is None
        if counts is not None and not first:
            # Where every sequence has its last drafts, nothing is drafted any more.
            leaves = any(count > 1 or count == self.drafts for count in counts[1])
        return {"drafts": False, "verifies": True, "leaves": leaves}

    def first(self, state: SpeculativeState, plan: RoundPlan) -> None:
        length = state.cursor.masked_fill(state.done, 0)
        window = Window.make(
            torch.zeros_like(length), length, length, width=plan.width, commit=length
        )
        hidden, live = self._forward(state, window, 1), (~state.done).int()
        commit_tokens(state, self.pick(state, hidden, length - 1, live, 1), live)
        self._next_drafts(state, hidden, torch.full_like(length, plan.width + 1))

    def verify(
        self, state: SpeculativeState, plan: RoundPlan, count: Tensor, guess: Tensor | None
    ) -> None:
        width = plan.width
        guess = state.guess[:, : width - 1]
        window = self.verified(state, width, count)
        leaves = width if plan.leaves else 0
        hidden = self._forward(self.placed(state, guess, count), window, leaves)
        picks = self.pick(state, hidden, torch.zeros_like(count), window.length, width)
        final = run_length(guess, picks, window.length)
        state.rounds += ~state.done
        commit_tokens(state, picks, final)
        if leaves:
            leaf = final - 1 + width - window.length  # of the last accepted row
            self._next_drafts(state, hidden, width + leaf * (self.drafts + 1) + 1)

    def _forward(self, state: SpeculativeState, window: Window, leaves: int) -> Tensor:
        """The window, and leaves of masks: one more than there are drafts."""
        adapter = self.adapter and leaves > 0
        rows = self.drafts + 1
        return forward(
            state, window, attention="causal", adapter=adapter, leaves=leaves, leaf_rows=rows
        )

    def _next_drafts(self, state: SpeculativeState, hidden: Tensor, row: Tensor) -> None:
        """The rows from ``row (b,)`` on predict what follows the token that was written last."""
        count = self.num_drafts(state, self.drafts)
        drafted = replace(state, logprobs=None)
        state.guess.copy_(self.pick(drafted, hidden, row, count, self.drafts))
