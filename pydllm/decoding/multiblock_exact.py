"""Several blocks at a time on block-causal models (D2F, arXiv 2508.09192; MultiBD of Diffulex).

A block sees the blocks before it as they are, masks included, so its tokens are not those of
block-wise decoding. Keys are exact nevertheless: a block is stored by the forward after the one
that completed it and all blocks before it, in which its tokens are final, and nothing that follows
changes them. So there is nothing to wait for and nothing to renew.

Each sequence has a window of open blocks, from the first that is not stored. The blocks of a window
are rows of ``ops.unmask``: one launch accepts in all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from pydllm import ops
from pydllm.decoding.call import Call
from pydllm.decoding.driver import Counts, Decoded, Decoder, Plan
from pydllm.decoding.graph import power_of_two
from pydllm.decoding.state import Selection, State, Window
from pydllm.decoding.step import fill_after_eos, forward, pick, statistics

if TYPE_CHECKING:
    from pydllm.decoding.multiblock import MultiBlock


@dataclass
class OpenBlocksState(State):
    """Also the window of each sequence.

    Attributes:
        stored: ``(b,)`` int32, leading slots of the cache that are right; the window begins there.
        open_blocks: ``(b,)`` int32, blocks in the window.
        last_end: ``(b,)`` int32, the end of the sequence's last block.
    """

    stored: Tensor
    open_blocks: Tensor
    last_end: Tensor


@dataclass(frozen=True, kw_only=True)
class OpenBlocksPlan(Plan):
    """A forward of ``blocks`` blocks; ``stores`` more rows where it begins with the prompts, and
    no blocks where it stores these alone."""

    blocks: int
    stores: int
    is_first: bool


@dataclass(frozen=True)
class OpenBlocksDecoder(Decoder):
    """One forward per step over the open blocks, then at most one more of them.

    The counts have a second row: open blocks of the next forward.

    Attributes:
        above: the least probability that exceeds the threshold.
    """

    algorithm: MultiBlock
    above: float
    opens_alone: ClassVar[bool] = True

    @classmethod
    def of(cls, algorithm: MultiBlock, call: Call) -> OpenBlocksDecoder:
        dtype = torch.promote_types(call.model.dtype, torch.float32)
        threshold = torch.tensor(algorithm.threshold, dtype=dtype)
        return cls(algorithm, torch.nextafter(threshold, threshold + 1).item())

    def most_forwards(self, call: Call) -> int:
        # A token of the first block per forward, a forward that stores each where the buffer is 1,
        # the prompt's. NaN logits can leave a mask a mask.
        size = self.algorithm.block_length
        tokens = max(call.region_lengths) + 2 * size
        return tokens + tokens // size + 1

    def begin(self, call: Call, prompts: list[int]) -> tuple[OpenBlocksState, None]:
        size, at_prompt = self.algorithm.block_length, self._at_prompt(call)
        cache = call.runner.cache("cache", call.model, len(prompts), call.max_len)
        zero = torch.zeros(len(prompts), dtype=torch.int32, device=call.device)
        state = OpenBlocksState.begin(
            call,
            prompts,
            cache,
            stored=zero,
            open_blocks=zero
            + torch.tensor(
                [self._first_blocks(call, max(prompt, 0)) for prompt in prompts],
                dtype=torch.int32,
                device=call.device,
            ),
            last_end=zero.clone(),
        )
        first = torch.zeros_like(zero) if not at_prompt else state.prompt_length
        state.stored.copy_(first + (state.region_start - first) // size * size)
        state.last_end.copy_(first + (state.end - first + size - 1) // size * size)
        state.open_blocks.masked_fill_(state.done, 0)
        return state, None

    def plan(self, state: OpenBlocksState, counts: Counts | None) -> OpenBlocksPlan:
        call, size = state.call, self.algorithm.block_length
        runner, first = call.runner, not any(state.forwards)
        if first:
            blocks = max(self._first_blocks(call, prompt) for prompt in state.live_prompts)
        else:
            blocks = 1 if counts is None else max(max(counts[1]), 1)
        if runner.fixed_shapes:
            blocks = min(power_of_two(blocks), call.max_len // size)
        stores = 0
        if first:
            longest = max(call.first_positions[prompt] for prompt in state.live_prompts)
            stores = longest if self._at_prompt(call) else longest // size * size
            stores = min(runner.width(stores, call.max_len), call.max_len) if stores else 0
        if self._is_d2f and stores:
            blocks = 0
        key = (first, blocks, stores)
        return OpenBlocksPlan(key, blocks=blocks, stores=stores, is_first=first)

    def step(self, state: OpenBlocksState, plan: OpenBlocksPlan) -> tuple[Tensor, None]:
        if plan.blocks == 0:
            self._store_prompts(state, plan.stores)
            return self._counts(state), None
        call, size = state.call, self.algorithm.block_length
        width = plan.blocks * size
        complete = self._leading_complete(state, plan.blocks)
        positions = Selection(state.stored.clone(), state.open_blocks * size, width)
        window = self._window(state, plan, complete * size)
        picked = pick(state, window.width, window.start, positions)
        # Nothing depends on the last layer's other rows.
        rows = picked.rows if picked.live is not None and call.guidance == 0 else None
        stats = statistics(
            state,
            forward(state, window, rows=rows),
            window.start,
            positions,
            suppress_ids=call.suppress_but_mask if self._is_d2f else call.suppress_ids,
            picked=picked,
        )
        self._accept(state, plan.blocks, stats)
        state.stored += complete * size
        state.open_blocks -= complete
        self._open_next(state, plan.blocks)
        return self._counts(state), None

    def finish(self, call: Call, results: Decoded) -> Decoded:
        fill_after_eos(call, results.x, results.step_map)
        return results

    def _first_blocks(self, call: Call, prompt: int) -> int:
        """Blocks of a prompt's first forward, as ``_open_next`` says of the prompt's tail."""
        algorithm, size = self.algorithm, self.algorithm.block_length
        if algorithm.compat != "diffulex":
            return 1
        start = call.first_positions[prompt]
        tail = start % size
        room = call.ends[prompt] > start - tail + size and (algorithm.buffer or 2) > 1
        return 2 if room and tail / size >= algorithm.add_at else 1

    def _at_prompt(self, call: Call) -> bool:
        return call.model.spec.block_origin == "prompt"

    @property
    def _is_d2f(self) -> bool:
        """Whether a prompt is one block, whatever its length, and the mask may be predicted."""
        return self.algorithm.compat == "d2f"

    def _store_prompts(self, state: OpenBlocksState, width: int) -> None:
        length, zero = state.stored.masked_fill(state.done, 0), torch.zeros_like(state.stored)
        window = Window.make(zero, length, length, width=width, commit=length)
        forward(state, window, attention="full")
        state.nfe += length > 0

    def _window(self, state: OpenBlocksState, plan: OpenBlocksPlan, complete: Tensor) -> Window:
        """The open blocks, after the row that predicts their first position; first all prompts."""
        size, start = self.algorithm.block_length, state.stored
        stop = start + state.open_blocks * size
        width = plan.blocks * size
        if plan.is_first:
            width, start = width + plan.stores, torch.zeros_like(start)
        else:
            lead = int(state.call.model.spec.shift_logits)
            width, start = width + lead, (start - lead).clamp(min=0)
        rows = (stop - start).masked_fill(state.done, 0)
        commit = (state.stored + complete - start).masked_fill(state.done, 0)
        if not plan.is_first:
            commit = commit.masked_fill(complete == 0, 0)
        width = min(width, state.call.max_len)
        return Window.make(start, rows, stop, width=width, commit=commit)

    def _slots(self, state: OpenBlocksState, blocks: int) -> Tensor:
        """Positions of the window's blocks, ``(b, blocks * size)``, distinct; those past the end
        of a sequence begin again at 0, and belong to no open block."""
        offsets = torch.arange(blocks * self.algorithm.block_length, device=state.x.device)
        return (state.stored[:, None] + offsets).long() % state.x.shape[1]

    def _masks(self, state: OpenBlocksState, blocks: int) -> Tensor:
        """Masks of each open block ``(b, blocks)`` int32; -1 where no block is open."""
        x = state.x.gather(1, self._slots(state, blocks))
        masks = (x == state.call.mask_id).unflatten(1, (blocks, -1)).sum(2, dtype=torch.int32)
        number = torch.arange(blocks, device=x.device)
        return masks.masked_fill(number >= state.open_blocks[:, None], -1)

    def _leading_complete(self, state: OpenBlocksState, blocks: int) -> Tensor:
        return (self._masks(state, blocks) == 0).int().cumprod(1).sum(1, dtype=torch.int32)

    def _forced(self, masks: Tensor) -> Tensor:
        """Which blocks write a token in any case ``(b, blocks)``."""
        size = self.algorithm.block_length
        incomplete = masks > 0
        if self.algorithm.forced == "first":
            return incomplete & (incomplete.cumsum(1) == 1)
        # What is stored before the window is decoded.
        decoded = (size - masks).masked_fill(masks < 0, 0) / size
        before = torch.cat((torch.ones_like(decoded[:, :1]), decoded[:, :-1]), 1)
        return incomplete & (before >= self.algorithm.full_at)

    def _accept(self, state: OpenBlocksState, blocks: int, stats: ops.VocabStats) -> None:
        """Write what is certain enough in each open block, and the best of a forced one."""
        size, slots = self.algorithm.block_length, self._slots(state, blocks)
        masks = self._masks(state, blocks)
        least = self._forced(masks).int().flatten()
        rows = (-1, size)
        x, step_map = (t.gather(1, slots).view(rows) for t in (state.x, state.step_map))
        nfe = state.nfe.repeat_interleave(blocks)
        zero = torch.zeros_like(nfe)
        length = torch.where(masks >= 0, size, 0).masked_fill(state.done[:, None], 0)
        score, rule = self._rule(stats, least)
        unmasked = ops.unmask(
            x,
            step_map,
            nfe,
            stats.token.view(rows),
            score.view(rows),
            mask_id=state.call.mask_id,
            start=zero,
            length=length.flatten().int(),
            backend=state.call.backend,
            **rule,
        )
        state.x.scatter_(1, slots, x.view(slots.shape))
        state.step_map.scatter_(1, slots, step_map.view(slots.shape))
        state.noise_offset += unmasked.accepted.view(-1, blocks).sum(1, dtype=torch.int32)
        state.nfe += ~state.done

    def _rule(self, stats: ops.VocabStats, least: Tensor) -> tuple[Tensor, dict[str, Any]]:
        threshold = self.algorithm.threshold
        if self.algorithm.score == "entropy":
            if threshold < 0:
                return stats.entropy.neg(), {"rule": "quota", "quota": least}
            rule = {"rule": "entropy", "threshold": threshold, "min_tokens": least}
            return stats.entropy, rule
        if self.above > 1:
            return stats.prob, {"rule": "quota", "quota": least}
        rule = {"rule": "threshold", "threshold": self.above, "min_tokens": least}
        return stats.prob, rule

    def _open_next(self, state: OpenBlocksState, blocks: int) -> None:
        """Open a block where the newest is decoded far enough; say which sequences are done."""
        algorithm, size = self.algorithm, self.algorithm.block_length
        masks = self._masks(state, blocks)
        number = torch.arange(blocks, device=masks.device)
        newest = (number == state.open_blocks[:, None] - 1).any(1)
        left = masks.gather(1, (state.open_blocks - 1).clamp(0, blocks - 1).long()[:, None])[:, 0]
        if algorithm.compat == "diffulex":  # of the blocks that are not complete
            last = torch.where(masks > 0, number, -1).amax(1)
            left = torch.where(last < 0, 0, masks.gather(1, last.clamp(min=0)[:, None])[:, 0])
        progress = torch.where(newest, (size - left) / size, 1.0)
        end = state.stored + state.open_blocks * size
        ended, settled = self._ends(state)
        opens = (progress >= algorithm.add_at) & (end < state.last_end) & ~state.done
        if not algorithm.early_stop:
            ended, settled = torch.zeros_like(ended), torch.zeros_like(settled)
        opens &= ~ended
        if algorithm.buffer is not None:
            opens &= state.open_blocks < algorithm.buffer
        state.open_blocks += opens
        complete = ~(masks > 0).any(1) & ~opens & ((end >= state.last_end) | ended)
        done = complete if algorithm.compat else complete | settled
        state.done |= done
        state.open_blocks.masked_fill_(state.done, 0)

    def _ends(self, state: OpenBlocksState) -> tuple[Tensor, Tensor]:
        """Whether an EOS is written ``(b,)``, and whether it is in a block before which, and in
        which, no mask is left."""
        call, size = state.call, self.algorithm.block_length
        if call.eos is None:
            return torch.zeros_like(state.done), torch.zeros_like(state.done)
        position = torch.arange(state.x.shape[1], device=state.x.device)
        new = (position >= state.prompt_length[:, None]) & (position < state.end[:, None])
        ends = torch.isin(state.x, call.eos) & new
        masked = (state.x == call.mask_id) & (position >= state.stored[:, None])
        front = torch.where(masked, position, state.x.shape[1]).amin(1)
        front = state.stored + (front - state.stored) // size * size
        opened = position < (state.stored + state.open_blocks * size)[:, None]
        return (ends & opened).any(1), (ends & opened & (position < front[:, None])).any(1)

    def _counts(self, state: OpenBlocksState) -> Tensor:
        return torch.stack((-state.done.int(), state.open_blocks))
