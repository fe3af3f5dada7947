"""Self-speculation: a model drafts by diffusion and verifies autoregressively, on one cache.

A round is two forwards of the same weights. The draft forward sees the last token and masks after
it, all of each other, and stores nothing; every mask predicts its own position. The verify forward
is causal over the drafts and stores its rows: what it picks is what autoregressive decoding would
pick, as long as the drafts before it are right. Its picks are written, never the drafts, so the
answer is ``Autoregressive``'s token by token at every temperature, whatever the drafts: they draw
under the noise of the same position, and a bad draft costs speed alone. Rows stored for wrong
drafts are overwritten by the next round, which begins there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pydllm._checks import check_bool, check_int
from pydllm.decoding.autoregressive import (
    CursorPlan,
    CursorState,
    begin_at_prompt,
    commit_tokens,
    prompt_width,
    write_next,
)
from pydllm.decoding.call import Call
from pydllm.decoding.driver import POLL, Algorithm, Counts, Decoder
from pydllm.decoding.state import Selection, Window
from pydllm.decoding.step import forward, statistics
from pydllm.models import Model


@dataclass(frozen=True, kw_only=True)
class SelfSpeculative(Algorithm):
    """The tokens of ``Autoregressive`` in fewer forwards, drafted by the model's own diffusion.

    For models that were trained both ways, whose causal forward predicts the next token
    (``ModelSpec.causal == "shifted"``), such as Nemotron-Labs-Diffusion.

    Attributes:
        drafts: masks that a round drafts, at least 1; a round writes up to one token more.
        adapter: draft with the model's draft adapter, where it has one.

    ``Generation.nfe`` counts both forwards of a round, ``Generation.rounds`` rounds.
    """

    drafts: int = 31
    adapter: bool = True

    def __post_init__(self) -> None:
        check_int("drafts", self.drafts, 1)
        check_bool("adapter", self.adapter)

    def check(self, model: Model, max_new_tokens: int) -> None:
        spec = model.spec
        if spec.causal != "shifted" or spec.attention == "causal":
            raise ValueError(
                "SelfSpeculative: expected a diffusion model whose causal forward predicts the "
                f"next token (causal='shifted'), got {spec.attention!r} attention with "
                f"causal={spec.causal!r}"
            )

    def decoder(self, call: Call) -> SelfSpeculativeDecoder:
        adapted = self.adapter and getattr(call.model, "has_draft_adapter", False)
        return SelfSpeculativeDecoder(self.drafts, adapted)


@dataclass
class SpeculativeState(CursorState):
    """Also ``rounds (b,)`` int32, of a draft and a verification."""

    rounds: Tensor

    def counters(self) -> dict[str, Tensor]:
        return super().counters() | {"rounds": self.rounds}


@dataclass(frozen=True)
class SelfSpeculativeDecoder(Decoder):
    """A draft forward and a verify forward per step; the first step forwards the prompt alone.

    The counts have a second row: the drafts of the next round.
    """

    drafts: int
    adapter: bool
    opens_alone: ClassVar[bool] = True

    def begin(self, call: Call, prompts: list[int]) -> tuple[SpeculativeState, None]:
        rounds = torch.zeros(len(prompts), dtype=torch.int32, device=call.device)
        return begin_at_prompt(SpeculativeState, call, prompts, rounds=rounds), None

    def plan(self, state: SpeculativeState, counts: Counts | None) -> CursorPlan:
        first, fixed = not any(state.forwards), state.call.runner.fixed_shapes
        if first:
            width = prompt_width(state)
        else:
            drafts = self.drafts if fixed or counts is None else max(counts[1])
            width = min(drafts + 1, state.call.max_len)
        poll = POLL if fixed else 1
        return CursorPlan((first, width), poll, is_first=first, width=width)

    def step(self, state: SpeculativeState, plan: CursorPlan) -> tuple[Tensor, None]:
        if plan.is_first:
            write_next(state, first=True, width=plan.width)
        else:
            self._round(state, plan.width)
        wanted = self._num_drafts(state, self.drafts)
        return torch.stack((-state.done.int(), wanted)), None

    def _num_drafts(self, state: SpeculativeState, most: int) -> Tensor:
        """The verifier's own token fills the last place."""
        return (state.end - state.cursor - 1).clamp(0, most).masked_fill(state.done, 0)

    def _round(self, state: SpeculativeState, width: int) -> None:
        call, cursor = state.call, state.cursor
        count, last = self._num_drafts(state, width - 1), cursor - 1
        shown = torch.where(count > 0, count + 1, 0)
        verified = (count + 1).masked_fill(state.done, 0)
        x = state.x
        if width > 1:
            x = self._draft(state, shown, count, width)
        guess = x.gather(1, self._places(state, width - 1))
        window = Window.make(last, verified, last + verified, width=width, commit=verified)
        hidden = forward(replace(state, x=x), window, attention="causal")
        first = cursor.clamp(max=call.max_len - 1)
        picks = statistics(
            state,
            hidden,
            last,
            Selection(first, verified, width),
            suppress_ids=call.suppress_ids,
            noise_offset=self._offsets(state, width),
            shifted=True,
        ).token
        offsets = torch.arange(width - 1, device=x.device)
        right = (guess == picks[:, : width - 1]) & (offsets < count[:, None])
        run = right.cumprod(1).sum(1, dtype=torch.int32)
        state.nfe += count > 0
        state.rounds += ~state.done
        commit_tokens(state, picks, (run + 1).masked_fill(state.done, 0))

    def _draft(self, state: SpeculativeState, shown: Tensor, count: Tensor, width: int) -> Tensor:
        """``x`` with drafts in place of the next masks."""
        call, start = state.call, state.cursor - 1
        window = Window.make(start, shown, start + shown, width=width)
        hidden = forward(state, window, attention="full", adapter=self.adapter)
        drafts = statistics(
            state,
            hidden,
            start,
            Selection(state.cursor.clamp(max=call.max_len - 1), count, width - 1),
            suppress_ids=call.suppress_ids,
            noise_offset=self._offsets(state, width - 1),
            shifted=False,
        ).token
        places = self._places(state, width - 1)
        offsets = torch.arange(width - 1, device=places.device)
        kept = torch.where(offsets < count[:, None], drafts, state.x.gather(1, places))
        return state.x.scatter(1, places, kept)

    @staticmethod
    def _places(state: SpeculativeState, width: int) -> Tensor:
        """The positions from the cursor on, ``(b, width)`` int64, those past the end repeated."""
        offsets = torch.arange(width, device=state.x.device)
        return (state.cursor[:, None] + offsets).clamp(max=state.call.max_len - 1).long()

    @staticmethod
    def _offsets(state: SpeculativeState, width: int) -> Tensor:
        """Tokens written before each position from the cursor on, ``(b, width)`` int32."""
        offsets = torch.arange(width, dtype=torch.int32, device=state.x.device)
        return (state.cursor - state.prompt_length)[:, None] + offsets
