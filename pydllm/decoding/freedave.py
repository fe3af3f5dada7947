"""FreeDave: free draft-and-verification (arXiv 2510.00294), lossless with respect to a baseline.

From one forward's statistics the next steps of the baseline are guessed: the baseline's own rule
is applied again and again to the same, now stale, statistics. The candidates that arise are nested.
One forward looks at all of them; where the rule, applied to a candidate's own statistics, gives the
next candidate, that one is a state of the baseline as well. The longest such chain is accepted, and
the statistics of its last candidate are the ones that the next round guesses from.

The same rule makes guesses and judgements, so the accepted states are the baseline's by
construction, whatever the model, the number of drafts or the cache: provided that a row's
statistics do not depend on its batch. Where a step is one token in an order by score, two ops do
it, one launch each (``ops.draft``, ``ops.verify``); other baselines apply ``ops.unmask`` once a
candidate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pydllm import ops
from pydllm.decoding.drafts import MOST, Carried, Composed, Drafts, Fused
from pydllm.decoding.generation import Decoded, Request
from pydllm.decoding.loop import Block, Blockwise, force_first
from pydllm.decoding.pipelined import Pipelined
from pydllm.decoding.state import HostNumbers
from pydllm.decoding.static import Baseline, Static, expect, expect_int
from pydllm.models import Model

# The ops rank 128 positions, and a pipelined window has a block more than its drafts.
_FUSED_BLOCK = 64


@dataclass(frozen=True)
class FreeDave:
    """The tokens of a baseline in fewer forwards (FreeDave, arXiv 2510.00294).

    Attributes:
        draft_steps: steps of the baseline that one forward verifies at most, 1 to 32; 1 is the
            baseline itself, forward for forward. ``"auto"``: as many as the sequences' running
            acceptance, the masks that are left and a budget of 256 rows a forward suggest. The
            forwards of a sequence then depend on its batch, its tokens do not.
        block_length, cache, first_token: as in ``Static``.
        mode: ``"strict"``: drafts stay inside the block. ``"pipelined"``, for block-causal models
            alone: drafts run on into the blocks behind, every forward verifies, none is spent on
            opening a block, and each sequence goes its own pace.
        baseline: whose tokens are produced, with its own block length and cache: ``Static``,
            ``Threshold``, ``Factor`` or ``EntropyBound``. None: ``Static`` with one token a step
            and the values above, which have to stay at their defaults otherwise.
        lossless: at a temperature above 0, ``"tokens"``: each candidate draws under the noise of
            the baseline in that state, so the tokens are the baseline's for the same seed.
            ``"distribution"``: each draws under noise of its own; the tokens follow the baseline's
            law, but are others, and fewer drafts are right.

    A forward computes up to ``draft_steps`` copies of the window and counts once in
    ``Generation.nfe``. ``Generation.step_map`` holds the forward that made a token certain.
    """

    draft_steps: int | str = 8
    block_length: int = 32
    mode: str = "strict"
    cache: str = "none"
    first_token: str = "window"
    baseline: Baseline | None = None
    lossless: str = "tokens"

    def __post_init__(self) -> None:
        if isinstance(self.draft_steps, str):
            expect("draft_steps", self.draft_steps, ("auto",))
        else:
            expect_int("draft_steps", self.draft_steps, 1, MOST)
        expect("mode", self.mode, ("strict", "pipelined"))
        expect("lossless", self.lossless, ("tokens", "distribution"))
        self._baseline()

    def check(self, model: Model, max_new_tokens: int) -> None:
        self._baseline().check(model, max_new_tokens)
        if self.mode == "pipelined" and model.spec.attention != "block_causal":
            raise ValueError(
                "mode: expected 'strict' with full attention, where a later block changes what "
                f"earlier ones predict, got {self.mode!r}"
            )

    def run(self, request: Request) -> Decoded:
        auto = isinstance(self.draft_steps, str)
        most = MOST if isinstance(self.draft_steps, str) else self.draft_steps
        drafts = Drafts(most, auto, self.lossless == "distribution")
        baseline = self._baseline()
        mode = Pipelined if self.mode == "pipelined" else _Strict
        road = Fused if _is_fused(baseline) else Composed
        return mode(**vars(baseline.plan()), drafts=drafts, road=road).run(request)

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


def _is_fused(baseline: Baseline) -> bool:
    """Whether a step is one token in an order by score, and a window small enough to rank."""
    if not isinstance(baseline, Static) or baseline.score == "random":
        return False
    return baseline.tokens_per_step == 1 and baseline.block_length <= _FUSED_BLOCK


@dataclass(frozen=True)
class _Strict(Blockwise):
    """Fills a block of the baseline, several of its steps a forward."""

    drafts: Drafts
    road: type[Composed] | type[Fused]

    def fill(self, block: Block, numbers: HostNumbers) -> Iterator[None]:
        state, selection = block.state, block.block
        road = self.road(block.request, self.accept, self.drafts, None)

        def begin() -> tuple[Carried, Tensor]:
            stats = block.look(state, block.refresh, selection, draw=self.drafts.draw(state, 1))
            accept = force_first if block.forced else self.accept
            carried = road.begin(state, stats, selection, selection, accept)
            return carried, self._wish(block)

        carried, wish = block.run("begin", block.refresh, begin)
        yield
        # As many as the baseline could need: with logits that are NaN a mask can stay a mask.
        for index in range(block.size - 1):
            numbers.post(wish)
            most = numbers.read()[0]
            if block.request.warm:
                most = 1 + index % self.drafts.most
            if most == 0:
                break
            rows = block.window.width * len(state.rows)
            branches = self.drafts.bucket(block.request, self.drafts.branches(most, rows))

            def verify(carried: Carried = carried, branches: int = branches) -> tuple:
                packed = road.pack(state, carried, branches)
                draw = self.drafts.draw(state, branches)
                wide = selection.repeat(branches)
                looked = block.look(packed, block.window, wide, branches=branches, draw=draw)
                _, following = road.follow(state, carried, packed, looked, selection, branches)
                return following, self._wish(block)

            carried, wish = block.run(("verify", branches), block.window, verify)
            yield
        block.run("close", block.window, lambda: close(block))

    def _wish(self, block: Block) -> Tensor:
        """The largest number of candidates that a sequence wishes for, ``(1,)``."""
        wish = self.drafts.wish(block.state, block.masks_left(block.state))
        return wish.amax(0, keepdim=True)


def close(block: Block) -> None:
    """Say which sequences are done: a step that writes no tokens."""
    state, request = block.state, block.request
    nothing = torch.zeros_like(state.nfe)
    window = state.x[:, : block.block.width]
    ops.unmask(
        state.x,
        state.step_map,
        nothing,  # not a forward
        window.clone(),
        torch.zeros_like(window, dtype=torch.float32),
        mask_id=request.mask_id,
        start=block.block.start,
        length=block.block.length,
        rule="quota",
        quota=nothing.clone(),
        ending=block.ending(last=True),
        backend=request.backend,
    )
