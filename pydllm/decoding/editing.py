"""Token editing: a model that was trained to correct its own tokens may replace them.

The blocks are those of block-wise decoding on a block-causal model. In a step masks become tokens,
and tokens of the block that the model is sure to contradict become others; when no mask is left,
further steps edit alone. A block is complete when such a step changes nothing, or when their budget
is spent. Until then no token of it is final, an EOS neither. The forward that opens the next block
stores it, with the keys of its final tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from pydllm import ops
from pydllm._checks import check_choice, check_int, check_number
from pydllm.decoding.blocks import BlockState, open_block
from pydllm.decoding.blockwise import BlockPlan, begin_blocks, block_ending
from pydllm.decoding.call import Call
from pydllm.decoding.driver import Algorithm, Counts, Decoder
from pydllm.decoding.state import Selection, Window
from pydllm.decoding.static import Static
from pydllm.decoding.step import busy, close, forward, note_logprobs, pick, statistics
from pydllm.models import Model
from pydllm.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Editing(Algorithm):
    """Masks above one threshold are filled, tokens above another are replaced (LLaDA2.1).

    For block-causal models that were trained to predict the tokens they are shown, right or wrong;
    with another, leave ``edit_threshold`` at None. At a temperature both thresholds
    look at the probability under the distribution that the token is drawn from.

    Attributes:
        threshold: probability that a mask's token has to exceed, in [0, 1].
        edit_threshold: probability that a token has to exceed to replace another, in [0, 1]; 0
            replaces at every disagreement, None never.
        max_post_steps: forwards of a block after its last mask is filled, at most.
        min_tokens: masks that a step fills at least, the most probable ones.
        block_length: of the model's mask.
        compat: None ends a block as the model's own ``generate`` does. ``"sglang"``: where the
            budget ends it, by one forward more, which writes nothing (the same tokens);
            ``"diffusers"``: by one forward more, which may write. Both codes have other thresholds:
            0.5 and 0, and 0.7 and 0.5.
    """

    takes_guidance: ClassVar[bool] = True

    threshold: float = 0.95
    edit_threshold: float | None = 0.9
    max_post_steps: int = 16
    min_tokens: int = 1
    block_length: int = 32
    compat: str | None = None

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, 0, 1)
        if self.edit_threshold is not None:
            check_number("edit_threshold", self.edit_threshold, 0, 1)
        check_int("max_post_steps", self.max_post_steps, 0)
        check_int("min_tokens", self.min_tokens, 1)
        check_int("block_length", self.block_length, 1)
        check_choice("compat", self.compat, (None, "sglang", "diffusers"))

    def check(self, model: Model, max_new_tokens: int) -> None:
        expect_whole_blocks("Editing", model.spec)
        self.layout.check(model, max_new_tokens)

    def decoder(self, call: Call) -> EditingDecoder:
        return EditingDecoder(self)

    @property
    def layout(self) -> Static:
        """An algorithm with these blocks."""
        return Static(block_length=self.block_length)

    @property
    def ending(self) -> dict[str, Any]:
        """When a block is complete, in terms of ``ops.edit_tokens``."""
        budget = self.max_post_steps
        if self.compat == "sglang":
            return {"max_post_steps": budget, "confirm": True}
        if self.compat == "diffusers":
            return {"max_post_steps": budget + 1}
        # Without edits a forward of known tokens changes nothing.
        return {"max_post_steps": 0 if self.edit_threshold is None else budget}

    @property
    def most_steps(self) -> int:
        """Forwards of a block at most."""
        return self.block_length + self.max_post_steps + 1


@dataclass
class EditingState(BlockState):
    """Also where each slot's block stands.

    Attributes:
        post_steps: ``(b,)`` int32, forwards of it that began without masks.
        complete: ``(b,)`` bool.
    """

    post_steps: Tensor = None  # type: ignore[assignment]
    complete: Tensor = None  # type: ignore[assignment]


@dataclass(frozen=True)
class EditingDecoder(Decoder):
    """Fills and edits blocks; a sequence whose block is complete waits, and is not forwarded."""

    algorithm: Editing

    def begin(self, call: Call, prompts: list[int]) -> tuple[EditingState, None]:
        zero = torch.zeros(len(prompts), dtype=torch.int32, device=call.device)
        extra = {"post_steps": zero, "complete": zero.bool()}
        return begin_blocks(EditingState, self.algorithm.layout, call, prompts, **extra), None

    def plan(self, state: EditingState, counts: Counts | None) -> BlockPlan:
        block, most = state.block, self.algorithm.most_steps
        over = counts is not None and max(counts[0]) <= 0 and not state.call.warm
        if block is None or over or state.steps_done == most:
            block = open_block(self.algorithm.layout, state)
        index = state.steps_done
        state.steps_done += 1
        first, last = index == 0, state.steps_done == most
        width = block.refresh.width if first else block.window.width
        key = (first, last, width, block.positions.width)
        return BlockPlan(key, block=block, is_first=first, is_last=last)

    def step(self, state: EditingState, plan: BlockPlan) -> tuple[Tensor, Any]:
        window, selection = open_rows(state, plan)
        stats = predict(self.algorithm, state, window, selection)
        edit(self.algorithm, state, selection, plan.block.ends_from, stats)
        if state.logprobs is not None:
            written = state.step_map == state.nfe[:, None] - 1
            note_logprobs(state, selection, stats.prob.log(), written)
        finish_blocks(state, plan)
        return busy(state, (~state.complete).int()), None

    def settled(self, state: EditingState) -> Tensor:
        """A block's tokens may change until it is complete."""
        opened = state.next_start - self.algorithm.block_length
        settled = torch.where(state.complete, state.next_start, opened)
        return torch.where(state.done, state.end, settled)


def expect_whole_blocks(name: str, spec: ModelSpec) -> None:
    """Raise ValueError for a model whose blocks cannot be edited by the algorithm of that name."""
    if spec.attention != "block_causal" or spec.seeded:
        found = f"{spec.attention!r} attention"
        if spec.seeded:
            found = "one whose blocks' first tokens come from the block before"
        raise ValueError(
            f"{name}: expected a block-causal model whose rows see the whole block, got {found}"
        )


def open_rows(state: EditingState, plan: BlockPlan) -> tuple[Window, Selection]:
    """What a step forwards and decides: nothing of blocks that are complete."""
    block, window = plan.block, plan.block.refresh
    if plan.is_first:
        state.post_steps.zero_()
        state.complete.copy_(state.done)
    else:
        window = block.window
        window = replace(window, length=window.length.masked_fill(state.complete, 0))
    length = block.positions.length.masked_fill(state.complete, 0)
    return window, replace(block.positions, length=length)


def predict(
    algorithm: Editing,
    state: EditingState,
    window: Window,
    selection: Selection,
    *,
    branches: int = 1,
    noise_offset: Tensor | None = None,
) -> ops.VocabStats:
    """One forward, and the statistics of the selected positions, masks and tokens alike.

    With ``branches``, the state and the selection hold that number of copies of each sequence, side
    by side, all at the sequence's window and over its cache.
    """
    call, eligible = state.call, None
    if algorithm.edit_threshold is not None:
        position = torch.arange(state.x.shape[1], device=state.x.device)
        eligible = position >= state.prompt_length[:, None]
    start = window.start if branches == 1 else window.start.repeat_interleave(branches)
    places: dict[str, Any] = {"eligible": eligible, "noise_offset": noise_offset}
    picked = pick(state, window.width, start, selection, **places)
    # Nothing depends on the last layer's other rows.
    rows = picked.rows if picked.live is not None and call.guidance == 0 else None
    return statistics(
        state,
        forward(state, window, branches=branches, rows=rows),
        start,
        selection,
        suppress_ids=call.suppress_ids,
        tempered=state.draws,
        picked=picked,
        **places,
    )


def edit(
    algorithm: Editing,
    state: EditingState,
    selection: Selection,
    editable_from: Tensor,
    stats: ops.VocabStats,
) -> None:
    """A step of the algorithm on statistics of the selected positions."""
    edited = ops.edit_tokens(
        state.x,
        state.step_map,
        state.nfe,
        state.post_steps,
        state.complete,
        stats.token,
        stats.prob,
        mask_id=state.call.mask_id,
        start=selection.start,
        length=selection.length,
        editable_from=editable_from,
        threshold=algorithm.threshold,
        edit_threshold=algorithm.edit_threshold,
        min_tokens=algorithm.min_tokens,
        backend=state.call.backend,
        **algorithm.ending,
    )
    state.noise_offset += edited.filled + edited.edited


def finish_blocks(state: EditingState, plan: BlockPlan) -> None:
    """Look for an EOS in blocks that are complete; after the last step, all are."""
    positions = plan.block.positions
    if plan.is_last:  # NaN logits can leave a mask a mask
        state.complete.fill_(True)
    length = positions.length.masked_fill(~state.complete, 0)
    ending = block_ending(state, plan.block, last=True)
    close(state, replace(positions, length=length), ending)
