"""Callables of other packages, checked against the signatures that they are known to have.

Signatures are written as Python writes parameters: ``"key, value"``, ``"x, *, scale, **kwargs"``.
Names before ``*`` are positional, those after it are passed by keyword, in any order.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

from pydllm._backend.errors import PydllmError

Known = str | Mapping[str, str]


def check_replaced(package: str, function: Callable[..., Any], known: Known) -> str:
    """Which known signature a callable has that ours takes the place of.

    All parameters count, since its callers may pass any of them: one more, one fewer or another
    name is another signature.

    Args:
        package: the name it is installed under, of whose version the error tells.
        function: a function, a method or a class. ``self`` is left out.
        known: one signature, or several by key. One that ends in ``...`` may go on with anything:
            the replacement passes it through.

    Returns:
        The key of the signature; ``""`` where ``known`` is a string.

    Raises:
        PydllmError: none of them, with the version and both signatures.
    """
    return _check(package, function, known, _has_exactly)


def check_called(package: str, function: Callable[..., Any], known: Known) -> str:
    """Which of the known calls a callable takes; arguments and errors as in ``check_replaced``.

    A call fits where every argument has a place and no parameter without a default is left over.
    """
    return _check(package, function, known, _takes)


def _check(
    package: str,
    function: Callable[..., Any],
    known: Known,
    fits: Callable[[list[inspect.Parameter], str], bool],
) -> str:
    parameters = list(inspect.signature(function).parameters.values())
    if parameters and parameters[0].name == "self":
        del parameters[0]
    calls = {"": known} if isinstance(known, str) else known
    for key, call in calls.items():
        if fits(parameters, call):
            return key
    expected = " or ".join(f"({call})" for call in calls.values())
    name = getattr(function, "__qualname__", type(function).__name__)
    bare = inspect.Signature([p.replace(annotation=p.empty, default=p.empty) for p in parameters])
    raise PydllmError(f"{package} {version_of(package)}: {name}: expected {expected}, found {bare}")


def written(function: Callable[..., Any], without: tuple[str, ...] = ()) -> str:
    """The signature of one of our callables, less some names, as ``check_replaced`` takes it."""
    parameters = inspect.signature(function).parameters.values()
    ours = [p for p in parameters if p.name not in ("self", *without)]
    by_name = [p.name for p in ours if p.kind is p.KEYWORD_ONLY]
    names = [_written(p) for p in ours if p.kind is not p.KEYWORD_ONLY]
    return ", ".join([*names, "*", *by_name] if by_name else names)


def version_of(package: str) -> str:
    """The version that is imported, or else installed."""
    found = getattr(sys.modules.get(package), "__version__", None)
    try:
        return str(found or importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return "(unknown version)"


def _split(call: str) -> tuple[list[str], list[str]]:
    """Names passed by position and by keyword."""
    names = call.split(", ") if call else []
    cut = names.index("*") if "*" in names else len(names)
    return names[:cut], names[cut + 1 :]


def _has_exactly(parameters: list[inspect.Parameter], call: str) -> bool:
    positional, keyword = _split(call)
    names = [_written(p) for p in parameters]
    if positional and positional[-1] == "...":
        return names[: len(positional) - 1] == positional[:-1]
    names = [name for name in names if name != "*"]
    first, rest = names[: len(positional)], names[len(positional) :]
    return first == positional and sorted(rest) == sorted(keyword)


def _takes(parameters: list[inspect.Parameter], call: str) -> bool:
    positional, keyword = _split(call)
    try:
        inspect.Signature(parameters).bind(*positional, **dict.fromkeys(keyword))
    except TypeError:
        return False
    return True


def _written(parameter: inspect.Parameter) -> str:
    if parameter.kind is parameter.VAR_POSITIONAL:
        return f"*{parameter.name}"
    return f"**{parameter.name}" if parameter.kind is parameter.VAR_KEYWORD else parameter.name
