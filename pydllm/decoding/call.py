"""A checked call of ``generate``, as the decoders receive it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import lcm

import torch
from torch import Tensor
from torch.nn import functional as F

from pydllm.decoding.graph import Eager, Runner, bucket
from pydllm.decoding.stops import Stops
from pydllm.models import Model


@dataclass(frozen=True)
class Step:
    """What ``on_step`` receives after every forward. The tensors are copies.

    Attributes:
        index: forwards of this call so far, this one included.
        x: ``(B, L)`` int64 tokens: prompts and generation regions, masks included. With a
            block-causal model the last block is whole, so it may reach past the region.
        step_map: ``(B, L)`` int32, the forward (counted per sequence) that wrote a position, or -1.
        prompt_length: ``(B,)`` int32.
    """

    index: int
    x: Tensor
    step_map: Tensor
    prompt_length: Tensor


@dataclass(frozen=True)
class Call:
    """A checked call of ``generate``.

    Attributes:
        x: ``(N, L)`` int64 on the model's device, one row per prompt: prompt, masks, EOS after
            them. With a block-causal model masks also fill the rest of the last block.
        prompt_length: ``(N,)`` int32 on the device.
        region_start: ``(N,)`` int32 on the device, the first position to decode: the first mask of
            a prompt that has masks, otherwise its end. None: the ends of all prompts.
        end: ``(N,)`` int32 on the device, prompt length plus new tokens.
        request_id: ``(N,)`` int32 on the device, key of a prompt's noise.
        temperature: 0, or ``(N,)`` fp32 on the device, one per prompt.
        top_k, top_p: ``(N,)`` int32 and fp32 on the device, filters of what is drawn from; None:
            there are none.
        guidance: scale of classifier-free guidance; above 0, ``model`` is a ``GuidedModel``.
        logprobs: whether the log-probabilities of written tokens are kept.
        eos: ``(E,)`` int64 on the device, ids that end a sequence; None: there are none.
        suppress_ids: ``(n,)`` int32 on the device, ids that are never predicted, the mask id first;
            None: there are none. A causal model without a mask has ``mask_id`` -1 where nothing was
            written yet.
        prompt_lengths, region_starts, ends: the same on the host.
        ignores_eos: whether the model's EOS ids are tokens as any other.
        fill_id: what rows hold after their end.
        runner: runs the steps.
        warm: take every step that a block may need, so that all of them are captured.
        stops: what else ends a sequence, looked for on the host; None: nothing.
    """

    model: Model
    mask_id: int
    x: Tensor
    prompt_length: Tensor
    end: Tensor
    request_id: Tensor
    temperature: float | Tensor
    seed: int
    backend: str | None
    eos: Tensor | None
    suppress_ids: Tensor | None
    prompt_lengths: Sequence[int]
    ends: Sequence[int]
    region_start: Tensor | None = None
    region_starts: Sequence[int] | None = None
    ignores_eos: bool = False
    fill_id: int = 0
    on_step: Callable[[Step], None] | None = None
    runner: Runner = field(default_factory=Eager)
    warm: bool = False
    top_k: Tensor | None = None
    top_p: Tensor | None = None
    logprobs: bool = False
    guidance: float = 0.0
    stops: Stops | None = None

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def suppress_but_mask(self) -> Tensor | None:
        """``suppress_ids`` without the mask id, which some codes predict."""
        if self.suppress_ids is None or self.mask_id < 0:
            return self.suppress_ids
        return self.suppress_ids[1:] if len(self.suppress_ids) > 1 else None

    @property
    def max_len(self) -> int:
        """Positions of every row, the padding to a bucket included."""
        return self.x.shape[1]

    @property
    def longest(self) -> int:
        """Prompt and new tokens of the longest sequence."""
        return max(self.ends)

    @property
    def region_lengths(self) -> list[int]:
        """Positions from the first to decode to the end, of each prompt."""
        return [end - start for start, end in zip(self.first_positions, self.ends, strict=True)]

    @property
    def first_positions(self) -> Sequence[int]:
        """The first position to decode of each prompt."""
        return self.prompt_lengths if self.region_starts is None else self.region_starts

    @property
    def has_infill(self) -> bool:
        """Whether a prompt has masks."""
        return self.region_starts is not None

    def decoded_front(self, prompt: int, row: list[int]) -> list[int]:
        """The new ids of a prompt before the first that is not decoded."""
        answer = row[self.prompt_lengths[prompt] : self.ends[prompt]]
        return answer[: answer.index(self.mask_id)] if self.mask_id in answer else answer

    def with_runner(self, runner: Runner) -> Call:
        """The call with its small tensors in the runner's buffers."""
        eos, suppress_ids = runner.static_buffer("call", (self.eos, self.suppress_ids))
        return replace(self, runner=runner, eos=eos, suppress_ids=suppress_ids)

    def with_max_len(self, max_len: int) -> Call:
        """The call with rows of at least its length, filled as after an end."""
        beyond = max_len - self.max_len
        return replace(self, x=F.pad(self.x, (0, beyond), value=self.fill_id))

    def whole_width(self, prompts: Sequence[int]) -> int:
        """Rows of a forward over the whole sequences of some prompts."""
        return self.runner.width(max(self.ends[prompt] for prompt in prompts), self.max_len)


def region(model: Model, prompt: int, end: int) -> int:
    """End of the last block of a sequence, in positions, for ends of the prompt and all."""
    block = model.spec.block_size or 1
    first = prompt if model.spec.block_origin == "prompt" else 0
    return first - (first - end) // block * block


def extents(lengths: Sequence[int], ends: Sequence[int], *, shared: bool) -> Sequence[int]:
    """Positions of each row that are in use; ``shared``: every region is as long as the longest."""
    if not shared:
        return ends
    longest = max(end - length for length, end in zip(lengths, ends, strict=True))
    return [length + longest for length in lengths]


def padded_length(
    model: Model, prompt_lengths: Sequence[int], ends: Sequence[int], *, fixed_shapes: bool
) -> int:
    """Positions that the rows of a call have: whole blocks, and a bucket for recorded steps."""
    spec = model.spec
    whole = max(region(model, *each) for each in zip(prompt_lengths, ends, strict=True))
    if not fixed_shapes:
        return whole
    block = spec.block_size or 1
    # Where blocks begin at the prompt's end, another prompt's may end up to a block later.
    spare = block - 1 if spec.block_origin == "prompt" else 0
    multiple = lcm(16, block)
    length = -(-bucket(max(ends) + spare) // multiple) * multiple
    return length if spec.max_positions is None else max(whole, min(length, spec.max_positions))


def lay_out(
    model: Model,
    mask_id: int,
    fill_id: int,
    ids: Sequence[Sequence[int]],
    ends: Sequence[int],
    max_len: int,
) -> Tensor:
    """The tokens ``(N, max_len)`` of a call, on the host: prompt, masks, ``fill_id``."""
    x = torch.full((len(ids), max_len), fill_id)
    for row, (prompt, end) in enumerate(zip(ids, ends, strict=True)):
        x[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
        x[row, len(prompt) : region(model, len(prompt), end)] = mask_id
    return x
