"""Cases of a published loop: the original, our drop-in and the tests' restatement of it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pydllm._backend.errors import PydllmError
from tests.upstream.models import Trio
from tests.upstream.sources import Checkouts


class Result(NamedTuple):
    """Tokens ``(B, L)``, and the forwards where the original reports them."""

    tokens: Tensor
    forwards: int | None = None

    def equals(self, other: Result) -> bool:
        counts = (self.forwards, other.forwards)
        return torch.equal(self.tokens, other.tokens) and (None in counts or len(set(counts)) == 1)


@dataclass
class Case:
    """A model, a prompt ``(B, P)`` with its attention mask or None, and keyword arguments."""

    trio: Trio | None
    prompt: Tensor
    mask: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)
    told: str = ""  # how a report names the model


Run = Callable[[Case], Result]


class Loop(NamedTuple):
    """A published loop.

    Attributes:
        draw: makes a case from a source of random numbers.
        original, dropin, restated: run it; ``restated`` is None where there is no restatement.
            It returns None for a case that it does not cover.
    """

    draw: Callable[[random.Random], Case]
    original: Run
    dropin: Run
    restated: Callable[[Case], Result | None] | None = None


Loader = Callable[[Checkouts], dict[str, Loop]]


@dataclass
class Report:
    """What comparing a loop gave."""

    calls: int = 0
    equal: int = 0
    ties: int = 0  # the drop-in gives the original's result with weights changed by millionths
    failures: Counter[str] = field(default_factory=Counter)  # the original raised or did not end
    restated: int = 0
    restated_equal: int = 0
    differences: list[str] = field(default_factory=list)


def compare(loop: Loop, calls: int, seed: int = 0) -> Report:
    """Run ``calls`` cases. A failure of the original is no case; it is counted apart."""
    report = Report()
    number = -1
    while report.calls < calls and report.failures.total() <= 2 * calls:
        number += 1
        case = loop.draw(random.Random(1_000_003 * seed + number))
        torch.manual_seed(number)
        try:
            expected = loop.original(case)
        except Exception as error:  # what the published code raises
            report.failures[f"{type(error).__name__}: {error}"[:70]] += 1
            continue
        report.calls += 1
        torch.manual_seed(number)
        try:
            got = loop.dropin(case)
        except (PydllmError, ValueError) as error:
            report.differences.append(f"case {number}: {case.told} {case.options}: {error}")
            continue
        if got.equals(expected):
            report.equal += 1
        elif _is_tie(loop, case, number, expected):
            report.ties += 1
            continue
        else:
            report.differences.append(f"case {number}: {_difference(case, expected, got)}")
        if loop.restated is None:
            continue
        torch.manual_seed(number)
        stated = loop.restated(case)
        if stated is not None:
            report.restated += 1
            report.restated_equal += stated.equals(expected)
            if not stated.equals(expected):
                text = _difference(case, expected, stated)
                report.differences.append(f"case {number}, restated: {text}")
    return report


def _is_tie(loop: Loop, case: Case, number: int, expected: Result) -> bool:
    """Whether two scores agree to the rounding of the published modeling code, partly fp32."""
    if case.trio is None:
        return False
    for seed in range(12):
        torch.manual_seed(number)
        if loop.dropin(replace(case, trio=case.trio.nudged(seed))).equals(expected):
            return True
    return False


def _difference(case: Case, expected: Result, got: Result) -> str:
    told = f"{case.told} prompt {tuple(case.prompt.shape)} {case.options}: "
    if expected.tokens.shape != got.tokens.shape:
        return f"{told}shape {tuple(expected.tokens.shape)}, got {tuple(got.tokens.shape)}"
    places = int((expected.tokens != got.tokens).sum())
    return f"{told}{places} tokens differ, forwards {expected.forwards}, got {got.forwards}"
