"""What decoding keeps on the device, and how numbers travel from there to the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pydllm.decoding.generation import Request


@dataclass(frozen=True)
class Window:
    """A span of positions a sequence that one forward computes; all ``(B,)`` int32 on the device.

    ``width`` is the number of rows of the forward, known to the host; ``index (B, width)`` are the
    positions of the rows, those behind a sequence's length clamped into it.
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


@dataclass(frozen=True)
class Selection:
    """The positions whose statistics are wanted: ``width`` from ``start``, ``length`` of them
    valid.

    ``start`` and ``length`` are ``(B,)`` int32 on the device.
    """

    start: Tensor
    length: Tensor
    width: int

    def repeat(self, times: int) -> Selection:
        """The selection of ``times`` copies of each sequence, the copies side by side."""
        start, length = (t.repeat_interleave(times) for t in (self.start, self.length))
        return Selection(start, length, self.width)


@dataclass
class State:
    """The sequences still being decoded. All tensors on the device, rows in batch order."""

    rows: Tensor  # (b,) int64: which rows of the request these are
    x: Tensor  # (b, L) int64; with a block-causal model whole blocks, L up to the next multiple
    step_map: Tensor  # (b, L) int32
    nfe: Tensor  # (b,) int32
    decoded: Tensor  # (b,) int32: tokens written so far, the last word of the noise key
    prompt_length: Tensor  # (b,) int32
    request_id: Tensor  # (b,) int32
    steps: Tensor  # (b,) int32: steps of the baseline, where a forward may take several
    run: Tensor  # (b,) fp32: of late, so many steps a forward
    end: Tensor  # (b,) int32: the first position behind the sequence
    done: Tensor  # (b,) bool: nothing is left to decode

    @classmethod
    def of(cls, request: Request) -> State:
        batch = request.x.shape[0]
        device = request.x.device
        x = request.whole_blocks()
        return cls(
            rows=torch.arange(batch, device=device),
            x=x,
            step_map=torch.full_like(x, -1, dtype=torch.int32),
            nfe=torch.zeros(batch, dtype=torch.int32, device=device),
            decoded=torch.zeros(batch, dtype=torch.int32, device=device),
            prompt_length=request.prompt_length,
            request_id=request.request_id,
            steps=torch.zeros(batch, dtype=torch.int32, device=device),
            run=torch.full((batch,), 2.0, device=device),
            end=request.prompt_length + request.max_new_tokens,
            done=torch.zeros(batch, dtype=torch.bool, device=device),
        )

    @classmethod
    def interleave(cls, states: list[State]) -> State:
        """The states side by side: row ``b * len(states) + j`` is row b of the j-th."""
        fields = zip(*(vars(state).values() for state in states), strict=True)
        return cls(*(torch.stack(field, 1).flatten(0, 1) for field in fields))

    def copy(self) -> State:
        return State(**{name: value.clone() for name, value in vars(self).items()})

    def keep(self, rows: Tensor) -> Self:
        """The state of some of its rows, copied."""
        return type(self)(**{name: value[rows] for name, value in vars(self).items()})

    def write_back(self, target: State) -> None:
        """Copy the rows into the state of the whole request, unless this is that state."""
        if target is self:
            return
        for name in ("x", "step_map", "nfe", "decoded"):
            getattr(target, name)[self.rows] = getattr(self, name)


class HostNumbers:
    """A few integers that travel from the device to the host without a synchronising copy."""

    def __init__(self, device: torch.device, count: int) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        pinned = device.type == "cuda"
        self._values = torch.zeros(count, dtype=torch.int32, pin_memory=pinned)
        self._posted = 0

    def post(self, values: Tensor) -> None:
        """Send a 1-D tensor of at most ``count`` numbers on its way."""
        self._posted = len(values)
        self._values[: self._posted].copy_(values, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def read(self) -> list[int]:
        """Wait until the last posted values have arrived and return them."""
        if self._event is not None:
            self._event.synchronize()
        return self._values[: self._posted].tolist()


def fill_holes(live: list[int]) -> list[int]:
    """The live rows in an order that leaves those before ``len(live)`` where they are."""
    last = iter(row for row in live if row >= len(live))
    stay = set(live)
    return [row if row in stay else next(last) for row in range(len(live))]
