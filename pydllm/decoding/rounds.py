"""Decoding from left to right: draft after the last token, verify, keep the leading run.

A round is: forward of the diffusion model over a window and the masks after it, drafts from all of
them at once, forward of the verifier over the drafts, acceptance, commit. Each sequence has its own
position, window and lookahead. The host reads three numbers per sequence, once per round: how many
rows each forward needs. They depend on how much the last round accepted; padding to their bounds
instead would about double the rows of a forward.

Replayed as a CUDA graph, a round has the rows that its window and its drafts can need at most: a
forward of few rows mostly reads weights. The host then looks only now and then at who is finished.

On a CPU the drafts are made and verified in chunks, and a sequence whose run has ended leaves the
rest undone: no draft depends on those after it, and two LM heads and the noise are most of a round
there. On a GPU a few rows cost what many do, and a chunk would be a wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from pydllm import ops
from pydllm.decoding.call import Call
from pydllm.decoding.draft_chunks import FIRST_CHUNK, DraftChunk, correct, next_chunk
from pydllm.decoding.driver import POLL, Counts, Decoder, Plan
from pydllm.decoding.state import Selection, State, Window
from pydllm.decoding.step import forward, select_rows, write_run
from pydllm.models import Model, StaticCache


@dataclass
class RoundState(State):
    """Also where each sequence is, and its own parameters.

    Attributes:
        cursor: ``(b,)`` int32, the first position without a token.
        previous: ``(b,)`` int32, the cursor one round earlier, at first 0.
        verified: ``(b,)`` int32, leading slots of the verifier's cache that are right.
        verifier_nfe: ``(b,)`` int32.
        verifier_cache: the verifier's keys and values; None without a verifier.
        kv_window, lookahead: ``(b,)`` int32; mixture ``(b,)`` fp32.
        chunk: drafts of the next round's first chunk; on the host.
    """

    cursor: Tensor
    previous: Tensor
    verified: Tensor
    verifier_nfe: Tensor
    verifier_cache: StaticCache | None
    kv_window: Tensor
    lookahead: Tensor
    mixture: Tensor
    chunk: int = field(metadata={"rows": False})

    def counters(self) -> dict[str, Tensor]:
        if self.verifier_cache is None:
            return super().counters()
        return super().counters() | {"verifier_nfe": self.verifier_nfe}


class RoundSpans(NamedTuple):
    """What a round looks at; all ``(b,)`` int32."""

    left: Tensor  # first position that the diffusion model computes
    masks: Tensor  # masks that it sees; 0: the sequence is finished
    drafts: Tensor  # of these, how many are drafted
    verify: Tensor  # rows that the verifier computes; 0: it is not needed


@dataclass(frozen=True, kw_only=True)
class RoundPlan(Plan):
    """Rows of the window, drafts, and rows of the verifier, at most of any sequence."""

    rows: int
    drafts: int
    verify: int
    is_prefill: bool = False


@dataclass(frozen=True)
class DraftVerifyDecoder(Decoder):
    """How a round drafts, verifies and emits.

    The counts have three more rows, those of ``RoundPlan``, unless shapes are fixed.

    Attributes:
        verifier: a causal model, or None where every draft is accepted.
        mixture, kv_window, lookahead: one value per prompt; see ``APD``.
        limit: drafts per round, or None for as many as there are masks.
        top_p, emit: see ``APD``.
        rule: ``"paper"``; or ``"reference"``, as the published code: drafts at the square of the
            temperature, targets without noise and nucleus.
        shared_vocab: leading ids that may be drafted, or None for all.
        own_cache: the verifier is the model, read causally, and its cache is what the diffusion
            model sees: a window is the last token and the masks, and every round stores. The first
            step stores the prompts.
    """

    verifier: Model | None
    mixture: Sequence[float]
    kv_window: Sequence[int | None]
    lookahead: Sequence[int | None]
    limit: int | None = None
    top_p: float | None = None
    emit: str = "draft"
    rule: str = "paper"
    shared_vocab: int | None = None
    own_cache: bool = False
    opens_alone: ClassVar[bool] = True

    def begin(self, call: Call, prompts: list[int]) -> tuple[RoundState, Tensor | None]:
        runner, slots, device = call.runner, call.max_len, call.device
        verifier_cache = None
        if self.verifier is not None:
            verifier_cache = runner.cache("verifier", self.verifier, len(prompts), slots)
        cached = any(window is not None for window in self.kv_window)
        cache = runner.cache("cache", call.model, len(prompts), slots if cached else 0)

        def per_slot(values: Sequence[int | None]) -> Tensor:
            # No position is farther away than there are slots.
            reach = [slots if value is None else min(value, slots) for value in values]
            numbers = [reach[max(prompt, 0)] for prompt in prompts]
            return torch.tensor(numbers, dtype=torch.int32, device=device)

        zero = torch.zeros(len(prompts), dtype=torch.int32, device=device)
        mixture = [self.mixture[max(prompt, 0)] for prompt in prompts]
        state = RoundState.begin(
            call,
            prompts,
            cache,
            cursor=zero,
            previous=zero.clone(),
            verified=zero.clone(),
            verifier_nfe=zero.clone(),
            verifier_cache=verifier_cache,
            kv_window=per_slot(self.kv_window),
            lookahead=per_slot(self.lookahead),
            mixture=torch.tensor(mixture, dtype=torch.float32, device=device),
            chunk=FIRST_CHUNK,
        )
        state.cursor = torch.where(state.done, state.end, state.prompt_length)
        return state, None if runner.fixed_shapes else self._counts(state)

    def plan(self, state: RoundState, counts: Counts | None) -> RoundPlan:
        if self.own_cache and not any(state.forwards):
            call = state.call
            longest = max(call.prompt_lengths[prompt] for prompt in state.live_prompts)
            width, poll = call.runner.width(longest, call.max_len), int(counts is not None)
            return RoundPlan(
                ("prefill", width), poll, rows=width, drafts=0, verify=width, is_prefill=True
            )
        if not state.call.runner.fixed_shapes:
            if counts is None:
                raise ValueError("counts: expected those of the last round, got None")
            rows, drafts, verify = map(max, counts[1:])
            return RoundPlan((rows, drafts, verify), 1, rows=rows, drafts=drafts, verify=verify)
        first = not any(state.forwards)
        rows, drafts, verify = self._most(state, first)
        key = (first, rows, drafts, verify)
        return RoundPlan(key, POLL, rows=rows, drafts=drafts, verify=verify)

    def step(self, state: RoundState, plan: RoundPlan) -> tuple[Tensor, None]:
        if plan.is_prefill:
            return self._prefill(state, plan.rows), None
        call, cursor, spans = state.call, state.cursor, self._spans(state)
        # A sequence that is done may stay, and has no window any more.
        first_mask = torch.where(spans.masks > 0, cursor, spans.left)
        right = first_mask + spans.masks
        # Keys of masks are never seen again.
        kept = first_mask - spans.left if state.cache.max_len else None
        window = Window.make(spans.left, right - spans.left, right, width=plan.rows, commit=kept)
        if self.own_cache and state.verifier_cache is not None:
            hidden = forward(replace(state, cache=state.verifier_cache), window, attention="full")
        else:
            hidden = forward(state, window)
        selection = Selection(cursor, spans.drafts, plan.drafts)
        hidden = select_rows(call.model, hidden, spans.left, selection)
        token, length = self._decide(state, spans, hidden, plan.verify)
        write_run(state, token, cursor, length)
        # A sequence without masks stays as it is.
        state.previous.copy_(torch.where(spans.masks > 0, cursor, state.previous))
        state.cursor.copy_(torch.where(state.done, state.end, cursor + length))
        # The slot of the last token is computed anew: that row predicts the next round's first.
        state.verified.copy_(torch.where(spans.verify > 0, state.cursor - 1, state.verified))
        return self._counts(state), None

    def _prefill(self, state: RoundState, width: int) -> Tensor:
        """Store all of the prompts but the last tokens, which the first windows begin with."""
        length = (state.cursor - 1).clamp(min=0).masked_fill(state.done, 0)
        zero = torch.zeros_like(length)
        window = Window.make(zero, length, length, width=width, commit=length)
        forward(self._as_verifier(state, state.x), window, attention="causal")
        state.verifier_nfe += length > 0
        state.verified.copy_(length)
        return self._counts(state)

    def _as_verifier(self, state: RoundState, x: Tensor) -> RoundState:
        """The state with the verifier in the model's place."""
        model, cache = self.verifier, state.verifier_cache
        if model is None or cache is None:
            raise ValueError("verifier: expected a causal model, got None")
        mask = model.spec.mask_id
        call = replace(
            state.call, model=model, mask_id=state.call.mask_id if mask is None else mask
        )
        return replace(state, call=call, cache=cache, x=x)

    def stop(self, state: RoundState, slots: list[int]) -> None:
        super().stop(state, slots)
        rows = torch.tensor(slots, device=state.x.device)
        state.cursor[rows] = state.end[rows]

    def _counts(self, state: RoundState) -> Tensor:
        if state.call.runner.fixed_shapes:
            return -(state.cursor >= state.end).int()[None]
        spans = self._spans(state)
        live = spans.masks > 0
        rows = torch.where(live, state.cursor + spans.masks - spans.left, 0)
        return torch.stack((live.int() - 1, rows, spans.drafts, spans.verify)).int()

    def _most(self, state: RoundState, first: bool) -> tuple[int, int, int]:
        """What a round needs at most: rows of the window, drafts, rows of the verifier.

        A round's window reaches back over the run of the last one, and the verifier over it and the
        token before; the first has the prompt in both.
        """
        whole = state.call.runner.width(state.call.longest, state.call.max_len)
        masks, window = (
            max(whole if value is None else min(value, whole) for value in values)
            for values in (self.lookahead, self.kv_window)
        )
        drafts = masks if self.limit is None else min(masks, self.limit)
        if self.own_cache:
            return min(1 + masks, whole), drafts, drafts
        if first:
            return whole, drafts, whole
        return min(window - 1 + drafts + masks, whole), drafts, min(2 * drafts, whole)

    def _spans(self, state: RoundState) -> RoundSpans:
        # The window counts back from the first token of the last run, so that the run, whose keys
        # are those of masks and wrong drafts until now, is always computed anew.
        left = (state.previous - state.kv_window + 1).clamp(min=0)
        if self.own_cache:
            left = (state.cursor - 1).clamp(min=0)
        masks = torch.minimum(state.lookahead, state.end - state.cursor)
        drafts = masks if self.limit is None else masks.clamp(max=self.limit)
        verify = torch.zeros_like(masks)
        if self.verifier is not None:
            # At mixture 1 the target is the draft; a round of one draft is free.
            needed = drafts > int(self.emit != "target")
            if self.rule == "paper":
                needed &= state.mixture < 1
            if self.own_cache:  # it stores what is written
                needed = drafts > 0
            verify = torch.where(needed, state.cursor + drafts - 1 - state.verified, verify)
        return RoundSpans(left, masks, drafts, verify)

    def _decide(
        self, state: RoundState, spans: RoundSpans, hidden: Tensor, verifier_rows: int
    ) -> tuple[Tensor, Tensor]:
        """Drafts ``(b, width)`` of the hidden rows, and how many of them are written ``(b,)``."""
        call, width = state.call, hidden.shape[1]
        counter = ops.round_counter(state.cursor, state.request_id, width, emit=self.emit)
        counter = counter.view(-1, width, 3)
        token = torch.zeros_like(counter[..., 0], dtype=torch.int64)
        length = torch.zeros_like(spans.drafts)
        verifies = self.verifier is not None and verifier_rows > 0
        in_chunks = verifies and hidden.device.type == "cpu" and not call.runner.fixed_shapes
        chunk = DraftChunk(slice(None), 0, min(state.chunk, width) if in_chunks else width)
        sampling = state.sampling(width)
        while True:
            noise: dict[str, Any] = {
                "temperature": chunk.of(sampling["temperature"], width),
                "seed": call.seed,
                "counter": chunk.take(counter).flatten(0, 1),
                "suppress_ids": call.suppress_ids,
                "shared_vocab": self.shared_vocab,
                "backend": call.backend,
            }
            logits = call.model.head(chunk.take(hidden)).flatten(0, 1)
            top_p: float | Tensor | None = self.top_p
            if sampling["top_p"] is not None:
                top_p = chunk.of(sampling["top_p"], width)
            draft = self._draft(logits, top_p, noise)
            drafts = draft.token.view(-1, chunk.stop - chunk.first)
            token[chunk.rows, chunk.first : chunk.stop] = drafts
            number = (spans.drafts[chunk.rows] - chunk.first).clamp(max=drafts.shape[1])
            if not verifies:
                return token, number
            expert = self._verifier_logits(state, spans, token, chunk, verifier_rows)
            target = noise | {"threshold": draft.threshold}
            if self.rule == "reference":  # neither noise nor nucleus
                target |= {"temperature": 0.0, "threshold": None}
            verdict = ops.mixture_accept(
                logits,
                expert.flatten(0, 1),
                draft.token,
                length=number,
                mixture=state.mixture[chunk.rows],
                emit=self.emit if chunk.first == 0 else "target",  # one draft a round is free
                **target,
            )
            written = verdict.accepted
            if self.emit != "draft":
                drafts, written = correct(drafts, verdict, number)
                token[chunk.rows, chunk.first : chunk.stop] = drafts
            length[chunk.rows] += written
            if in_chunks:
                going = (verdict.accepted == number) & (spans.drafts[chunk.rows] > chunk.stop)
                chunk = chunk.following(going, width)
            if not in_chunks or chunk.empty:
                break
        if in_chunks:
            state.chunk = next_chunk(length)
        return token, length

    def _draft(
        self, logits: Tensor, top_p: float | Tensor | None, noise: dict[str, Any]
    ) -> ops.MixtureDraft:
        if self.rule == "reference":
            # From the nucleus at the temperature, drawn at its square.
            if top_p is not None:
                limit = ops.mixture_draft(logits, top_p=top_p, **noise).threshold[:, None]
                logits = logits.masked_fill(logits.to(limit.dtype) < limit, -torch.inf)
            noise = noise | {"temperature": noise["temperature"] * noise["temperature"]}
            top_p = None
        return ops.mixture_draft(logits, top_p=top_p, **noise)

    def _verifier_logits(
        self,
        state: RoundState,
        spans: RoundSpans,
        token: Tensor,
        chunk: DraftChunk,
        rows: int,
    ) -> Tensor:
        """``(rows of the chunk, drafts, V)``: what follows the tokens and the drafts before each
        drafted position.

        Sequences that need no verifier get numbers without meaning. ``rows`` bounds the rows that
        any of them needs; the chunks of a round count as one forward.
        """
        width = token.shape[1]
        offset = torch.arange(state.x.shape[1], device=token.device) - state.cursor[:, None]
        drafts = token.gather(1, offset.clamp(0, width - 1))
        drafted = (offset >= 0) & (offset < spans.drafts[:, None])
        sequence = self._as_verifier(state, torch.where(drafted, drafts, state.x))
        model = sequence.call.model
        # What the chunks before have not seen yet.
        start, length = state.verified, spans.verify
        if chunk.first:
            start = state.cursor + chunk.first - 1
        if chunk.stop < width or chunk.first:
            end = state.cursor + spans.drafts.clamp(max=chunk.stop) - 1
            wanted = torch.zeros_like(length)
            wanted[chunk.rows] = (end - start)[chunk.rows]
            length = torch.where(spans.verify > 0, wanted, 0)
            start = start.where(length > 0, state.verified)
            rows = max(1, int(length.max()))
        window = Window.make(start, length, start + length, width=rows, commit=length)
        reading = None if model.spec.attention == "causal" else "causal"
        count = chunk.stop - chunk.first
        leaves = count if reading is not None and model.spec.causal == "masked" else 0
        hidden = forward(sequence, window, attention=reading, leaves=leaves)
        if chunk.first == 0:
            state.verifier_nfe += spans.verify > 0
        if leaves:
            # Position p is predicted by a mask after the row of p - 1; the last row has the last.
            last = spans.drafts.clamp(max=chunk.stop)
            index = (rows + count + chunk.first - last)[:, None]
            index = (index + torch.arange(count, device=index.device)).clamp(0, rows + count - 1)
            hidden = hidden.gather(1, index.long()[..., None].expand(-1, -1, hidden.shape[2]))
            return model.head(hidden[chunk.rows])
        # Causal: position p is predicted by row p - 1.
        first = state.cursor + chunk.first - int(not model.spec.shift_logits)
        selection = Selection(first, spans.drafts, count)
        return model.head(select_rows(model, hidden, start, selection)[chunk.rows])
