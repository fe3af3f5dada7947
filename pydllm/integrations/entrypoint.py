"""Other people's decoding functions: found by name, and what they return."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pydllm._backend.errors import PydllmError

_ACCEPTED = (
    "a tensor of token ids, (tensor, forwards), an object with `sequences`, a dict or a list of "
    "token ids"
)


def find_function(name: str) -> Callable[..., Any]:
    """What ``module:attribute`` or ``path/to/file.py:attribute`` names; attributes may have dots.

    Modules are looked for in the working directory, too.

    Raises:
        PydllmError: there is no such module or attribute, or it cannot be called.
    """
    place, colon, path = name.rpartition(":")
    if not colon or not place or not path:
        raise PydllmError(f"{name}: expected module:function or file.py:function")
    try:
        module = _import(place)
    except Exception as error:  # whatever the code that is imported raises
        raise PydllmError(
            f"{place}: cannot be imported: {type(error).__name__}: {error}"
        ) from error
    found: Any = module
    for part in path.split("."):
        if not hasattr(found, part):
            names = [key for key in vars(found) if callable(getattr(found, key)) and key[0] != "_"]
            known = ", ".join(sorted(names)[:12]) or "none"
            raise PydllmError(f"{name}: expected a function of {place} (there are {known})")
        found = getattr(found, part)
    if not callable(found):
        raise PydllmError(f"{name}: expected a function, got {type(found).__name__}")
    return found


def _import(place: str) -> Any:
    if not place.endswith(".py"):
        before = list(sys.path)
        sys.path.insert(0, str(Path.cwd()))
        try:
            return importlib.import_module(place)
        finally:
            sys.path[:] = before
    specification = importlib.util.spec_from_file_location(Path(place).stem, place)
    if specification is None or specification.loader is None or not Path(place).is_file():
        raise FileNotFoundError(f"no such file: {place}")
    module = importlib.util.module_from_spec(specification)
    sys.modules.setdefault(specification.name, module)  # dataclasses look themselves up
    before = list(sys.path)
    sys.path.insert(0, str(Path(place).resolve().parent))
    try:
        specification.loader.exec_module(module)
    finally:
        sys.path[:] = before
    return module


def read_sequences(value: Any, who: str) -> tuple[list[list[int]], int | None]:
    """Token ids of every sequence, and forwards where the function returned them.

    Args:
        value: a tensor ``(B, L)`` or ``(L,)``; ``(tensor, forwards)``; an object with
            ``sequences`` (and perhaps ``nfe``), such as transformers' outputs; a dict of rows; a
            list of tensors or of lists of ids.

    Raises:
        PydllmError: anything else.
    """
    forwards = None
    if isinstance(value, tuple) and len(value) == 2 and _is_count(value[1]):
        value, forwards = value[0], int(value[1])
    if hasattr(value, "sequences"):
        reported = getattr(value, "nfe", None)
        if forwards is None and reported is not None:
            # A batch's forwards are those of its longest sequence.
            forwards = int(reported.max()) if isinstance(reported, Tensor) else int(reported)
        value = value.sequences
    if isinstance(value, Mapping):
        value = [value[key] for key in sorted(value)]
    if isinstance(value, Tensor):
        value = value[None] if value.ndim == 1 else value
        if value.ndim != 2 or value.is_floating_point():
            raise PydllmError(
                f"{who}: expected token ids (B, L), got {tuple(value.shape)} {value.dtype}"
            )
        return value.tolist(), forwards
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value):
        rows = [row.tolist() if isinstance(row, Tensor) else row for row in value]
        rows = [rows] if all(isinstance(token, int) for token in rows) else rows
        if all(isinstance(row, list) and all(isinstance(t, int) for t in row) for row in rows):
            return rows, forwards
    raise PydllmError(f"{who}: expected {_ACCEPTED}; got {type(value).__name__}")


def _is_count(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_prompts(path: Path, tokenizer: Any) -> list[list[int]]:
    """Prompts of a file: a line each, text, or JSON (a list of ids, or an object with ``prompt``).

    Raises:
        ValueError: a line that is none of them, with its number; text without a tokenizer.
    """
    prompts = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a text file, got {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        value: Any = line
        if line.lstrip()[0] in "[{":
            try:
                value = json.loads(line)
            except json.JSONDecodeError:
                value = line
        if isinstance(value, dict):
            value = value.get("prompt")
        if isinstance(value, str):
            if tokenizer is None:
                raise ValueError(f"{path}:{number}: expected token ids (no tokenizer), got text")
            value = tokenizer.encode(value).ids
        if not (isinstance(value, list) and value and all(isinstance(t, int) for t in value)):
            raise ValueError(f"{path}:{number}: expected text or token ids, got {line!r:.60}")
        prompts.append(value)
    if not prompts:
        raise ValueError(f"{path}: expected a prompt a line, got none")
    return prompts
