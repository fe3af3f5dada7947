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
    """Also whether the step drafts and whether it verifies."""

    drafts: bool
    verifies: bool


@dataclass(frozen=True, kw_only=True)
class SpeculativeDecoder(Decoder):
    """A draft forward and a verify forward per step; the first step forwards the prompt alone.

    The counts have two more rows: drafts of the next round, and masks that are left of them.

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
        drafting, verifying = self._parts(first, width, counts)
        return RoundPlan(
            (first, width, drafting, verifying),
            POLL if fixed and self.threshold is None else 1,
            is_first=first,
            width=width,
            drafts=drafting,
            verifies=verifying,
        )

    def _parts(self, first: bool, width: int, counts: Counts | None) -> tuple[bool, bool]:
        """Whether the next step drafts, and whether it verifies."""
        if self.threshold is None or counts is None or first:
            return width > 1, True
        # Sequences whose drafts are there wait for the others: a step is one forward.
        return (True, False) if max(counts[2]) > 0 else (False, True)

    def step(self, state: SpeculativeState, plan: RoundPlan) -> tuple[Tensor, None]:
        if plan.is_first:
            self.first(state, plan)
        else:
            if plan.drafts:
                self._draft(state, plan.width)
            if plan.verifies:
                self.verify(state, plan)
        wanted = self.num_drafts(state)
        left = self._left(state, wanted).sum(1, dtype=torch.int32)
        busy = torch.where(left < wanted, left, 0).masked_fill(state.done, -1)
        return torch.stack((busy, wanted, left)), None

    def first(self, state: SpeculativeState, plan: RoundPlan) -> None:
        """Forward the prompt and write the token that follows."""
        length = state.cursor.masked_fill(state.done, 0)
        window = Window.make(
            torch.zeros_like(length), length, length, width=plan.width, commit=length
        )
        hidden = forward(state, window, attention="causal", leaves=int(self.is_masked))
        row = torch.full_like(length, plan.width) if self.is_masked else length - 1
        self._commit_picks(state, self.pick(state, hidden, row, (~state.done).int(), 1))

    def verify(self, state: SpeculativeState, plan: RoundPlan) -> None:
        """Write what the causal forward picks, as far as the drafts before it are right."""
        width = plan.width
        window, length = self.verified(state, width)
        hidden = forward(
            self.placed(state), window, attention="causal", leaves=width if self.is_masked else 0
        )
        row = 2 * width - length if self.is_masked else torch.zeros_like(length)
        picks = self.pick(state, hidden, row, length, width)
        self._commit_picks(state, picks, self.run_length(state, picks, length))

    def num_drafts(self, state: SpeculativeState, most: int | None = None) -> Tensor:
        """The verifier's own token fills the last place."""
        most = self.drafts if most is None else most
        count = (state.end - state.cursor - 1).clamp(0, most).masked_fill(state.done, 0)
        if self.aligned:
            spec = state.call.model.spec
            size, last = spec.block_size or 1, state.cursor - 1
            first = state.prompt_length if spec.block_origin == "prompt" else 0
            count = torch.minimum(count, size - 1 - (last - first).remainder(size))
        return count

    def verified(self, state: SpeculativeState, width: int) -> tuple[Window, Tensor]:
        """The last token and the drafts, which are stored."""
        last, count = state.cursor - 1, self.num_drafts(state, width - 1)
        length = (count + 1).masked_fill(state.done, 0)
        return Window.make(last, length, last + length, width=width, commit=length), length

    def pick(
        self, state: SpeculativeState, hidden: Tensor, row: Tensor, length: Tensor, width: int
    ) -> Tensor:
        """Tokens ``(b, width)`` from the cursor on, predicted by the rows from ``row (b,)`` on.

        A draft is drawn under the noise of the token that autoregressive decoding would write.
        """
        call, first = state.call, state.cursor.clamp(max=state.call.max_len - 1)
        offsets = torch.arange(width, dtype=torch.int32, device=first.device)
        return statistics(
            state,
            hidden,
            first - row,
            Selection(first, length, width),
            suppress_ids=call.suppress_ids,
            noise_offset=(state.cursor - state.prompt_length)[:, None] + offsets,
            shifted=False,
        ).token

    def placed(self, state: SpeculativeState) -> SpeculativeState:
        """The state with drafts in place of the next masks."""
        size = min(self.drafts, state.call.max_len)
        offsets = torch.arange(size, device=state.x.device)
        places = (state.cursor[:, None] + offsets).clamp(max=state.call.max_len - 1).long()
        inside = offsets < self.num_drafts(state)[:, None]
        kept = torch.where(inside, state.guess[:, :size], state.x.gather(1, places))
        return replace(state, x=state.x.scatter(1, places, kept))

    def run_length(self, state: SpeculativeState, picks: Tensor, length: Tensor) -> Tensor:
        """``(b,)`` picks that are final: those of right drafts and one more."""
        width = picks.shape[1] - 1
        offsets = torch.arange(width, device=picks.device)
        right = (state.guess[:, :width] == picks[:, :width]) & (offsets < length[:, None] - 1)
        run = right.cumprod(1).sum(1, dtype=torch.int32)
        return torch.minimum(run + 1, length)

    def _commit_picks(
        self, state: SpeculativeState, picks: Tensor, length: Tensor | None = None
    ) -> None:
        live = (~state.done).int()
        if length is not None:
            state.rounds += live
        commit_tokens(state, picks, live if length is None else length)
        state.guess.fill_(state.call.mask_id)

    def _left(self, state: SpeculativeState, count: Tensor) -> Tensor:
        """``(b, drafts)`` which of the next drafts are masks."""
        offsets = torch.arange(self.drafts, device=count.device)
        return (state.guess == state.call.mask_id) & (offsets < count[:, None])

    def _draft(self, state: SpeculativeState, width: int) -> None:
        """Predict the masks that are left of the next drafts, from the last token and all others.

        Every mask predicts its own position. Nothing is stored.
        """
        call, start = state.call, state.cursor - 1
        count = self.num_drafts(state, width - 1)
        open_ = self._left(state, count).any(1)
        shown = torch.where(open_, count + 1, 0)
        window = Window.make(start, shown, start + shown, width=width)
        drafted = replace(self.placed(state), logprobs=None)
        hidden = forward(drafted, window, attention="full", adapter=self.adapter)
        length = torch.where(open_, count, 0)
        first = state.cursor.clamp(max=call.max_len - 1)
        offsets = torch.arange(width - 1, dtype=torch.int32, device=start.device)
        stats = statistics(
            drafted,
            hidden,
            start,
            Selection(first, length, width - 1),
            suppress_ids=call.suppress_ids,
            noise_offset=(state.cursor - state.prompt_length)[:, None] + offsets,
            shifted=False,
        )
        guess = state.guess[:, : width - 1]
        if self.threshold is None:
            guess.copy_(stats.token)
            state.nfe += open_
            return
        kept = guess.contiguous()
        ops.unmask(
            kept,
            torch.zeros_like(kept, dtype=torch.int32),
            state.nfe,
            stats.token,
            stats.prob,
            mask_id=call.mask_id,
            start=torch.zeros_like(length),
            length=length,
            rule="threshold",
            threshold=self.threshold,
            backend=call.backend,
        )
        guess.copy_(kept)


@dataclass(frozen=True, kw_only=True)
class OneForwardDecoder(SpeculativeDecoder):
    """Rounds of one forward: it verifies the drafts and drafts the next round for every outcome.

    Behind each of the verified rows stands a leaf of masks, which see the tokens as far as that row
    and each other. The row that turns out to be the last right one has the next drafts in its leaf.
    The leaf's first mask stands where the verifier's own token goes and is not used.
    """

    def _parts(self, first: bool, width: int, counts: Counts | None) -> tuple[bool, bool]:
        if first or counts is None:
            return True, True
        # Where every sequence has its last drafts, nothing is drafted any more.
        return any(count == self.drafts or count > 1 for count in counts[1]), True

    def step(self, state: SpeculativeState, plan: RoundPlan) -> tuple[Tensor, None]:
        if plan.is_first:
            self.first(state, plan)
        else:
            self.verify(state, plan)
        busy = torch.zeros_like(state.nfe).masked_fill(state.done, -1)
        wanted = self.num_drafts(state)
        return torch.stack((busy, wanted, torch.zeros_like(wanted))), None

    def first(self, state: SpeculativeState, plan: RoundPlan) -> None:
        length = state.cursor.masked_fill(state.done, 0)
        window = Window.make(
            torch.zeros_like(length), length, length, width=plan.width, commit=length
        )
        hidden = self._forward(state, window, 1)
        self._commit_picks(state, self.pick(state, hidden, length - 1, (~state.done).int(), 1))
        self._next_drafts(state, hidden, torch.full_like(length, plan.width + 1))

    def verify(self, state: SpeculativeState, plan: RoundPlan) -> None:
        width = plan.width
        window, length = self.verified(state, width)
        leaves = width if plan.drafts else 0
        hidden = self._forward(self.placed(state), window, leaves)
        picks = self.pick(state, hidden, torch.zeros_like(length), length, width)
        final = self.run_length(state, picks, length)
        self._commit_picks(state, picks, final)
        if leaves:
            leaf = final - 1 + width - length  # behind the last row that was right
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
        count = self.num_drafts(state)
        drafted = replace(state, logprobs=None)
        state.guess.copy_(self.pick(drafted, hidden, row, count, self.drafts))
