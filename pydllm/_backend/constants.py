"""What the compiler may take for a constant instead of tracing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant_result(function: _Function) -> _Function:
    """``torch.compiler.assume_constant_result`` without its import of the whole compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_result
def capability(index: int | None) -> int:
    """Compute capability of a CUDA device: 90 for sm_90."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@constant_result
def is_rocm() -> bool:
    return torch.version.hip is not None
