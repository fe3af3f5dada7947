"""What FreeDave's two modes share: candidates, their longest chain, and how many to look at."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pydllm.decoding.loop import State

MOST = 32
# Rows of one forward up to which more rows cost little: below them a bf16 forward on current GPUs
# reads weights longer than it computes (989 TFLOP/s over 3.35 TB/s is about 295 rows).
ROW_BUDGET = 256


@dataclass(frozen=True)
class Drafts:
    """How many candidates a forward looks at, and under which noise.

    A fixed number, or with ``adaptive`` what each sequence wishes for, and of that the most that
    the row budget allows: candidates are packed, so all sequences of a batch have equally many.
    A sequence wishes for twice its mean run of accepted steps, which is longer than 86 % of the
    runs if steps fail independently, and never for more steps than it has masks.
    """

    most: int
    adaptive: bool
    fresh_noise: bool

    def wish(self, state: State, masks: Tensor) -> Tensor:
        """Candidates ``(b,)`` int32, at least 1 where there are masks, else 0."""
        if not self.adaptive:
            return torch.minimum(masks, torch.full_like(masks, self.most))
        return torch.minimum((2 * state.run).ceil().int().clamp(1, self.most), masks)

    def ahead(self, branches: int) -> int:
        """Steps that the next forward may verify, after one of so many candidates."""
        return min(self.most, max(4, 2 * branches)) if self.adaptive else self.most

    def draw(self, state: State, branches: int) -> Tensor | None:
        """The last word of the noise key of each candidate: by default what static decoding has."""
        if not self.fresh_noise:
            return None
        branch = torch.arange(branches, dtype=torch.int32, device=state.nfe.device)
        return (state.nfe[:, None] * MOST + branch).flatten()

    def branches(self, wish: int, rows: int) -> int:
        """What the largest wish comes to, where one candidate of all sequences has so many rows."""
        if self.adaptive:
            wish = min(wish, max(1, ROW_BUDGET // max(rows, 1)))
        return max(1, min(wish, self.most))


def candidate(state: State) -> State:
    """A copy that counts the baseline's steps in ``nfe``: a random order is keyed by them."""
    return replace(state.copy(), nfe=state.steps.clone())


def longest_chain(packed: Tensor, stepped: Tensor, branches: int) -> Tensor:
    """Index ``(b,)`` of each sequence's last candidate that is a state of the baseline.

    Candidate 0 is one; candidate j + 1 is if candidate j is and the baseline steps from j to j + 1.
    """
    now, then = (x.unflatten(0, (-1, branches)) for x in (packed, stepped))
    agrees = (then[:, :-1] == now[:, 1:]).all(-1)
    return agrees.cumprod(1).sum(1)


def advance(state: State, reached: State, masks: Tensor) -> None:
    """Make ``reached`` the state; the current forward made what is new in it certain."""
    new, some = state.x != reached.x, masks > 0
    state.step_map.copy_(torch.where(new, state.nfe[:, None], state.step_map))
    state.run += (reached.nfe - state.steps - state.run) * (some / 4)
    state.nfe += some
    state.x.copy_(reached.x)
    state.decoded.copy_(reached.decoded)
    state.steps.copy_(reached.nfe)
