"""Tables of public functions, arguments that they accept, and wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Case(NamedTuple):
    """A public function.

    Attributes:
        arguments: makes valid ones. Each is replaced by values of a wrong type, dtype or shape.
        optional: those that may be None.
        extra: further wrong values, by argument.
        free: those that may have any number of dimensions.
        instead: wrong values of an argument in place of the usual ones, some of which are valid.
    """

    function: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]
    optional: str = ""
    extra: tuple[tuple[str, Any], ...] = ()
    free: str = ""
    instead: dict[str, tuple[Any, ...]] = {}
    name: str = ""

    @property
    def title(self) -> str:
        return self.name or self.function.__name__
