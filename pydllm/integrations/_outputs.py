"""Results that can be read as the output classes of transformers and diffusers are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any


class Output:
    """Base of a dataclass: fields by name, by key or by number, those that are None left out."""

    def to_tuple(self) -> tuple:
        return tuple(self[name] for name in self.keys())

    def keys(self) -> list[str]:
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]
        return [name for name in names if getattr(self, name) is not None]

    def __getitem__(self, key: int | slice | str) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())
