"""d3LLM's published multi-block decoders, for LLaDA and for Dream: one sequence, read on the host.

This is what that code does, defects included: the end is decided on the masks in ``x``, tokens
are accepted behind an EOS, a window of a shifted model predicts its first position from its own
row, and a refresh of Dream's cache keeps keys of waiting blocks twice. ``pydllm.MultiBlock`` is
the algorithm of the paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pydllm._backend.errors import PydllmError
from pydllm.integrations.samplers import add_gumbel_noise
from pydllm.models import Model

_LIMIT = 10_000  # forwards after which the published loops give up
_NAN = math.nan


@dataclass(frozen=True)
class Settings:
    """The arguments of a published decoder.

    Attributes:
        threshold: nats.
        cache: (delay, refresh interval) in forwards, or None for the decoder without a cache.
        eos_id: what ends a sequence, or None where nothing does.
        random_order: LLaDA's ``remasking="random"``: uniform numbers in place of entropies.
    """

    block_size: int
    threshold: float
    add_at: float
    full_at: float
    eos_id: int | None = None
    cache: tuple[int, int] | None = None
    temperature: float = 0.0
    random_order: bool = False


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


class PublishedMultiBlock:
    """One call of a published decoder: of LLaDA's for an unshifted model, of Dream's otherwise.

    Args:
        model: one with full attention and a mask id.
        x: ``(1, L)`` int64, prompt and masks, decoded in place.
        prompt_length: positions of the prompt.
        pad: ``(1,)`` int32, positions of left padding, or None.
    """

    def __init__(
        self,
        model: Model,
        x: Tensor,
        prompt_length: int,
        settings: Settings,
        *,
        pad: Tensor | None = None,
        backend: str | None = None,
    ) -> None:
        self.model, self.x, self.pad, self.backend = model, x, pad, backend
        self.settings, self.prompt_length = settings, prompt_length
        self.shifted, self.mask_id = model.spec.shift_logits, model.spec.mask_id
        new, size = x.shape[1] - prompt_length, settings.block_size
        whole = not (self.shifted and settings.cache is not None)
        self.most = new // size if whole else -(-new // size)
        if self.most == 0:
            raise ValueError(f"max_new_tokens: expected at least one block ({size}), got {new}")
        self.blocks = [_Block(0, prompt_length, 0, True, done=0)]
        self.has_eos, self.nfe = False, 0
        # Slots behind the sequence hold the keys that Dream's refresh keeps twice.
        slots = x.shape[1] + (new if self.shifted else 0) if settings.cache is not None else 0
        self.cache = model.new_cache(1, slots)
        self.prefix, self.twice, self.filled = 0, 0, False
        self._tokens: list[int] = x[0].tolist()

    def run(self) -> int:
        """Decode; returns the forwards that the published decoder reports."""
        self._create()
        while True:
            masked = [p for p, token in enumerate(self._tokens) if token == self.mask_id]
            left = any(p >= self.prompt_length for p in masked)
            if not left and len(self.blocks) > self.most:
                break
            self.nfe += 1
            if self._stop_early():
                break
            for before, block in self._pairs():
                block.full |= before.progress >= self.settings.full_at
            last = self.blocks[-1]
            ready = last.progress >= self.settings.add_at or last.masks == 0
            if ready and not self.has_eos and len(self.blocks) <= self.most:
                self._create()
            end = next(b.end for b in reversed(self.blocks) if b.full or b.masks > 0)
            eligible = [p for p in masked if p < end]
            window = self._window(end, idle=not eligible)
            if window is None:
                break
            if eligible:
                self._accept(eligible, self._rows(eligible, *window))
            elif self.settings.cache is None:
                self.nfe = _LIMIT + 1  # nothing changes any more: the rest up to the limit
            if self.nfe > _LIMIT:
                break
        return self.nfe

    def _pairs(self) -> Iterator[tuple[_Block, _Block]]:
        return zip(self.blocks, self.blocks[1:], strict=False)

    def _create(self, **known: int | bool) -> None:
        start = self.blocks[-1].end
        end = min(start + self.settings.block_size, self.x.shape[1])
        if known:
            block = _Block(start, end, 0, True, done=self.nfe, cached=True)
        else:
            full = self.blocks[-1].progress >= self.settings.full_at
            block = _Block(start, end, self._masks(start, end), full)
        self.blocks.append(block)

    def _masks(self, start: int, end: int) -> int:
        return self._tokens[start:end].count(self.mask_id or 0)

    def _write(self, positions: list[int], tokens: list[int]) -> None:
        for position, token in zip(positions, tokens, strict=True):
            self._tokens[position] = token
        index = torch.tensor(positions, device=self.x.device)
        self.x[0, index] = torch.tensor(tokens, device=self.x.device)

    def _stop_early(self) -> bool:
        """Fill up behind the first EOS and count again; whether no mask is left."""
        eos = self.settings.eos_id
        if eos is None or eos not in self._tokens[self.prompt_length :]:
            return False
        self.has_eos = True
        place = self._tokens.index(eos, self.prompt_length)
        behind = [p for p in range(place + 1, len(self._tokens)) if self._tokens[p] != eos]
        if behind:
            self._write(behind, [eos] * len(behind))
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

    def _window(self, end: int, *, idle: bool) -> tuple[Tensor, int] | None:
        """Forward what this step needs; returns hidden states ``(T, hidden)`` and their start.

        None: the published decoder leaves here. ``idle``: no position can be written any more, and
        the forward is counted, not computed.
        """
        if self.settings.cache is None:
            return self._forward(0, idle=idle), 0
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
                    "compat=False does not allow the prediction"
                )
            return self._forward(start, idle=idle), start
        if commit is not None:
            start, grown = self.prefix, commit.end - self.prefix
            hidden = self._forward(start, commit=grown, idle=idle)
            self.prefix, self.filled = commit.end, True
            return hidden, start
        if not self.filled:
            return self._forward(0, idle=idle), 0
        keep = waiting[-1].start if waiting else self.prefix
        hidden = self._forward(0, commit=keep, idle=idle)
        self.twice = keep - self.prefix
        if self.twice:
            behind = self.x.shape[1]
            for kept in (self.cache.keys, self.cache.values):
                kept[:, :, behind : behind + self.twice] = kept[:, :, self.prefix : keep]
        return hidden, 0

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

    def _forward(self, start: int, *, commit: int = 0, idle: bool = False) -> Tensor:
        if idle:
            return self.x.new_empty(0)
        length = self.x.shape[1]

        def each(number: int) -> Tensor:
            return torch.full((1,), number, dtype=torch.int32, device=self.x.device)

        hidden = self.model.forward(
            self.x[:, start:].contiguous(),
            each(start),
            self.cache,
            length=each(length - start),
            kv_len=each(length + self.twice if start else length),
            commit=each(commit),
            pad=self.pad,
            backend=self.backend,
        )
        return hidden[0]

    def _rows(self, eligible: list[int], hidden: Tensor, start: int) -> dict[int, _Row]:
        """What the window says of the positions that may be written.

        A mask before the window, in a block whose keys are kept, has no row. Dream's decoder does
        not write it. LLaDA's reads logits of -inf there: token 0, and an entropy that is no number,
        for which positions that are no masks are chosen instead, so those get their rows too.
        """
        settings, device = self.settings, hidden.device
        length = self.x.shape[1]
        lost = [p for p in eligible if p < start]
        seen = eligible[len(lost) :]
        rows: dict[int, _Row] = {}
        if lost and not self.shifted:
            seen = list(range(start, length))
            rows = {p: _Row(0, 0, _NAN) for p in range(start)}
        index = torch.tensor(seen, dtype=torch.int64, device=device)
        source = (index - start - int(self.shifted)).clamp(min=0)
        stats = self.model.head_stats(hidden, source, backend=self.backend)
        token = best = stats.token
        if settings.temperature > 0:
            token = self._draw(hidden, start)[index - start]
        columns = [column.tolist() for column in (token, best, stats.entropy)]
        for position, values in zip(seen, zip(*columns, strict=True), strict=True):
            rows[position] = _Row(*values)
        order: list[float] | None = None
        if settings.random_order:
            order = torch.rand(self.x.shape, device=device)[0].tolist()
        for position, row in rows.items():
            row.order = row.entropy if order is None else order[position]
        return rows

    def _draw(self, hidden: Tensor, start: int) -> Tensor:
        """Tokens ``(T,)`` of all positions of the window, from torch's generator as published."""
        logits = self.model.head(hidden)
        temperature = self.settings.temperature
        if self.shifted:
            logits = torch.cat((logits[:1], logits[:-1]))
            return torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0]
        # The noise is of the whole sequence.
        unseen = logits.new_full((start, logits.shape[1]), -torch.inf)
        whole = torch.cat((unseen, logits))[None]
        return add_gumbel_noise(whole, temperature).argmax(-1)[0, start:]

    def _accept(self, eligible: list[int], rows: dict[int, _Row]) -> None:
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
            self._write(list(tokens), list(tokens.values()))
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
        order = torch.full(self.x.shape[1:], torch.inf, dtype=torch.float64)
        order[eligible] = torch.tensor([rows[p].order for p in eligible], dtype=torch.float64)
        return order.topk(len(eligible), largest=False).indices.tolist()


def _number(value: float, instead: float) -> float:
    return instead if math.isnan(value) else value
