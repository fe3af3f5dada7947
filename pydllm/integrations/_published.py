"""Published decoding loops on the driver: a schedule of forwards, a rule, a source of noise.

A published loop keeps one matrix of tokens, rows of equal length, prompts padded on the left; all
rows advance together until the loop ends.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pydllm import ops
from pydllm.decoding.call import Call
from pydllm.decoding.driver import Counts, Decoded, Decoder, Plan, drive
from pydllm.decoding.state import Selection, State, Window
from pydllm.decoding.step import forward, select_rows, statistics
from pydllm.integrations._arguments import draw_seed
from pydllm.models import Model


@dataclass(frozen=True, kw_only=True)
class Pass(Plan):
    """A forward of positions [start, stop) that decides positions [first, last).

    Attributes:
        seen: end of the positions that are seen; None: ``stop``.
        commit: positions from ``start`` on whose keys and values are written to the cache.
        quota: tokens to write per sequence, where the schedule says it.
        block: first position of the block, whose masks are counted; None: ``first``.
        number: passes of the block before this one.
    """

    key: Hashable = None
    start: int = 0
    stop: int
    first: int
    last: int
    seen: int | None = None
    commit: int = 0
    quota: int = 0
    block: int | None = None
    number: int = 0


@dataclass
class LoopState(State):
    """Also what the schedule needs.

    Attributes:
        pad: ``(b,)`` int32, positions of left padding, or None.
        schedule: the passes that are to come.
        left: masks per sequence before ``last`` after the last pass, on the host.
        block_left: those in the block.
    """

    pad: Tensor | None = None
    schedule: Iterator[Pass] = field(default_factory=lambda: iter(()), metadata={"rows": False})
    left: list[int] = field(default_factory=list, metadata={"rows": False})
    block_left: list[int] = field(default_factory=list, metadata={"rows": False})

    def masked(self, first: int, last: int) -> Tensor:
        return self.x[:, first:last] == self.call.mask_id

    def first_mask(self) -> int:
        """The first position at which a sequence has a mask, read on the host.

        Statistics are wanted from there on: on a GPU every position costs a row of the head.
        """
        return int(self.masked(0, self.x.shape[1]).any(0).int().argmax())


@dataclass(kw_only=True)
class PublishedLoop(Decoder):
    """A published loop in a call.

    Attributes:
        temperature: of the tokens.
        published: draw with torch's generator, in the original's order; otherwise tokens are drawn
            in the kernel, and the mask is never predicted.
        cached: keep keys and values.
        pad: ``(b,)`` int32, positions of left padding, or None.
        suppress: ids that are not predicted and count as impossible.
        seed: of the kernel's noise.
    """

    temperature: float = 0.0
    published: bool = True
    cached: bool = False
    pad: Tensor | None = None
    suppress: list[int] = field(default_factory=list)

    @abstractmethod
    def schedule(self, state: LoopState) -> Iterator[Pass]:
        """The passes, one at a time; ``state.left`` is what the pass before left."""

    def choose(self, state: LoopState, plan: Pass, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of [first, last) and which of them are written, ``(b, S)`` each."""
        raise NotImplementedError

    def wrote(self, state: LoopState, plan: Pass) -> None:
        """After tokens are written."""

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn by torch."""
        return self.published and self.temperature > 0

    def run(self, model: Model, prompt: Tensor, new: int, backend: str | None) -> Decoded:
        """Decode ``new`` masks after each row of ``prompt (B, P)``."""
        mask_id = model.spec.mask_id or 0
        if not self.published:
            self.suppress = [*self.suppress, mask_id]
        batch, length = prompt.shape

        def each(number: int) -> Tensor:
            return torch.full((batch,), number, dtype=torch.int32, device=prompt.device)

        call = Call(
            model=model,
            mask_id=mask_id,
            x=torch.cat((prompt, prompt.new_full((batch, new), mask_id)), 1),
            prompt_length=each(length),
            end=each(length + new),
            request_id=torch.arange(batch, dtype=torch.int32, device=prompt.device),
            temperature=0.0 if self.draws else self.temperature,
            seed=0 if self.published else draw_seed(),
            backend=backend,
            eos=None,
            suppress_ids=_ids(self.suppress, prompt.device),
            prompt_lengths=[length] * batch,
            ends=[length + new] * batch,
        )
        decoded = drive(self, call)
        if decoded.interrupted:  # as the original would be
            raise KeyboardInterrupt
        return decoded

    def begin(self, call: Call, prompts: list[int]) -> tuple[LoopState, Tensor]:
        slots = call.max_len if self.cached else 0
        cache = call.runner.cache("cache", call.model, len(prompts), slots)
        state = LoopState.begin(call, prompts, cache, pad=self.pad)
        state.schedule = self.schedule(state)
        return state, torch.ones(3, len(prompts), dtype=torch.int32, device=call.device)

    def plan(self, state: LoopState, counts: Counts | None) -> Pass | None:
        if counts is not None:
            state.left, state.block_left = counts[1], counts[2]
        return next(state.schedule, None)

    def step(self, state: LoopState, plan: Pass) -> tuple[Tensor, Any]:
        hidden = self.forward(state, plan)
        token, chosen = self.choose(state, plan, hidden)
        window = state.x[:, plan.first : plan.last]
        window.copy_(torch.where(chosen, token, window))
        self.wrote(state, plan)
        state.nfe += 1
        block = plan.first if plan.block is None else plan.block
        left, in_block = (
            state.masked(first, plan.last).sum(1, dtype=torch.int32) for first in (0, block)
        )
        # Above 0: sequences do not leave one by one.
        return torch.stack((torch.ones_like(left), left, in_block)), None

    def window(self, state: State, plan: Pass) -> Window:
        """The plan's positions, of every sequence."""
        width = plan.stop - plan.start
        ends = (plan.start, width, plan.stop if plan.seen is None else plan.seen, plan.commit)
        start, length, kv_len, commit = (
            torch.full_like(state.x[:, 0], n, dtype=torch.int32) for n in ends
        )
        return Window.make(start, length, kv_len, width=width, commit=commit)

    def forward(self, state: State, plan: Pass, **options: Any) -> Tensor:
        """Hidden rows ``(b, stop - start, hidden)``; options of ``decoding.step.forward``."""
        return forward(state, self.window(state, plan), **{"pad": self.pad, **options})

    def logits(
        self, state: State, plan: Pass, hidden: Tensor, span: tuple[int, int] | None = None
    ) -> Tensor:
        """Logits ``(b, S, V)`` of the positions [first, last) of ``span``, or the plan's."""
        start, selection = _span(hidden, plan.start, *(span or (plan.first, plan.last)))
        model = state.call.model
        logits = model.head(select_rows(model, hidden, start, selection))
        if self.suppress:
            logits[..., self.suppress] = -torch.inf
        return logits

    def stats(
        self, state: State, plan: Pass, hidden: Tensor, *, suppress: tuple = (), **options: Any
    ) -> ops.VocabStats:
        """Statistics ``(b, S)`` of [first, last); on a CPU those of masks alone."""
        start, selection = _span(hidden, plan.start, plan.first, plan.last)
        ids = state.call.suppress_ids
        if suppress:
            ids = _ids([*self.suppress, *suppress], hidden.device)
        return statistics(
            state, hidden, start, selection, suppress_ids=ids, noise_offset=state.nfe, **options
        )


def _ids(ids: list[int], device: torch.device) -> Tensor | None:
    """Ascending, as the ops take them."""
    return torch.tensor(sorted(set(ids)), dtype=torch.int32, device=device) if ids else None


def _span(hidden: Tensor, start: int, first: int, last: int) -> tuple[Tensor, Selection]:
    windows, begin, length = (
        torch.full((len(hidden),), n, dtype=torch.int32, device=hidden.device)
        for n in (start, first, last - first)
    )
    return windows, Selection(begin, length, last - first)


def spread(count: int, steps: int) -> list[int]:
    """Tokens over steps, the remainder first."""
    return [count // steps + (step < count % steps) for step in range(steps)]
