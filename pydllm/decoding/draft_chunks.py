"""Drafts of a round in chunks, as a CPU makes and verifies them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pydllm import ops

FIRST_CHUNK = 8  # drafts of the first chunk of a call
_GROWTH = 4  # a chunk has this many times the drafts of the one before


@dataclass
class DraftChunk:
    """Drafts ``first`` to ``stop`` of some sequences."""

    rows: Tensor | slice  # which sequences of the batch, int64
    first: int
    stop: int

    @property
    def empty(self) -> bool:
        return isinstance(self.rows, Tensor) and not len(self.rows)

    def take(self, grid: Tensor) -> Tensor:
        """The part of a tensor ``(b, width, ...)``."""
        return grid[self.rows, self.first : self.stop]

    def of(self, numbers: float | Tensor, width: int) -> float | Tensor:
        """The part of what is one number, or one for each of ``b * width`` rows."""
        if not isinstance(numbers, Tensor):
            return numbers
        return self.take(numbers.view(-1, width)).flatten()

    def following(self, going: Tensor, width: int) -> DraftChunk:
        """The next drafts, more of them, of the sequences that ``going`` says. Waits for it."""
        chosen = going.nonzero().squeeze(1)
        rows = chosen if isinstance(self.rows, slice) else self.rows[chosen]
        return DraftChunk(
            rows, self.stop, min(self.stop + _GROWTH * (self.stop - self.first), width)
        )


def next_chunk(length: Tensor) -> int:
    """Drafts of the next round's first chunk: what this round wrote, and the end of such a run."""
    return 1 + math.ceil(length.float().mean().item())


def correct(token: Tensor, verdict: ops.Accepted, drafts: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and their number where the target replaces the first draft that differs from it."""
    wrong = verdict.accepted < drafts
    place = verdict.accepted.clamp(max=token.shape[1] - 1).long()[:, None]
    # A row of NaN has no target: its draft goes through, or the round would never end.
    found = (wrong & (verdict.correction >= 0))[:, None]
    right = torch.where(found, verdict.correction[:, None], token.gather(1, place))
    return token.scatter(1, place, right), verdict.accepted + wrong
