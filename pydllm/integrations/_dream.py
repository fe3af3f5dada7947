"""What the loops for Dream models share: the arguments of ``diffusion_generate``, and a step."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from pydllm._checks import check_choice, check_int
from pydllm.integrations._arguments import (
    check_prompt,
    check_temperature,
    full_attention,
    left_padding,
)
from pydllm.integrations._outputs import Output
from pydllm.integrations._published import LoopState, Pass, PublishedLoop
from pydllm.integrations.samplers import sample_tokens
from pydllm.models import Model

_DEFAULT_LENGTH = 20


@dataclass
class DreamModelOutput(Output):
    """``sequences (B, L)`` int64, and ``history``, a list of such tensors, or None."""

    sequences: Tensor
    history: list[Tensor] | None = None


@dataclass(frozen=True)
class Settings:
    """The fields of Dream's generation config that its loops read, with its defaults."""

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    max_length: int | None = _DEFAULT_LENGTH
    max_new_tokens: int | None = None
    eps: float = 1e-3
    steps: int = 512
    alg: str = "origin"
    alg_temp: float | None = None
    num_return_sequences: int = 1
    return_dict_in_generate: bool = False
    output_history: bool = False
    mask_token_id: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None


@dataclass(frozen=True)
class Call:
    """A checked call: the model, its prompt ``(B, P)``, padding, and what the loop was told."""

    model: Model
    prompt: Tensor
    pad: Tensor | None
    settings: Settings
    options: dict[str, Any]

    @property
    def new(self) -> int:
        return (self.settings.max_length or 0) - self.prompt.shape[1]

    def blocks(self) -> tuple[int, int]:
        """Tokens of a block, the option ``block_length`` (None: all new ones), and its steps."""
        size, steps = self.options["block_length"], self.settings.steps
        size = self.new if size is None else size
        if type(size) is not int or size < 1 or self.new % size:
            raise ValueError(
                f"block_length: expected a divisor of the {self.new} new, got {size!r}"
            )
        blocks = self.new // size
        if steps % blocks:
            raise ValueError(f"steps: expected a multiple of the {blocks} blocks, got {steps}")
        return size, steps // blocks

    def result(self, x: Tensor, history: list[Tensor] | None = None) -> Tensor | DreamModelOutput:
        if self.settings.return_dict_in_generate:
            return DreamModelOutput(x, history)
        return x

    def history(self) -> list[Tensor] | None:
        wanted = self.settings.return_dict_in_generate and self.settings.output_history
        return [] if wanted else None


def read_call(
    name: str,
    model: Any,
    inputs: Tensor | None,
    config: Any,
    arguments: Mapping[str, Any],
    options: Mapping[str, Any],
    algorithms: tuple[str, ...],
) -> Call:
    """Settings from the defaults, the model's config, ``config`` and the keyword arguments.

    ``options`` are the loop's own keyword arguments and their defaults.
    """
    if inputs is None:
        raise ValueError("inputs: expected token ids (B, P), got None")
    known = {field.name for field in fields(Settings)}
    unknown = sorted(set(arguments) - known - set(options) - {"attention_mask"})
    if unknown:
        accepted = ", ".join(sorted(known | set(options) | {"attention_mask"}))
        raise TypeError(f"{name}: expected arguments among {accepted}, got {', '.join(unknown)}")
    settings = _from_configs(model, config)
    settings = replace(settings, **{k: v for k, v in arguments.items() if k in known})
    check_choice("alg", settings.alg, algorithms)
    check_temperature(settings.temperature)
    check_int("steps", settings.steps, 1)
    if settings.max_new_tokens is not None:
        check_int("max_new_tokens", settings.max_new_tokens, 1)
    if settings.mask_token_id is None:
        spec = getattr(model, "spec", None)
        mask = None if spec is None else spec.mask_id
        if mask is None:
            raise ValueError("mask_token_id: expected the mask's token id, got none")
        settings = replace(settings, mask_token_id=mask)
    own = full_attention(model, name, settings.mask_token_id, shifted=True)  # type: ignore[arg-type]
    prompt = check_prompt("inputs", inputs, own, 0)
    settings = _with_length(settings, prompt.shape[1], own, "max_length" in arguments)
    mask = arguments.get("attention_mask")
    padding = settings.pad_token_id
    if mask is None and padding is not None and bool(prompt.eq(padding).any()):
        warnings.warn(
            "inputs: found the padding id and no attention_mask, so padding counts as text",
            stacklevel=3,
        )
    pad = left_padding(mask, prompt)
    copies = settings.num_return_sequences
    if copies > 1:
        prompt = prompt.repeat_interleave(copies, 0)
        pad = None if pad is None else pad.repeat_interleave(copies, 0)
    own_options = {key: arguments.get(key, value) for key, value in options.items()}
    call = Call(own, prompt, pad, settings, own_options)
    check_prompt("inputs", prompt, own, call.new)
    return call


def _from_configs(model: Any, config: Any) -> Settings:
    """The settings before the call's own.

    Without a config they come from the model's, as in the original: those of transformers 4 hold
    its global defaults, a temperature of 1 and the 50 likeliest ids among them. With a config, ids
    that it leaves open come from the model.
    """
    known = {field.name for field in fields(Settings)}
    model_config = getattr(model, "config", None)
    if config is None:
        return replace(Settings(), **_found(model_config, known))
    sources = (model_config, getattr(model, "generation_config", None), config)
    ids: dict[str, Any] = {}
    for source in sources:
        found = _found(source, _ids())
        ids |= {name: token for name, token in found.items() if token is not None}
    return replace(Settings(), **_found(config, known) | ids)


def _found(source: Any, names: set[str]) -> dict[str, Any]:
    values = (
        source
        if isinstance(source, Mapping)
        else {name: getattr(source, name) for name in names if hasattr(source, name)}
    )
    return {name: value for name, value in values.items() if name in names}


def _ids() -> set[str]:
    return {field.name for field in fields(Settings) if field.name.endswith("_token_id")}


def _with_length(settings: Settings, length: int, model: Model, given: bool) -> Settings:
    """``max_length`` in tokens, prompt included, as Dream works it out."""
    total = settings.max_length
    if settings.max_new_tokens is not None:
        total = settings.max_new_tokens + length
    elif not given and total == _DEFAULT_LENGTH:
        total = min(_DEFAULT_LENGTH + length, model.spec.max_positions)
    if total is None or total <= length:
        raise ValueError(
            f"max_length: expected more than the {length} positions of the inputs, got {total}"
        )
    return replace(settings, max_length=total)


@dataclass(kw_only=True)
class DreamLoop(PublishedLoop):
    """What the loops for Dream models share: confidences, and Dream's schedule."""

    settings: Settings

    @property
    def places_temperature(self) -> float:
        """Above 0 the places that are written are drawn, too."""
        return float(self.settings.alg_temp or 0.0)

    @property
    def stored(self) -> bool:
        """Whether logits are: what torch draws is drawn in their dtype, as in the original."""
        filtered = self.settings.top_k is not None or (self.settings.top_p or 1) < 1
        return filtered or self.draws or (self.published and self.places_temperature > 0)

    def parts(self, steps: int) -> list[float]:
        """Which part of the masks a step writes, in (0, 1]; all of them in the last step."""
        times = torch.linspace(1, self.settings.eps, steps + 1)
        return [*(1 - times[1:-1] / times[:-2]).tolist(), 1.0]

    def quota(self, masks: int, batch: int, step: int, steps: int) -> int:
        """Tokens per sequence, in the fp32 arithmetic of the original."""
        return int(torch.tensor(masks) / batch * torch.tensor(self.parts(steps)[step]))

    def propose(
        self,
        state: LoopState,
        plan: Pass,
        hidden: Tensor,
        logits: Tensor | None,
        wanted: Tensor,
        score: str = "prob",
    ) -> tuple[Tensor, Tensor]:
        """Token and score of the wanted positions, of [first, last) or of those of the logits."""
        if logits is None:
            stats = self.stats(state, plan, hidden)
            scores = {"margin": stats.margin, "entropy": -stats.entropy}
            return stats.token, scores.get(score, stats.prob)
        confidence, drawn = sample_tokens(
            logits[wanted],
            temperature=self.settings.temperature,
            top_p=self.settings.top_p,
            top_k=self.settings.top_k,
            margin_confidence=score == "margin",
            neg_entropy=score == "entropy",
        )
        token = torch.zeros(wanted.shape, dtype=torch.int64, device=wanted.device)
        token[wanted] = drawn
        spread = torch.zeros(wanted.shape, dtype=confidence.dtype, device=wanted.device)
        spread[wanted] = confidence
        return token, spread
