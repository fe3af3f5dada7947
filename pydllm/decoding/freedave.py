"""FreeDave: free draft-and-verification (arXiv 2510.00294), lossless with respect to a baseline.

From one forward's statistics the next steps of the baseline are guessed: the baseline's own rule
is applied again and again to the same, now stale, statistics. The candidates that arise are nested.
One forward verifies all of them; where the rule, applied to a candidate's own statistics, gives the
next candidate, that one is a state of the baseline as well. The longest such prefix is accepted,
and the statistics of its last candidate are those that the next round guesses from.

The same rule makes guesses and judgements, so the accepted states are the baseline's by
construction, whatever the model, the number of drafts or the cache: provided that a row's
statistics do not depend on its batch. Where a step is one token in an order by score, two ops do
it, one launch each (``ops.draft``, ``ops.verify``); for other baselines ``ops.unmask`` runs once
per candidate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pydllm import ops
from pydllm._checks import check_choice, check_int
from pydllm.decoding.blocks import Block, BlockState, open_block, reading
from pydllm.decoding.blockwise import (
    BlockwiseAlgorithm,
    begin_blocks,
    block_ending,
    count_blocks_without_masks,
    count_only_stored,
    force_first,
    masks_left,
    window_stats,
)
from pydllm.decoding.call import Call
from pydllm.decoding.drafts import (
    MOST,
    Carried,
    DraftBudget,
    Drafter,
    FusedDrafter,
    RuleDrafter,
    draft_fields,
    is_fused,
)
from pydllm.decoding.driver import Algorithm, Counts, Decoder, Plan
from pydllm.decoding.edited_drafts import DraftedEditingDecoder
from pydllm.decoding.editing import Editing
from pydllm.decoding.pipelined import PipelinedDecoder
from pydllm.decoding.state import Selection, State, Window
from pydllm.decoding.static import Static
from pydllm.decoding.step import close, write
from pydllm.models import Model


@dataclass(frozen=True, kw_only=True)
class FreeDave(Algorithm):
    """The tokens of a baseline in fewer forwards (FreeDave, arXiv 2510.00294).

    Attributes:
        draft_steps: steps of the baseline that one forward verifies at most, 1 to 32; 1 is the
            baseline itself, forward for forward. ``"auto"``: as many as the sequences' running
            acceptance, the masks that are left and a budget of 256 rows per forward suggest. The
            forwards of a sequence then depend on its batch, its tokens do not.
        block_length, cache, first_token: as in ``Static``.
        mode: ``"strict"``: drafts stay inside the block. ``"pipelined"``, for block-causal models
            alone: drafts run on into the next blocks, every forward verifies, none is spent on
            opening a block, and each sequence goes at its own pace.
        baseline: whose tokens are produced, with its own block length and cache: ``Static``,
            ``Threshold``, ``Factor`` or ``EntropyBound``; or ``Editing``, in strict mode. None:
            ``Static`` with one token per step and the values above, which have to stay at their
            defaults otherwise.
        lossless: at a temperature above 0, ``"tokens"``: each candidate draws under the noise of
            the baseline in that state, so the tokens are the baseline's for the same seed.
            ``"distribution"``: each draws under noise of its own; the tokens follow the baseline's
            law, but are others, and fewer drafts are right. Not with ``"auto"``, where they would
            depend on the batch.

    A forward computes up to ``draft_steps`` copies of the window and counts once in
    ``Generation.nfe``. ``Generation.step_map`` holds the forward that made a token certain.
    """

    takes_guidance: ClassVar[bool] = True
    fills_prompts: ClassVar[bool] = True

    draft_steps: int | str = 8
    block_length: int = 32
    mode: str = "strict"
    cache: str = "none"
    first_token: str = "window"
    baseline: BlockwiseAlgorithm | Editing | None = None
    lossless: str = "tokens"

    def __post_init__(self) -> None:
        if isinstance(self.draft_steps, str):
            check_choice("draft_steps", self.draft_steps, ("auto",))
        else:
            check_int("draft_steps", self.draft_steps, 1, MOST)
        check_choice("mode", self.mode, ("strict", "pipelined"))
        check_choice("lossless", self.lossless, ("tokens", "distribution"))
        if self.draft_steps == "auto" and self.lossless == "distribution":
            raise ValueError(
                "lossless: expected 'tokens' with draft_steps 'auto' (fresh noise is keyed by the "
                "candidate, and their number depends on the batch), got 'distribution'"
            )
        self._baseline()

    def check(self, model: Model, max_new_tokens: int) -> None:
        baseline = self._baseline()
        baseline.check(model, max_new_tokens)
        if self.mode == "pipelined" and isinstance(baseline, Editing):
            raise ValueError(
                "mode: expected 'strict' for Editing, whose tokens are not final before their "
                f"block is, got {self.mode!r}"
            )
        if self.mode == "pipelined" and model.spec.seeded:
            raise ValueError(
                "mode: expected 'strict' for a model whose blocks' first tokens come from the "
                f"block before, got {self.mode!r}"
            )
        if self.mode == "pipelined" and model.spec.block_origin != "zero":
            raise ValueError(
                "mode: expected 'strict' for blocks that begin at the prompt's end, "
                f"got {self.mode!r}"
            )
        if self.mode == "pipelined" and model.spec.attention != "block_causal":
            raise ValueError(
                "mode: expected 'strict' with full attention, where a later block changes what "
                f"earlier ones predict, got {self.mode!r}"
            )

    @property
    def is_random(self) -> bool:
        return self._baseline().is_random

    def decoder(self, call: Call) -> Decoder:
        auto = isinstance(self.draft_steps, str)
        most = MOST if isinstance(self.draft_steps, str) else self.draft_steps
        budget = DraftBudget(most, auto, self.lossless == "distribution")
        baseline = self._baseline()
        if isinstance(baseline, Editing):
            return DraftedEditingDecoder(baseline, budget)
        kind = FusedDrafter if is_fused(baseline) else RuleDrafter
        if self.mode == "pipelined":
            return PipelinedDecoder.of(call, baseline, budget, kind)
        return StrictDecoder(baseline, budget, kind(baseline.accept, budget))

    def _baseline(self) -> BlockwiseAlgorithm | Editing:
        if self.baseline is None:
            return Static(
                block_length=self.block_length, cache=self.cache, first_token=self.first_token
            )
        if not isinstance(self.baseline, BlockwiseAlgorithm | Editing):
            raise TypeError(f"baseline: expected a block-wise algorithm, got {self.baseline!r}")
        if isinstance(self.baseline, BlockwiseAlgorithm) and self.baseline.compat is not None:
            raise ValueError(
                "baseline: expected compat None (a mask that is predicted is never drafted), "
                f"got {self.baseline!r}"
            )
        for name, default in (("block_length", 32), ("cache", "none"), ("first_token", "window")):
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name}: expected the default {default!r} beside a baseline, which has its "
                    f"own, got {getattr(self, name)!r}"
                )
        return self.baseline


@dataclass
class StrictState(BlockState):
    """Also what both modes of FreeDave carry, see ``DraftState``."""

    baseline_steps: Tensor = None  # type: ignore[assignment]
    accept_ema: Tensor = None  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class StrictPlan(Plan):
    """A step of ``block``: seed, begin, verify (of ``branches`` candidates) or close."""

    block: Block
    kind: str
    branches: int = 1


@dataclass(frozen=True)
class StrictDecoder(Decoder):
    """Fills a block of the baseline, several of its steps per forward.

    The counts of a forward have a second row: the candidates that each sequence asks for.
    """

    baseline: BlockwiseAlgorithm
    budget: DraftBudget
    drafter: Drafter

    def begin(self, call: Call, prompts: list[int]) -> tuple[StrictState, None]:
        extra = draft_fields(len(prompts), call.device)
        return begin_blocks(StrictState, self.baseline, call, prompts, **extra), None

    def plan(self, state: StrictState, counts: Counts | None) -> StrictPlan:
        block, batch = state.block, len(state.prompts)
        if block is None or (counts is not None and max(counts[0]) <= 0):
            block = open_block(self.baseline, state)
            if state.call.model.spec.seeded and not block.skips_first:
                state.steps_done = 0
                return StrictPlan(("seed", block.refresh.width), block=block, kind="seed")
            return self._opening(state, block)
        wanted = max(counts[1]) if counts is not None else 0
        if state.steps_done == 0 and (wanted > 0 or state.call.warm):
            return self._opening(state, block)
        if state.call.warm:
            wanted = 1 + (state.steps_done - 1) % self.budget.most
        widths = (block.window.width, block.positions.width)
        # As many rounds as the baseline could need: NaN logits can leave a mask a mask.
        if wanted == 0 or state.steps_done == self.baseline.block_length:
            return StrictPlan(("close", *widths), is_forward=False, block=block, kind="close")
        state.steps_done += 1
        rows = block.window.width * batch
        branches = self.budget.branches(wanted, rows, state.call.runner)
        return StrictPlan(
            ("verify", branches, *widths), block=block, kind="verify", branches=branches
        )

    def _opening(self, state: StrictState, block: Block) -> StrictPlan:
        """The forward whose statistics the first candidates are guessed from."""
        state.steps_done = 1
        opening = block.window if state.call.model.spec.seeded else block.refresh
        widths = (opening.width, block.positions.width)
        return StrictPlan(("begin", *widths), block=block, kind="begin")

    def step(self, state: StrictState, plan: StrictPlan) -> tuple[Tensor, Carried]:
        block = plan.block
        if plan.kind == "close":
            close(state, block.positions, block_ending(state, block, last=True))
            return -state.done.int()[None], None
        carried = None
        if plan.kind == "seed":
            self._seed(state, block)
        elif plan.kind == "begin":
            carried = self._begin(state, block)
        else:
            carried = self._verify(state, block, plan.branches)
        wanted = self.budget.num_drafts(state, masks_left(state, block))
        return torch.stack((torch.where(state.done, -1, 1), wanted)).int(), carried

    def _seed(self, state: StrictState, block: Block) -> None:
        """Store the block before, and write the token that it predicts: the baseline's step."""
        selection = block.first_selection
        stats = self._stats(state, state, block.refresh, selection, first=True)
        count_blocks_without_masks(state, block)
        only_stored = count_only_stored(state, block)
        unmasked = write(state, stats, selection, force_first)
        state.baseline_steps += only_stored + unmasked.accepted

    def _begin(self, state: StrictState, block: Block) -> Carried:
        seeded = state.call.model.spec.seeded
        window = block.window if seeded else block.refresh
        stats = self._stats(state, state, window, block.positions, first=not seeded)
        if not seeded:
            count_blocks_without_masks(state, block)
        forced = block.is_forced and not seeded
        accept = force_first if forced else self.baseline.accept
        first = block.first_selection if forced else block.positions
        return self.drafter.begin(state, stats, block.positions, first, accept)

    def _verify(self, state: StrictState, block: Block, branches: int) -> Carried:
        packed = self.drafter.pack(state, branches)
        positions = block.positions.repeat(branches)
        stats = self._stats(state, packed, block.window, positions, first=False, branches=branches)
        return self.drafter.follow(state, packed, stats, block.positions, branches)[1]

    def _stats(
        self,
        state: StrictState,
        packed: State,
        window: Window,
        selection: Selection,
        *,
        first: bool,
        branches: int = 1,
    ) -> ops.VocabStats:
        """One forward of the candidates that are packed, ``branches`` of each sequence."""
        noise = self.budget.noise_offset(state, branches)
        options = reading(state, first=first) | {"branches": branches, "noise_offset": noise}
        return window_stats(self.baseline, packed, window, selection, **options)
