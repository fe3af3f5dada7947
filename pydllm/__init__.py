"""pydllm: kernels and decoding algorithms for diffusion language models."""

from __future__ import annotations

from typing import Any

from pydllm import metrics, ops
from pydllm._backend.errors import BackendError, CheckpointError, PydllmError
from pydllm.decoding import (
    APD,
    Autoregressive,
    Editing,
    EntropyBound,
    Factor,
    FreeDave,
    Generation,
    Infilled,
    LeftToRight,
    LevenshteinEditing,
    MultiBlock,
    SelfSpeculative,
    Static,
    Step,
    Stream,
    Threshold,
    generate,
    infill,
    stream,
    warmup,
)
from pydllm.models import load, register_family

__version__ = "0.1.0"

__all__ = [
    "APD",
    "Autoregressive",
    "BackendError",
    "CheckpointError",
    "Editing",
    "EntropyBound",
    "Factor",
    "FreeDave",
    "Generation",
    "Infilled",
    "LeftToRight",
    "LevenshteinEditing",
    "MultiBlock",
    "SelfSpeculative",
    "PydllmError",
    "Static",
    "Step",
    "Stream",
    "Threshold",
    "env",
    "generate",
    "infill",
    "load",
    "metrics",
    "ops",
    "patch",
    "register_family",
    "stream",
    "warmup",
]


def __getattr__(name: str) -> Any:
    if name == "env":  # a callable module, imported when wanted so that `-m pydllm.env` can run it
        import importlib

        return importlib.import_module("pydllm.env")
    if name == "patch":
        from pydllm.integrations.patch import patch

        return patch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
