"""One token per forward, from left to right: what every parallel algorithm is compared with."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from pydllm.decoding.blocks import BlockState
from pydllm.decoding.blockwise import BlockwiseDecoder
from pydllm.decoding.call import Call
from pydllm.decoding.driver import POLL, Algorithm, Counts, Decoder, Plan
from pydllm.decoding.state import Selection, State, Window
from pydllm.decoding.static import Static
from pydllm.decoding.step import busy, forward, statistics, write_run
from pydllm.models import Model
from pydllm.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Autoregressive(Algorithm):
    """One token per forward, each given all tokens before it and nothing else.

    For causal models, and for diffusion models that were trained to be read causally
    (``ModelSpec.causal``): ``"shifted"``, a causal forward whose row i predicts token i + 1, or
    ``"masked"``, the block-causal forward with blocks of one token.
    """

    needs_mask: ClassVar[bool] = False

    def check(self, model: Model, max_new_tokens: int) -> None:
        expect_causal("Autoregressive", model.spec)

    def decoder(self, call: Call) -> Decoder:
        if call.model.spec.causal == "masked":
            return _MaskedDecoder(Static(block_length=1))
        expect_prompts(call)
        return AutoregressiveDecoder()


def expect_causal(name: str, spec: ModelSpec) -> None:
    if spec.attention != "causal" and spec.causal is None:
        raise ValueError(
            f"{name}: expected a causal model, or one that can be read causally "
            f"(pydllm.load(..., causal='shifted' or 'masked')), got {spec.attention!r} attention"
        )


def expect_prompts(call: Call) -> None:
    """The first token is predicted from the one before it."""
    if 0 in call.prompt_lengths:
        row = list(call.prompt_lengths).index(0)
        raise ValueError(
            f"prompts[{row}]: expected at least one token (position i is predicted from i - 1), "
            "got none"
        )


class _MaskedDecoder(BlockwiseDecoder):
    """Blocks of one token, whatever the model's own."""

    def begin(self, call: Call, prompts: list[int]) -> tuple[BlockState, None]:
        model = copy.copy(call.model)
        model.spec = replace(model.spec, attention="block_causal", block_size=1)
        return super().begin(replace(call, model=model), prompts)


@dataclass
class CursorState(State):
    """Also ``cursor (b,)`` int32, the first position without a token."""

    cursor: Tensor


Cursor = TypeVar("Cursor", bound=CursorState)


@dataclass(frozen=True, kw_only=True)
class CursorPlan(Plan):
    """A forward of ``width`` rows, which begins with the prompt or with the last token."""

    is_first: bool
    width: int


class AutoregressiveDecoder(Decoder):
    """A causal forward of the last token, whose row predicts the next."""

    opens_alone: ClassVar[bool] = True

    def begin(self, call: Call, prompts: list[int]) -> tuple[CursorState, None]:
        return begin_at_prompt(CursorState, call, prompts), None

    def plan(self, state: CursorState, counts: Counts | None) -> CursorPlan:
        first, fixed = not any(state.forwards), state.call.runner.fixed_shapes
        width = prompt_width(state) if first else 1
        poll = POLL if fixed else 1
        return CursorPlan((first, width), poll, is_first=first, width=width)

    def step(self, state: CursorState, plan: CursorPlan) -> tuple[Tensor, None]:
        write_next(state, first=plan.is_first, width=plan.width)
        return busy(state, torch.zeros_like(state.nfe)), None


def begin_at_prompt(kind: type[Cursor], call: Call, prompts: list[int], **extra: Tensor) -> Cursor:
    """The state before the first forward, the prompt's."""
    cache = call.runner.cache("cache", call.model, len(prompts), call.max_len)
    zero = torch.zeros(len(prompts), dtype=torch.int32, device=call.device)
    state = kind.begin(call, prompts, cache, cursor=zero, **extra)
    state.cursor.copy_(torch.where(state.done, state.end, state.prompt_length))
    return state


def prompt_width(state: State) -> int:
    """Rows of a forward of the longest prompt."""
    call = state.call
    longest = max(call.prompt_lengths[prompt] for prompt in state.live_prompts)
    return call.runner.width(longest, call.max_len)


def write_next(state: CursorState, *, first: bool, width: int) -> None:
    """Forward the prompt, or the last token, and write the token that follows."""
    call, cursor, one = state.call, state.cursor, torch.ones_like(state.cursor)
    start = torch.zeros_like(cursor) if first else cursor - 1
    length = (cursor - start).masked_fill(state.done, 0)
    window = Window.make(start, length, start + length, width=width, commit=length)
    hidden = forward(state, window, attention="causal")
    # A sequence that is done has no next position.
    selection = Selection(cursor.clamp(max=call.max_len - 1), one.masked_fill(state.done, 0), 1)
    stats = statistics(
        state, hidden, start, selection, suppress_ids=call.suppress_ids, shifted=True
    )
    commit_tokens(state, stats.token, selection.length)


def commit_tokens(state: CursorState, token: Tensor, length: Tensor) -> None:
    """Write the first ``length (b,)`` of ``token (b, S)`` at the cursor, as far as an EOS."""
    state.noise_offset += write_run(state, token, state.cursor, length).accepted
    state.cursor.copy_(torch.where(state.done, state.end, state.cursor + length))
