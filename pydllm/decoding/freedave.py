"""FreeDave: free draft-and-verification (arXiv 2510.00294), lossless with respect to a baseline.

From one forward's statistics the next steps of the baseline are guessed: the baseline's own rule
is applied again and again to the same, now stale, statistics. The candidates that arise are nested.
One forward looks at all of them; where the rule, applied to a candidate's own statistics, gives the
next candidate, that one is a state of the baseline as well. The longest such chain is accepted, and
the statistics of its last candidate are the ones that the next round guesses from.

The rule is applied by the op that the baseline uses (``ops.unmask``), to guesses and to judgements
alike, so the accepted states are the baseline's by construction, whatever the model, the number of
drafts or the cache: provided that a row's statistics do not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pydllm import ops
from pydllm.decoding.generation import Decoded, Request
from pydllm.decoding.loop import Block, Blockwise, State, force_first, write
from pydllm.decoding.static import Baseline, Static, expect, expect_int
from pydllm.models import Model


@dataclass(frozen=True)
class FreeDave:
    """The tokens of a baseline in fewer forwards (FreeDave, arXiv 2510.00294).

    Attributes:
        draft_steps: steps of the baseline that one forward verifies at most, 1 to 32; 1 is the
            baseline itself, forward for forward.
        block_length, cache, first_token: as in ``Static``.
        mode: ``"strict"``: drafts stay inside the block.
        baseline: whose tokens are produced, with its own block length and cache: ``Static``,
            ``Threshold``, ``Factor`` or ``EntropyBound``. None: ``Static`` with one token a step
            and the values above, which have to stay at their defaults otherwise.

    A forward computes up to ``draft_steps`` copies of the window and counts once in
    ``Generation.nfe``. ``Generation.step_map`` holds the forward that made a token certain.
    """

    draft_steps: int = 8
    block_length: int = 32
    mode: str = "strict"
    cache: str = "none"
    first_token: str = "window"
    baseline: Baseline | None = None

    def __post_init__(self) -> None:
        expect_int("draft_steps", self.draft_steps, 1, 32)
        expect("mode", self.mode, ("strict",))
        self._plan()

    def check(self, model: Model, max_new_tokens: int) -> None:
        self._baseline().check(model, max_new_tokens)

    def run(self, request: Request) -> Decoded:
        return self._plan().run(request)

    def _baseline(self) -> Baseline:
        if self.baseline is None:
            return Static(self.block_length, cache=self.cache, first_token=self.first_token)
        if not isinstance(self.baseline, Baseline):
            raise TypeError(f"baseline: expected a block-wise algorithm, got {self.baseline!r}")
        if self.baseline.semantics != "exact":
            raise ValueError(
                "baseline: expected semantics 'exact' (a mask that is predicted is never drafted), "
                f"got {self.baseline!r}"
            )
        for name, default in (("block_length", 32), ("cache", "none"), ("first_token", "window")):
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name}: expected the default {default!r} beside a baseline, which has its "
                    f"own, got {getattr(self, name)!r}"
                )
        return self.baseline

    def _plan(self) -> Blockwise:
        return _DraftAndVerify(**vars(self._baseline().plan()), draft_steps=self.draft_steps)


@dataclass(frozen=True)
class _DraftAndVerify(Blockwise):
    """Fills a block of the baseline, several of its steps a forward.

    A candidate's state counts the baseline's steps in ``nfe``, because a random order is keyed by
    them; the state that is decoded counts forwards there, and the steps in ``steps``.
    """

    draft_steps: int

    def fill(self, block: Block) -> Iterator[Tensor | None]:
        request, state, selection = block.request, block.state, block.block
        masks = block.masks_left(state)
        stats = block.look(state, block.refresh, selection)
        reached = _candidate(state)
        accept = force_first if block.forced else self.accept
        write(request, reached, stats, selection, accept)
        _advance(state, reached, masks)
        masks = block.masks_left(state)
        yield masks
        branches = min(self.draft_steps, block.size)
        wide_selection = selection.repeat(branches)
        # As many as the baseline could need: with logits that are NaN a mask can stay a mask.
        for _ in range(block.size - 1):
            drafts = [_candidate(state)]
            for _ in range(branches - 1):
                drafts.append(drafts[-1].copy())
                write(request, drafts[-1], stats, selection, self.accept)
            packed = State.interleave(drafts)
            wide_stats = block.look(packed, block.window, wide_selection, branches=branches)
            stepped = packed.copy()
            write(request, stepped, wide_stats, wide_selection, self.accept)
            chosen = _longest_chain(packed.x, stepped.x, branches)
            stats = ops.VocabStats(*(field[chosen] for field in wide_stats))
            _advance(state, stepped.keep(chosen), masks)
            masks = block.masks_left(state)
            yield masks


def _candidate(state: State) -> State:
    return replace(state.copy(), nfe=state.steps.clone())


def _longest_chain(packed: Tensor, stepped: Tensor, branches: int) -> Tensor:
    """Rows ``(b,)`` of the last candidates that are states of the baseline.

    Candidate 0 is one; candidate j + 1 is if candidate j is and the baseline steps from j to j + 1.
    """
    now, then = (x.unflatten(0, (-1, branches)) for x in (packed, stepped))
    agrees = (then[:, :-1] == now[:, 1:]).all(-1)
    last = agrees.cumprod(1).sum(1)
    return torch.arange(len(last), device=last.device) * branches + last


def _advance(state: State, reached: State, masks: Tensor) -> None:
    """Make ``reached`` the state; the current forward made what is new in it certain."""
    new = state.x != reached.x
    state.step_map.copy_(torch.where(new, state.nfe[:, None], state.step_map))
    state.nfe += masks > 0
    state.x.copy_(reached.x)
    state.decoded.copy_(reached.decoded)
    state.steps.copy_(reached.nfe)
