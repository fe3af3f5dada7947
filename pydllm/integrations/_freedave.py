"""FreeDave's published loops: drafts, their verification, and the schedule of forwards.

The host holds the round: it reads how many masks are left and which draft was accepted, as the
published code does. Forwards and statistics are steps of the driver.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pydllm._backend.errors import PydllmError
from pydllm.decoding.state import Selection, State
from pydllm.decoding.step import forward, statistics
from pydllm.integrations._arguments import raise_stuck
from pydllm.integrations._published import LoopState, Pass, PublishedLoop
from pydllm.integrations._rules import top
from pydllm.integrations._sampling import draw


class Predicted(NamedTuple):
    """Token and probability ``(n, S)`` of every mask; elsewhere the mask's id and -inf."""

    token: Tensor
    score: Tensor

    def row(self, index: int) -> Predicted:
        return Predicted(self.token[index, None], self.score[index, None])


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Which masks a step writes.

    Attributes:
        threshold: all that reach it, and the best; None: the best.
        left_to_right: the first mask is the best; by threshold the masks up to the first below it.
    """

    mask_id: int
    threshold: float | None
    left_to_right: bool

    def drafts(
        self, x: Tensor, predicted: Predicted, count: int, shift: Tensor | None = None
    ) -> Tensor:
        """The next ``count`` states of ``x (1, S)`` if predictions stayed: ``(count, S)``.

        ``shift (S,)``: added to the scores, so that masks of earlier blocks come first.
        """
        if self.threshold is None:
            return torch.cat([self._best(x, predicted, n + 1, shift) for n in range(count)])
        first = self.step(x, predicted, shift)
        more = [self._best(first, predicted, n + 1, shift) for n in range(count - 1)]
        return torch.cat([first, *more])

    def step(self, x: Tensor, predicted: Predicted, shift: Tensor | None = None) -> Tensor:
        """The states ``(n, S)`` after one step each."""
        if self.threshold is None:
            return self._best(x, predicted, 1, shift)
        masked = x == self.mask_id
        score = predicted.score.masked_fill(~masked, -torch.inf)
        limit: Any = self.threshold
        if shift is not None:
            score = score + shift
            limit = self.threshold + (masked.int() * shift).amax(1, keepdim=True)
        sure = masked & (score >= limit)
        if self.left_to_right:
            sure = masked & ((masked & ~sure).cumsum(1) == 0)
            best = masked & (masked.cumsum(1) == 1)
        else:
            best = top(score, masked, 1) & masked
        chosen = torch.where(sure.any(1, keepdim=True), sure, best)
        return torch.where(chosen, predicted.token, x)

    def _best(self, x: Tensor, predicted: Predicted, count: int, shift: Tensor | None) -> Tensor:
        masked = x == self.mask_id
        if self.left_to_right:
            chosen = masked & (masked.cumsum(1) <= count)
        else:
            score = predicted.score.masked_fill(~masked, -torch.inf)
            score = score if shift is None else score + shift
            chosen = top(score, masked, count) & masked
        return torch.where(chosen, predicted.token, x)


def accepted(drafts: Tensor, targets: Tensor, mask_id: int, *, subset: bool) -> int:
    """The draft that the round goes on from.

    From the first draft to the last one that its target agrees with, and so on. ``subset``: a
    target agrees with every draft whose tokens it has; otherwise with its equal.
    """
    same = drafts[None] == targets[:, None]
    masked = drafts == mask_id
    if subset:
        same |= masked
    agrees = (same.all(-1) | masked.all(-1)).tolist()  # of target i with draft j
    best, last = 0, -1
    while best > last:
        last = best
        best = max(j for j in range(last, len(drafts)) if j == last or agrees[last][j])
    return best


@dataclass(frozen=True, kw_only=True)
class Round(Pass):
    """A forward of ``drafts (n, width)``, versions of the positions from ``first`` on; None: of
    the sequences themselves. It predicts the masks of [first, last).

    ``opens``: the first forward of a block of a model with shifted logits, which decides the
    block's first token, whatever its confidence.
    """

    drafts: Tensor | None = field(default=None, compare=False)
    opens: bool = False


@dataclass(kw_only=True)
class FreeDaveLoop(PublishedLoop):
    """A loop of FreeDave's code.

    Attributes:
        block_length: tokens in a block.
        draft_steps: drafts of a round at most; None: the static loop.
        eager: drafts run on into later blocks.
        end_ids: a block of one of these alone ends the generation, the rest is filled with it.
        step_map: ``(B, L)``, when a position was written.
        proposed, hit: tokens that were drafted, and those of them that were kept.
    """

    block_length: int
    rule: Rule
    draft_steps: int | None
    eager: bool
    top_k: int | None
    top_p: float | None
    end_ids: tuple[int, ...]
    step_map: Tensor = field(default_factory=lambda: torch.empty(0))
    steps: int = 0
    proposed: int = 0
    hit: int = 0

    def begin(self, call: Any, prompts: list[int]) -> Any:
        self.step_map = torch.full_like(call.x, -1)
        return super().begin(call, prompts)

    @abstractmethod
    def schedule(self, state: LoopState) -> Iterator[Pass]: ...

    def step(self, state: LoopState, plan: Any) -> tuple[Tensor, Predicted | None]:
        """Run the forward; what it predicts is carried to the schedule."""
        branches = state if plan.drafts is None else self._branches(state, plan, plan.drafts)
        count = len(branches.x) // len(state.x)
        hidden = forward(branches, self.window(state, plan), branches=count, pad=self.pad)
        if plan.opens:
            self._write_first(state, plan, hidden)
        predicted = None
        if self._goes_on(state, plan):  # a prediction takes its noise from torch's generator
            predicted = self._predict(branches, plan, hidden, self.masked(branches, plan))
        state.nfe += 1
        ones = torch.ones_like(state.nfe)
        return torch.stack((ones, ones, ones)), predicted

    def _goes_on(self, state: LoopState, plan: Round) -> bool:
        """Whether what the forward predicts is used."""
        return plan.last > plan.first

    def _branches(self, state: LoopState, plan: Round, drafts: Tensor) -> State:
        first = plan.first
        x = state.x.repeat(len(drafts), 1)
        x[:, first : first + drafts.shape[1]] = drafts
        return replace(state, x=x, request_id=state.request_id.repeat(len(drafts)))

    def masked(self, state: State, plan: Pass) -> Tensor:
        return state.x[:, plan.first : plan.last] == state.call.mask_id

    def _write_first(self, state: LoopState, plan: Round, hidden: Tensor) -> None:
        """The token at the window's first position; with torch's noise all positions draw one."""
        first = plan.first
        span = (0, plan.stop) if self.draws else (first, first + 1)
        whole = replace(plan, first=span[0], last=span[1])
        wanted = torch.ones_like(state.x[:, span[0] : span[1]], dtype=torch.bool)
        token = self._predict(state, whole, hidden, wanted).token
        state.x[:, first] = token[:, first - span[0]]
        self.step_map[:, first] = self.steps

    def _predict(self, state: State, plan: Round, hidden: Tensor, wanted: Tensor) -> Predicted:
        """Of the positions of [first, last) that are ``wanted (b, last - first)``."""
        window = state.x[:, plan.first : plan.last]
        hot = self.temperature > 0
        if hot and (self.published or self.top_k or (self.top_p or 1.0) < 1):
            rows = self.logits(state, plan, hidden)[wanted]
            token = torch.full_like(window, state.call.mask_id)
            score = rows.new_full(window.shape, -torch.inf)
            if len(rows):
                drawn = draw(rows[None], self.temperature, self.top_k, self.top_p)
                token[wanted], score[wanted] = drawn.token[0], drawn.prob[0]
            return Predicted(token, score)
        of_rows = torch.full_like(state.x[:, 0], plan.start, dtype=torch.int32)
        length = torch.full_like(of_rows, plan.last - plan.first)
        eligible = torch.zeros_like(state.x, dtype=torch.bool)
        eligible[:, plan.first : plan.last] = wanted
        stats = statistics(
            state,
            hidden,
            of_rows,
            Selection(torch.full_like(of_rows, plan.first), length, plan.last - plan.first),
            suppress_ids=state.call.suppress_ids,
            eligible=eligible,
            # Known tokens: a state draws the same whether it is a draft or the sequence.
            noise_offset=(state.x != state.call.mask_id).sum(1, dtype=torch.int32),
            tempered=hot,
        )
        token = stats.token.masked_fill(~wanted, state.call.mask_id).to(state.x.dtype)
        return Predicted(token, stats.prob.masked_fill(~wanted, -torch.inf))

    def write(self, state: LoopState, start: int, window: Tensor) -> int:
        """Put the window's tokens into the sequences; returns how many masks that filled."""
        part = slice(start, start + window.shape[1])
        mask_id = state.call.mask_id
        new = (state.x[:, part] == mask_id) & (window != mask_id)
        state.x[:, part] = window
        count = int(new.sum())
        if count:
            self.step_map[:, part][new] = self.steps
            self.steps += 1
        return count

    def verify(
        self, state: LoopState, start: int, stop: int, step: Round, predicted: Predicted
    ) -> Iterator[Pass]:
        """Rounds over [start, stop) until its first block, with full attention until all of it is
        known.

        ``step``: the forward of a round, without its drafts. ``predicted``: from a forward of the
        window as it is; where logits are shifted from one before its first token was known.
        """
        size, full = self.block_length, state.call.model.spec.attention == "full"
        shift = self._shift(state, stop - start)
        last_block, stuck = stop == state.call.max_len and stop - start == size, 0
        opens = full and state.call.model.spec.shift_logits
        while True:
            x = state.x[:, start:stop]
            masks = int((x == self.rule.mask_id).sum())
            count = min(self.draft_steps or 1, masks)
            if opens:  # what is known is the first draft
                plain = replace(self.rule, threshold=None)
                more = [plain.drafts(x, predicted, count - 1, shift)] if count > 1 else []
                drafts = torch.cat((x, *more))
            else:
                drafts = self.rule.drafts(x, predicted, count, shift)
            opens = False
            filled = (x == self.rule.mask_id) & (drafts[-1:] != self.rule.mask_id)
            self.proposed += int(filled.sum())
            in_block = int((x[:, :size] == self.rule.mask_id).sum())
            if in_block <= 1 and (last_block or not self.eager):
                self.hit += self.write(state, start, drafts[:1])
                return
            yield replace(step, drafts=drafts)
            found = state.carried
            targets = self.rule.step(drafts, found, shift)
            best = accepted(drafts, targets, self.rule.mask_id, subset=full)
            if self.eager and not (drafts[best, :size] == self.rule.mask_id).any():
                target = targets[best, None]
                self.proposed += int((target != drafts[best]).sum())
                written = self.write(state, start, target)
            else:
                written = self.write(state, start, drafts[best, None])
                predicted = found.row(best)
            self.hit += written
            known = state.x[:, start : stop if full else start + size] != self.rule.mask_id
            if known.all():
                return
            stuck = 0 if written else stuck + 1
            if stuck > 1 and self.temperature == 0:
                raise_stuck()

    def _shift(self, state: LoopState, width: int) -> Tensor | None:
        if not self.eager:
            return None
        blocks = torch.arange(width // self.block_length - 1, -1, -1, device=state.x.device)
        return blocks.repeat_interleave(self.block_length)

    def window_end(self, state: LoopState, start: int) -> int:
        """Of the window of drafts of the block at ``start``."""
        size = self.block_length
        later = -(-(self.draft_steps or 1) // size) if self.eager else 0
        return min(start + (1 + later) * size, state.call.max_len)

    def ends(self, state: LoopState, start: int) -> bool:
        """Whether the block at ``start`` ends the generation; fills the rest then."""
        stop = start + self.block_length
        for token in self.end_ids:
            if bool((state.x[:, start:stop] == token).all()):
                state.x[:, stop:] = token
                return True
        return False


@dataclass(kw_only=True)
class FullLoop(FreeDaveLoop):
    """Full attention; keys and values before the window are kept, ``dual``: those after it, too.

    Attributes:
        forwards: of a block at most, in the static loop.
    """

    dual: bool
    forwards: int

    def _goes_on(self, state: LoopState, plan: Round) -> bool:
        if plan.drafts is not None or self.draft_steps is None:
            return not plan.opens
        # The first forward of a block, which drafts of the one before may have filled.
        block = replace(plan, last=plan.first + self.block_length)
        return bool(self.masked(state, block).any())

    def schedule(self, state: LoopState) -> Iterator[Pass]:
        length, size = state.call.max_len, self.block_length
        shifted = state.call.model.spec.shift_logits
        for start in range(state.call.prompt_lengths[0], length, size):
            stop = self.window_end(state, start)
            yield Round(stop=length, commit=length, first=start, last=stop, opens=shifted)
            again = Round(
                start=start, stop=stop if self.dual else length, seen=length, first=start, last=stop
            )
            if self.draft_steps is None:
                yield from self._denoise(state, again, write=not shifted)
            elif (state.x[:, start : start + size] == self.rule.mask_id).any():
                yield from self.verify(state, start, stop, again, state.carried)
            else:
                continue  # before the original looks for an end
            if self.ends(state, start):
                return

    def _denoise(self, state: LoopState, again: Round, *, write: bool) -> Iterator[Pass]:
        """The static loop in a block, after its first forward."""
        first, last, before = again.first, again.last, self.steps
        if write:
            self.write(state, first, self.rule.step(state.x[:, first:last], state.carried))
        self.steps = before + 1
        for _ in range(1, self.forwards):
            yield again
            self.write(state, first, self.rule.step(state.x[:, first:last], state.carried))
            if not self.masked(state, again).any():
                return


@dataclass(kw_only=True)
class BlockLoop(FreeDaveLoop):
    """Block-causal attention, blocks aligned to position 0; a finished block's keys and values are
    stored by a forward of its own."""

    def schedule(self, state: LoopState) -> Iterator[Pass]:
        length, size = state.call.max_len, self.block_length
        prompt = state.call.prompt_lengths[0] // size * size
        if prompt:
            yield self._store(0, prompt)
        for start in range(prompt, length, size):
            stop, end = start + size, self.window_end(state, start)
            known = not (state.x[:, start:stop] == self.rule.mask_id).any()
            if known and self.draft_steps is not None:
                yield self._store(start, stop)
                continue  # before the original looks for an end
            again = Round(start=start, stop=end, first=start, last=end)
            if self.draft_steps is None:
                yield from self._denoise(state, again)
            else:
                yield again
                yield from self.verify(state, start, end, again, state.carried)
            if not self.masked(state, replace(again, last=stop)).any():
                yield self._store(start, stop)
            elif stop < length:
                raise PydllmError(
                    "the model predicts the mask: a block keeps masks, and the published loop "
                    "fails in the next one; compat=None does not allow the prediction"
                )
            if self.ends(state, start):
                return

    def _denoise(self, state: LoopState, again: Round) -> Iterator[Pass]:
        for _ in range(self.block_length):
            yield again
            window = state.x[:, again.first : again.last]
            written = self.write(state, again.first, self.rule.step(window, state.carried))
            self.proposed, self.hit = self.proposed + written, self.hit + written
            if not self.masked(state, again).any():
                return

    def _store(self, start: int, stop: int) -> Round:
        return Round(start=start, stop=stop, first=stop, last=stop, commit=stop - start)
