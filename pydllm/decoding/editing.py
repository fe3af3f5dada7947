"""Token editing: a model that was trained to correct its own tokens may replace them.

The blocks are those of block-wise decoding on a block-causal model. In a step masks become tokens,
and tokens of the block that the model is sure to contradict become others; when no mask is left,
further steps edit alone. A block is complete when such a step changes nothing, or when their budget
is spent. Until then no token of it is final, an EOS neither. The forward that opens the next block
stores it, with the keys of its final tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

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


@dataclass(frozen=True, kw_only=True)
class Editing(Algorithm):
    """Masks above one threshold are filled, tokens above another are replaced (LLaDA2.1).

    For block-causal models that predict the tokens they are shown. At a temperature both thresholds
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
        spec = model.spec
        if spec.attention != "block_causal" or spec.seeded:
            found = f"{spec.attention!r} attention"
            if spec.seeded:
                found = "one whose blocks' first tokens come from the block before"
            raise ValueError(
                "Editing: expected a block-causal model whose rows see the whole block, "
                f"got {found}"
            )
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

    def step(self, state: EditingState, plan: BlockPlan) -> tuple[Tensor, None]:
        block, call = plan.block, state.call
        if plan.is_first:
            state.post_steps.zero_()
            state.complete.copy_(state.done)
        window = block.refresh if plan.is_first else block.window
        if not plan.is_first:
            window = replace(window, length=window.length.masked_fill(state.complete, 0))
        length = block.positions.length.masked_fill(state.complete, 0)
        selection = replace(block.positions, length=length)
        token, prob = self._predict(state, window, selection)
        edited = ops.edit_tokens(
            state.x,
            state.step_map,
            state.nfe,
            state.post_steps,
            state.complete,
            token,
            prob,
            mask_id=call.mask_id,
            start=selection.start,
            length=selection.length,
            editable_from=block.ends_from,
            threshold=self.algorithm.threshold,
            edit_threshold=self.algorithm.edit_threshold,
            min_tokens=self.algorithm.min_tokens,
            backend=call.backend,
            **self.algorithm.ending,
        )
        state.noise_offset += edited.filled + edited.edited
        if plan.is_last:  # NaN logits can leave a mask a mask
            state.complete.fill_(True)
        if state.logprobs is not None:
            written = state.step_map == state.nfe[:, None] - 1
            note_logprobs(state, selection, prob.log(), written)
        finished = replace(selection, length=length.masked_fill(~state.complete, 0))
        close(state, finished, block_ending(state, block, last=True))
        return busy(state, (~state.complete).int()), None

    def _predict(
        self, state: EditingState, window: Window, selection: Selection
    ) -> tuple[Tensor, Tensor]:
        """Token and probability of the selected positions, masks and tokens alike."""
        call, eligible = state.call, None
        if self.algorithm.edit_threshold is not None:
            position = torch.arange(state.x.shape[1], device=state.x.device)
            eligible = position >= state.prompt_length[:, None]
        places: dict[str, Any] = {"eligible": eligible}
        picked = pick(state, window.width, window.start, selection, **places)
        # Nothing depends on the last layer's other rows.
        rows = picked.rows if picked.live is not None else None
        stats = statistics(
            state,
            forward(state, window, rows=rows),
            window.start,
            selection,
            suppress_ids=call.suppress_ids,
            tempered=isinstance(state.temperature, Tensor) or state.temperature > 0,
            picked=picked,
            **places,
        )
        return stats.token, stats.prob

    def settled(self, state: EditingState) -> Tensor:
        """A block's tokens may change until it is complete."""
        opened = state.next_start - self.algorithm.block_length
        settled = torch.where(state.complete, state.next_start, opened)
        return torch.where(state.done, state.end, settled)
