"""Hyper-parameters of a distillation, and the published ones by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """How a student is trained (arXiv 2601.07568; the published values are in ``PRESETS``).

    Attributes:
        score: order of the teacher's trajectories, as in ``pydllm.Static``.
        max_new_tokens: length of the answers, in tokens.
        block_length: of the teacher's blocks, in tokens.
        windows: window length at the start of each epoch, in tokens; the training is cut into as
            many epochs.
        ratios: mask ratios are drawn between a lower end, which rises from the first number to
            the second, and the second.
        entropy_weight: of the certainty term; 0 leaves cross-entropy alone.
        entropy_temperature: what the logits are divided by in it.
        complement: train on the complementary masks as well.
        complement_entropy: with the certainty term on them.
        learning_rate: its peak.
        schedule: ``"constant"`` or ``"cosine"``, after the warm-up.
        warmup: part of the steps in which the rate rises linearly.
        batch_size: samples of a forward on one device.
        accumulation: forwards of a step.
        weight_decay: of AdamW.
        clip: largest norm of the gradient.
        lora_rank: rank and alpha of LoRA on every projection of every layer; 0: all weights.
    """

    score: str = "confidence"
    max_new_tokens: int = 256
    block_length: int = 32
    windows: tuple[int, ...] = (16, 16, 24, 24, 32, 32)
    ratios: tuple[float, float] = (0.0, 0.8)
    entropy_weight: float = 2.0
    entropy_temperature: float = 0.5
    complement: bool = True
    complement_entropy: bool = False
    learning_rate: float = 2e-5
    schedule: str = "constant"
    warmup: float = 0.0
    batch_size: int = 4
    accumulation: int = 16
    weight_decay: float = 0.01
    clip: float = 1.0
    lora_rank: int = 256

    def __post_init__(self) -> None:
        def whole(value: Any) -> bool:
            return type(value) is int and value >= 1

        checks: dict[str, tuple[str, Callable[[Any], bool]]] = {
            "max_new_tokens": ("an int of at least 1", whole),
            "block_length": ("an int of at least 1", whole),
            "windows": ("one or more ints of at least 1", lambda v: v and all(map(whole, v))),
            "ratios": (
                "two numbers, 0 <= first <= second <= 1",
                lambda v: len(v) == 2 and 0 <= v[0] <= v[1] <= 1,
            ),
            "entropy_weight": ("a number of at least 0", lambda v: 0 <= v < math.inf),
            "entropy_temperature": ("a number in [1e-6, 1e18]", lambda v: 1e-6 <= v <= 1e18),
            "learning_rate": ("a number above 0", lambda v: 0 < v < math.inf),
            "schedule": ("constant or cosine", lambda v: v in ("constant", "cosine")),
            "warmup": ("a number in [0, 1)", lambda v: 0 <= v < 1),
            "batch_size": ("an int of at least 1", whole),
            "accumulation": ("an int of at least 1", whole),
            "weight_decay": ("a number of at least 0", lambda v: 0 <= v < math.inf),
            "clip": ("a number above 0", lambda v: v > 0),
            "lora_rank": ("an int of at least 0", lambda v: type(v) is int and v >= 0),
        }
        for name, (expected, fits) in checks.items():
            value = getattr(self, name)
            if not fits(value):
                raise ValueError(f"{name}: expected {expected}, got {value!r}")

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of step ``step``, counted from 0, of ``steps``."""
        warm = math.ceil(self.warmup * steps)
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - warm) / max(1, steps - warm)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


# Published with 4 samples per forward, 4 forwards per step and 4 GPUs: 64 per step, here on one.
PRESETS = {
    "llada": Recipe(),
    "dream": Recipe(
        score="entropy",
        windows=(16, 24, 32),
        entropy_weight=1.0,
        complement_entropy=True,
        schedule="cosine",
        warmup=0.05,
    ),
    "coder": Recipe(
        score="entropy",
        max_new_tokens=512,
        windows=(16, 24, 32),
        entropy_weight=1.0,
        complement=False,
        learning_rate=2e-6,
        schedule="cosine",
        warmup=0.05,
        lora_rank=0,
    ),
}
