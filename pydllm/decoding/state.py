"""What decoding keeps on the device: the sequences in the slots of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from pydllm.decoding.call import Call
from pydllm.models import StaticCache

IDLE = -1  # the prompt of a slot that holds none


@dataclass(frozen=True)
class Window:
    """The positions of each sequence that one forward computes.

    Attributes:
        start, length, kv_len, commit: ``(b,)`` int32 on the device, see ``Model.forward``.
        index: ``(b, width)`` int64, positions of the rows; those past a sequence's length repeat
            its last one.
        width: rows of the forward per sequence, known to the host.
    """

    start: Tensor
    length: Tensor
    kv_len: Tensor
    commit: Tensor
    index: Tensor
    width: int

    @classmethod
    def make(
        cls,
        start: Tensor,
        length: Tensor,
        kv_len: Tensor,
        *,
        width: int,
        commit: Tensor | None = None,
    ) -> Window:
        offsets = torch.arange(width, device=start.device)
        last = (start + length - 1).clamp(min=0)
        index = torch.minimum(start[:, None] + offsets, last[:, None])
        commit = torch.zeros_like(length) if commit is None else commit
        return cls(start, length, kv_len, commit, index.long(), width)

    def is_whole(self, max_len: int) -> bool:
        """Whether all rows are in use and all slots are visible; reads values."""
        _, lengths, visible, _ = self._values
        fills = all(length == self.width for length in lengths)
        return fills and (max_len == 0 or all(end == max_len for end in visible))

    @property
    def is_read_only(self) -> bool:
        """Whether nothing is committed; reads values."""
        return not any(self._values[3])

    @cached_property
    def _values(self) -> list[list[int]]:
        return torch.stack((self.start, self.length, self.kv_len, self.commit)).tolist()


@dataclass(frozen=True)
class Selection:
    """The positions whose statistics are wanted: ``width`` from ``start``, ``length`` of them
    valid.

    ``start`` and ``length`` are ``(b,)`` int32 on the device.
    """

    start: Tensor
    length: Tensor
    width: int

    def repeat(self, times: int) -> Selection:
        """The selection of ``times`` copies of each sequence, the copies side by side."""
        start, length = (t.repeat_interleave(times) for t in (self.start, self.length))
        return Selection(start, length, self.width)


class Places(NamedTuple):
    """Where selected positions are, and the rows of windows that predict them.

    Attributes:
        position: ``(b, S)`` int32.
        rows: ``(b * S,)`` int64, counted through the batch.
    """

    position: Tensor
    rows: Tensor

    @classmethod
    def of(cls, start: Tensor, width: int, selection: Selection, lead: int) -> Places:
        """Those of windows of ``width`` rows at ``start``: position p is predicted by the row of
        position ``p - lead``.
        """
        batch, device = start.shape[0], start.device
        position = selection.start[:, None] + torch.arange(selection.width, device=device)
        index = (position - (start + lead)[:, None]).clamp_(0, width - 1)
        if batch > 1:
            index = index + torch.arange(0, batch * width, width, device=device)[:, None]
        return cls(position, index.flatten())


@dataclass
class State:
    """The sequences in the slots of a batch. A decoder adds fields of its own.

    Tensors have one row per slot; numbers are the host's and shared by the slots.

    Attributes:
        prompts: which prompt of the call each slot holds, or ``IDLE``; on the host.
        forwards: forwards since each slot's prompt was admitted; on the host.
        cache: keys and values of the slots.
        x: ``(b, L)`` int64 tokens.
        step_map: ``(b, L)`` int32, the forward that wrote a position, or -1.
        nfe: ``(b,)`` int32, forwards in which the sequence took part.
        noise_offset: ``(b,)`` int32, tokens written so far, the last word of the noise key.
        prompt_length, region_start, end, request_id, temperature, top_k, top_p: of the slot's
            prompt, see ``Call``.
        done: ``(b,)`` bool, nothing is left to decode. No op touches such a row.
        logprobs: ``(b, L)`` fp32, log-probability of the token that was predicted last at a
            position while it was masked, under the distribution that it was drawn from; None:
            nobody asked.
        carried: what the last step left for the next one, the decoder's own.
    """

    call: Call
    prompts: list[int]
    forwards: list[int]
    cache: StaticCache
    x: Tensor
    step_map: Tensor
    nfe: Tensor
    noise_offset: Tensor
    prompt_length: Tensor
    end: Tensor
    request_id: Tensor
    temperature: float | Tensor
    done: Tensor
    region_start: Tensor = field(kw_only=True)
    top_k: Tensor | None = field(default=None, kw_only=True)
    top_p: Tensor | None = field(default=None, kw_only=True)
    logprobs: Tensor | None = field(default=None, kw_only=True)
    carried: Any = field(default=None, kw_only=True)

    @classmethod
    def begin(cls, call: Call, prompts: list[int], cache: StaticCache, **extra: Any) -> Self:
        """The state before the first forward of some prompts of a call.

        An idle slot holds the first prompt's tokens, and is done.
        """
        device = call.device
        rows = torch.tensor([max(prompt, 0) for prompt in prompts], device=device)
        x = call.x[rows]

        def of_slots(values: Any) -> Any:
            return values[rows] if isinstance(values, Tensor) else values

        zero = torch.zeros(len(prompts), dtype=torch.int32, device=device)
        return cls(
            call=call,
            prompts=list(prompts),
            forwards=[0] * len(prompts),
            cache=cache,
            x=x,
            step_map=torch.full_like(x, -1, dtype=torch.int32),
            nfe=zero,
            noise_offset=zero.clone(),
            prompt_length=call.prompt_length[rows],
            region_start=(call.prompt_length if call.region_start is None else call.region_start)[
                rows
            ],
            end=call.end[rows],
            request_id=call.request_id[rows],
            temperature=of_slots(call.temperature),
            top_k=of_slots(call.top_k),
            top_p=of_slots(call.top_p),
            logprobs=torch.zeros_like(x, dtype=torch.float32) if call.logprobs else None,
            done=torch.tensor([prompt == IDLE for prompt in prompts], device=device),
            **extra,
        )

    def counters(self) -> dict[str, Tensor]:
        """What was counted for each slot, ``(b,)`` int32, by name."""
        return {"nfe": self.nfe}

    @property
    def live(self) -> list[int]:
        """The slots that hold a prompt."""
        return [slot for slot, prompt in enumerate(self.prompts) if prompt != IDLE]

    @property
    def live_prompts(self) -> list[int]:
        return [prompt for prompt in self.prompts if prompt != IDLE]

    def take(self, slots: Sequence[int]) -> Self:
        """The state of some slots in another order; tensors are copied, the cache is a view."""
        rows = torch.tensor(slots, device=self.x.device)
        return replace(self, **{n: _take(getattr(self, n), rows, slots) for n in _row_fields(self)})

    def put(self, slots: Sequence[int], other: Self) -> None:
        """Overwrite the slots by the slots of another state, in place."""
        rows = torch.tensor(slots, device=self.x.device)
        for name in _row_fields(self):
            _put(getattr(self, name), rows, slots, getattr(other, name))

    def candidate(self) -> State:
        """A copy that a draft may write to: tokens and counters are its own."""
        own = {
            name: getattr(self, name).clone() for name in ("x", "step_map", "nfe", "noise_offset")
        }
        values = {f.name: getattr(self, f.name) for f in fields(State)}
        return State(**values | own)

    @property
    def draws(self) -> bool:
        """Whether a sequence may be at a temperature."""
        return isinstance(self.temperature, Tensor) or self.temperature > 0

    def sampling(self, repeats: int) -> dict[str, Any]:
        """``temperature``, ``top_k`` and ``top_p`` of ``repeats`` rows per sequence."""
        values = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p")}
        return {
            name: value.repeat_interleave(repeats) if isinstance(value, Tensor) else value
            for name, value in values.items()
        }

    @staticmethod
    def interleave(states: list[State]) -> State:
        """The states side by side: row ``b * len(states) + j`` is row b of the j-th."""
        first = states[0]
        names = [f.name for f in fields(State) if isinstance(getattr(first, f.name), Tensor)]
        stacked: dict[str, Any] = {
            name: torch.stack([getattr(state, name) for state in states], 1).flatten(0, 1)
            for name in names
        }
        return replace(first, **stacked)


def _row_fields(state: State) -> list[str]:
    """Fields with one entry per slot."""
    shared = ("call",)
    return [f.name for f in fields(state) if f.metadata.get("rows", f.name not in shared)]


def _take(value: Any, rows: Tensor, slots: Sequence[int]) -> Any:
    if isinstance(value, Tensor):
        return value[rows]
    if isinstance(value, StaticCache):
        return value.take(slots)
    if isinstance(value, list):
        return [value[slot] for slot in slots]
    if isinstance(value, tuple):
        parts = [_take(part, rows, slots) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if is_dataclass(value) and not isinstance(value, type):
        named = {f.name: getattr(value, f.name) for f in fields(value)}
        return replace(value, **{name: _take(part, rows, slots) for name, part in named.items()})
    return value


def _put(value: Any, rows: Tensor, slots: Sequence[int], other: Any) -> None:
    if isinstance(value, Tensor):
        value[rows] = other
    elif isinstance(value, StaticCache):
        value.put(slots, other)
    elif isinstance(value, list):
        for slot, entry in zip(slots, other, strict=True):
            value[slot] = entry
    elif isinstance(value, tuple):
        for part, new in zip(value, other, strict=True):
            _put(part, rows, slots, new)
    elif is_dataclass(value) and not isinstance(value, type):
        for f in fields(value):
            _put(getattr(value, f.name), rows, slots, getattr(other, f.name))


def fill_holes(active: Sequence[int]) -> list[int]:
    """The active slots in an order that leaves those before ``len(active)`` where they are."""
    moved = iter(slot for slot in active if slot >= len(active))
    kept = set(active)
    return [slot if slot in kept else next(moved) for slot in range(len(active))]
