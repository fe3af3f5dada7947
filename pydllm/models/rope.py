"""Rotary position embedding: the types that configurations name, their frequencies and tables.

Definitions as in transformers' ``ROPE_INIT_FUNCTIONS`` (4.57 and 5.x), in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pydllm._backend.errors import CheckpointError
from pydllm.models.config import Config

# Keys that a section may have besides those of its type; the last two belong to Ministral 3.
_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_COMMON |= {"llama_4_scaling_beta", "max_position_embeddings"}
_YARN = {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
_KEYS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor", "original_max_position_embeddings"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
    "yarn": {"factor", "original_max_position_embeddings"} | _YARN,
    "proportional": {"factor"},
}


@dataclass(frozen=True)
class Rope:
    """Frequencies of a rotary embedding.

    Attributes:
        theta: base of the frequencies.
        rotary: leading dimensions of a head that rotate, half-split.
        kind: ``"default"``, ``"linear"``, ``"llama3"``, ``"yarn"`` or ``"proportional"``.
        options: parameters of the type by name, sorted.
    """

    theta: float
    rotary: int
    kind: str = "default"
    options: tuple[tuple[str, float], ...] = ()

    def frequencies(self) -> Tensor:
        """``(rotary / 2,)`` fp64, radians per position."""
        exponent = torch.arange(0, self.rotary, 2, dtype=torch.float64) / self.rotary
        return _RESCALE[self.kind](self, self.theta**-exponent, dict(self.options))

    @property
    def attention_factor(self) -> float:
        """Factor on cos and sin; scores grow by its square."""
        return dict(self.options).get("attention_factor", 1.0)


def _linear(rope: Rope, frequency: Tensor, options: Mapping[str, float]) -> Tensor:
    return frequency / options.get("factor", 1.0)


def _llama3(rope: Rope, frequency: Tensor, options: Mapping[str, float]) -> Tensor:
    low, high = options["low_freq_factor"], options["high_freq_factor"]
    turns = options["original_max_position_embeddings"] * frequency / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / options["factor"])


def _yarn(rope: Rope, frequency: Tensor, options: Mapping[str, float]) -> Tensor:
    original = options["original_max_position_embeddings"]

    def dimension(turns: float) -> float:
        """Where a frequency makes ``turns`` turns within the original length."""
        return rope.rotary * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(options["beta_fast"]), dimension(options["beta_slow"])
    if options["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(len(frequency), dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    return frequency * (ramp / options["factor"] + 1 - ramp)


def _proportional(rope: Rope, frequency: Tensor, options: Mapping[str, float]) -> Tensor:
    rotating = torch.arange(len(frequency)) < options["rotating"]
    return torch.where(rotating, frequency, 0.0) / options.get("factor", 1.0)


_RESCALE: dict[str, Callable[[Rope, Tensor, Mapping[str, float]], Tensor]] = {
    "default": lambda rope, frequency, options: frequency,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "proportional": _proportional,
}


class RopeTables:
    """cos and sin by position, grown as longer caches are asked for.

    Angles in fp64, rounded once. A table that was replaced is kept: a captured graph may read it.
    """

    def __init__(self, rope: Rope, dtype: torch.dtype, device: torch.device) -> None:
        self._frequency, self._factor = rope.frequencies(), rope.attention_factor
        self._dtype = torch.promote_types(dtype, torch.float32)
        self._device = device
        self._tables: list[tuple[Tensor, Tensor]] = []

    def tables(self, positions: int) -> tuple[Tensor, Tensor]:
        """cos and sin, ``(at least positions, rotary / 2)``, fp32 or, for an fp64 model, fp64."""
        longest = self._tables[-1][0].shape[0] if self._tables else 0
        if positions > longest or not self._tables:
            size = max(positions, 2 * longest)
            angle = torch.arange(size, dtype=torch.float64)[:, None] * self._frequency
            cos, sin = (
                (t * self._factor).to(self._device, self._dtype) for t in (angle.cos(), angle.sin())
            )
            self._tables.append((cos, sin))
        return self._tables[-1]


def read_rope(config: Config, head_dim: int) -> Rope:
    """The rotary embedding of a configuration: nested, as transformers 4 and 5 write it, or flat.

    Raises:
        CheckpointError: an unknown type (``longrope`` is one: its frequencies change with the
            length), a key that the type does not have, a value out of range.
    """
    section = rope_section(config)
    sections = [section, config]
    theta = next((s for s in sections if s.get("rope_theta") is not None), config)
    partial = next((s for s in sections if s.get("partial_rotary_factor") is not None), None)
    share = 1.0 if partial is None else partial.number("partial_rotary_factor")
    kind = _kind(section)
    unknown = sorted(section.keys() - _COMMON - _KEYS[kind])
    if unknown:
        raise section.wrong(unknown[0], f"no such key with rope type {kind!r}")
    rotary = int(head_dim * share) if kind != "proportional" else head_dim
    if rotary % 2 or not 0 < rotary <= head_dim:
        raise CheckpointError(
            f"{config.where}: expected an even number of rotary dimensions, at most the head size "
            f"{head_dim}, found {rotary}"
        )
    options = _options(config, section, kind)
    if kind == "proportional":
        options["rotating"] = float(int(share * head_dim // 2))
    if kind == "dynamic":  # differs from the default beyond max_position_embeddings alone
        kind, options = "default", {}
    base = theta.number("rope_theta")
    if kind == "yarn" and base == 1:
        raise theta.wrong("rope_theta", "a number other than 1 with rope type 'yarn'")
    return Rope(base, rotary, kind, tuple(sorted(options.items())))


def read_query_scale(config: Config) -> tuple[float, int] | None:
    """``(beta, original length)`` of Ministral 3: q times 1 + beta ln(1 + floor(p / original))."""
    section = rope_section(config)
    if section.get("llama_4_scaling_beta") is None:
        return None
    beta = section.number("llama_4_scaling_beta")
    return beta, section.integer("original_max_position_embeddings")


def rope_section(config: Config) -> Config:
    """The nested object; two of them have to be of one type."""
    found = [config.section(key) for key in ("rope_parameters", "rope_scaling")]
    filled = [section for section in found if section.keys()]
    if len(filled) == 2 and _kind(filled[0]) != _kind(filled[1]):
        raise filled[1].wrong("rope_type", f"{_kind(filled[0])!r} as rope_parameters says")
    return filled[0] if filled else found[0]


def _kind(section: Config) -> str:
    key = "rope_type" if section.get("rope_type") is not None else "type"
    kind = section.get(key)
    if kind is None:
        if section.keys() - _COMMON:
            raise section.wrong("rope_type", f"one of {', '.join(_KEYS)}")
        return "default"
    if not isinstance(kind, str) or kind not in _KEYS:
        raise section.unsupported(key, f"one of {', '.join(_KEYS)}")
    return kind


def _options(config: Config, section: Config, kind: str) -> dict[str, float]:
    if kind in ("linear", "dynamic"):
        return {"factor": section.number("factor")}
    if kind == "proportional":
        return {"factor": section.number("factor", 1.0)}
    if kind == "llama3":
        options = {key: section.number(key) for key in ("low_freq_factor", "high_freq_factor")}
        if options["low_freq_factor"] >= options["high_freq_factor"]:
            raise section.wrong(
                "high_freq_factor", f"more than low_freq_factor {options['low_freq_factor']:g}"
            )
    elif kind == "yarn":
        options = {
            "beta_fast": section.number("beta_fast", 32.0),
            "beta_slow": section.number("beta_slow", 1.0),
            "truncate": float(section.flag("truncate", True)),
        }
        if options["beta_fast"] < options["beta_slow"]:
            raise section.wrong("beta_fast", f"at least beta_slow {options['beta_slow']:g}")
    else:
        return {}
    longest: Any = config.get("original_max_position_embeddings") and config
    if longest is None or section.get("original_max_position_embeddings") is not None:
        longest = section
    if longest.get("original_max_position_embeddings") is None:
        original = config.integer("max_position_embeddings")
    else:
        original = longest.integer("original_max_position_embeddings")
    options["original_max_position_embeddings"] = float(original)
    if kind == "yarn" and section.get("factor") is None:
        options["factor"] = config.integer("max_position_embeddings") / original
    else:
        options["factor"] = section.number("factor")
    if kind == "yarn":
        options["attention_factor"] = _attention_factor(section, options["factor"])
    return options


def _attention_factor(section: Config, factor: float) -> float:
    """YaRN's: given, or from the factor and the two scales of DeepSeek."""
    if section.get("attention_factor") is not None:
        return section.number("attention_factor")

    def scale(key: str | None = None) -> float:
        weight = 1.0 if key is None else section.number(key)
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if section.get("mscale") and section.get("mscale_all_dim"):
        return scale("mscale") / scale("mscale_all_dim")
    return scale()
