"""d3LLM's trajectory data: one record per prompt, with the whole sequence after every step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pydllm._backend.errors import CheckpointError, PydllmError
from pydllm.distill.trajectories import LONGEST, Trajectories, pack

FIELDS = ("prompt_ids", "trajectory", "final_output")
# Records of a parquet or arrow file that are turned into lists at a time.
_BATCH = 16


class Recorded(NamedTuple):
    """Trajectories of a data set.

    Attributes:
        trajectories: of the records that are kept, in their order.
        mask_id: the token that stood where nothing was decoded yet; None: nothing was kept.
        records: that were read.
        incorrect: left out because ``is_correct`` is false.
        empty: left out because they have no trajectory, or an answer that keeps a mask.
    """

    trajectories: Trajectories
    mask_id: int | None
    records: int
    incorrect: int
    empty: int


def read_published(
    paths: Sequence[Path], *, max_new_tokens: int | None = None, keep_incorrect: bool = False
) -> Recorded:
    """Read trajectory data that d3LLM's scripts wrote (arXiv 2601.07568).

    Args:
        paths: files or folders of them: ``trajectory_part_*.json`` (a list of records), JSON lines,
            and, where pyarrow is installed, parquet files or what ``save_to_disk`` of datasets
            writes. A record has ``prompt_ids``, ``final_output`` (prompt and answer) and
            ``trajectory`` (the sequence after each step); other fields but ``is_correct`` are not
            read.
        max_new_tokens: answers are truncated to this length; None keeps them whole.
        keep_incorrect: also records whose ``is_correct`` is false. The published training keeps
            them, its filter is switched off.

    Returns:
        The order in which each answer was written; the targets are the recorded answers. Tokens
        that were written in one step count as written from the left.

    Raises:
        ValueError: no file, or a path that is none.
        CheckpointError: a record that is none of these, named by its file and number.
        PydllmError: a parquet or arrow file without pyarrow.
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    counts = {"records": 0, "incorrect": 0, "empty": 0}
    length, mask_id = max_new_tokens, None
    for place, record in _records(paths):
        counts["records"] += 1
        if not keep_incorrect and record.get("is_correct") is False:
            counts["incorrect"] += 1
            continue
        found = _read(place, record)
        if found is None:
            counts["empty"] += 1
            continue
        ids, steps, mask = found
        if mask_id not in (None, mask):
            raise CheckpointError(f"{place}: trajectory: expected the mask {mask_id}, found {mask}")
        mask_id = mask
        length = length or len(steps)
        if len(steps) < length or (max_new_tokens is None and len(steps) > length):
            raise CheckpointError(
                f"{place}: expected an answer of {length} tokens, found {len(steps)}"
            )
        pairs.append((ids[: len(ids) - len(steps) + length], steps[:length]))
    return Recorded(pack(pairs, length or 1), mask_id, **counts)


def _read(place: str, record: dict[str, Any]) -> tuple[Tensor, Tensor, int] | None:
    """Sequence, the step of every answer token, and the mask; None: no trajectory to learn from."""
    missing = [name for name in FIELDS if name not in record]
    if missing:
        raise CheckpointError(
            f"{place}: expected a record with {', '.join(FIELDS)}, found none of the name "
            f"{missing[0]}"
        )
    if not record["trajectory"]:
        return None
    try:
        prompt, states, ids = (torch.tensor(record[name]) for name in FIELDS)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{place}: expected lists of token ids, found {error}") from error
    answer = ids.numel() - prompt.numel()
    shapes = prompt.ndim == ids.ndim == 1 and tuple(states.shape[1:]) == tuple(ids.shape)
    whole = not any(t.is_floating_point() or t.dtype == torch.bool for t in (states, ids))
    if not (shapes and whole and states.ndim == 2 and 0 < answer <= LONGEST):
        raise CheckpointError(
            f"{place}: expected token ids: prompt_ids (P,), final_output (P + n,) and trajectory "
            f"(steps, P + n), found {tuple(prompt.shape)}, {tuple(ids.shape)} and "
            f"{tuple(states.shape)}"
        )
    if prompt.numel() and not torch.equal(ids[: prompt.numel()], prompt.to(ids.dtype)):
        raise CheckpointError(f"{place}: final_output: expected to begin with prompt_ids")
    final, states = ids[-answer:], states[:, -answer:]
    open_yet = states != final
    masks = states[open_yet].unique().tolist()
    later = (open_yet[1:] & ~open_yet[:-1]).any()
    if len(masks) != 1 or bool(later):
        raise CheckpointError(
            f"{place}: trajectory: expected one mask id where final_output is not yet written, and "
            f"no token to change, found {masks[:4]}"
        )
    if masks[0] in final.tolist():
        return None
    return ids, open_yet.sum(0, dtype=torch.int32), masks[0]


def _records(paths: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each record is, and the record."""
    for path in _files(paths):
        read = {".json": _json, ".jsonl": _lines}.get(path.suffix, _arrow)
        for number, record in enumerate(read(path)):
            place = f"{path}, record {number}"
            if not isinstance(record, dict):
                raise CheckpointError(f"{place}: expected an object, found {record!r:.40}")
            yield place, record


def _files(paths: Sequence[Path]) -> list[Path]:
    known = (".json", ".jsonl", ".parquet", ".arrow")
    files = []
    for path in paths:
        if path.is_dir():
            # What save_to_disk of datasets writes beside its tables.
            notes = ("dataset_info.json", "state.json", "dataset_dict.json")
            found = [
                p for p in sorted(path.rglob("*")) if p.suffix in known and p.name not in notes
            ]
        else:
            found = [path] if path.is_file() and path.suffix in known else []
        if not found:
            raise ValueError(
                f"--trajectories: expected a file, or a folder of files, ending in "
                f"{', '.join(known)}, got {path}"
            )
        files += found
    return files


def _json(path: Path) -> list[Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(found, list):
        raise CheckpointError(f"{path}: expected a list of records, got {type(found).__name__}")
    return found


def _lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise CheckpointError(f"{path}:{number}: expected JSON, got {error}") from error


def _arrow(path: Path) -> Iterator[Any]:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise PydllmError(
            f"{path}: {path.suffix} files need pyarrow (pip install pyarrow)"
        ) from None
    wanted = [*FIELDS, "is_correct"]
    try:
        if path.suffix == ".parquet":
            file = parquet.ParquetFile(path)
            names = [name for name in wanted if name in file.schema_arrow.names]
            for batch in file.iter_batches(_BATCH, columns=names):
                yield from batch.to_pylist()
            return
        with arrow.memory_map(str(path)) as source, arrow.ipc.open_stream(source) as batches:
            for batch in batches:
                table = arrow.Table.from_batches([batch])
                table = table.select([name for name in wanted if name in table.column_names])
                for first in range(0, len(table), _BATCH):
                    yield from table.slice(first, _BATCH).to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise CheckpointError(f"{path}: expected a table, got {error}") from error
