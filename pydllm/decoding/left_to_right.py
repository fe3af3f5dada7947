"""Decoding from left to right, the baseline of adaptive parallel decoding (arXiv 2506.00413)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pydllm._checks import check_each, check_int, each
from pydllm.decoding.apd import (
    expect_full,
    expect_one_nucleus,
    expect_reach,
    per_prompt,
)
from pydllm.decoding.arguments import expect_nucleus
from pydllm.decoding.call import Call
from pydllm.decoding.driver import Algorithm
from pydllm.decoding.rounds import DraftVerifyDecoder
from pydllm.models import Model


@dataclass(frozen=True, kw_only=True)
class LeftToRight(Algorithm):
    """A fixed number of tokens per forward, from left to right: the baseline of arXiv 2506.00413.

    Equal to ``APD`` with mixture 1 that accepts at most ``tokens_per_step`` drafts a round, under
    the same noise.

    Attributes:
        tokens_per_step: K, tokens written a forward, at most ``lookahead``. The LM head is
            evaluated at these positions alone.
        window, lookahead, top_p: as in ``APD``; by default everything is computed anew and all
            masks are shown.
    """

    takes_top_k: ClassVar[bool] = False
    has_logprobs: ClassVar[bool] = False

    tokens_per_step: int = 1
    window: int | None | Sequence[int | None] = None
    lookahead: int | None | Sequence[int | None] = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        check_int("tokens_per_step", self.tokens_per_step, 1)
        check_each("window", self.window, expect_reach)
        check_each("lookahead", self.lookahead, expect_reach)
        expect_nucleus("top_p", self.top_p)
        least = min((value for value in each(self.lookahead) if value is not None), default=None)
        if least is not None and least < self.tokens_per_step:
            raise ValueError(
                f"lookahead: expected at least the {self.tokens_per_step} tokens_per_step, "
                f"got {least}"
            )

    def check(self, model: Model, max_new_tokens: int) -> None:
        expect_full(self, model)

    def decoder(self, call: Call) -> DraftVerifyDecoder:
        expect_one_nucleus(self.top_p, call)
        count = len(call.prompt_lengths)
        return DraftVerifyDecoder(
            None,
            [1.0] * count,
            per_prompt("window", self.window, count),
            per_prompt("lookahead", self.lookahead, count),
            limit=self.tokens_per_step,
            top_p=self.top_p,
        )
