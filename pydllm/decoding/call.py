"""A checked call of ``generate``, as the decoders receive it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import lcm

import torch
from torch import Tensor
from torch.nn import functional as F

from pydllm.decoding.graph import Eager, Runner, bucket
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
        end: ``(N,)`` int32 on the device, prompt length plus new tokens.
        request_id: ``(N,)`` int32 on the device, key of a prompt's noise.
        temperature: a number, or ``(N,)`` fp32 on the device, one per prompt.
        eos: ``(E,)`` int64 on the device, ids that end a sequence; None: there are none.
        suppress_ids: ``(1,)`` int32 on the device, the mask id, which is never predicted; None for
            a causal model without one, whose empty positions are ``mask_id`` -1.
        prompt_lengths: ``prompt_length`` on the host.
        max_new_tokens: length of every generation region, in tokens.
        runner: runs the steps.
        warm: take every step that a block may need, so that all of them are captured.
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
    max_new_tokens: int
    on_step: Callable[[Step], None] | None = None
    runner: Runner = field(default_factory=Eager)
    warm: bool = False

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def max_len(self) -> int:
        """Positions of every row, the padding to a bucket included."""
        return self.x.shape[1]

    @property
    def longest(self) -> int:
        """Prompt and new tokens of the longest sequence."""
        return max(self.prompt_lengths) + self.max_new_tokens

    def with_runner(self, runner: Runner) -> Call:
        """The call with its small tensors in the runner's buffers."""
        eos, suppress_ids = runner.static_buffer("call", (self.eos, self.suppress_ids))
        return replace(self, runner=runner, eos=eos, suppress_ids=suppress_ids)

    def with_max_len(self, max_len: int) -> Call:
        """The call with rows of at least its length, filled as after an end."""
        eos_ids = self.model.spec.eos_ids
        beyond = max_len - self.max_len
        x = F.pad(self.x, (0, beyond), value=eos_ids[0] if eos_ids else 0)
        return replace(self, x=x)

    def whole_width(self, prompts: Sequence[int]) -> int:
        """Rows of a forward over the whole sequences of some prompts."""
        longest = max(self.prompt_lengths[prompt] for prompt in prompts) + self.max_new_tokens
        return self.runner.width(longest, self.max_len)


def region(model: Model, prompt: int, max_new_tokens: int) -> int:
    """End of the last block of a sequence, in positions."""
    block = model.spec.block_size or 1
    first = prompt if model.spec.block_origin == "prompt" else 0
    return first - (first - prompt - max_new_tokens) // block * block


def padded_length(model: Model, prompt: int, max_new_tokens: int, *, fixed_shapes: bool) -> int:
    """Positions that the rows of a call have: whole blocks, and a bucket for recorded steps."""
    spec = model.spec
    whole = region(model, prompt, max_new_tokens)
    if not fixed_shapes:
        return whole
    block = spec.block_size or 1
    # Where blocks begin at the prompt's end, another prompt's may end up to a block later.
    spare = block - 1 if spec.block_origin == "prompt" else 0
    multiple = lcm(16, block)
    length = -(-bucket(prompt + max_new_tokens + spare) // multiple) * multiple
    return length if spec.max_positions is None else max(whole, min(length, spec.max_positions))


def lay_out(
    model: Model, mask_id: int, ids: Sequence[Sequence[int]], max_new_tokens: int, max_len: int
) -> Tensor:
    """The tokens ``(N, max_len)`` of a call, on the host: prompt, masks, EOS."""
    spec = model.spec
    fill = spec.eos_ids[0] if spec.eos_ids else 0
    x = torch.full((len(ids), max_len), fill)
    for row, prompt in enumerate(ids):
        end = region(model, len(prompt), max_new_tokens)
        x[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
        x[row, len(prompt) : end] = mask_id
    return x
