"""Every environment variable that the library reads, read once, at import."""

from __future__ import annotations

import os
from typing import Any

BACKENDS = ("auto", "cuda", "triton", "torch")
LOG_LEVELS = ("off", "info", "debug")


def _choice(name: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, allowed[0])
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
    return value


BACKEND: str
LOG: str
REPLACE: bool
PDL: bool
ERROR: str | None = None  # what is wrong with one of these; whoever reads one raises it
try:
    BACKEND = _choice("PYDLLM_BACKEND", BACKENDS)
    LOG = _choice("PYDLLM_LOG", LOG_LEVELS)
    REPLACE = _choice("PYDLLM_REPLACE", ("0", "1")) == "1"
    PDL = _choice("PYDLLM_PDL", ("0", "1")) == "1"
except ValueError as error:
    ERROR = str(error)
    for _name in ("BACKEND", "LOG", "REPLACE", "PDL"):
        globals().pop(_name, None)


def __getattr__(name: str) -> Any:
    if ERROR is not None and name in ("BACKEND", "LOG", "REPLACE", "PDL"):
        raise ValueError(ERROR)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


TRITON_INTERPRET = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
