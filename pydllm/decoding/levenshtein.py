"""Levenshtein editing: a step may also delete tokens of its block, and insert masks.

The blocks, and how they are stored, are those of ``editing``. An insertion moves what follows by a
position inside the block, a deletion moves it back; positions of other blocks never change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pydllm import ops
from pydllm._checks import check_int, check_number
from pydllm.decoding.blockwise import BlockPlan, begin_blocks
from pydllm.decoding.call import Call
from pydllm.decoding.driver import Algorithm
from pydllm.decoding.editing import (
    EditingDecoder,
    EditingState,
    expect_whole_blocks,
    finish_blocks,
    open_rows,
)
from pydllm.decoding.state import Selection
from pydllm.decoding.static import Static
from pydllm.decoding.step import TILE_ROWS, busy, forward, select_rows
from pydllm.models import Model


@dataclass(frozen=True, kw_only=True)
class LevenshteinEditing(Algorithm):
    """Masks are filled, tokens replaced, deleted and inserted (LLaDA2.2).

    For block-causal models with ids that delete and split (``ModelSpec.delete_id``, ``split_id``).
    Greedy: it takes temperature 0 alone, without filters.

    Attributes:
        threshold: probability that a mask's token has to exceed, in [0, 1].
        edit_threshold: probability that a token has to exceed to replace another, in [0, 1]; 0
            replaces at every disagreement, None never.
        max_post_steps: steps of a block that begin without a mask of those it began with; the last
            one fills all masks. 0: the step that fills the last such mask is the last.
        block_length: of the model's mask.
    """

    has_logprobs: ClassVar[bool] = False
    is_greedy: ClassVar[bool] = True

    threshold: float = 0.5
    edit_threshold: float | None = 0.0
    max_post_steps: int = 16
    block_length: int = 32

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, 0, 1)
        if self.edit_threshold is not None:
            check_number("edit_threshold", self.edit_threshold, 0, 1)
        check_int("max_post_steps", self.max_post_steps, 0)
        check_int("block_length", self.block_length, 1)

    def check(self, model: Model, max_new_tokens: int) -> None:
        expect_whole_blocks("LevenshteinEditing", model.spec)
        if model.spec.delete_id is None or model.spec.split_id is None:
            raise ValueError(
                "LevenshteinEditing: expected a model with ids that delete and split, got one "
                "whose configuration has no delete_token_id and split_token_id"
            )
        self.layout.check(model, max_new_tokens)

    def decoder(self, call: Call) -> LevenshteinDecoder:
        return LevenshteinDecoder(self)

    @property
    def layout(self) -> Static:
        """An algorithm with these blocks."""
        return Static(block_length=self.block_length)

    @property
    def most_steps(self) -> int:
        """Forwards of a block at most."""
        return self.block_length + self.max_post_steps + 1


@dataclass
class LevenshteinState(EditingState):
    """Also the rest of each slot's ``ops.BlockEdits``."""

    original: Tensor = None  # type: ignore[assignment]
    updates: Tensor = None  # type: ignore[assignment]
    seen: Tensor = None  # type: ignore[assignment]
    written: Tensor = None  # type: ignore[assignment]


@dataclass(frozen=True)
class LevenshteinDecoder(EditingDecoder):
    """Edits blocks as ``EditingDecoder`` does, with another step."""

    algorithm: LevenshteinEditing  # type: ignore[assignment]

    def begin(self, call: Call, prompts: list[int]) -> tuple[LevenshteinState, None]:
        algorithm = self.algorithm
        edits = ops.BlockEdits.make(
            len(prompts), algorithm.block_length, algorithm.max_post_steps, call.device
        )
        state = begin_blocks(LevenshteinState, algorithm.layout, call, prompts, **edits._asdict())
        return state, None

    def step(self, state: Any, plan: BlockPlan) -> tuple[Tensor, Any]:
        window, selection = open_rows(state, plan)
        if plan.is_first:
            state.updates.zero_()
        hidden = forward(state, window)
        rows = select_rows(state.call.model, hidden, window.start, selection)
        self._edit(state, selection, plan.block.ends_from, rows)
        finish_blocks(state, plan)
        return busy(state, (~state.complete).int()), None

    def _edit(
        self, state: LevenshteinState, selection: Selection, editable_from: Tensor, rows: Tensor
    ) -> None:
        """A step on hidden rows; logits of some sequences at a time are stored."""
        call, algorithm, spec = state.call, self.algorithm, state.call.model.spec
        ids: dict[str, Any] = {"delete_id": spec.delete_id, "split_id": spec.split_id}
        banned = call.suppress_but_mask
        count = max(1, TILE_ROWS // selection.width)
        for first in range(0, len(rows), count):
            part = slice(first, first + count)
            logits = call.model.head(rows[part])
            if banned is not None:
                logits = logits.index_fill(-1, banned.long(), -torch.inf)
            edits = {name: getattr(state, name)[part] for name in ops.BlockEdits._fields}
            ops.edit_block(
                state.x[part],
                state.step_map[part],
                state.nfe[part],
                ops.BlockEdits(**edits),
                logits,
                mask_id=call.mask_id,
                start=selection.start[part],
                length=selection.length[part],
                editable_from=editable_from[part],
                threshold=algorithm.threshold,
                edit_threshold=algorithm.edit_threshold,
                max_post_steps=algorithm.max_post_steps,
                backend=call.backend,
                **ids,
            )
