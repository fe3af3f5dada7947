"""Entropy-based multi-block decoding of d3LLM (arXiv 2601.07568).

Several blocks are decoded at a time: the next opens as soon as a tenth of the newest is decoded,
and one forward accepts whatever is certain in any of them. Finished blocks wait a few forwards
before their keys and values are kept, because those of a bidirectional model drift with what
follows.

Everything that happens between two forwards is one launch, ``ops.multiblock_step``, which leaves
the next window on the device. The host reads four numbers per forward: the widths of the window and
of the head, how many sequences are left, and whether keys have to be copied. Widths bounded by what
the host knows would be those of a full forward: the windows of cached forwards are a matter of the
tokens. They choose the CUDA graph that is replayed, so here the host looks at every forward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from pydllm import ops
from pydllm._checks import check_bool, check_choice, check_int, check_number, renamed
from pydllm.decoding.call import Call
from pydllm.decoding.driver import Algorithm, Counts, Decoder, Plan
from pydllm.decoding.multiblock_exact import OpenBlocksDecoder
from pydllm.decoding.state import Selection, State, Window
from pydllm.decoding.step import forward, statistics
from pydllm.models import Model
from pydllm.ops.multiblock_step import MultiBlockState


@renamed(profile="pydllm.integrations.d3llm")
@dataclass(frozen=True, kw_only=True)
class MultiBlock(Algorithm):
    """d3LLM: tokens below an entropy, in several blocks at a time (arXiv 2601.07568); D2F, the same
    with exact keys on block-causal models (arXiv 2508.09192).

    Attributes:
        threshold: a token is accepted up to this entropy of its distribution (at temperature 1), in
            nats; with ``score="confidence"`` above this probability. A forward accepts at least
            one: models with unshifted logits take the most certain token of all, and each forward
            takes one of the first block that is fully activated.
        block_length: tokens in a block; the last may be shorter.
        add_at: part of the newest block that is decoded before the next opens, in [0, 1].
        full_at: part of a block that is decoded before the next must advance every forward.
        delay: forwards that the prompt and each finished block wait, while full forwards renew the
            cache, before their keys and values are kept.
        refresh: every this many forwards, one is full and renews the cache; None: never.
        early_stop: decode nothing after an EOS, as soon as one is written.
        cache: keep keys and values of the prompt and of finished blocks. An approximation.
        tail: how many masks after the newest block are forwarded: ``"full"``, all, as in training;
            ``"blocks"``, none; or a number.
        score: ``"entropy"``, or for block-causal models ``"confidence"``.
        forced: of block-causal models, which blocks write a token in each forward: ``"first"``, the
            first that is not complete; ``"ready"``, all whose predecessor is decoded to
            ``full_at``.
        buffer: of block-causal models, open blocks at most, one that is complete and not stored yet
            included. None: no limit.
        compat: None; ``"d2f"``: a prompt is one block, whatever its length, probabilities count the
            mask's, which may be predicted and then stays a mask, and after an EOS the open blocks
            are completed (its values: confidence, threshold 0.9, ``full_at`` 0.5,
            ready); ``"diffulex"``: likewise completed, the newest block is the newest that is
            not complete, and a prompt that fills ``add_at`` of its last block opens the next before
            the first forward (confidence, 0.95, ``full_at`` 0.9, ready, buffer 4).

    On a block-causal model keys and values of finished blocks are exact, and ``delay``,
    ``refresh``, ``cache`` and ``tail`` stay at their defaults; the tokens are not those of
    block-wise decoding. ``full_at`` is looked at by ``forced="ready"`` alone.

    With a shifted model and a cache, the window starts one position early. The first
    position is thus predicted from a row computed with the present tokens: exactly what a full
    forward gives where the cache is up to date, while a hidden row carried over from the commit
    would stay as it was until the next refresh.

    The published decoders, defects included, are ``pydllm.integrations.d3llm``.
    """

    threshold: float = 0.5
    block_length: int = 32
    add_at: float = 0.1
    full_at: float = 0.95
    delay: int = 2
    refresh: int | None = None
    early_stop: bool = True
    cache: bool = True
    tail: str | int = "full"
    score: str = "entropy"
    forced: str = "first"
    buffer: int | None = None
    compat: str | None = None

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, -math.inf, infinite=True)
        check_int("block_length", self.block_length, 1)
        check_number("add_at", self.add_at, 0, 1)
        check_number("full_at", self.full_at, 0, 1)
        check_int("delay", self.delay, 0)
        if self.refresh is not None:
            check_int("refresh", self.refresh, 1)
        check_bool("early_stop", self.early_stop)
        check_bool("cache", self.cache)
        if isinstance(self.tail, str):
            check_choice("tail", self.tail, ("full", "blocks"))
        else:
            check_int("tail", self.tail, 0)
        check_choice("score", self.score, ("entropy", "confidence"))
        check_choice("forced", self.forced, ("first", "ready"))
        check_choice("compat", self.compat, (None, "d2f", "diffulex"))
        if self.buffer is not None:
            check_int("buffer", self.buffer, 1)
        if self.score == "confidence":
            check_number("threshold", self.threshold, 0, 1)

    takes_guidance: ClassVar[bool] = True
    fills_prompts: ClassVar[bool] = True
    shares_region: ClassVar[bool] = True
    ends_early: ClassVar[bool] = True

    def check(self, model: Model, max_new_tokens: int) -> None:
        spec = model.spec
        if spec.attention == "causal" or spec.seeded or spec.context != "block":
            raise ValueError(
                "MultiBlock: expected a model with full or block-causal attention whose blocks "
                f"store themselves, got {spec.attention!r} with context {spec.context!r}"
            )
        others = ("score", "forced", "buffer", "compat")
        if spec.attention == "block_causal":
            others = ("delay", "refresh", "cache", "tail")
            if self.block_length != spec.block_size:
                raise ValueError(
                    f"block_length: expected {spec.block_size}, the block of the block-causal "
                    f"model, got {self.block_length}"
                )
        for name in others:
            default = type(self).__dataclass_fields__[name].default
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name}: expected the default {default!r} with {spec.attention!r} attention, "
                    f"got {getattr(self, name)!r}"
                )
        origin = {"d2f": "prompt", "diffulex": "zero"}.get(self.compat or "", spec.block_origin)
        if origin != spec.block_origin:
            raise ValueError(
                f"compat: expected a model with block_origin {origin!r} for {self.compat!r}, "
                f"got {spec.block_origin!r}"
            )

    def decoder(self, call: Call) -> MultiBlockDecoder | OpenBlocksDecoder:
        if call.model.spec.attention == "block_causal":
            return OpenBlocksDecoder.of(self, call)
        return MultiBlockDecoder(self)


@dataclass
class MultiBlockCallState(State):
    """Also what ``ops.multiblock_step`` carries; forwards are counted there."""

    step: MultiBlockState = field(metadata={"rows": False})

    def take(self, slots: Sequence[int]) -> Self:
        rows = torch.tensor(slots, device=self.x.device)
        numbers, blocks, eligible = self.step
        taken = super().take(slots)
        taken.step = MultiBlockState(numbers[:, rows], blocks[:, rows], eligible[rows])
        return taken

    def put(self, slots: Sequence[int], other: Self) -> None:
        super().put(slots, other)
        rows = torch.tensor(slots, device=self.x.device)
        self.step.numbers[:, rows] = other.step.numbers
        self.step.blocks[:, rows] = other.step.blocks
        self.step.eligible[rows] = other.step.eligible

    def counters(self) -> dict[str, Tensor]:
        return {"nfe": self.step.nfe}


@dataclass(frozen=True, kw_only=True)
class MultiBlockPlan(Plan):
    """Rows of the window and of the head."""

    width: int
    rows: int


@dataclass(frozen=True)
class MultiBlockDecoder(Decoder):
    """One forward and one ``ops.multiblock_step`` per step.

    The counts have two more rows: those of ``MultiBlockPlan``.
    """

    algorithm: MultiBlock
    opens_alone: ClassVar[bool] = True

    def most_forwards(self, call: Call) -> int:
        # With logits that are NaN a mask can stay a mask.
        return max(call.region_lengths)

    def begin(self, call: Call, prompts: list[int]) -> tuple[MultiBlockCallState, Tensor]:
        algorithm, new = self.algorithm, max(call.region_lengths)
        kept = call.max_len if algorithm.cache else 0
        cache = call.runner.cache("cache", call.model, len(prompts), kept)
        shape = call.x.new_empty(len(prompts), call.max_len)
        step = MultiBlockState.make(shape, new, algorithm.block_length)
        state = MultiBlockCallState.begin(call, prompts, cache, step=step)
        step.mode.masked_fill_(state.done, 0)
        nothing = state.x[:, :0]
        counts = self._advance(state, nothing, torch.zeros_like(nothing, dtype=torch.float32))
        return state, counts

    def stop(self, state: MultiBlockCallState, slots: list[int]) -> None:
        super().stop(state, slots)
        rows = torch.tensor(slots, device=state.x.device)
        for name in ("mode", "length", "commit", "rows"):
            getattr(state.step, name)[rows] = 0

    def plan(self, state: MultiBlockCallState, counts: Counts | None) -> MultiBlockPlan:
        if counts is None:
            raise ValueError("counts: expected those of the last step, got None")
        runner, slots = state.call.runner, state.call.max_len
        width, rows = (runner.width(max(count), slots) for count in counts[1:3])
        key = (width, rows, max(state.call.region_lengths))
        return MultiBlockPlan(key, 1, width=width, rows=rows)

    def step(self, state: MultiBlockCallState, plan: MultiBlockPlan) -> tuple[Tensor, None]:
        call, step = state.call, state.step
        # The op gives every sequence the region of the longest; nothing after its own end is seen.
        length, kv_len, commit = (
            torch.minimum(count, limit)
            for count, limit in (
                (step.length, state.end - step.start),
                (step.kv_len, state.end),
                (step.commit, state.end - step.start),
            )
        )
        window = Window.make(step.start, length, kv_len, width=plan.width, commit=commit)
        selection = Selection(step.first, step.rows, plan.rows)
        hidden = forward(state, window)
        stats = statistics(
            state,
            hidden,
            step.start,
            selection,
            suppress_ids=call.suppress_ids,
            noise_offset=step.decoded,
            eligible=step.eligible,
        )
        return self._advance(state, stats.token, stats.entropy), None

    def _advance(self, state: MultiBlockCallState, token: Tensor, entropy: Tensor) -> Tensor:
        """Accept and plan; returns the counts of the next forward."""
        call, step, algorithm = state.call, state.step, self.algorithm
        tail: str | int | None = algorithm.tail
        if isinstance(tail, str):
            tail = {"full": None, "blocks": 0}[tail]
        ops.multiblock_step(
            state.x,
            state.step_map,
            step,
            token,
            entropy,
            mask_id=call.mask_id,
            prompt_length=state.region_start,
            max_new_tokens=max(call.region_lengths),
            block_length=algorithm.block_length,
            threshold=algorithm.threshold,
            add_at=algorithm.add_at,
            full_at=algorithm.full_at,
            eos_ids=call.eos,
            early_stop=algorithm.early_stop,
            cached=algorithm.cache,
            delay=algorithm.delay,
            refresh=algorithm.refresh,
            tail=tail,
            shifted=call.model.spec.shift_logits,
            backend=call.backend,
        )
        finished = -(step.mode == 0).int()
        return torch.stack((finished, step.length, step.rows))
