"""Checks of the algorithms' parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def expect(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, allowed))}, got {value!r}")


def expect_int(name: str, value: object, low: int, high: int = 2**31 - 1) -> None:
    if type(value) is not int or not low <= value <= high:
        upper = "" if high == 2**31 - 1 else f" and at most {high}"
        raise ValueError(f"{name}: expected an int of at least {low}{upper}, got {value!r}")


def expect_number(name: str, value: object, low: float, high: float) -> None:
    if type(value) not in (int, float) or not low <= value <= high:  # type: ignore[operator]
        raise ValueError(f"{name}: expected a number in [{low}, {high}], got {value!r}")


def expect_bool(name: str, value: object) -> None:
    if type(value) is not bool:
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def each(value: Any) -> Sequence[Any]:
    """One value, or one per prompt, as a sequence."""
    return value if isinstance(value, list | tuple) else (value,)


def expect_each(name: str, value: Any, expect_one: Callable[[str, Any], None]) -> None:
    for one in each(value):
        expect_one(name, one)
