"""Every environment variable that the library reads, read once, at import."""

from __future__ import annotations

import os
from pathlib import Path

BACKENDS = ("auto", "cuda", "triton", "torch")
LOG_LEVELS = ("off", "info", "debug")


def _choice(name: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, allowed[0])
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
    return value


BACKEND = _choice("PYDLLM_BACKEND", BACKENDS)
LOG = _choice("PYDLLM_LOG", LOG_LEVELS)
REPLACE = _choice("PYDLLM_REPLACE", ("0", "1")) == "1"
TRITON_INTERPRET = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
# Checkouts of published code, for bench/ to compare with; None: restatements are compared with.
UPSTREAM_DIR = os.environ.get("PYDLLM_UPSTREAM_DIR") or None
# For tests alone: published modeling files to run them on.
MODELING_DIR = Path(d) if (d := os.environ.get("PYDLLM_MODELING_DIR")) else None
