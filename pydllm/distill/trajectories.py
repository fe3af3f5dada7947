"""Teacher trajectories: the teacher's own answers and the order in which it unmasked them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pydllm._backend.errors import CheckpointError
from pydllm.decoding import Static, generate
from pydllm.models import Model

# Positions are kept in 16 bits.
LONGEST = 2**15 - 1
_DTYPES = {"ids": torch.int32, "prompt_length": torch.int32, "step_map": torch.int16}


@dataclass(frozen=True)
class Trajectories:
    """``N`` decoded sequences and the step at which each answer token was written.

    Attributes:
        ids: ``(N, L)`` int32: prompt, then ``n`` answer tokens, then padding of no meaning.
        prompt_length: ``(N,)`` int32.
        step_map: ``(N, n)`` int16, a permutation of 0 to n - 1 in each row: the position is a mask
            before that step and stays clean after it. What the teacher filled after an
            EOS counts as written after everything else, one position per step from the left.
    """

    ids: Tensor
    prompt_length: Tensor
    step_map: Tensor

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, rows: Tensor) -> Trajectories:
        return Trajectories(self.ids[rows], self.prompt_length[rows], self.step_map[rows])


def extract(
    teacher: Model,
    prompts: Sequence[Sequence[int]] | Sequence[str],
    *,
    max_new_tokens: int,
    block_length: int = 32,
    score: str = "confidence",
    temperatures: Sequence[float] = (0.0,),
    accept: Callable[[int, str], bool] | None = None,
    seed: int = 0,
    backend: str | None = None,
) -> Trajectories:
    """Decode prompts with the teacher, one token per step, and record the order (arXiv 2601.07568).

    Differs from the published extraction where that one is wrong: the prompts are the very tokens
    that training sees (it decoded raw text and trained on templated text), and a rejected answer
    takes its trajectory with it (its filter was off, and would have shifted the rows). The steps
    are kept, not every intermediate sequence.

    Args:
        teacher: any model that ``pydllm.generate`` decodes.
        prompts: token ids, or strings where the teacher has a tokenizer; a chat template is the
            caller's to apply.
        max_new_tokens: answer length ``n``, at most 32767.
        block_length: of the teacher's blocks, in tokens.
        score: which position is written first, as in ``Static``: the published choice is
            ``"confidence"`` for LLaDA and ``"entropy"`` for Dream.
        temperatures: tried in turn until the answer is accepted.
        accept: called with a prompt's index and the answer's text; False tries the next
            temperature, and drops the prompt after the last. None accepts everything.
        seed: of the noise at temperatures above 0.
        backend: as in ``pydllm.generate``.

    Returns:
        The accepted trajectories, in the order of the prompts, on the CPU.

    Raises:
        ValueError: as ``pydllm.generate``; an answer too long; ``accept`` without a tokenizer.
    """
    if max_new_tokens > LONGEST:
        raise ValueError(f"max_new_tokens: expected at most {LONGEST}, got {max_new_tokens}")
    if len(temperatures) == 0:
        raise ValueError("temperatures: expected at least one, got none")
    if accept is not None and teacher.tokenizer is None:
        raise ValueError("accept: expected a teacher with a tokenizer, got one without")
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    open_rows = list(range(len(prompts)))
    for temperature in temperatures:
        chosen: Any = [prompts[row] for row in open_rows]
        result = generate(
            teacher,
            chosen,
            Static(block_length=block_length, score=score),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            request_ids=open_rows,
            backend=backend,
        )
        result.expect_complete()
        for place, row in enumerate(open_rows):
            if accept is None or (result.text is not None and accept(row, result.text[place])):
                kept[row] = (result.sequences[place], result.step_map[place])
        open_rows = [row for row in open_rows if row not in kept]
        if not open_rows:
            break
    return pack([kept[row] for row in sorted(kept)], max_new_tokens)


def pack(pairs: Sequence[tuple[Tensor, Tensor]], count: int) -> Trajectories:
    """Sequences with ``count`` answer tokens, and the step that wrote each of these; -1: none."""
    longest = max((len(ids) for ids, _ in pairs), default=count)
    ids = torch.zeros(len(pairs), longest, dtype=torch.int32)
    step_map = torch.empty(len(pairs), count, dtype=torch.int16)
    for row, (sequence, written) in enumerate(pairs):
        ids[row, : len(sequence)] = sequence
        # Rank of the position by (step, place); -1, filled after an EOS, comes last.
        order = written.masked_fill(written < 0, LONGEST).argsort(stable=True)
        step_map[row, order] = torch.arange(count, dtype=torch.int16)
    lengths = torch.tensor([len(ids) - count for ids, _ in pairs], dtype=torch.int32)
    return Trajectories(ids, lengths, step_map)


def join(parts: Sequence[Trajectories]) -> Trajectories:
    """Several sets as one; all must have answers of one length."""
    lengths = sorted({part.step_map.shape[1] for part in parts})
    if len(lengths) != 1:
        raise ValueError(f"parts: expected trajectories of one answer length, got {lengths}")
    longest = max(part.ids.shape[1] for part in parts)
    ids = [torch.nn.functional.pad(p.ids, (0, longest - p.ids.shape[1])) for p in parts]
    return Trajectories(
        torch.cat(ids),
        torch.cat([part.prompt_length for part in parts]),
        torch.cat([part.step_map for part in parts]),
    )


def save_trajectories(trajectories: Trajectories, path: Path) -> None:
    """Write a safetensors file; it appears whole or not at all."""
    tensors = {name: getattr(trajectories, name).contiguous() for name in _DTYPES}
    save_file(tensors, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)


def load_trajectories(path: Path, vocab_size: int) -> Trajectories:
    """Read what ``save_trajectories`` wrote; CheckpointError where it is anything else."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: expected a file of trajectories, found {error}") from error
    found = {name: tensor.dtype for name, tensor in tensors.items()}
    if found != _DTYPES:
        raise CheckpointError(f"{path}: expected {_DTYPES}, found {found}")
    ids, lengths, steps = (tensors[name] for name in _DTYPES)
    fits = ids.ndim == steps.ndim == 2 and lengths.shape == ids.shape[:1] == steps.shape[:1]
    if not fits:
        shapes = [tuple(tensor.shape) for tensor in (ids, lengths, steps)]
        raise CheckpointError(f"{path}: expected (N, L), (N) and (N, n), found {shapes}")
    ranks = torch.arange(steps.shape[1], dtype=torch.int16).expand_as(steps)
    if not torch.equal(steps.sort(1).values, ranks):
        raise CheckpointError(f"{path}: step_map: expected each of the n steps once in every row")
    longest = ids.shape[1] - steps.shape[1]
    if len(ids) and not (lengths.min() >= 0 and lengths.max() <= longest):
        raise CheckpointError(f"{path}: prompt_length: expected at most {longest}")
    if len(ids) and not (ids.min() >= 0 and ids.max() < vocab_size):
        raise CheckpointError(f"{path}: ids: expected token ids in [0, {vocab_size})")
    return Trajectories(ids, lengths, steps)
