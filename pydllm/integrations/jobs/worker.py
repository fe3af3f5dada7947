"""A process that answers batches of a job: loads the model once, writes a part per batch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from pydllm._backend.env import BACKENDS
from pydllm._checks import FLOATS, check_choice, check_int, check_number, describe
from pydllm.decoding import generate
from pydllm.decoding.settings import ALGORITHMS, fit_blocks, make_algorithm, plain_name
from pydllm.integrations._arguments import check_temperature
from pydllm.integrations.jobs.job import Row, part_name, write_whole
from pydllm.models import load
from pydllm.models.load import find_folder
from pydllm.models.parallel import is_first_process

_CHECKPOINT_FILES = (".json", ".safetensors", ".jinja", ".txt", ".model")
DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in FLOATS)
_SAMPLE, _MAX_HEADER = 512, 2**27  # bytes


@dataclass(frozen=True)
class Recipe:
    """What decides an answer, in values that travel between processes; see ``pydllm.generate``.

    Attributes:
        temperature and what follows it: as in ``generate``.
        model, verifier: folders or hub ids; the verifier is loaded for an algorithm that has one.
        algorithm, settings: as ``make_algorithm`` takes them.
        dtype: a name of torch's, or None.
    """

    model: str
    algorithm: str
    settings: tuple[tuple[str, str], ...]
    verifier: str
    max_new_tokens: int
    temperature: float
    seed: int
    dtype: str | None
    backend: str | None
    top_k: int | None = None
    top_p: float | None = None
    guidance: float = 0.0
    stop: list[str] | None = None
    ignore_eos: bool = False
    suppress_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("model", "verifier", "algorithm"):
            if not isinstance(value := getattr(self, name), str):
                raise TypeError(f"{name}: expected a string, got {describe(value)}")
        if not isinstance(self.settings, tuple | list):
            raise TypeError(f"settings: expected pairs of strings, got {describe(self.settings)}")
        check_int("max_new_tokens", self.max_new_tokens, 1)
        check_temperature(self.temperature)
        if self.top_p is not None:
            check_number("top_p", self.top_p, 0, 1, above=True)
        if self.top_k is not None:
            check_int("top_k", self.top_k, 1)
        check_int("seed", self.seed, 0, 2**64 - 1)
        if self.backend is not None:
            check_choice("backend", self.backend, BACKENDS)
        if self.dtype is not None:
            check_choice("dtype", self.dtype, DTYPES)

    def check(self) -> None:
        """Raise for a name or a number that no model can make right; loads nothing.

        Raises:
            PydllmError, ValueError: no such folder, algorithm or parameter, or one out of range.
        """
        find_folder(self.model)
        if self._has_verifier():
            find_folder(self.verifier)
            return  # which its algorithm checks beside its numbers
        make_algorithm(self.algorithm, dict(self.settings))

    def as_json(self) -> dict[str, Any]:
        """What decides an answer, with fingerprints of the checkpoints that are read."""
        record = json.loads(json.dumps(asdict(self)))
        record["fingerprint of the model"] = fingerprint(find_folder(self.model))
        if self._has_verifier():
            record["fingerprint of the verifier"] = fingerprint(find_folder(self.verifier))
        return record

    def _has_verifier(self) -> bool:
        kind = ALGORITHMS.get(plain_name(self.algorithm))
        return kind is not None and "verifier" in {field.name for field in fields(kind)}


def fingerprint(folder: Path) -> str:
    """A digest of a checkpoint's files, the same for a copy of it elsewhere.

    Small files are read whole. Of weights the header is read, and of each tensor its first, middle
    and last bytes: training, merging or converting changes those, and a large file is not read.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix not in _CHECKPOINT_FILES or not path.is_file():
            continue
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            if path.suffix != ".safetensors":
                digest.update(file.read())
                continue
            start = int.from_bytes(file.read(8), "little")
            header = file.read(min(start, _MAX_HEADER))
            digest.update(header)
            try:
                tensors = json.loads(header).values()
            except ValueError:
                continue  # loading it tells more
            for first, last in (t["data_offsets"] for t in tensors if "data_offsets" in t):
                for place in {first, (first + last) // 2, max(first, last - _SAMPLE)}:
                    file.seek(8 + start + place)
                    digest.update(file.read(min(_SAMPLE, last - place)))
    return digest.hexdigest()


class Worker:
    """Answers batches, ``max_batch`` rows at a time, and writes them to ``parts``.

    Noise is keyed by a row's place in the file: a row's answer does not depend on its batch, but
    for the bits of a matrix product of another height.
    """

    def __init__(
        self,
        recipe: Recipe,
        parts: Path,
        max_batch: int,
        device: str | None = None,
        expert_parallel: bool = False,
    ) -> None:
        options: dict[str, Any] = {"device": device, "tp": None}
        options["dtype"] = None if recipe.dtype is None else getattr(torch, recipe.dtype)
        self.recipe, self.parts, self.max_batch = recipe, parts, max_batch
        self.model = load(recipe.model, expert_parallel=expert_parallel, **options)
        settings = dict(recipe.settings)
        algorithm = make_algorithm(
            recipe.algorithm, settings, lambda: load(recipe.verifier, **options)
        )
        self.algorithm = fit_blocks(algorithm, settings, self.model)
        self.algorithm.check(self.model, recipe.max_new_tokens)  # before a row is blamed for it
        self.writes = is_first_process()

    def __call__(self, rows: Sequence[Row]) -> tuple[int, int]:
        """Answer a batch and write its part; how many rows it had, and how many of them failed."""
        records = self._answer(rows)
        if self.writes:
            text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
            write_whole(self.parts / part_name(rows), text)
        return len(records), sum("error" in record for record in records)

    def _answer(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """A record per row. Where the batch is refused, or too large, its halves are tried: one bad
        row is alone in the end, and the others have their answers.
        """
        recipe = self.recipe
        try:
            made = generate(
                self.model,
                [row.prompt for row in rows],
                self.algorithm,
                max_new_tokens=recipe.max_new_tokens,
                temperature=recipe.temperature,
                top_k=recipe.top_k,
                top_p=recipe.top_p,
                guidance=recipe.guidance,
                stop=recipe.stop,
                ignore_eos=recipe.ignore_eos,
                suppress_ids=recipe.suppress_ids,
                seed=recipe.seed,
                backend=recipe.backend,
                request_ids=[row.index for row in rows],
                max_batch=self.max_batch,
            )
            made.expect_complete()
        except (ValueError, TypeError, torch.OutOfMemoryError) as error:
            if len(rows) == 1:
                message = str(error).replace("prompts[0]", "prompt")
                return [{"index": rows[0].index, "id": rows[0].id, "error": message}]
            half = len(rows) // 2
            return self._answer(rows[:half]) + self._answer(rows[half:])
        records = []
        for place, row in enumerate(rows):
            nfe = made.nfe[place].item()
            answer: dict[str, Any] = {"index": row.index, "id": row.id}
            if made.text is None:
                answer["ids"] = made.sequences[place][-recipe.max_new_tokens :].tolist()
            else:
                answer["text"] = made.text[place]
            tokens = round(made.tokens_per_forward[place].item() * nfe)
            records.append(answer | {"nfe": nfe, "tokens": tokens})
        return records
