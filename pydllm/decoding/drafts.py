"""What FreeDave's two modes share: how many candidates to look at, making them, judging them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pydllm import ops
from pydllm.decoding.generation import Request
from pydllm.decoding.graph import power_of_two
from pydllm.decoding.state import Selection, State
from pydllm.decoding.step import Accept, write

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

    def bucket(self, request: Request, branches: int) -> int:
        """Candidates to look at where so many are wanted: more where shapes are static."""
        if not request.runner.static:
            return branches
        return min(power_of_two(branches), self.most)

    def branches(self, wish: int, rows: int) -> int:
        """What the largest wish comes to, where one candidate of all sequences has so many rows."""
        if self.adaptive:
            wish = min(wish, max(1, ROW_BUDGET // max(rows, 1)))
        return max(1, min(wish, self.most))


# What the next round needs of the last: a road's own, in the runner's buffers.
Carried = tuple[Any, ...]


class Verified(NamedTuple):
    """What a round came to, ``(b,)`` int32 each."""

    branch: Tensor  # the last accepted candidate
    complete: Tensor  # positions of complete blocks that it begins its window with


class Composed:
    """Candidates and steps by the baseline's own rule (``ops.unmask``): for every baseline.

    A candidate's state counts the baseline's steps in ``nfe``, because a random order is keyed by
    them; the state that is decoded counts forwards there, and the steps in ``steps``.
    """

    def __init__(
        self, request: Request, accept: Accept, drafts: Drafts, block_size: int | None
    ) -> None:
        self._request, self._accept, self._size = request, accept, block_size

    def begin(
        self,
        state: State,
        stats: ops.VocabStats,
        known: Selection,
        first: Selection,
        accept: Accept,
    ) -> Carried:
        """After a forward of the state alone: the step ``accept`` in the rows ``first``."""
        reached = _candidate(state)
        write(self._request, reached, _columns(stats, first.width), first, accept)
        _advance(state, reached)
        return self._carry(stats, known)

    def pack(self, state: State, carried: Carried, branches: int) -> State:
        """Candidates, side by side; the first is the state."""
        drafts = [_candidate(state)]
        for _ in range(branches - 1):
            drafts.append(drafts[-1].copy())
            self._step(drafts[-1], *carried)
        return State.interleave(drafts)

    def follow(
        self,
        state: State,
        carried: Carried,
        packed: State,
        stats: ops.VocabStats,
        known: Selection,
        branches: int,
    ) -> tuple[Verified, Carried]:
        """Accept the longest chain and take the step behind it; returns the chain's last candidate
        and, in a window of several blocks, how many positions of complete blocks it begins with.
        """
        stepped = packed.copy()
        self._step(stepped, stats, known.repeat(branches))
        branch = longest_chain(packed.x, stepped.x, branches)
        chosen = torch.arange(len(branch), device=branch.device) * branches + branch
        complete = self._complete(packed.x[chosen], known)
        _advance(state, stepped.keep(chosen))
        return Verified(branch.int(), complete), self._carry(_rows(stats, chosen), known)

    def keep(self, carried: Carried, rows: Tensor) -> Carried:
        """Without the other sequences."""
        stats, known = carried
        known = Selection(known.start[rows], known.length[rows], known.width)
        return self._carry(_rows(stats, rows), known)

    def _carry(self, stats: ops.VocabStats, known: Selection) -> Carried:
        return self._request.runner.hold("carried", (stats, known))

    def _step(self, state: State, stats: ops.VocabStats, known: Selection) -> None:
        """One step; of several blocks in the first with masks, if its statistics are known."""
        if self._size is None:
            write(self._request, state, stats, known, self._accept)
            return
        offsets = torch.arange(known.width, device=state.x.device)
        at = (known.start[:, None] + offsets).clamp(max=state.x.shape[1] - 1)
        masked = state.x.gather(1, at.long()).eq(self._request.mask_id)
        masked &= offsets < known.length[:, None]
        first = masked.int().argmax(1) // self._size * self._size
        index = first[:, None] + torch.arange(self._size, device=offsets.device)
        index = index.clamp(max=known.width - 1)
        block = ops.VocabStats(*(field.gather(1, index) for field in stats))
        length, start = masked.any(1).int() * self._size, known.start + first.int()
        write(self._request, state, block, Selection(start, length, self._size), self._accept)

    def _complete(self, x: Tensor, known: Selection) -> Tensor:
        if self._size is None:
            return torch.zeros_like(known.start)
        position = torch.arange(x.shape[1], device=x.device)
        masked = x.eq(self._request.mask_id) & (position >= known.start[:, None])
        first = torch.where(masked, position, x.shape[1]).amin(1) // self._size * self._size
        return torch.minimum(first - known.start, known.length).int()


class Fused:
    """The same by ``ops.draft`` and ``ops.verify``, for one token a step in an order by score."""

    def __init__(
        self, request: Request, accept: Accept, drafts: Drafts, block_size: int | None
    ) -> None:
        self._request, self._accept = request, accept
        self._size = block_size
        self._most = drafts.most

    def begin(
        self,
        state: State,
        stats: ops.VocabStats,
        known: Selection,
        first: Selection,
        accept: Accept,
    ) -> Carried:
        """As ``Composed.begin``."""
        unmasked = write(self._request, state, _columns(stats, first.width), first, accept)
        state.steps += unmasked.accepted
        candidates = ops.draft(
            state.x,
            stats.token,
            self._score(stats),
            mask_id=self._request.mask_id,
            start=known.start,
            length=known.length,
            branches=self._most,
            block_size=self._size,
            backend=self._request.backend,
        )
        return self._carry(candidates)

    def pack(self, state: State, carried: Carried, branches: int) -> State:
        """As ``Composed.pack``; only what a forward and its statistics need is repeated."""
        number = torch.arange(branches, dtype=torch.int32, device=state.x.device)
        # One candidate of several is a view with gaps, which verify does not take.
        x = carried[0][:, :branches].flatten(0, 1).contiguous()
        return replace(
            state,
            rows=state.rows.repeat_interleave(branches),
            x=x,
            decoded=(state.decoded[:, None] + number).flatten(),
            request_id=state.request_id.repeat_interleave(branches),
        )

    def follow(
        self,
        state: State,
        carried: Carried,
        packed: State,
        stats: ops.VocabStats,
        known: Selection,
        branches: int,
    ) -> tuple[Verified, Carried]:
        """As ``Composed.follow``."""
        token, score, x = (
            t.unflatten(0, (-1, branches)) for t in (stats.token, self._score(stats), packed.x)
        )
        before = state.nfe.clone()
        done = ops.verify(
            state.x,
            state.step_map,
            state.nfe,
            x,
            token,
            score,
            mask_id=self._request.mask_id,
            start=known.start,
            length=known.length,
            drafts=self._most,
            block_size=self._size,
            backend=self._request.backend,
        )
        state.decoded += done.accepted
        state.steps += done.accepted
        state.run += (done.accepted - state.run) * ((state.nfe > before) / 4)
        return Verified(done.branch, done.complete), self._carry(done.candidates)

    def keep(self, carried: Carried, rows: Tensor) -> Carried:
        """Without the other sequences."""
        return self._carry(carried[0][rows])

    def _carry(self, candidates: Tensor) -> Carried:
        return self._request.runner.hold("carried", (candidates,))

    def _score(self, stats: ops.VocabStats) -> Tensor:
        score, rule = self._accept(stats)
        return torch.zeros_like(score) if rule["rule"] == "left_to_right" else score


def longest_chain(packed: Tensor, stepped: Tensor, branches: int) -> Tensor:
    """Index ``(b,)`` of each sequence's last candidate that is a state of the baseline.

    Candidate 0 is one; candidate j + 1 is if candidate j is and the baseline steps from j to j + 1.
    """
    now, then = (x.unflatten(0, (-1, branches)) for x in (packed, stepped))
    agrees = (then[:, :-1] == now[:, 1:]).all(-1)
    return agrees.cumprod(1).sum(1)


def _candidate(state: State) -> State:
    return replace(state.copy(), nfe=state.steps.clone())


def _advance(state: State, reached: State) -> None:
    """Make ``reached`` the state; the current forward made what is new in it certain."""
    new, steps = state.x != reached.x, reached.nfe - state.steps
    state.step_map.copy_(torch.where(new, state.nfe[:, None], state.step_map))
    state.run += (steps - state.run) * ((steps > 0) / 4)
    state.nfe += steps > 0
    state.x.copy_(reached.x)
    state.decoded.copy_(reached.decoded)
    state.steps.copy_(reached.nfe)


def _rows(stats: ops.VocabStats, rows: Tensor) -> ops.VocabStats:
    return ops.VocabStats(*(field[rows] for field in stats))


def _columns(stats: ops.VocabStats, count: int) -> ops.VocabStats:
    return ops.VocabStats(*(field[:, :count] for field in stats))
