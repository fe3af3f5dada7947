"""d3LLM's published multi-block decoders for LLaDA and Dream: one sequence, decided on the host.

This is what that code does, defects included: the end is decided on the masks in ``x``, tokens
are accepted after an EOS, a window of a shifted model predicts its first position from its own
row, and a refresh of Dream's cache keeps keys of waiting blocks twice. ``pydllm.MultiBlock`` is
the algorithm of the paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pydllm._backend.errors import PydllmError
from pydllm._checks import check_choice, check_int, check_number
from pydllm.decoding.call import Call
from pydllm.decoding.driver import Counts
from pydllm.integrations._arguments import check_temperature
from pydllm.integrations._published import LoopState, Pass, PublishedLoop
from pydllm.integrations.samplers import add_gumbel_noise

_LIMIT = 10_000  # forwards after which the published loops give up
_NAN = math.nan


@dataclass(frozen=True)
class Settings:
    """The arguments of a published decoder, under its names.

    Attributes:
        threshold: nats.
        cache: (delay, refresh interval) in forwards, or None for the decoder without a cache.
        eos_id: what ends a sequence, or None where nothing does.
        remasking: of LLaDA's; ``"random"``: uniform numbers in place of entropies.
    """

    threshold: float
    block_size: int
    block_add_threshold: float
    decoded_token_threshold: float
    eos_id: int | None
    temperature: float
    remasking: str = "low_confidence"
    cache: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_int("block_size", self.block_size, 1)
        check_number("block_add_threshold", self.block_add_threshold, 0, 1)
        check_number("decoded_token_threshold", self.decoded_token_threshold, 0, 1)
        check_number("threshold", self.threshold, -math.inf, infinite=True)
        check_temperature(self.temperature)
        check_choice("remasking", self.remasking, ("low_confidence", "random"))
        if self.cache is not None:
            check_int("cache_delay_iter", self.cache[0], 0)
            check_int("refresh_interval", self.cache[1], 1)


@dataclass
class _Block:
    """Positions [start, end), the masks that are counted in it, and where its cache stands."""

    start: int
    end: int
    masks: int
    full: bool
    done: int | None = None  # the forward after which it was found complete
    cached: bool = False

    @property
    def progress(self) -> float:
        size = self.end - self.start
        return 1 - self.masks / size if size else 1.0


@dataclass
class _Row:
    """What a forward says of a position."""

    token: int  # of the distribution at the temperature
    best: int  # the arg-max
    entropy: float
    order: float = field(default=_NAN)  # what tokens are chosen by: the entropy, or noise


@dataclass(frozen=True, kw_only=True)
class _Pass(Pass):
    """A forward, and the positions whose rows the host wants.

    Attributes:
        repeated: the first and the last slot whose keys are copied to after the sequence.
    """

    rows: list[int]
    repeated: tuple[int, int] = (0, 0)


@dataclass(kw_only=True)
class PublishedMultiBlock(PublishedLoop):
    """A published decoder: LLaDA's for an unshifted model, Dream's otherwise.

    Attributes:
        nfe: the forwards that it reports.
    """

    settings: Settings
    nfe: int = 0
    has_eos: bool = False
    prefix: int = 0
    twice: int = 0
    filled: bool = False
    answer: list[list[int]] = field(default_factory=list)

    def begin(self, call: Call, prompts: list[int]) -> tuple[LoopState, Tensor]:
        spec, size = call.model.spec, self.settings.block_size
        self.shifted, self.mask_id = spec.shift_logits, call.mask_id
        self.prompt_length, new = call.prompt_lengths[0], call.region_lengths[0]
        whole = not (self.shifted and self.settings.cache is not None)
        self.most = new // size if whole else -(-new // size)
        if self.most == 0:
            raise ValueError(f"max_new_tokens: expected at least one block ({size}), got {new}")
        self.blocks = [_Block(0, self.prompt_length, 0, True, done=0)]
        # Slots after the sequence hold the keys that Dream's refresh keeps twice.
        slots = call.max_len + (new if self.shifted else 0) if self.settings.cache else 0
        state = LoopState.begin(call, prompts, call.model.new_cache(1, slots))
        self._tokens: list[int] = state.x[0].tolist()
        state.schedule = self.schedule(state)
        return state, torch.ones(1, 1, dtype=torch.int32, device=call.device)

    def plan(self, state: LoopState, counts: Counts | None) -> Pass | None:
        self.answer = counts or []
        return next(state.schedule, None)

    def schedule(self, state: LoopState) -> Iterator[Pass]:
        self._create()
        while True:
            masked = [p for p, token in enumerate(self._tokens) if token == self.mask_id]
            left = any(p >= self.prompt_length for p in masked)
            if not left and len(self.blocks) > self.most:
                break
            self.nfe += 1
            if self._stop_early(state.x):
                break
            for before, block in self._pairs():
                block.full |= before.progress >= self.settings.decoded_token_threshold
            last = self.blocks[-1]
            ready = last.progress >= self.settings.block_add_threshold or last.masks == 0
            if ready and not self.has_eos and len(self.blocks) <= self.most:
                self._create()
            end = next(b.end for b in reversed(self.blocks) if b.full or b.masks > 0)
            eligible = [p for p in masked if p < end]
            window = self._window(end)
            if window is None:
                break
            if eligible:  # otherwise no position can be written, and the forward is only counted
                plan = self._pass(eligible, *window)
                yield plan
                self._accept(state.x, eligible, self._rows(plan, eligible))
            elif self.settings.cache is None:
                self.nfe = _LIMIT + 1  # nothing changes any more: the rest up to the limit
            if self.nfe > _LIMIT:
                break

    def _pairs(self) -> Iterator[tuple[_Block, _Block]]:
        return zip(self.blocks, self.blocks[1:], strict=False)

    def _create(self, **known: int | bool) -> None:
        start = self.blocks[-1].end
        end = min(start + self.settings.block_size, len(self._tokens))
        if known:
            block = _Block(start, end, 0, True, done=self.nfe, cached=True)
        else:
            full = self.blocks[-1].progress >= self.settings.decoded_token_threshold
            block = _Block(start, end, self._masks(start, end), full)
        self.blocks.append(block)

    def _masks(self, start: int, end: int) -> int:
        return self._tokens[start:end].count(self.mask_id or 0)

    def _write(self, x: Tensor, positions: list[int], tokens: list[int]) -> None:
        for position, token in zip(positions, tokens, strict=True):
            self._tokens[position] = token
        index = torch.tensor(positions, device=x.device)
        x[0, index] = torch.tensor(tokens, device=x.device)

    def _stop_early(self, x: Tensor) -> bool:
        """Fill up after the first EOS and count again; whether no mask is left."""
        eos = self.settings.eos_id
        if eos is None or eos not in self._tokens[self.prompt_length :]:
            return False
        self.has_eos = True
        place = self._tokens.index(eos, self.prompt_length)
        behind = [p for p in range(place + 1, len(self._tokens)) if self._tokens[p] != eos]
        if behind:
            self._write(x, behind, [eos] * len(behind))
        for block in self.blocks[1:]:
            if self.shifted or block.end > place:
                masks = self._masks(block.start, block.end)
                block.full |= masks == 0 and masks != block.masks
                block.masks = masks
            if self.shifted and block.start > place:
                block.cached = True
                block.done = self.nfe if block.done is None else block.done
        while len(self.blocks) <= self.most:
            self._create(known=True)
        return self._masks(self.prompt_length, len(self._tokens)) == 0

    def _window(self, end: int) -> tuple[int, int, tuple[int, int]] | None:
        """Where the forward of this step starts, what it commits, and the slots whose keys it
        keeps twice. None: the published decoder leaves here.
        """
        if self.settings.cache is None:
            return 0, 0, (0, 0)
        delay, interval = self.settings.cache
        commit = self._completed(delay)
        waiting = [b for b in self.blocks if b.masks == 0 and b.done is not None and not b.cached]
        active = [b.start for b in self.blocks if b.masks > 0]
        start = min([self.prefix, *active, *(b.start for b in waiting)])
        if start >= end:
            return None
        if commit is None and self.filled and not waiting and self.nfe % interval:
            if start < self.prefix:
                raise PydllmError(
                    "a block whose keys are kept has masks again: the model predicts the mask; "
                    "compat=None does not allow the prediction"
                )
            return start, 0, (0, 0)
        if commit is not None:
            start, self.prefix, self.filled = self.prefix, commit.end, True
            return start, commit.end - start, (0, 0)
        if not self.filled:
            return 0, 0, (0, 0)
        keep = waiting[-1].start if waiting else self.prefix
        self.twice = keep - self.prefix
        return 0, keep, (self.prefix, keep)

    def _completed(self, delay: int) -> _Block | None:
        """The last block whose keys are to be kept now."""
        commit = None
        for block in self.blocks:
            if block.end <= self.prefix:
                continue
            if block.masks > 0:
                break
            block.done = self.nfe if block.done is None else block.done
            if self.nfe - block.done >= delay and not block.cached:
                commit, block.cached = block, True
            elif self.nfe - block.done < delay and not self.shifted:
                break
        return commit

    def _pass(
        self, eligible: list[int], start: int, commit: int, repeated: tuple[int, int]
    ) -> _Pass:
        """The forward, with rows for the positions that may be written.

        A mask before the window, in a block whose keys are kept, has no row. Dream's decoder does
        not write it. LLaDA's reads logits of -inf there: token 0, and an entropy that is no number,
        for which positions that are no masks are chosen instead, so those get their rows too.
        """
        length = len(self._tokens)
        rows = [p for p in eligible if p >= start]
        if len(rows) < len(eligible) and not self.shifted:
            rows = list(range(start, length))
        return _Pass(
            start=start,
            stop=length,
            seen=length + self.twice if start else length,
            commit=commit,
            first=start,
            last=length,
            rows=rows,
            repeated=repeated,
        )

    def step(self, state: LoopState, plan: Any) -> tuple[Tensor, None]:
        """Posts token, arg-max and entropy of each row, then random numbers in place of entropies
        where these are wanted: fp64 numbers as pairs of int32."""
        hidden = self.forward(state, plan)
        first, last = plan.repeated
        for kept in (state.cache.keys, state.cache.values):
            kept[:, :, plan.stop : plan.stop + last - first] = kept[:, :, first:last]
        index = torch.tensor(plan.rows, dtype=torch.int64, device=hidden.device) - plan.start
        source = (index - int(self.shifted)).clamp(min=0)
        stats = state.call.model.head_stats(hidden[0], source, backend=state.call.backend)
        token = self._draw(state, plan, hidden)[index] if self.temperature > 0 else stats.token
        numbers = [token, stats.token, stats.entropy]
        if self.settings.remasking == "random":
            numbers.append(torch.rand(state.x.shape, device=hidden.device)[0])
        flat = torch.cat([n.double() for n in numbers]).view(torch.int32)[:, None]
        return torch.cat((flat.new_ones(1, 1), flat)), None  # of no row too: all may be cached

    def _rows(self, plan: _Pass, eligible: list[int]) -> dict[int, _Row]:
        """What the forward said of the positions."""
        numbers = torch.tensor(self.answer[1:], dtype=torch.int32).view(-1).view(torch.float64)
        count = len(plan.rows)
        token, best, entropy, order = numbers.split([count, count, count, len(numbers) - 3 * count])
        rows: dict[int, _Row] = {}
        if eligible[0] < plan.start and not self.shifted:
            rows = {p: _Row(0, 0, _NAN) for p in range(plan.start)}
        columns = (token.long().tolist(), best.long().tolist(), entropy.tolist())
        for position, values in zip(plan.rows, zip(*columns, strict=True), strict=True):
            rows[position] = _Row(*values)
        for position, row in rows.items():
            row.order = row.entropy
            if self.settings.remasking == "random":
                row.order = order[position].item()
        return rows

    def _draw(self, state: LoopState, plan: Pass, hidden: Tensor) -> Tensor:
        """Tokens ``(T,)`` of all positions of the window, from torch's generator as published."""
        logits = state.call.model.head(hidden[0])
        if self.shifted:
            logits = torch.cat((logits[:1], logits[:-1]))
            return torch.multinomial((logits / self.temperature).softmax(-1), 1)[:, 0]
        # The noise is of the whole sequence.
        unseen = logits.new_full((plan.start, logits.shape[1]), -torch.inf)
        whole = torch.cat((unseen, logits))[None]
        return add_gumbel_noise(whole, self.temperature).argmax(-1)[0, plan.start :]

    def _accept(self, x: Tensor, eligible: list[int], rows: dict[int, _Row]) -> None:
        """Write what is certain, and at least one token of the first full block."""
        threshold = self.settings.threshold
        if self.shifted:
            chosen = {p for p in eligible if p in rows and rows[p].order < threshold}
        else:
            ranked = self._ranked(eligible, rows)
            chosen = {p for n, p in enumerate(ranked) if n == 0 or not rows[p].order > threshold}
        tokens = {p: rows[p].token for p in chosen.intersection(eligible)}
        focus = next((b for b in self.blocks[1:] if b.full and b.masks > 0), None)
        if focus is not None and not any(focus.start <= p < focus.end for p in chosen):
            inside = [p for p in eligible if focus.start <= p < focus.end and p in rows]
            if inside:
                # argmin takes what is no number for the least.
                forced = min(inside, key=lambda p: (_number(rows[p].entropy, -math.inf), p))
                chosen.add(forced)
                tokens[forced] = rows[forced].token if self.shifted else rows[forced].best
        if tokens:
            self._write(x, list(tokens), list(tokens.values()))
        for block in self.blocks[1:]:
            written = sum(block.start <= p < block.end for p in chosen)
            if self.settings.cache is not None:
                block.masks = max(0, block.masks - written)
            elif block.masks > 0:
                block.masks -= written

    def _ranked(self, eligible: list[int], rows: dict[int, _Row]) -> list[int]:
        """As many positions as may be written, the lowest entropy first.

        In ``topk`` positions that are no masks come next, and what is no number last.
        """
        if all(rows[p].order == rows[p].order for p in eligible):
            return sorted(eligible, key=lambda p: (rows[p].order, p))
        order = torch.full((len(self._tokens),), torch.inf, dtype=torch.float64)
        order[eligible] = torch.tensor([rows[p].order for p in eligible], dtype=torch.float64)
        return order.topk(len(eligible), largest=False).indices.tolist()


def _number(value: float, instead: float) -> float:
    return instead if math.isnan(value) else value
