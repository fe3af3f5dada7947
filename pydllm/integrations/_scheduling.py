"""What the schedulers for diffusers share: configuration, checks, and what a step proposes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from pydllm import ops
from pydllm._backend.signatures import check_replaced, written
from pydllm.integrations._sampling import Drawn, draw


class Config(dict):
    """A configuration that is read as a mapping or by attribute."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


class Scheduler:
    """What a pipeline asks of any scheduler."""

    order = 1
    config: Config

    @classmethod
    def from_config(cls, config: Any = None, **kwargs: Any) -> Self:
        """From a mapping, or an object with ``config``; what this scheduler has not is left out."""
        cls._check_signatures()
        config = getattr(config, "config", config)
        if not isinstance(config, Mapping):
            raise TypeError(f"config: expected a mapping, got {type(config).__name__}")
        known = cls().config
        unknown = sorted(set(kwargs) - set(known))
        if unknown:
            raise TypeError(f"config: expected {', '.join(known)}, got {', '.join(unknown)}")
        return cls(**{key: value for key, value in config.items() if key in known} | kwargs)

    @classmethod
    def _check_signatures(cls) -> None:
        """Raise where diffusers is imported and its scheduler of this name has other methods."""
        theirs = getattr(sys.modules.get("diffusers"), cls.__name__, None)
        for name, method in vars(cls).items():
            if theirs is not None and name[0] != "_" and hasattr(theirs, name):
                ours = method.__func__ if isinstance(method, staticmethod) else method
                known = written(ours, without=("compat", "backend"))
                check_replaced("diffusers", getattr(theirs, name), known)


def check_step(logits: Tensor, sample: Tensor) -> None:
    if sample.ndim != 2 or sample.dtype != torch.int64:
        raise ValueError(f"sample: expected (B, T) int64, got {tuple(sample.shape)} {sample.dtype}")
    if logits.ndim != 3 or logits.shape[:2] != sample.shape:
        raise ValueError(
            f"model_output: expected {(*sample.shape, 'V')}, got {tuple(logits.shape)}"
        )


def propose(
    logits: Tensor,
    method: dict[str, Any],
    generator: torch.Generator | None,
    published: bool,
    backend: str | None,
) -> Drawn:
    """Token, probability (fp32) and entropy of every position."""
    temperature, top_k, top_p = (method.get(name) for name in ("temperature", "top_k", "top_p"))
    flat = logits.reshape(-1, logits.shape[-1])
    shape = logits.shape[:-1]
    if not temperature:
        stats = ops.vocab_stats(flat, backend=backend)
        fields = (stats.token, stats.prob.float(), stats.entropy)
    elif published or top_k or (top_p or 1.0) < 1:
        drawn = draw((flat / temperature).float(), 1.0, top_k, top_p, generator)
        return Drawn(*(field.view(shape) for field in drawn))
    else:
        seed = int(torch.randint(2**62, (), generator=generator, device=_place(generator)))
        row = torch.arange(len(flat), dtype=torch.int32, device=flat.device)
        counter = torch.stack((row, torch.zeros_like(row), torch.zeros_like(row)), 1)
        stats = ops.vocab_stats(
            flat,
            temperature=temperature,
            tempered=True,
            seed=seed,
            counter=counter,
            backend=backend,
        )
        fields = (stats.token, stats.prob.float(), stats.entropy)
    return Drawn(*(field.view(shape) for field in fields))


def _place(generator: torch.Generator | None) -> torch.device | None:
    return None if generator is None else generator.device
