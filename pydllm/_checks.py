"""Checks of arguments. Every message says the argument, what was expected and what was got."""

from __future__ import annotations

import functools
import math
import reprlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def describe(value: Any) -> str:
    """A value in a message: a tensor by shape and dtype, anything else by its short repr."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} {value.dtype}"
    if value is None or isinstance(value, bool | int | float | str):
        return reprlib.repr(value)
    return f"{type(value).__name__} {reprlib.repr(value)}"


def check_tensor(
    name: str,
    value: Any,
    shape: tuple[int | str, ...],
    dtype: torch.dtype | tuple[torch.dtype, ...],
    like: Tensor | None = None,
    like_name: str = "",
) -> None:
    """A tensor of a shape and a dtype, on the device of ``like``, which messages call by its name.

    Args:
        shape: sizes, and names for sizes that may be anything: ``("B", "T", 64)``.
        dtype: one, or several that are allowed.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape or device.
    """
    check_is_tensor(name, value)
    got = value.shape
    if got != shape:
        fits = len(got) == len(shape)
        if fits:
            for want, size in zip(shape, got, strict=True):
                fits = fits and (want == size or type(want) is str)
        if not fits:
            check_shape(name, value, *shape)
    if value.dtype != dtype and not (isinstance(dtype, tuple) and value.dtype in dtype):
        check_dtype(name, value, *(dtype if isinstance(dtype, tuple) else (dtype,)))
    if like is not None and value.device != like.device:
        check_device(name, value, like_name, like)


def check_written(name: str, tensor: Tensor) -> None:
    """An argument that is updated in place: each element has memory of its own."""
    if not tensor.is_contiguous() and any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    ):
        raise ValueError(
            f"{name}: expected a tensor to write to, got an expanded one with strides "
            f"{tensor.stride()}"
        )


def check_is_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {describe(value)}")


def check_shape(name: str, tensor: Tensor, *expected: int | str) -> None:
    """``expected`` holds sizes, and names for sizes that may be anything: ``("B", "T", 64)``."""
    check_is_tensor(name, tensor)
    got = tuple(tensor.shape)
    fits = len(got) == len(expected) and all(
        isinstance(want, str) or want == size for want, size in zip(expected, got, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in expected)
        raise ValueError(f"{name}: expected shape ({wanted}), got {got}")


def check_dtype(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    check_is_tensor(name, tensor)
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype) for dtype in allowed)
        raise TypeError(f"{name}: expected dtype {names}, got {tensor.dtype}")


def check_device(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"{name}: expected device {like.device} (that of {like_name}), got {tensor.device}"
        )


def check_int(name: str, value: Any, low: int, high: int = 2**31 - 1) -> None:
    """An int in [low, high]; a bool is not one."""
    known = isinstance(value, int) and not isinstance(value, bool)
    if known and low <= value <= high:
        return
    wanted = f"an int in {_span(low, high)}"
    if high == 2**31 - 1 and not (known and value > high):
        wanted = f"an int of at least {low}"
    error = ValueError if known else TypeError
    raise error(f"{name}: expected {wanted}, got {describe(value)}")


def check_token_id(name: str, value: Any) -> None:
    check_int(name, value, -(2**63), 2**63 - 1)


def check_number(
    name: str,
    value: Any,
    low: float,
    high: float = math.inf,
    *,
    above: bool = False,
    infinite: bool = False,
) -> None:
    """A number in [low, high], or in (low, high] with ``above``; NaN is in neither.

    ``infinite``: an infinity that lies in it will do.
    """
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    inside = known and low <= value <= high and not (above and value == low)
    if inside and (infinite or -math.inf < value < math.inf):
        return
    wanted = f"a number in {'(' if above else '['}{low:g}, {high:g}]"
    if high == math.inf:
        bound = "" if low == -math.inf else f" {'above' if above else 'of at least'} {low:g}"
        wanted = f"a {'' if infinite else 'finite '}number{bound}"
    error = ValueError if known else TypeError
    raise error(f"{name}: expected {wanted}, got {describe(value)}")


def check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {describe(value)}")


def check_choice(name: str, value: Any, choices: tuple[str | None, ...]) -> None:
    """One of a few words, or None where it is among them."""
    if value is None and None in choices:
        return
    wanted = f"one of {', '.join(map(str, choices))}"
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected {wanted}, got {describe(value)}")
    if value not in choices:
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")


def each(value: Any) -> Sequence[Any]:
    """One value, or one per prompt, as a sequence."""
    return value if isinstance(value, list | tuple) else (value,)


def check_each(name: str, value: Any, check_one: Callable[[str, Any], None]) -> None:
    """A value, or each of several."""
    for one in each(value):
        check_one(name, one)


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


def _span(low: int, high: int) -> str:
    if high + 1 in (2**31, 2**63, 2**64):
        start = "-2^63" if low == -(2**63) else str(low)
        return f"[{start}, 2^{(high + 1).bit_length() - 1})"
    return f"[{low}, {high}]"


def check_usable(name: str, device: torch.device | str) -> torch.device:
    """A device that this machine has.

    Raises:
        ValueError: not a device's name, or not here.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"{name}: expected a device such as cpu, cuda or cuda:1, got {describe(device)}"
        ) from None
    if found.type == "cuda":
        if torch.version.cuda is None and torch.version.hip is None:
            raise ValueError(f"{name}: expected cpu, as this torch is built for, got {device}")
        count = torch.cuda.device_count()
        if (found.index or 0) >= count:
            raise ValueError(f"{name}: expected one of {count} CUDA devices, got {device}")
    return found


Function = TypeVar("Function", bound=Callable[..., Any])


def renamed(**names: str) -> Callable[[Function], Function]:
    """A decorator: keywords that are no longer taken, each with what to use instead.

    Raises, when the function is called:
        TypeError: an old keyword was given.
    """

    def decorate(function: Function) -> Function:
        if isinstance(function, type):  # a dataclass
            function.__init__ = decorate(function.__init__)  # type: ignore[misc]
            return function

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old in names.keys() & kwargs.keys():
                name = function.__qualname__.removesuffix(".__init__")
                raise TypeError(f"{name}: {old} is no argument any more, use {names[old]}")
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate
