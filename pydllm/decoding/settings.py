"""Algorithms from text, for the command line and the evaluation harness: names and parameters."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from pydllm.decoding.apd import APD
from pydllm.decoding.autoregressive import Autoregressive
from pydllm.decoding.driver import Algorithm
from pydllm.decoding.editing import Editing
from pydllm.decoding.freedave import FreeDave
from pydllm.decoding.left_to_right import LeftToRight
from pydllm.decoding.levenshtein import LevenshteinEditing
from pydllm.decoding.multiblock import MultiBlock
from pydllm.decoding.self_speculative import SelfSpeculative
from pydllm.decoding.static import EntropyBound, Factor, Static, Threshold
from pydllm.models import Model

_KINDS = (
    Static,
    Threshold,
    Factor,
    EntropyBound,
    FreeDave,
    APD,
    LeftToRight,
    MultiBlock,
    Autoregressive,
    SelfSpeculative,
    Editing,
    LevenshteinEditing,
)
ALGORITHMS: dict[str, type] = {kind.__name__.lower(): kind for kind in _KINDS}
_PLAIN = ("None", "bool", "int", "float", "str")


class SettingError(ValueError):
    """A name that does not exist, or a value that cannot be read."""


def plain_name(name: str) -> str:
    """A name in lower case, without ``_`` and ``-``: the keys of ``ALGORITHMS``."""
    return re.sub("[-_]", "", name).lower()


def parameters(kind: type) -> dict[str, tuple[str, ...]]:
    """The parameters of an algorithm that text can state, and the types that each may have."""
    found = {}
    for field in dataclasses.fields(kind):
        types = tuple(name for name in _PLAIN if re.search(rf"\b{name}\b", str(field.type)))
        if field.init and types and not re.search("Model|BlockwiseAlgorithm", str(field.type)):
            found[field.name] = types
    return found


def convert(text: str, types: tuple[str, ...]) -> Any:
    """Text as the first of the types that it can be."""
    words = {"none": None, "true": True, "false": False}
    for name in types:
        if name in ("None", "bool"):
            value = words.get(text.lower(), text)
            if type(value).__name__ in (name, f"{name}Type"):
                return value
            continue
        try:
            return {"int": int, "float": float, "str": str}[name](text)
        except ValueError:
            continue
    raise SettingError(f"expected {' or '.join(types)}, got {text!r}")


def fit_blocks(algorithm: Algorithm, settings: Mapping[str, object], model: Model) -> Algorithm:
    """An algorithm of ``make_algorithm`` with the blocks of a block-causal model's mask, where
    ``settings`` say no ``block_length``.

    Raises:
        ValueError: another parameter does not fit such blocks.
    """
    size, values = model.spec.block_size, vars(algorithm)
    fitted: Any = algorithm  # a dataclass
    if size is None:
        return algorithm
    if (baseline := values.get("baseline")) is not None:
        nested = {
            key.removeprefix("baseline."): value
            for key, value in settings.items()
            if key.startswith("baseline.")
        }
        return dataclasses.replace(fitted, baseline=fit_blocks(baseline, nested, model))
    if "block_length" not in values or "block_length" in settings:
        return algorithm
    return dataclasses.replace(fitted, block_length=size)


def make_algorithm(
    name: str, settings: Mapping[str, object], verifier: Callable[[], Model] | None = None
) -> Algorithm:
    """An algorithm from its name and its parameters.

    Args:
        name: one of ``ALGORITHMS``; case, ``_`` and ``-`` do not matter.
        settings: parameters by name; values are text, or have the right type already. A parameter
            that is an algorithm itself (``baseline`` of FreeDave) is given by name, and its own
            parameters with a dot: ``{"baseline": "threshold", "baseline.threshold": "0.8"}``.
        verifier: makes the causal model of an algorithm that has one; called for no other.

    Raises:
        SettingError: no such algorithm or parameter (lists those there are), or a value of no type
            that the parameter has.
        ValueError, TypeError: a value that the algorithm refuses.
    """
    kind = ALGORITHMS.get(plain_name(name))
    if kind is None:
        raise SettingError(f"algorithm: expected one of {', '.join(ALGORITHMS)}, got {name}")
    known = parameters(kind)
    types = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    inner = [field for field, declared in types.items() if "BlockwiseAlgorithm" in declared]
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if key in known:
            try:
                values[key] = convert(str(value), known[key])
            except SettingError as error:
                raise SettingError(f"{key}: {error}") from None
        elif key.partition(".")[0] not in inner or (key not in inner and inner[0] not in settings):
            names = [*known, *inner, *(f"{field}.NAME" for field in inner)]
            raise SettingError(f"{name} takes {', '.join(names)}; got {key!r}")
    for field in inner:
        if field in settings:
            nested = {
                key.removeprefix(f"{field}."): value
                for key, value in settings.items()
                if key.startswith(f"{field}.")
            }
            values[field] = make_algorithm(str(settings[field]), nested)
    if "verifier" in types and verifier is not None:
        values["verifier"] = verifier()
    return kind(**values)
