"""Argument checks of the public ops: every message says the argument, expected and got."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_shape(name: str, tensor: Tensor, *expected: int | str) -> None:
    """``expected`` holds sizes, and names for sizes that may be anything: ``("B", "T", 64)``."""
    got = tuple(tensor.shape)
    fits = len(got) == len(expected) and all(
        isinstance(want, str) or want == size for want, size in zip(expected, got, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in expected)
        raise ValueError(f"{name}: expected shape ({wanted}), got {got}")


def check_dtype(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype) for dtype in allowed)
        raise TypeError(f"{name}: expected dtype {names}, got {tensor.dtype}")


def check_device(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"{name}: expected device {like.device} (that of {like_name}), got {tensor.device}"
        )


def check_no_grad(op: str, **tensors: Tensor | None) -> None:
    """Refuse inputs that want a gradient: the inference ops have no backward pass."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{op}: expected inputs without gradient, got {name} with requires_grad=True "
                "(call under torch.no_grad())"
            )
