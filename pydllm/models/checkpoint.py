"""Reading a checkpoint directory: JSON files and safetensors, one or many.

Everything is checked from headers before the first weight is read. Pickles are never opened.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pydllm._backend.errors import CheckpointError
from pydllm.models.config import Config
from pydllm.models.families import Names, Sizes
from pydllm.models.layouts import Part, read_layout
from pydllm.models.partition import Partition
from pydllm.models.weights import Found, Index, Slot, Updates

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_CONVERT = (
    'pickles are not read; convert it once: python -c "import glob, torch, safetensors.torch as s; '
    "s.save_file({{k: v.clone() for f in sorted(glob.glob('{0}')) for k, v in "
    "torch.load(f, weights_only=True).items()}}, 'model.safetensors')\""
)


def read_config(folder: Path) -> Config:
    return read_object(folder, "config.json")


def read_generation_config(folder: Path) -> Config | None:
    """generation_config.json; None where there is no such file."""
    name = "generation_config.json"
    return read_object(folder, name) if (folder / name).exists() else None


def read_object(folder: Path, name: str) -> Config:
    values = read_json(folder, name)
    if not isinstance(values, dict):
        raise CheckpointError(f"{name}: expected a JSON object, found {type(values).__name__}")
    return Config(values, name)


def read_json(folder: Path, name: str, *, required: bool = True) -> Any:
    """What a JSON file holds; None where it is missing and need not be there."""
    if not required and not (folder / name).exists():
        return None
    text = read_text(folder, name)  # its errors are not those of JSON
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}: expected JSON, found {error}") from error


def read_text(folder: Path, name: str) -> str:
    path = folder / name
    if not path.exists():
        raise CheckpointError(f"{folder}: expected {name}, found none")
    if not path.is_file():  # a FIFO would block
        raise CheckpointError(f"{name}: expected a file, found something else at {path}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{name}: expected UTF-8 text, found {error}") from error


class Shards:
    """The safetensors files of a directory, their headers read.

    Attributes:
        found: shape and type of every tensor.
    """

    def __init__(self, folder: Path) -> None:
        self.found: dict[str, Found] = {}
        self._parts: dict[str, Part] = {}
        self._files: dict[str, Path] = {}
        if (folder / _SINGLE).is_file():
            self._read_header(folder / _SINGLE)
        elif (folder / _INDEX).is_file():
            self._read_index(folder)
        else:
            raise CheckpointError(_no_weights(folder))

    def _read_index(self, folder: Path) -> None:
        index = read_json(folder, _INDEX)
        where = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
            raise CheckpointError(f"{_INDEX}: weight_map: expected a file for each tensor")
        files = sorted(set(where.values()))
        for file in files:
            if Path(file).name != file:
                raise CheckpointError(f"{_INDEX}: expected files in its folder, found {file!r}")
            if not (folder / file).is_file():
                raise CheckpointError(
                    f"{file}: expected this file, {_INDEX} names it, found none in {folder}"
                )
        held = {file: self._read_header(folder / file) for file in files}
        for name, file in where.items():
            if name not in held[file]:
                raise CheckpointError(
                    f"{file}: expected {name}, {_INDEX} says so, found no such tensor in this file"
                )
            self._files[name] = folder / file

    def _read_header(self, path: Path) -> set[str]:
        with open_safetensors(path) as file:
            names = set(file.keys())
            for name in names:
                entry = file.get_slice(name)
                kind = entry.get_dtype()
                self.found[name] = Found(tuple(entry.get_shape()), _DTYPES.get(kind, kind))
                self._files[name] = path
        return names

    def read_layout(self, names: Names, sizes: Sizes, where: str) -> None:
        """Rename what ``found`` has as a mixture of experts is named, fused tensors in parts."""
        self.found, self._parts = read_layout(self.found, names, sizes, where)

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some of its rows."""
        with open_safetensors(self._file(name)) as file:
            if rows is None and name not in self._parts:
                return file.get_tensor(name)
            others = (slice(None),) * (len(self.found[name].shape) - 1)
            return self._read(file, name, (slice(None) if rows is None else rows, *others))

    def rows(self, name: str, count: int) -> Tensor:
        """The first rows of a tensor; the rest is not read."""
        return self.tensor(name, slice(count))

    def _file(self, name: str) -> Path:
        part = self._parts.get(name)
        return self._files[name if part is None else part.stored]

    def _read(self, file: Any, name: str, index: Index) -> Tensor:
        part = self._parts.get(name)
        if part is None:
            return file.get_slice(name)[index]
        return file.get_slice(part.stored)[part.index(index)]

    def load(
        self,
        wanted: Sequence[Slot],
        device: torch.device,
        dtype: torch.dtype,
        partition: Partition | None = None,
        updates: Updates | None = None,
    ) -> dict[str, Tensor]:
        """Allocate the transformer's tensors and read each weight straight into its place.

        With a partition, of its part alone; nothing else is read. ``updates`` are merged on the
        way, by the name of the weight.
        """
        loaded: dict[str, Tensor] = {}
        targets: dict[Path, list[tuple[str, Index, Tensor]]] = {}
        for slot in wanted:
            taken = slot.index if partition is None else partition.index(slot)
            if taken is None:
                continue
            shapes = [
                tuple(len(range(n)[part]) for n, part in zip(shape, index, strict=True))
                for (_, shape), index in zip(slot.sources, taken, strict=True)
            ]
            rows = [shape[0] for shape in shapes]
            kind = slot.dtype(dtype)
            whole = torch.empty(sum(rows), *shapes[0][1:], dtype=kind, device=device)
            loaded[slot.name] = whole
            for (name, _), index, view in zip(slot.sources, taken, whole.split(rows), strict=True):
                targets.setdefault(self._file(name), []).append((name, index, view))
        for path, entries in targets.items():
            with open_safetensors(path) as file:
                for name, index, view in entries:
                    part = self._read(file, name, index)
                    update = (updates or {}).get(name)
                    view.copy_(part if update is None else update.merged(part, index, dtype))
        return loaded


def open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(
            f"{path.name}: expected a whole safetensors file, found {path.stat().st_size} bytes "
            f"that are none: {error}"
        ) from error


def _no_weights(folder: Path) -> str:
    expected = f"{folder}: expected {_SINGLE} or {_INDEX}"
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    pickles += sorted(path.name for path in folder.glob("*.pt*"))
    if pickles:
        every = pickles[0] if len(pickles) == 1 else f"*{Path(pickles[0]).suffix}"
        return f"{expected}, found {pickles[0]}: {_CONVERT.format(every)}"
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    return f"{expected}, found {', '.join(others[:4]) or 'no weights'}"
