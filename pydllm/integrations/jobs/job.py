"""What a batch job still has to do, and what it has done: files in a folder, written whole.

    out/job.json       what decides the answers; a job goes on only where it is the same
    out/parts/*.jsonl  the answers of a batch, renamed into place when they are complete
    out/results.jsonl  all of them in the order of the prompts, when nothing is left

A row is done when a part holds an answer to it; rows that failed are tried again. A batch that
was cut off has no part, one that ran twice has written the same part twice: nothing is lost and
nothing is there two times.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pydllm._backend.errors import PydllmError

_OBJECT = "a JSON object with a 'prompt', text or token ids"


@dataclass(frozen=True)
class Row:
    """A prompt: its line number from 0, what the user calls it, and text or token ids."""

    index: int
    id: Any
    prompt: str | list[int]


@dataclass(frozen=True)
class Summary:
    """A finished job: rows in the file, how many failed, how many were done before this run."""

    rows: int
    failed: int
    resumed: int
    forwards: int
    tokens: int
    sha256: str


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there completely or not at all.

    Raises:
        PydllmError: it cannot be written: no space, no permission.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise PydllmError(f"{path}: cannot be written: {error.strerror or error}") from error


def read_json_line(line: str | bytes) -> Any:
    """One JSON value.

    Raises:
        ValueError: not JSON, NaN or an infinity, which JSON lacks, or nested too deeply.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"got {constant}")

    try:
        return json.loads(line, parse_constant=refuse)
    except RecursionError:
        raise ValueError("got one nested too deeply") from None
    except ValueError as error:
        got = str(error) if str(error).startswith("got ") else f"got {line[:60]!r} ({error})"
        raise ValueError(got) from None


def claim(out: Path, settings: dict[str, Any]) -> None:
    """Make a folder that of the job with these settings.

    Raises:
        PydllmError: it cannot be made, or holds another job.
    """
    try:
        (out / "parts").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PydllmError(f"--out: {out / 'parts'} cannot be made: {error}") from error
    path = out / "job.json"
    if not path.exists():
        write_whole(path, json.dumps(settings, indent=2) + "\n")
    _compare(out, settings)  # another process may have been first


def _compare(out: Path, settings: dict[str, Any]) -> None:
    path = out / "job.json"
    if not path.exists():
        return
    found = _read_own(path, path.read_bytes())
    for key in {**settings, **found}:
        if settings.get(key) != found.get(key):
            raise PydllmError(
                f"--out: {out} holds another job: {key} was {found.get(key)!r}, "
                f"is {settings.get(key)!r} (take another folder)"
            )


def _read_own(path: Path, text: bytes) -> dict[str, Any]:
    """An object that this job has written."""
    try:
        record = read_json_line(text)
    except ValueError as error:
        raise PydllmError(
            f"{path}: expected JSON, {error}: the file is damaged; delete it to go on"
        ) from None
    if not isinstance(record, dict):
        raise PydllmError(f"{path}: expected a JSON object, got {type(record).__name__}")
    return record


class Job:
    """The rows of a file of prompts and the folder of their answers.

    Args:
        data: a JSON object a line, ``{"prompt": text or ids, "id": anything}``; ``id`` is the line
            number where there is none. Blank lines are left out.
        out: the folder; ``claim`` makes it where it does not exist.
        recipe: what else decides the answers, as JSON values.

    Raises:
        PydllmError: the file cannot be read or is empty, the folder holds another job (says what
            differs), or a file in it is damaged.
    """

    def __init__(self, data: Path, out: Path, recipe: dict[str, Any]) -> None:
        try:
            content = data.read_bytes()
        except OSError as error:
            raise PydllmError(f"--data: expected a file of prompts, got {error}") from error
        self.out, self.parts = out, out / "parts"
        self.rows: list[Row] = []
        self.unreadable: list[dict[str, Any]] = []
        for index, line in enumerate(content.splitlines()):
            if line.strip():
                self._read(index, line)
        self.count = len(self.rows) + len(self.unreadable)
        if self.count == 0:
            raise PydllmError(f"--data: expected a JSON object a line in {data}, got an empty file")
        self.settings = recipe | {"sha256 of the prompts": hashlib.sha256(content).hexdigest()}
        _compare(out, self.settings)
        self.done = {record["index"] for record in self.records() if "error" not in record}
        self.resumed = len(self.done)

    def _read(self, index: int, line: bytes) -> None:
        name: Any = index
        try:
            record = read_json_line(line)
            if not isinstance(record, dict):
                raise ValueError(f"got {type(record).__name__}")
            name = record.get("id", index)
            prompt = record.get("prompt")
            if not isinstance(prompt, str) and not (
                isinstance(prompt, list) and all(type(token) is int for token in prompt)
            ):
                raise ValueError(f"got the prompt {prompt!r:.80}")
        except ValueError as error:
            message = f"line {index + 1}: expected {_OBJECT}, {error}"
            self.unreadable.append({"index": index, "id": name, "error": message})
        else:
            self.rows.append(Row(index, name, prompt))

    def claim(self) -> None:
        """Make the folder this job's; nothing is written before."""
        claim(self.out, self.settings)

    def batches(self, size: int) -> list[list[Row]]:
        """Rows that are left, ``size`` at a time, prompts of like length together.

        The longest come first: what does not fit into memory fails at once, and the short ones fill
        the workers' last minute.
        """
        left = [row for row in self.rows if row.index not in self.done]
        left.sort(key=lambda row: (-len(row.prompt), row.index))
        return [left[first : first + size] for first in range(0, len(left), size)]

    def records(self) -> Iterator[dict[str, Any]]:
        """What the parts hold."""
        for path in sorted(self.parts.glob("*.jsonl")):
            for line in path.read_bytes().splitlines():
                record = _read_own(path, line)
                if "index" not in record:
                    raise PydllmError(f"{path}: expected rows with an index, got {line[:60]!r}")
                yield record

    def finish(self) -> Summary:
        """Write ``results.jsonl`` in the order of the prompts.

        Raises:
            PydllmError: rows are missing.
        """
        written = sorted(self.records(), key=lambda record: "error" not in record)
        records = {record["index"]: record for record in written}  # an answer before an error
        records |= {record["index"]: record for record in self.unreadable}
        if len(records) != self.count:
            raise PydllmError(
                f"{self.out}: expected {self.count} rows, got {len(records)}: "
                "run the same command again for those that are missing"
            )
        ordered = [records[index] for index in sorted(records)]
        text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in ordered)
        write_whole(self.out / "results.jsonl", text)
        answered = [record for record in ordered if "error" not in record]
        return Summary(
            rows=self.count,
            failed=self.count - len(answered),
            resumed=self.resumed,
            forwards=sum(record["nfe"] for record in answered),
            tokens=sum(record["tokens"] for record in answered),
            sha256=hashlib.sha256(text.encode()).hexdigest(),
        )


def part_name(rows: Iterable[Row]) -> str:
    """The file of a batch: the same for the same rows."""
    indices = [row.index for row in rows]
    digest = hashlib.sha256(json.dumps(indices).encode()).hexdigest()[:12]
    return f"{min(indices):09d}-{digest}.jsonl"
