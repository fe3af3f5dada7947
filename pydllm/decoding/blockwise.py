"""Block-wise decoding: one block after the other, each block step by step.

A step is: window forward, statistics, accept, commit. The sequences of a batch fill a block each at
the same time, at their own positions; a sequence whose block is complete waits for the others.
Within a step nothing is read on the host. Between steps the host reads how many masks are left, and
only where the number of steps is not known beforehand. That an EOS was written, the step finds out
itself (``ops.Ending``).

With full attention, blocks start at the end of the prompt, and the forward that opens a block
recomputes the whole sequence.

A block-causal model's blocks are aligned to position 0: the end of the prompt shares the first one
with masks, and the last one is decoded whole and cut. Keys and values of finished blocks are exact,
they never change again. The forward that opens a block stores the one before, so a block of m
masks takes m steps of one token, and the prompt takes none.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pydllm import ops
from pydllm._checks import check_choice, check_int
from pydllm.decoding.blocks import Block, BlockState, open_block, reading
from pydllm.decoding.call import Call
from pydllm.decoding.driver import Algorithm, Counts, Decoder, Plan
from pydllm.decoding.state import Places, Selection, State, Window
from pydllm.decoding.step import busy, forward, pick, statistics, write
from pydllm.models import Model
from pydllm.models.spec import ModelSpec

CACHES = ("none", "prefix", "dual")
CARRY_MASKS = ("llada", "fast_dllm")


class BlockwiseAlgorithm(Algorithm):
    """What the block-wise algorithms have in common; each declares these fields in its own order.

    Attributes:
        block_length: tokens in a block; the last block may be shorter. For a block-causal model
            it has to be the model's, or, for a seeded one (Fast-dLLM v2), a divisor of it: the
            model's block is filled in parts, from left to right.
        cache: ``"none"``: every step forwards the whole sequence. ``"prefix"``: each block opens
            with a forward of the whole sequence whose keys and values before the block are kept;
            the block and everything after it are recomputed. ``"dual"``: those after it are kept
            as well and only the block is recomputed. Both approximate ``"none"``. With a
            block-causal model keys and values of finished blocks are always kept, which is exact,
            and ``"none"`` is the only value.
        first_token: for shifted models with a cache: ``"window"`` starts the window one token
            early, so that every position is predicted by the row before it; ``"forced"`` takes the
            first token of each block from the block's first forward, as Fast-dLLM and FreeDave do.
            A block-causal model takes it from there if it is ``seeded``, and only then. Where
            ``"forced"`` would change nothing, it is refused.
        compat: None, or the published code whose loop is followed: the mask id may be predicted,
            and then stays a mask; ``"llada"`` and ``"fast_dllm"`` fill such a mask in later blocks,
            as those loops do. Scores are fp32.
    """

    takes_guidance: ClassVar[bool] = True
    fills_prompts: ClassVar[bool] = True

    block_length: int
    cache: str
    first_token: str
    compat: str | None = None

    def __post_init__(self) -> None:
        check_int("block_length", self.block_length, 1)
        check_choice("cache", self.cache, CACHES)
        check_choice("first_token", self.first_token, ("window", "forced"))

    @abstractmethod
    def accept(self, stats: ops.VocabStats) -> tuple[Tensor, dict[str, Any]]:
        """The score of each position, and the arguments of ``ops.unmask`` that state the rule."""

    def steps(self, masks: int) -> int | None:
        """Steps that a number of masks takes; None: it depends on the tokens."""
        return None

    @property
    def takes_one_by_score(self) -> bool:
        """Whether a step is one token, in an order by score."""
        return False

    @property
    def carries_masks(self) -> bool:
        """Whether a full forward also fills masks that earlier blocks were left with."""
        return self.compat in CARRY_MASKS

    def check(self, model: Model, max_new_tokens: int) -> None:
        name, spec = type(self).__name__, model.spec
        if spec.attention == "causal":
            raise ValueError(
                f"{name}: expected a model with full or block-causal attention, got 'causal'"
            )
        if self.first_token == "forced" and not spec.seeded:
            self._check_forced(spec)
        if spec.attention == "full":
            return
        parts = spec.seeded and (spec.block_size or 1) % self.block_length == 0
        if self.block_length != spec.block_size and not parts:
            raise ValueError(
                f"block_length: expected {spec.block_size}, the block of the block-causal model, "
                f"got {self.block_length}"
            )
        if self.cache != "none":
            raise ValueError(
                "cache: expected 'none' with a block-causal model, which always keeps exact keys "
                f"and values of finished blocks, got {self.cache!r}"
            )
        if self.carries_masks:
            raise ValueError(
                f"compat: expected none of {', '.join(CARRY_MASKS)} with a block-causal model "
                f"(they fill masks of finished blocks), got {self.compat!r}"
            )

    def _check_forced(self, spec: ModelSpec) -> None:
        """The block's first forward has to predict its first token as no later one does."""
        if spec.attention != "full":
            found = "a block-causal model that is not seeded"
        elif not spec.shift_logits:
            found = "logits that are not shifted"
        elif self.cache == "none":
            found = "cache 'none'"
        else:
            return
        raise ValueError(f"first_token: expected 'window' with {found}, got 'forced'")

    def decoder(self, call: Call) -> Decoder:
        return BlockwiseDecoder(self)


@dataclass(frozen=True, kw_only=True)
class BlockPlan(Plan):
    """A step of ``block``."""

    block: Block
    is_first: bool
    is_last: bool


@dataclass(frozen=True)
class BlockwiseDecoder(Decoder):
    """Fills blocks by an algorithm's rule, one step of it per forward."""

    algorithm: BlockwiseAlgorithm

    def begin(self, call: Call, prompts: list[int]) -> tuple[BlockState, None]:
        return begin_blocks(BlockState, self.algorithm, call, prompts), None

    def plan(self, state: BlockState, counts: Counts | None) -> BlockPlan:
        block = state.block
        if block is None or is_over(state, counts):
            block = open_block(self.algorithm, state, with_places=True)
        index = state.steps_done
        state.steps_done += 1
        first, last = index == 0, state.steps_done == block.steps
        window = block.refresh if first else block.window
        selection = block.first_selection if first else block.selection
        key = ((first, last, selection.width), window.width, block.positions.width)
        poll = 1 if last or not block.is_known else 0
        return BlockPlan(key, poll, block=block, is_first=first, is_last=last)

    def step(self, state: BlockState, plan: BlockPlan) -> tuple[Tensor, None]:
        block, first, last = plan.block, plan.is_first, plan.is_last
        window = block.refresh if first else block.window
        selection = block.first_selection if first else block.selection
        forced = first and block.is_forced
        places = block.first_places if first else block.places
        options = reading(state, first=first)
        stats = window_stats(self.algorithm, state, window, selection, places=places, **options)
        if first:
            count_blocks_without_masks(state, block)
            if state.call.model.spec.seeded:
                count_only_stored(state, block)
        accept = force_first if forced else self.algorithm.accept
        # One forced token does not complete a block.
        ending = None if forced and not last else block_ending(state, block, last=last)
        unmasked = write(state, stats, selection, accept, ending=ending)
        decides_block = block.first_decides_block if first else block.decides_block
        if decides_block and not last and ending is not None and not state.call.has_infill:
            return unmasked.remaining[None], None
        left = torch.zeros_like(state.nfe) if last else masks_left(state, block)
        return busy(state, left), None


def begin_blocks(
    kind: type[BlockState],
    algorithm: BlockwiseAlgorithm,
    call: Call,
    prompts: list[int],
    **extra: Any,
) -> Any:
    """The state before the first block."""
    exact = call.model.spec.block_size is not None
    max_len = call.max_len if exact or algorithm.cache != "none" else 0
    cache = call.runner.cache("cache", call.model, len(prompts), max_len)
    state = kind.begin(
        call,
        prompts,
        cache,
        next_start=torch.zeros_like(call.prompt_length[:1]).expand(len(prompts)).clone(),
        blocks=[0] * len(prompts),
        **extra,
    )
    size = call.model.spec.block_size or 1
    if call.model.spec.block_origin == "prompt":
        state.next_start.copy_(state.prompt_length)
    else:
        state.next_start.copy_(state.region_start // size * size)
    return state


def is_over(state: BlockState, counts: Counts | None) -> bool:
    """Whether the open block is complete, as far as the host knows."""
    if state.block is None or state.steps_done == state.block.steps:
        return True
    if state.block.is_forced and state.steps_done == 1:  # it did not look for the block's end
        return False
    return counts is not None and max(counts[0]) <= 0 and not state.call.warm


def window_stats(
    algorithm: BlockwiseAlgorithm,
    state: State,
    window: Window,
    selection: Selection,
    *,
    branches: int = 1,
    noise_offset: Tensor | None = None,
    attention: str | None = None,
    shifted: bool | None = None,
    places: Places | None = None,
) -> ops.VocabStats:
    """One forward of the window and the statistics of the selected positions ``(b, S)``.

    With ``branches``, the state and the selection hold that number of copies of each sequence, side
    by side, all at the sequence's window and over its cache.
    """
    call = state.call
    start = window.start if branches == 1 else window.start.repeat_interleave(branches)
    own: dict[str, Any] = {"noise_offset": noise_offset, "shifted": shifted}
    picked = pick(state, window.width, start, selection, places=places, **own)
    # Nothing depends on the last layer's other rows.
    rows = picked.rows if picked.live is not None and call.guidance == 0 else None
    hidden = forward(state, window, branches=branches, attention=attention, rows=rows)
    return statistics(
        state,
        hidden,
        start,
        selection,
        suppress_ids=call.suppress_but_mask if algorithm.compat else call.suppress_ids,
        picked=picked,
        **own,
    )


def count_blocks_without_masks(state: BlockState, block: Block) -> None:
    """Count the forward that opens a block of given tokens alone, which decides nothing."""
    if state.call.has_infill:
        takes_part = (block.positions.length > 0) & (block.refresh.length > 0) & ~state.done
        state.nfe += takes_part & (masks_left(state, block) == 0)


def count_only_stored(state: BlockState, block: Block) -> Tensor:
    """Count the forward that stores a prompt and writes nothing; ``(b,)`` int32, 1 where it did."""
    stored = (block.refresh.length > 0) & (block.first_selection.length == 0) & ~state.done
    state.nfe += stored.int()
    return stored.int()


def masks_left(state: State, block: Block) -> Tensor:
    """Masks in the block, ``(b,)`` int32."""
    positions = block.positions
    offsets = torch.arange(positions.width, device=state.x.device)
    index = (positions.start[:, None] + offsets).clamp(max=state.x.shape[1] - 1).long()
    left = state.x.gather(1, index).eq(state.call.mask_id)
    left &= offsets < positions.length[:, None]
    return left.sum(1, dtype=torch.int32)


def block_ending(state: State, block: Block, *, last: bool) -> ops.Ending:
    """An EOS is looked for when the block is complete."""
    return ops.Ending(state.done, state.end, state.call.eos, block.ends_from, last)


def force_first(stats: ops.VocabStats) -> tuple[Tensor, dict[str, Any]]:
    """Take the leftmost token, whatever its score."""
    quota = torch.ones(stats.prob.shape[0], dtype=torch.int32, device=stats.prob.device)
    return stats.prob, {"rule": "left_to_right", "quota": quota}
