"""The baselines of the field, one frozen dataclass each: how a step of a block chooses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pydllm import ops
from pydllm._checks import check_choice, check_int, check_number, renamed
from pydllm.decoding.blockwise import BlockwiseAlgorithm

SCORES = ("confidence", "entropy", "margin", "left_to_right", "random")


@renamed(semantics="compat")
@dataclass(frozen=True, kw_only=True)
class Static(BlockwiseAlgorithm):
    """A fixed number of tokens per step, the best-scored first (LLaDA, arXiv 2502.09992).

    Attributes:
        tokens_per_step: tokens written a step; a block takes
            ``ceil(block_length / tokens_per_step)`` steps.
        score: ``"confidence"`` probability of the chosen token; ``"entropy"`` lowest entropy first;
            ``"margin"`` largest gap between the two best; ``"left_to_right"``; ``"random"`` an
            order drawn from the seed.
        compat: None, ``"llada"``, ``"fast_dllm"``, ``"dream"`` or ``"dllm"``.
    """

    block_length: int = 32
    tokens_per_step: int = 1
    score: str = "confidence"
    cache: str = "none"
    first_token: str = "window"
    compat: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("tokens_per_step", self.tokens_per_step, 1, self.block_length)
        check_choice("score", self.score, SCORES)
        check_choice("compat", self.compat, (None, "llada", "fast_dllm", "dream", "dllm"))

    @property
    def is_random(self) -> bool:
        return self.score == "random"

    @property
    def takes_one_by_score(self) -> bool:
        return self.tokens_per_step == 1 and not self.is_random

    def accept(self, stats: ops.VocabStats) -> tuple[Tensor, dict[str, Any]]:
        rule = self.score if self.score in ("left_to_right", "random") else "quota"
        score = stats.margin if self.score == "margin" else stats.prob
        score = -stats.entropy if self.score == "entropy" else score
        quota = torch.full_like(score[:, 0], self.tokens_per_step, dtype=torch.int32)
        return score, {"rule": rule, "quota": quota}

    def steps(self, masks: int) -> int:
        return -(-masks // self.tokens_per_step)


@renamed(semantics="compat")
@dataclass(frozen=True, kw_only=True)
class Threshold(BlockwiseAlgorithm):
    """Every token whose confidence reaches a threshold, and always the best one (Fast-dLLM,
    arXiv 2505.22618).

    Attributes:
        threshold: least probability of a token that is written, in [0, 1].
        compat: None, ``"fast_dllm"`` or ``"dllm"``.
        min_tokens: least number of tokens written a step, at least 1.
    """

    threshold: float = 0.9
    block_length: int = 32
    cache: str = "none"
    first_token: str = "window"
    compat: str | None = None
    min_tokens: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("threshold", self.threshold, 0, 1)
        check_choice("compat", self.compat, (None, "fast_dllm", "dllm"))
        check_int("min_tokens", self.min_tokens, 1)

    def accept(self, stats: ops.VocabStats) -> tuple[Tensor, dict[str, Any]]:
        return stats.prob, {
            "rule": "threshold",
            "threshold": self.threshold,
            "min_tokens": self.min_tokens,
        }


@renamed(semantics="a function of pydllm.integrations")
@dataclass(frozen=True, kw_only=True)
class Factor(BlockwiseAlgorithm):
    """As many tokens as their confidence allows in parallel: rank r is written while its
    confidence is at least ``1 - factor / (r + 1)`` (Fast-dLLM, arXiv 2505.22618).

    Attributes:
        factor: at least 0; larger writes more tokens per step.
    """

    factor: float = 1.0
    block_length: int = 32
    cache: str = "none"
    first_token: str = "window"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("factor", self.factor, 0, infinite=True)

    def accept(self, stats: ops.VocabStats) -> tuple[Tensor, dict[str, Any]]:
        return stats.prob, {"rule": "factor", "factor": self.factor}


@renamed(semantics="a function of pydllm.integrations")
@dataclass(frozen=True, kw_only=True)
class EntropyBound(BlockwiseAlgorithm):
    """The most certain tokens while the sum of their entropies stays bounded (EB-Sampler,
    arXiv 2505.24857).

    Attributes:
        bound: largest sum of the entropies of the tokens before, in nats, at least 0.
    """

    bound: float = 0.1
    block_length: int = 32
    cache: str = "none"
    first_token: str = "window"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("bound", self.bound, 0, infinite=True)

    def accept(self, stats: ops.VocabStats) -> tuple[Tensor, dict[str, Any]]:
        return stats.entropy, {
            "rule": "entropy_bound",
            "bound": self.bound,
        }
