"""Rounds from left to right: draft behind the last token, verify, keep the leading run.

A round is: forward of the diffusion model over a window and the masks behind it, drafts from all of
them at once, forward of the verifier over the drafts, acceptance, commit. The sequences of a batch
work on their n-th round together, each with its own position, window and lookahead. The host reads
three numbers a sequence, once a round: how many rows each forward needs. They depend on how much
the last round accepted; padding to their bounds instead would about double the rows of a forward.
A sequence that needs none is finished and leaves the batch.

Replayed as a CUDA graph, a round has the rows that its window and its drafts can need at most: a
forward of so few mostly reads weights. The host then looks only now and then at who is finished.

On a CPU the drafts are made and verified a piece at a time, and a sequence whose run has ended
leaves the rest undone: no draft depends on those behind it, and two LM heads and the noise are most
of a round there. On a GPU a few rows cost what many do, and a piece would be a wait.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pydllm import ops
from pydllm.decoding.generation import Decoded, Request, Step
from pydllm.decoding.graph import POLL
from pydllm.decoding.state import HostNumbers, Selection, State, Window, fill_holes
from pydllm.decoding.step import forward, row_temperatures, select_rows
from pydllm.models import Model, StaticCache

_FIRST_GUESS = 8  # drafts of the first piece of a call
_GROWTH = 4  # drafts of a piece for one of the piece before


@dataclass
class Progress(State):
    """The state, and where each sequence is; what it is told for itself comes along."""

    cursor: Tensor  # (b,) int32: the first position without a token
    previous: Tensor  # (b,) int32: the cursor one round earlier, at first 0
    verified: Tensor  # (b,) int32: leading slots of the verifier's cache that are right
    verifier_nfe: Tensor  # (b,) int32
    window: Tensor  # (b,) int32
    lookahead: Tensor  # (b,) int32
    mixture: Tensor  # (b,) fp32

    def write_back(self, target: State) -> None:
        super().write_back(target)
        if target is not self and isinstance(target, Progress):
            target.verifier_nfe[self.rows] = self.verifier_nfe


class Spans(NamedTuple):
    """What a round looks at; all ``(b,)`` int32."""

    left: Tensor  # first position that the diffusion model computes
    masks: Tensor  # masks that it sees; 0: the sequence is finished
    drafts: Tensor  # of these, how many are drafted
    verify: Tensor  # rows that the verifier computes; 0: it has nothing to say


@dataclass(frozen=True)
class Rounds:
    """How a round drafts, verifies and emits.

    Attributes:
        verifier: a causal model, or None where every draft is accepted.
        mixture, window, lookahead: one value a sequence; see ``APD``.
        limit: drafts a round, or None for as many as there are masks.
        top_p, emit, rule: see ``APD``.
        shared_vocab: leading ids that may be drafted, or None for all.
    """

    verifier: Model | None
    mixture: Sequence[float]
    window: Sequence[int | None]
    lookahead: Sequence[int | None]
    limit: int | None
    top_p: float | None
    emit: str
    rule: str
    shared_vocab: int | None

    def run(self, request: Request) -> Decoded:
        runner = request.runner
        whole = state = runner.hold("state", self._start(request))
        batch, slots = request.x.shape
        cached = any(window is not None for window in self.window)
        verifier = None
        if self.verifier is not None:
            seen = runner.cache("verifier", self.verifier, batch, slots)
            verifier = _Verifier(self.verifier, seen)
        cache = runner.cache("cache", request.model, batch, slots if cached else 0)
        banned = torch.tensor([request.mask_id], dtype=torch.int32, device=request.x.device)
        call = _Call(request, cache, verifier, runner.hold("banned", banned))
        if runner.static:
            return self._run_static(call, whole)
        numbers = HostNumbers(request.x.device, 3 * batch)
        forwards = 0
        while True:
            spans = self._spans(state)
            rows = torch.where(spans.masks > 0, state.cursor + spans.masks - spans.left, 0)
            numbers.post(torch.stack((rows, spans.drafts, spans.verify)).flatten())
            needed = torch.tensor(numbers.read()).view(3, -1)
            live = needed[0].nonzero().flatten().tolist()
            if not live:
                break
            if len(live) < len(state.rows):
                state.write_back(whole)
                order = fill_holes(live)
                state = state.keep(torch.tensor(order, device=request.x.device))
                call.cache = call.cache.take(order)
                if call.verifier is not None:
                    call.verifier.cache = call.verifier.cache.take(order)
                spans = self._spans(state)
            self._round(call, state, spans, needed.amax(1).tolist())
            forwards += 1
            if request.on_step is not None:
                state.write_back(whole)
                request.report(Step(forwards, whole.x, whole.step_map, whole.prompt_length))
        return self._decoded(state, whole)

    def _run_static(self, call: _Call, whole: Progress) -> Decoded:
        """The rounds as steps of fixed shapes."""
        request, state = call.request, whole
        runner = request.runner
        numbers, first = HostNumbers(whole.x.device, len(whole.x)), True
        for forwards in count(1):
            widths = self._most(request.width, first)
            key = (first, len(state.rows), *widths)

            def step(state: Progress = state, widths: list[int] = widths) -> Tensor:
                self._round(call, state, self._spans(state), widths)
                return (state.cursor < state.end).int()

            left, first = runner.run(key, step), False
            if request.on_step is not None:
                state.write_back(whole)
                request.report(Step(forwards, whole.x, whole.step_map, whole.prompt_length))
            if forwards % POLL:
                continue
            numbers.post(left)
            live = [row for row, going in enumerate(numbers.read()) if going]
            if not live:
                break
            stay = runner.stay(live, len(state.rows))
            if stay is not None:
                state.write_back(whole)
                order = fill_holes(stay)
                kept = state.keep(torch.tensor(order, device=whole.x.device))
                state = runner.hold("state", kept)
                call.cache = call.cache.take(order)
                if call.verifier is not None:
                    call.verifier.cache = call.verifier.cache.take(order)
        return self._decoded(state, whole)

    def _most(self, whole: int, first: bool) -> list[int]:
        """What a round needs at most: rows of the window, drafts, rows of the verifier.

        A round's window reaches back over the run of the last one, and the verifier over it and the
        token before; the first has the prompt in both.
        """
        masks, window = (
            max(whole if value is None else min(value, whole) for value in values)
            for values in (self.lookahead, self.window)
        )
        drafts = masks if self.limit is None else min(masks, self.limit)
        if first:
            return [whole, drafts, whole]
        return [min(window - 1 + drafts + masks, whole), drafts, min(2 * drafts, whole)]

    def _decoded(self, state: Progress, whole: Progress) -> Decoded:
        state.write_back(whole)
        verifier_nfe = None if self.verifier is None else whole.verifier_nfe
        return Decoded(whole.x, whole.step_map, whole.nfe, verifier_nfe)

    def _start(self, request: Request) -> Progress:
        slots = request.x.shape[1]
        zero = torch.zeros_like(request.prompt_length)

        def numbers(values: Sequence[int | None]) -> Tensor:
            # No position is farther away than there are slots.
            reach = [slots if value is None else min(value, slots) for value in values]
            return torch.tensor(reach, dtype=torch.int32, device=zero.device)

        return Progress(
            **vars(State.of(request)),
            cursor=request.prompt_length.clone(),
            previous=zero.clone(),
            verified=zero.clone(),
            verifier_nfe=zero.clone(),
            window=numbers(self.window),
            lookahead=numbers(self.lookahead),
            mixture=torch.tensor(self.mixture, dtype=torch.float32, device=zero.device),
        )

    def _spans(self, state: Progress) -> Spans:
        # The window counts back from the first token of the last run, so that the run, whose keys
        # are those of masks and wrong drafts until now, is always computed anew.
        left = (state.previous - state.window + 1).clamp(min=0)
        masks = torch.minimum(state.lookahead, state.end - state.cursor)
        drafts = masks if self.limit is None else masks.clamp(max=self.limit)
        verify = torch.zeros_like(masks)
        if self.verifier is not None:
            # At mixture 1 the target is the draft; a round of one draft is free.
            needed = drafts > int(self.emit != "target")
            if self.rule == "paper":
                needed &= state.mixture < 1
            verify = torch.where(needed, state.cursor + drafts - 1 - state.verified, verify)
        return Spans(left, masks, drafts, verify)

    def _round(self, call: _Call, state: Progress, spans: Spans, widths: list[int]) -> None:
        """One round of every sequence; ``widths`` are the largest numbers of rows."""
        rows, width, verifier_rows = widths
        request, cursor = call.request, state.cursor
        # A sequence that is done may stay, and has no window any more.
        behind = torch.where(spans.masks > 0, cursor, spans.left)
        right = behind + spans.masks
        # Keys of masks are never seen again.
        kept = behind - spans.left if call.cache.max_len else None
        window = Window.make(spans.left, right - spans.left, right, width=rows, commit=kept)
        hidden = forward(request, state, window, call.cache)
        selection = Selection(cursor, spans.drafts, width)
        hidden = select_rows(request.model, hidden, spans.left, selection)
        token, length = self._decide(call, state, spans, hidden, verifier_rows)
        ops.unmask(
            state.x,
            state.step_map,
            state.nfe,
            token,
            torch.zeros_like(token, dtype=torch.float32),
            mask_id=request.mask_id,
            start=cursor,
            length=length,  # all masks of this window are filled: a complete one ends a sequence
            rule="left_to_right",
            quota=length,
            ending=ops.Ending(state.done, state.end, request.eos),
            backend=request.backend,
        )
        # A sequence without masks stays as it is.
        state.previous.copy_(torch.where(spans.masks > 0, cursor, state.previous))
        state.cursor.copy_(torch.where(state.done, state.end, cursor + length))
        # The slot of the last token is computed anew: that row predicts the next round's first.
        state.verified.copy_(torch.where(spans.verify > 0, state.cursor - 1, state.verified))

    def _decide(
        self, call: _Call, state: Progress, spans: Spans, hidden: Tensor, verifier_rows: int
    ) -> tuple[Tensor, Tensor]:
        """Drafts ``(b, width)`` of the hidden rows, and how many of them are written ``(b,)``."""
        request, width = call.request, hidden.shape[1]
        counter = ops.round_counter(state.cursor, state.request_id, width, emit=self.emit)
        counter = counter.view(-1, width, 3)
        token = torch.zeros_like(counter[..., 0], dtype=torch.int64)
        length = torch.zeros_like(spans.drafts)
        verifier = call.verifier if verifier_rows else None
        in_pieces = verifier is not None and hidden.device.type == "cpu"
        in_pieces &= not request.runner.static
        piece = Piece(slice(None), 0, min(call.guess, width) if in_pieces else width)
        while True:
            noise: dict[str, Any] = {
                "temperature": piece.of(row_temperatures(request, state, width), width),
                "seed": request.seed,
                "counter": piece.take(counter).flatten(0, 1),
                "banned": call.banned,
                "shared_vocab": self.shared_vocab,
                "rule": self.rule,
                "backend": request.backend,
            }
            logits = request.model.head(piece.take(hidden)).flatten(0, 1)
            draft = ops.mixture_draft(logits, top_p=self.top_p, **noise)
            drafts = draft.token.view(-1, piece.stop - piece.first)
            token[piece.rows, piece.first : piece.stop] = drafts
            number = (spans.drafts[piece.rows] - piece.first).clamp(max=drafts.shape[1])
            if verifier is None:
                return token, number
            expert = verifier.logits(request, state, spans, token, piece, verifier_rows)
            verdict = ops.mixture_accept(
                logits,
                expert.flatten(0, 1),
                draft.token,
                length=number,
                mixture=state.mixture[piece.rows],
                threshold=draft.threshold,
                emit=self.emit if piece.first == 0 else "target",  # one draft a round is free
                **noise,
            )
            written = verdict.accepted
            if self.emit != "draft":
                drafts, written = _correct(drafts, verdict, number)
                token[piece.rows, piece.first : piece.stop] = drafts
            length[piece.rows] += written
            if in_pieces:
                going = (verdict.accepted == number) & (spans.drafts[piece.rows] > piece.stop)
                piece = piece.following(going, width)
            if not in_pieces or piece.empty:
                break
        if in_pieces:
            call.guess = _next_guess(length)
        return token, length


@dataclass
class Piece:
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

    def following(self, going: Tensor, width: int) -> Piece:
        """The next drafts, more of them, of the sequences that ``going`` says. Waits for it."""
        chosen = going.nonzero().squeeze(1)
        rows = chosen if isinstance(self.rows, slice) else self.rows[chosen]
        return Piece(rows, self.stop, min(self.stop + _GROWTH * (self.stop - self.first), width))


@dataclass
class _Verifier:
    """The causal model of a call, and its cache."""

    model: Model
    cache: StaticCache

    def logits(
        self,
        request: Request,
        state: Progress,
        spans: Spans,
        token: Tensor,
        piece: Piece,
        rows: int,
    ) -> Tensor:
        """``(rows of the piece, drafts, V)``: what follows the tokens and the drafts before each
        drafted position.

        Sequences that need no verifier get numbers without meaning. ``rows`` bounds the rows that
        any of them needs; the pieces of a round count as one forward.
        """
        width = token.shape[1]
        offset = torch.arange(state.x.shape[1], device=token.device) - state.cursor[:, None]
        drafts = token.gather(1, offset.clamp(0, width - 1))
        drafted = (offset >= 0) & (offset < spans.drafts[:, None])
        sequence = replace(state, x=torch.where(drafted, drafts, state.x))
        # What the pieces before have not seen yet.
        start, length = state.verified, spans.verify
        if piece.first:
            start = state.cursor + piece.first - 1
        if piece.stop < width or piece.first:
            end = state.cursor + spans.drafts.clamp(max=piece.stop) - 1
            wanted = torch.zeros_like(length)
            wanted[piece.rows] = (end - start)[piece.rows]
            length = torch.where(spans.verify > 0, wanted, 0)
            start = start.where(length > 0, state.verified)
            rows = max(1, int(length.max()))
        window = Window.make(start, length, start + length, width=rows, commit=length)
        hidden = forward(replace(request, model=self.model), sequence, window, self.cache)
        if piece.first == 0:
            state.verifier_nfe += spans.verify > 0
        # Causal: position p is predicted by row p - 1.
        first = state.cursor + piece.first - int(not self.model.spec.shift_logits)
        selection = Selection(first, spans.drafts, piece.stop - piece.first)
        return self.model.head(select_rows(self.model, hidden, start, selection)[piece.rows])


@dataclass
class _Call:
    """What the rounds of a call of ``generate`` share."""

    request: Request
    cache: StaticCache
    verifier: _Verifier | None
    banned: Tensor  # (1,) int32, the mask id
    guess: int = field(default_factory=lambda: _FIRST_GUESS)  # drafts of the first piece


def _next_guess(length: Tensor) -> int:
    """Drafts of the next round's first piece: what this round wrote, and the end of such a run."""
    return 1 + math.ceil(length.float().mean().item())


def _correct(token: Tensor, verdict: ops.Accepted, drafts: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and their number where the target replaces the first draft that differs from it."""
    wrong = verdict.accepted < drafts
    place = verdict.accepted.clamp(max=token.shape[1] - 1).long()[:, None]
    # A row of NaN has no target: its draft goes through, or the round would never end.
    found = (wrong & (verdict.correction >= 0))[:, None]
    right = torch.where(found, verdict.correction[:, None], token.gather(1, place))
    return token.scatter(1, place, right), verdict.accepted + wrong
