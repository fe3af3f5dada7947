"""config.json, read key by key: whatever is missing or of another kind is an error that says so."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydllm._backend.errors import CheckpointError

_LONGEST = 2**31 - 1  # sizes and positions are int32 on the device
WAY_OUT = "pydllm.patch(module) speeds up such a module as it stands"
_SHOWN = 200  # characters of a value in a message


class Config:
    """The keys of a Hugging Face configuration; a null counts as missing.

    Attributes:
        where: what messages call it: ``config.json``, or the module's class.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self._values, self.where = values, where

    def get(self, key: str) -> Any:
        return self._values.get(key)

    def replaced(self, **values: Any) -> Config:
        """The same configuration with other values of some keys."""
        return Config({**self._values, **values}, self.where)

    def keys(self) -> set[str]:
        """The keys that are not null."""
        return {key for key, value in self._values.items() if value is not None}

    def wrong(self, key: str, expected: str) -> CheckpointError:
        """The error of a key, for the caller to raise."""
        value = self.get(key)
        found = "none" if value is None else repr(value)
        found = found if len(found) <= _SHOWN else f"{found[:_SHOWN]}..."
        return CheckpointError(f"{self.where}: {key}: expected {expected}, found {found}")

    def integer(self, key: str, default: int | None = None, limit: int = _LONGEST) -> int:
        """A number of things, 1 to ``limit``."""
        value = default if self.get(key) is None else self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
            small = not isinstance(value, int) or value < 1
            raise self.wrong(key, f"an integer {'of at least 1' if small else f'up to {limit}'}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive, finite number."""
        value = default if self.get(key) is None else self.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self.wrong(key, "a positive number")
        if value > 1e300 or not math.isfinite(value):
            raise self.wrong(key, "a positive number that is finite")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = default if self.get(key) is None else self.get(key)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def ids(self, key: str, limit: int, override: str | None = None) -> tuple[int, ...]:
        """Token ids below ``limit``: one, a list, or none at all.

        ``override``: the argument of ``load`` that replaces them.
        """
        value = self.get(key)
        if value is None:
            return ()
        ids = value if isinstance(value, list | tuple) else [value]
        if not all(type(token) is int and 0 <= token < limit for token in ids):
            hint = "" if override is None else f" (load(..., {override}=) replaces them)"
            raise self.wrong(key, f"token ids in [0, {limit}){hint}")
        return tuple(ids)

    def unsupported(self, key: str, expected: str, way_out: str = WAY_OUT) -> CheckpointError:
        """The error of a value that means something which is not computed here."""
        return CheckpointError(
            f"{self.wrong(key, f'{expected} (others are not supported)')}; {way_out}"
        )

    def only(self, key: str, *allowed: Any, way_out: str = WAY_OUT) -> None:
        """Refuse any value but these; a missing key is fine."""
        if self.get(key) is not None and self.get(key) not in allowed:
            raise self.unsupported(key, " or ".join(map(repr, allowed)), way_out)

    def section(self, key: str) -> Config:
        """A nested object, empty where it is missing."""
        value = self.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.wrong(key, "an object")
        return Config(value or {}, f"{self.where}: {key}")
