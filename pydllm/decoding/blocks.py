"""How the blocks of a batch are laid out: windows, selections, steps.

With full attention the forward that opens a block recomputes the whole sequence, and blocks begin
where the first position to decode is. A block-causal model's blocks are those of its mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pydllm.decoding.state import Places, Selection, State, Window

if TYPE_CHECKING:
    from pydllm.decoding.blockwise import BlockwiseAlgorithm


@dataclass(frozen=True)
class Block:
    """One block of every sequence, made when it opens.

    Attributes:
        steps: steps that it takes at most.
        is_known: whether it takes exactly that many.
        is_forced: whether the first step writes the first position and nothing else.
        refresh, window: of the first forward, and of the others.
        first_selection, selection: the positions that the first step and the others decide.
        positions: those of the block.
        first_decides_block, decides_block: whether these are the block's and no others.
        skips_first: nothing is stored or forced, and the first forward is left out.
        ends_from: ``(b,)`` int32, the first position that may hold an EOS.
        first_places, places: of the first forward, and of the others, where they were made with the
            block.
    """

    steps: int
    is_known: bool
    is_forced: bool
    refresh: Window
    window: Window
    first_selection: Selection
    selection: Selection
    positions: Selection
    ends_from: Tensor
    first_decides_block: bool = True
    decides_block: bool = True
    skips_first: bool = False
    first_places: Places | None = None
    places: Places | None = None


@dataclass
class BlockState(State):
    """Also the block that every sequence fills.

    Attributes:
        next_start: ``(b,)`` int32, first position of the block that opens next.
        blocks: blocks that each slot has opened; on the host.
        block: the open one; None before the first.
        steps_done: steps of it that were planned.
    """

    next_start: Tensor
    blocks: list[int]
    block: Block | None = field(default=None, metadata={"rows": False})
    steps_done: int = field(default=0, metadata={"rows": False})


def open_block(
    algorithm: BlockwiseAlgorithm, state: BlockState, *, with_places: bool = False
) -> Block:
    """Open the next block of every sequence.

    ``with_places``: of windows without branches. Sequences must not leave before the block is over,
    so they are made with fixed shapes alone.
    """
    spec = state.call.model.spec
    if spec.block_size is None:
        block = _layout_full(algorithm, state)
    elif spec.seeded:
        block = _layout_seeded(algorithm, state)
    else:
        block = _layout_block_causal(algorithm, state)
    if state.call.runner.fixed_shapes:
        block = _with_places(state, block) if with_places else block
        block = state.call.runner.static_buffer("block", block)
    state.block = block
    state.next_start += algorithm.block_length
    state.blocks = [index + 1 for index in state.blocks]
    state.steps_done = int(block.skips_first)
    return state.block


def _with_places(state: State, block: Block) -> Block:
    """The block with its places, which a recorded step would compute each time."""

    def places(window: Window, selection: Selection, *, first: bool) -> Places:
        shifted = reading(state, first=first).get("shifted", state.call.model.spec.shift_logits)
        return Places.of(window.start, window.width, selection, int(shifted))

    return replace(
        block,
        first_places=places(block.refresh, block.first_selection, first=True),
        places=places(block.window, block.selection, first=False),
    )


def reading(state: State, *, first: bool) -> dict[str, Any]:
    """How a forward attends and what its rows predict, where it is not as the model's own."""
    spec = state.call.model.spec
    if spec.context == "block":
        return {}
    # Causal forwards store blocks and predict the next token; a mask predicts itself.
    return {"attention": "causal", "shifted": True} if first else {"attention": "full"}


def _limit(algorithm: BlockwiseAlgorithm, masks: Sequence[int], forced: bool) -> tuple[int, bool]:
    """Steps of a block at most, and whether there are exactly that many.

    Where masks can be left, as masks can be predicted, a short block has the steps of a whole one:
    the limit of a sequence does not depend on its batch.
    """
    whole = algorithm.block_length
    steps = [algorithm.steps(count - forced) for count in masks]
    if algorithm.compat is not None:
        steps = [algorithm.steps(whole - forced)]
    known = [step for step in steps if step is not None]
    return (forced + max(known), True) if known else (whole, False)


def _layout_full(algorithm: BlockwiseAlgorithm, state: BlockState) -> Block:
    call = state.call
    runner, cache = call.runner, algorithm.cache
    shifted = call.model.spec.shift_logits
    forced = shifted and algorithm.first_token == "forced" and cache != "none"
    offsets = [state.blocks[slot] * algorithm.block_length for slot in state.live]
    regions = call.region_lengths
    lengths = [regions[prompt] for prompt in state.live_prompts]
    left = [length - offset for length, offset in zip(lengths, offsets, strict=True)]
    sizes = [min(algorithm.block_length, count) for count in left]
    size, end = max(sizes), state.end
    start = torch.minimum(state.next_start, end)
    length = (end - start).clamp(max=algorithm.block_length)
    padded = min(algorithm.block_length, max(regions)) if runner.fixed_shapes else size
    positions = Selection(start, length, padded)
    first_selection = selection = positions
    zero = torch.zeros_like(end)
    width = call.whole_width(state.live_prompts)
    commit = None if cache == "none" else end
    refresh = window = Window.make(zero, end, end, width=width, commit=commit)
    if algorithm.carries_masks:
        filled = start + length - state.region_start
        width = runner.width(max(map(sum, zip(offsets, sizes, strict=True))), call.max_len)
        first_selection = Selection(state.region_start, filled, width)
    if cache == "none":
        selection = first_selection
    else:
        if forced:
            first_selection = Selection(start, torch.ones_like(end), 1)
        # A shifted model predicts the block's first position from the row before the block.
        lead = int(shifted and not forced)
        if cache == "dual":
            rows, width = length + lead, lead + padded
        else:
            rows = end - start + lead
            width = runner.width(lead + max(left), call.max_len)
        rows = torch.where(length > 0, rows, 0)
        window = Window.make(start - lead, rows, end, width=width)
    steps, known = _limit(algorithm, sizes, forced)
    if call.has_infill:  # a part of the block may be the prompt's
        known = False
    return Block(
        steps,
        known,
        forced,
        refresh,
        window,
        first_selection,
        selection,
        positions,
        torch.maximum(start, state.prompt_length),
        first_decides_block=first_selection is positions,
        decides_block=selection is positions,
    )


def _layout_block_causal(algorithm: BlockwiseAlgorithm, state: BlockState) -> Block:
    call, size = state.call, algorithm.block_length
    runner, slots, first_mask = call.runner, call.max_len, state.region_start
    shifted = int(call.model.spec.shift_logits)
    # A sequence that is done may stay, and has no block any more.
    start = state.next_start.clamp(max=slots - size)
    end = start + size
    # Masks after the end of a sequence that is done stay masks.
    length = torch.full_like(first_mask, size).masked_fill(state.done, 0)
    positions = Selection(start, length, size)
    # The first forward also stores the block before, or all that the prompt fills.
    opening = [slot for slot in state.live if state.blocks[slot] == 0]
    width, before = 2 * size, start - size
    if opening:
        longest = max(call.first_positions[state.prompts[slot]] for slot in opening)
        at_prompt = call.model.spec.block_origin == "prompt"
        whole = longest + size if at_prompt else (longest // size + 1) * size
        others = width if len(opening) < len(state.live) else 0
        width = runner.width(max(whole, others), slots)
        before = torch.where(start < first_mask + 1, 0, before)
    rows, stored = ((t - before).masked_fill(state.done, 0) for t in (end, start))
    refresh = Window.make(before, rows, end, width=width, commit=stored)
    first = (start - shifted).clamp(min=0)
    window = Window.make(first, end - first, end, width=min(size + shifted, slots))
    steps, known = _limit(algorithm, [size], False)
    if (opening or call.has_infill) and known:  # a part of the block may be the prompt's
        steps, known = size, False
    ends_from = torch.maximum(start, state.prompt_length)
    return Block(steps, known, False, refresh, window, positions, positions, positions, ends_from)


def _layout_seeded(algorithm: BlockwiseAlgorithm, state: BlockState) -> Block:
    """The first forward stores the model's block before, or all that the prompt fills, and its last
    row predicts the first token. The others forward the model's block alone, and decide a part.
    """
    call, part = state.call, algorithm.block_length
    spec, prompt = call.model.spec, state.prompt_length
    size, at_prompt = spec.block_size or 1, spec.block_origin == "prompt"
    part_start = state.next_start.clamp(max=call.max_len - part)
    phase = (part_start - prompt if at_prompt else part_start).remainder(size)
    start = part_start - phase  # of the model's block
    length = torch.full_like(prompt, part).masked_fill(state.done, 0)
    positions = Selection(part_start, length, part)
    begins = (phase == 0) & ~state.done
    # On the host: which slots open a block of the model, and which of these their first.
    opening = [slot for slot in state.live if state.blocks[slot] * part % size == 0]
    lengths = [call.prompt_lengths[state.prompts[s]] for s in opening if state.blocks[s] == 0]
    stored = [length if at_prompt else length // size * size for length in lengths]
    skips_first = not opening or (len(stored) == len(opening) and max(stored) == 0)
    width = call.runner.width(max([size, *stored]), call.max_len)
    before = torch.where(start < prompt + 1, 0, start - size)
    rows = torch.where(begins, start - before, 0)
    refresh = Window.make(before, rows, start, width=width, commit=rows)
    # The prompt's end may share the first block with masks: its first token is known then.
    seeds = (begins & (start >= prompt)).int()
    whole = torch.full_like(prompt, size).masked_fill(state.done, 0)
    window = Window.make(start, whole, start + size, width=size)
    steps, known = _limit(algorithm, [part], True)
    if part < size or (lengths and not at_prompt):
        steps, known = part + 1, False
    return Block(
        steps,
        known,
        True,
        refresh,
        window,
        Selection(start, seeds, 1),
        positions,
        positions,
        torch.maximum(part_start, prompt),
        first_decides_block=False,
        skips_first=skips_first,
    )
