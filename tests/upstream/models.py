"""One tiny random model three times: plain, in the published modeling code, and ours."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import nn

from pydllm.models import Model, load
from tests.integrations.tiny import EOS, MASK, standin
from tests.models.plain import CONFIGS, RECENT, Plain, random_plain

_NUDGE = 3e-6
LIMIT = 400  # forwards after which a published loop counts as endless


class Endless(Exception):
    """A published loop ran into the limit of forwards."""


@dataclass(frozen=True)
class Trio:
    """``plain`` for restatements, ``module`` for the published loop, ``own`` for the drop-in."""

    plain: Plain
    module: nn.Module
    own: Model

    def limited(self) -> nn.Module:
        """The module, its count of forwards at zero."""
        self.module.forwards = 0
        return self.module

    def nudged(self, seed: int) -> Trio:
        """Ours with weights changed by a few millionths, as much as fp32 arithmetic does."""
        generator = torch.Generator().manual_seed(seed)
        weights = {
            name: value
            * (1 + _NUDGE * torch.randn(value.shape, generator=generator, dtype=value.dtype))
            for name, value in self.plain.weights.items()
        }
        return replace(self, own=load(standin(Plain(self.plain.config, weights))))


def _count(module: nn.Module, *_: Any) -> None:
    module.forwards += 1
    if module.forwards > LIMIT:
        raise Endless(f"{LIMIT} forwards")


def trios(
    name: str,
    build: Callable[[dict[str, Any]], nn.Module] | None,
    silent: tuple[int, ...] = (),
    **changes: Any,
) -> Callable[[int, float, bool], Trio]:
    """Models of a configuration by seed, scale of the EOS row, and whether masks are predicted.

    Args:
        name: a configuration of ``tests.models.plain``; ``changes`` replace some of its values.
        build: the published module of a configuration; its weights are replaced. None: a module
            that only holds the weights, for loops that run on ``plain``.
        silent: ids that are not predicted.
    """

    @cache
    def make(seed: int, eos_scale: float, predicts_masks: bool) -> Trio:
        plain = random_plain((CONFIGS | RECENT)[name] | changes, seed)
        head = plain.weights[plain.ends[2] + ".weight"]
        head[EOS] *= eos_scale
        for token in (*silent, *(() if predicts_masks else (MASK,))):
            head[token] = 0
        module = standin(plain) if build is None else build(plain.config)
        missing = module.load_state_dict(plain.weights, strict=False).missing_keys
        if missing:
            raise RuntimeError(f"expected every weight of {name}, the module also has {missing}")
        module = module.double().eval()
        own = load(copy.deepcopy(module))
        module.register_forward_pre_hook(_count)
        return Trio(plain, module, own)

    return make
