"""Block-wise decoding: the baselines of the field, one frozen dataclass each.

All of them fill one block after another, each block step by step; they differ in which positions
a step writes. Blocks start at the end of the prompt, those of a block-causal model at multiples of
their size; after each an end of sequence is looked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pydllm import ops
from pydllm.decoding.generation import Decoded, Request
from pydllm.decoding.loop import CACHES, Blockwise
from pydllm.decoding.step import Accept
from pydllm.models import Model
from pydllm.ops.unmask import SEMANTICS

CARRY_MASKS = ("llada", "fast_dllm")
SCORES = ("confidence", "entropy", "margin", "left_to_right", "random")


def expect(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def expect_int(name: str, value: object, low: int, high: int | None = None) -> None:
    fits = isinstance(value, int) and value >= low and (high is None or value <= high)
    if not fits:
        upper = "" if high is None else f" and at most {high}"
        raise ValueError(f"{name}: expected an int of at least {low}{upper}, got {value!r}")


def expect_number(name: str, value: object, low: float, high: float) -> None:
    if not (isinstance(value, (int, float)) and low <= value <= high):
        raise ValueError(f"{name}: expected a number in [{low}, {high}], got {value!r}")


def expect_semantics(name: str, rule: str) -> None:
    expect("semantics", name, tuple(known for known, rules in SEMANTICS.items() if rule in rules))


class Baseline(ABC):
    """What the block-wise algorithms have in common; each declares these fields in its own order.

    Attributes:
        block_length: tokens in a block; the last block may be shorter. For a block-causal model
            it has to be the model's.
        cache: ``"none"``: every step forwards the whole sequence. ``"prefix"``: each block opens
            with a forward of the whole sequence whose keys and values before the block are kept;
            the block and all behind it are recomputed. ``"dual"``: those behind it are kept as
            well and only the block is recomputed. Both are approximations of ``"none"``. With a
            block-causal model keys and values of finished blocks are always kept, which is exact,
            and ``"none"`` is the only value.
        first_token: for shifted models with a cache: ``"window"`` starts the window one token
            early, so that every position is predicted by the row before it; ``"forced"`` takes the
            first token of each block from the block's first forward, as Fast-dLLM and FreeDave do.
        semantics: ``"exact"``, or whose accept rule to follow, as in ``pydllm.ops.unmask``, on
            fp32 scores. Under every name but ``"exact"`` the mask id may be predicted, and then
            stays a mask, as in that code; ``"llada"`` and ``"fast_dllm"`` fill such a mask in later
            blocks, as those loops do. Of the other codes it is the rule alone, not the loop.
    """

    block_length: int
    cache: str
    first_token: str
    semantics: str

    def __post_init__(self) -> None:
        expect_int("block_length", self.block_length, 1)
        expect("cache", self.cache, CACHES)
        expect("first_token", self.first_token, ("window", "forced"))

    @abstractmethod
    def plan(self) -> Blockwise:
        """How the shared loop fills a block."""

    def run(self, request: Request) -> Decoded:
        return self.plan().run(request)

    def check(self, model: Model, max_new_tokens: int) -> None:
        name, spec = type(self).__name__, model.spec
        if spec.attention == "causal":
            raise ValueError(
                f"{name}: expected a model with full or block-causal attention, got 'causal'"
            )
        if spec.attention == "full":
            return
        if self.block_length != spec.block_size:
            raise ValueError(
                f"block_length: expected {spec.block_size}, the block of the block-causal model, "
                f"got {self.block_length}"
            )
        if self.cache != "none":
            raise ValueError(
                "cache: expected 'none' with a block-causal model, which always keeps exact keys "
                f"and values of finished blocks, got {self.cache!r}"
            )
        if self.semantics in CARRY_MASKS:
            raise ValueError(
                f"semantics: expected none of {', '.join(CARRY_MASKS)} with a block-causal model "
                f"(they fill masks of finished blocks), got {self.semantics!r}"
            )

    def _blockwise(self, accept: Accept, steps: Callable[[int], int] | None = None) -> Blockwise:
        return Blockwise(
            block_length=self.block_length,
            accept=accept,
            steps=steps,
            cache=self.cache,
            forced_first=self.first_token == "forced",
            carry_masks=self.semantics in CARRY_MASKS,
            ban_mask=self.semantics == "exact",
        )


@dataclass(frozen=True)
class Static(Baseline):
    """A fixed number of tokens a step, the best-scored first (LLaDA, arXiv 2502.09992).

    Attributes:
        tokens_per_step: tokens written a step; a block takes
            ``ceil(block_length / tokens_per_step)`` steps.
        score: ``"confidence"`` probability of the chosen token; ``"entropy"`` lowest entropy first;
            ``"margin"`` largest gap between the two best; ``"left_to_right"``; ``"random"`` an
            order drawn from the seed.
        semantics: ``"exact"``, ``"llada"``, ``"fast_dllm"``, ``"dinfer"``, ``"dllm"``,
            ``"lmdeploy"``, ``"jetengine"`` or ``"dream"``. Two differ in the rule: the
            ``"left_to_right"`` of LMDeploy and JetEngine counts positions from the first mask on.
    """

    block_length: int = 32
    tokens_per_step: int = 1
    score: str = "confidence"
    cache: str = "none"
    first_token: str = "window"
    semantics: str = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_int("tokens_per_step", self.tokens_per_step, 1, self.block_length)
        expect("score", self.score, SCORES)
        expect_semantics(self.semantics, "quota")

    def plan(self) -> Blockwise:
        rule = self.score if self.score in ("left_to_right", "random") else "quota"
        # An order that the code of that name does not have is ours.
        semantics = self.semantics if rule in SEMANTICS[self.semantics] else "exact"

        def accept(stats: ops.VocabStats) -> tuple[Tensor, dict[str, Any]]:
            score = {"entropy": -stats.entropy, "margin": stats.margin}.get(self.score, stats.prob)
            quota = torch.full_like(score[:, 0], self.tokens_per_step, dtype=torch.int32)
            return score, {"rule": rule, "semantics": semantics, "quota": quota}

        return self._blockwise(accept, self._steps)

    def _steps(self, masks: int) -> int:
        return -(-masks // self.tokens_per_step)


@dataclass(frozen=True)
class Threshold(Baseline):
    """Every token whose confidence reaches a threshold, and always the best one (Fast-dLLM,
    arXiv 2505.22618).

    Attributes:
        threshold: least probability of a token that is written, in [0, 1].
        semantics: ``"exact"``, ``"fast_dllm"`` and ``"dllm"`` and ``"lmdeploy"`` (the same rule);
            ``"dinfer"``: all within 1e-5 of the best too, but none that predicts the mask;
            ``"sglang"`` and ``"diffusers"``: the threshold must be exceeded; ``"jetengine"``: that,
            and where fewer than ``min_tokens`` do, the leftmost are written instead.
        min_tokens: least number of tokens written a step, at least 1.
    """

    threshold: float = 0.9
    block_length: int = 32
    cache: str = "none"
    first_token: str = "window"
    semantics: str = "exact"
    min_tokens: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_number("threshold", self.threshold, 0.0, 1.0)
        expect_semantics(self.semantics, "threshold")
        expect_int("min_tokens", self.min_tokens, 1)

    def plan(self) -> Blockwise:
        rule = {
            "rule": "threshold",
            "threshold": self.threshold,
            "min_tokens": self.min_tokens,
            "semantics": self.semantics,
        }
        return self._blockwise(lambda stats: (stats.prob, rule))


@dataclass(frozen=True)
class Factor(Baseline):
    """As many tokens as their confidence allows in parallel: rank r is written while its
    confidence is at least ``1 - factor / (r + 1)`` (Fast-dLLM, arXiv 2505.22618).

    Attributes:
        factor: at least 0; larger writes more tokens a step.
        semantics: ``"exact"``, ``"dllm"`` (the same rule), or ``"fast_dllm"`` and ``"dinfer"``,
            where the last two masks of a window always go together.
    """

    factor: float = 1.0
    block_length: int = 32
    cache: str = "none"
    first_token: str = "window"
    semantics: str = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_number("factor", self.factor, 0.0, float("inf"))
        expect_semantics(self.semantics, "factor")

    def plan(self) -> Blockwise:
        rule = {"rule": "factor", "factor": self.factor, "semantics": self.semantics}
        return self._blockwise(lambda stats: (stats.prob, rule))


@dataclass(frozen=True)
class EntropyBound(Baseline):
    """The most certain tokens while the sum of their entropies stays bounded (EB-Sampler,
    arXiv 2505.24857).

    Attributes:
        bound: largest sum of the entropies of the tokens before, in nats, at least 0.
        semantics: ``"exact"``, ``"diffusers"`` (the same rule), or ``"jetengine"``: the sum
            includes the token itself and stays below the bound.
    """

    bound: float = 0.1
    block_length: int = 32
    cache: str = "none"
    first_token: str = "window"
    semantics: str = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_number("bound", self.bound, 0.0, float("inf"))
        expect_semantics(self.semantics, "entropy_bound")

    def plan(self) -> Blockwise:
        rule = {"rule": "entropy_bound", "bound": self.bound, "semantics": self.semantics}
        return self._blockwise(lambda stats: (stats.entropy, rule))
