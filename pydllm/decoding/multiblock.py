"""Entropy-based multi-block decoding of d3LLM (arXiv 2601.07568).

Several blocks are decoded at a time: the next opens as soon as a tenth of the newest is decoded,
and one forward accepts whatever is certain in any of them. Finished blocks wait a few forwards
before their keys and values are kept, because those of a bidirectional model drift with what
follows.

Everything that happens between two forwards is one launch, ``ops.multiblock_step``, which leaves
the next window on the device. The host reads four numbers a forward: the widths of the window and
of the head, how many sequences are left, and whether keys have to be copied. Widths bounded by what
the host knows would be those of a full forward: the windows of cached forwards are a matter of the
tokens. They choose the CUDA graph that is replayed, so here the host looks at every forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pydllm import ops
from pydllm.decoding.generation import Decoded, Request, Step
from pydllm.decoding.state import HostNumbers, Selection, State, Window, fill_holes
from pydllm.decoding.static import expect, expect_int, expect_number
from pydllm.decoding.step import forward, statistics
from pydllm.models import Model, StaticCache
from pydllm.ops.multiblock_step import MODES, MultiBlockState

_REFRESH = MODES.index("refresh")
_OPTIONS = (
    *("block_length", "threshold", "add_at", "full_at"),
    *("early_stop", "delay", "refresh", "profile"),
)
_PUBLISHED_LIMIT = 10_001  # forwards


@dataclass(frozen=True)
class MultiBlock:
    """d3LLM: tokens below an entropy, in several blocks at a time (arXiv 2601.07568).

    Attributes:
        threshold: a token is accepted up to this entropy of its distribution (at temperature 1), in
            nats. A forward accepts at least one: models with unshifted logits take the most certain
            token of all, and each forward takes one of the first block that is fully activated.
        block_length: tokens in a block; the last may be shorter.
        add_at: part of the newest block that is decoded before the next opens, in [0, 1].
        full_at: part of a block that is decoded before the next must advance every forward.
        delay: forwards that the prompt and each finished block wait, while full forwards renew the
            cache, before their keys and values are kept.
        refresh: one forward in so many is full and renews the cache; None: never.
        early_stop: decode nothing behind an end of sequence, as soon as one is written.
        cache: keep keys and values of the prompt and of finished blocks. An approximation.
        profile: ``"fixed"``, or ``"compat"``: the tokens and forwards of the published decoders,
            LLaDA's for models with unshifted logits and Dream's for shifted ones, their defects
            included, among them tokens behind an end of sequence and masks that are left where
            ``max_new_tokens`` is no multiple of ``block_length``; up to 10001 forwards are counted
            then. Sampling is ours all the same, and a length of 20, which Dream's code takes for a
            default that was not changed, is nothing special.
        tail: how many masks behind the newest block are forwarded: ``"full"``, all, as in training;
            ``"blocks"``, none; or a number.

    With a shifted model and a cache, the window starts one position early (``"fixed"``). The first
    position is thus predicted from a row computed with the present tokens: exactly what a full
    forward gives where the cache is up to date, while a hidden row carried over from the commit
    would stay as it was until the next refresh. ``"compat"`` predicts it from its own row, as Dream
    does.
    """

    threshold: float = 0.5
    block_length: int = 32
    add_at: float = 0.1
    full_at: float = 0.95
    delay: int = 2
    refresh: int | None = None
    early_stop: bool = True
    cache: bool = True
    profile: str = "fixed"
    tail: str | int = "full"

    def __post_init__(self) -> None:
        expect_number("threshold", self.threshold, -float("inf"), float("inf"))
        expect_int("block_length", self.block_length, 1)
        expect_number("add_at", self.add_at, 0.0, 1.0)
        expect_number("full_at", self.full_at, 0.0, 1.0)
        expect_int("delay", self.delay, 0)
        if self.refresh is not None:
            expect_int("refresh", self.refresh, 1)
        expect("profile", self.profile, ("fixed", "compat"))
        if isinstance(self.tail, str):
            expect("tail", self.tail, ("full", "blocks"))
        else:
            expect_int("tail", self.tail, 0)
        if self.profile == "compat" and self.tail != "full":
            raise ValueError(f"tail: expected 'full' with profile 'compat', got {self.tail!r}")

    def check(self, model: Model, max_new_tokens: int) -> None:
        if model.spec.attention != "full":
            raise ValueError(
                f"MultiBlock: expected a model with full attention, got {model.spec.attention!r}"
            )
        if self.profile == "compat" and max_new_tokens < self.block_length:
            raise ValueError(
                f"max_new_tokens: expected at least one block ({self.block_length}) with profile "
                f"'compat', got {max_new_tokens}"
            )

    def run(self, request: Request) -> Decoded:
        batch = _Batch(self, request)
        limit = _PUBLISHED_LIMIT if self.profile == "compat" else request.max_new_tokens
        for forwards in range(1, limit + 1):
            width, rows, live, copies = batch.look_ahead()
            if not live:
                break
            batch.decode(width, rows, copies > 0)
            if request.on_step is not None:
                whole = batch.write_back()
                request.report(Step(forwards, whole.x, whole.step_map, whole.prompt_length))
        whole = batch.write_back()
        return Decoded(whole.x, whole.step_map, whole.nfe)


class _Batch:
    """The sequences being decoded, their cache, and what the op carries between forwards."""

    def __init__(self, algorithm: MultiBlock, request: Request) -> None:
        spec, device = request.model.spec, request.x.device
        new, compat = request.max_new_tokens, algorithm.profile == "compat"
        self.request = request
        self.whole = request.runner.hold("state", State.of(request))
        eos_ids = spec.eos_ids[:1] if compat else spec.eos_ids
        tail = algorithm.tail
        if isinstance(tail, str):
            tail = {"full": new, "blocks": 0}[tail]
        self.options: dict[str, Any] = {
            **{
                n: getattr(algorithm, n) for n in ("block_length", "threshold", "add_at", "full_at")
            },
            **{n: getattr(algorithm, n) for n in ("early_stop", "delay", "refresh", "profile")},
            "eos_ids": request.eos[: len(eos_ids)] if request.eos is not None else None,
            "cached": algorithm.cache,
            "tail": None if tail >= new else tail,
            "shifted": spec.shift_logits,
            "mask_id": request.mask_id,
            "max_new_tokens": new,
            "backend": request.backend,
        }
        self.banned = None
        if not compat:
            banned = torch.tensor([request.mask_id], dtype=torch.int32, device=device)
            self.banned = request.runner.hold("banned", banned)
        batch, slots = request.x.shape
        # Dream's published refresh leaves keys in two places; the second is behind the sequence.
        spare = new if compat and spec.shift_logits else 0
        kept = slots + spare if algorithm.cache else 0
        self.cache = request.runner.cache("cache", request.model, batch, kept)
        self.state = self.whole
        step = MultiBlockState.make(request.x, new, algorithm.block_length)
        self.step = request.runner.hold("step", step)
        self.host = HostNumbers(device, 4)
        nothing = request.x[:, :0]
        self.host.post(self._advance(nothing, torch.zeros_like(nothing, dtype=torch.float32)))

    def look_ahead(self) -> list[int]:
        """The next forward in numbers: window rows, head rows, sequences, keys to copy.

        Finished sequences leave: those at the end of the batch move into their places.
        """
        width, rows, live, copies = self.host.read()
        runner, batch = self.request.runner, len(self.state.rows)
        if 0 < live < batch and runner.stay([*range(live)], batch) is not None:
            going = self.step.mode.nonzero().flatten().tolist()
            order = fill_holes(runner.stay(going, batch) or going)
            self.write_back()
            index = torch.tensor(order, device=self.request.x.device)
            self.state = runner.hold("state", self.state.keep(index))
            numbers, blocks, eligible = self.step
            step = MultiBlockState(numbers[:, index], blocks[:, index], eligible[index])
            self.step = runner.hold("step", step)
            self.cache = self.cache.take(order)
        slots = self.state.x.shape[1]
        return [runner.width(width, slots), runner.width(rows, slots), live, copies]

    def decode(self, width: int, rows: int, copies: bool) -> None:
        """The planned forward, and what it decides."""
        key = (width, rows, copies, len(self.state.rows), self.request.max_new_tokens)
        step = partial(self._decode, width, rows, copies)
        self.host.post(self.request.runner.run(key, step))

    def _decode(self, width: int, rows: int, copies: bool) -> Tensor:
        request, state, step = self.request, self.state, self.step
        total = state.prompt_length + request.max_new_tokens
        window = Window.make(step.start, step.length, step.kv_len, width=width, commit=step.commit)
        selection = Selection(step.first, step.rows, rows)
        hidden = forward(request, state, window, self.cache)
        if copies:
            _copy_twice(self.cache, step, total, request.max_new_tokens)
        state.decoded = step.decoded
        stats = statistics(
            request,
            state,
            hidden,
            step.start,
            selection,
            banned=self.banned,
            eligible=step.eligible,
        )
        return self._advance(stats.token, stats.entropy)

    def write_back(self) -> State:
        """Bring the whole request up to date."""
        self.state.nfe, self.state.decoded = self.step.nfe, self.step.decoded
        self.state.write_back(self.whole)
        return self.whole

    def _advance(self, token: Tensor, entropy: Tensor) -> Tensor:
        """Accept and plan; returns what the host wants to know of the next forward, ``(4,)``."""
        state, step = self.state, self.step
        ops.multiblock_step(
            state.x,
            state.step_map,
            step,
            token,
            entropy,
            prompt_length=state.prompt_length,
            **self.options,
        )
        copies = (step.mode == _REFRESH) & (step.stale > 0)
        ahead = (step.length.amax(), step.rows.amax(), (step.mode > 0).sum(), copies.sum())
        return torch.stack([number.int() for number in ahead])


def _copy_twice(cache: StaticCache, step: MultiBlockState, total: Tensor, most: int) -> None:
    """Behind a refresh of Dream's published decoder: the keys and values of the slots from the
    prefix to the last waiting block are seen again by the next forwards, beside those that replace
    them."""
    offset = torch.arange(most, device=total.device)
    wanted = (offset < step.stale[:, None]) & (step.mode == _REFRESH)[:, None]
    row = torch.arange(len(total), device=total.device)[:, None]
    source = (step.prefix[:, None] + offset).clamp(max=cache.max_len - 1).long()
    target = (total[:, None] + offset).long()
    for tensor in (cache.keys, cache.values):
        old, new = tensor[:, row, target], tensor[:, row, source]
        tensor[:, row, target] = torch.where(wanted[..., None, None], new, old)
