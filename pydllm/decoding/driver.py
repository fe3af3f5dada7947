"""The decoding loop: the only one.

A decoder says what runs next (``plan``, on the host) and what a step does (``step``, on the
device). The loop runs the steps, brings numbers to the host, reports, takes finished sequences out
of the batch and gives their slots to prompts that wait.

The host learns of a batch by counts, ``(k, b)`` int32, one column per slot. The first row says
where a sequence stands: -1 finished, 0 between two units of work (a block, or a round), above 0 in
the middle of one. Slots change hands when no sequence is in the middle. What other rows say is
between the decoder's ``step`` and its ``plan``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from pydllm.decoding.call import Call, Step, padded_length
from pydllm.decoding.graph import Eager
from pydllm.decoding.state import IDLE, State, fill_holes
from pydllm.models import Model

# Steps between two looks at the counts where nothing but the end of the call depends on them. They
# are read a step after they were sent, so that the device never waits for the host; as many steps
# at the end of a call may do nothing.
POLL = 4

Counts = list[list[int]]


@dataclass(frozen=True)
class Plan:
    """A step that is about to run.

    Attributes:
        key: what a recorded step depends on besides its tensors: kind and widths.
        poll: the host reads the counts of this step before it plans the next (1), does not read
            them (0), or reads those of every ``poll``-th step.
        is_forward: whether the step is a forward of the model, which ``on_step`` reports.
    """

    key: Hashable
    poll: int = 1
    is_forward: bool = True


class Algorithm(ABC):
    """A decoding algorithm: a frozen dataclass of its parameters.

    Attributes:
        needs_mask: whether it needs a model that has a mask id.
        shares_region: whether it gives every sequence the generation region of the longest, whose
            rest holds ``Call.fill_id``, no EOS.
        ends_early: whether an EOS counts before all tokens that precede it are known, and changes
            them. Stops then do not count as EOS.
        fills_prompts: whether it fills masks in a prompt.
        takes_top_k, has_logprobs, takes_guidance: whether ``generate`` takes ``top_k``,
            ``logprobs`` and ``guidance`` with it.
        is_greedy: whether it takes temperature 0 alone, and no filters.
    """

    needs_mask: ClassVar[bool] = True
    shares_region: ClassVar[bool] = False
    ends_early: ClassVar[bool] = False
    fills_prompts: ClassVar[bool] = False
    takes_top_k: ClassVar[bool] = True
    has_logprobs: ClassVar[bool] = True
    takes_guidance: ClassVar[bool] = False
    is_greedy: ClassVar[bool] = False

    @property
    def is_random(self) -> bool:
        """Whether it draws from the seed at temperature 0 as well."""
        return False

    @abstractmethod
    def check(self, model: Model, max_new_tokens: int) -> None:
        """Raise ValueError if this model or length cannot be decoded with it."""

    @abstractmethod
    def decoder(self, call: Call) -> Decoder:
        """What it does in a call."""


class Decoder(ABC):
    """What an algorithm does in a call.

    Attributes:
        opens_alone: an admitted prompt takes its first step in a batch of its own, because it is
            as wide as the prompt. Without, it joins the next step of all.
    """

    opens_alone: ClassVar[bool] = False

    @abstractmethod
    def begin(self, call: Call, prompts: list[int]) -> tuple[Any, Tensor | None]:
        """The state of some prompts of the call, and the counts before the first step.

        Counts may be None: every sequence is at 0.
        """

    @abstractmethod
    def plan(self, state: Any, counts: Counts | None) -> Any:
        """The next step, or None: all sequences are finished.

        ``counts`` is None where the last plan did not ask for them.
        """

    @abstractmethod
    def step(self, state: Any, plan: Any) -> tuple[Tensor, Any]:
        """Run it on the device. Reads no value on the host.

        Returns:
            The counts; and what the next step needs of this one besides the state's tensors, which
            becomes ``state.carried`` (None: nothing).
        """

    def most_forwards(self, call: Call) -> int | None:
        """Forwards after which a sequence leaves even if masks are left, as NaN logits can leave
        them. None: its forwards are bounded otherwise.
        """
        return None

    def stop(self, state: Any, slots: list[int]) -> None:
        """End the sequences of some slots before their length; between two steps."""
        rows = torch.tensor(slots, device=state.x.device)
        x = state.x[rows]
        state.x[rows] = x.masked_fill(x == state.call.mask_id, state.call.fill_id)
        state.done[rows] = True

    def settled(self, state: Any) -> Tensor | None:
        """``(b,)`` int32, the position before which no token changes any more, masks aside. None:
        no token that is written does.
        """
        return None

    def finish(self, call: Call, results: Decoded) -> Decoded:
        """Complete the results of all prompts."""
        return results


@dataclass(frozen=True)
class Decoded:
    """What a call came to, on the device.

    Attributes:
        x: ``(N, L)`` int64 tokens.
        step_map: ``(N, L)`` int32.
        counters: ``(N,)`` int32 each, ``nfe`` and what else the decoder counts, by name.
        logprobs: ``(N, L)`` fp32, or None.
        interrupted: Ctrl-C ended the call early.
    """

    x: Tensor
    step_map: Tensor
    counters: dict[str, Tensor]
    logprobs: Tensor | None = None
    interrupted: bool = False

    @classmethod
    def begin(cls, call: Call) -> Decoded:
        logprobs = torch.zeros_like(call.x, dtype=torch.float32) if call.logprobs else None
        return cls(call.x.clone(), torch.full_like(call.x, -1, dtype=torch.int32), {}, logprobs)

    def collect(self, state: State, slots: list[int]) -> None:
        """Copy the sequences of some slots to the rows of their prompts."""
        device = self.x.device
        rows = torch.tensor([state.prompts[slot] for slot in slots], device=device)
        index = torch.tensor(slots, device=device)
        self.x[rows], self.step_map[rows] = state.x[index], state.step_map[index]
        if self.logprobs is not None and state.logprobs is not None:
            self.logprobs[rows] = state.logprobs[index]
        for name, counter in state.counters().items():
            zero = self.x.new_zeros(len(self.x), dtype=torch.int32)
            self.counters.setdefault(name, zero)[rows] = counter[index]


class Mailbox:
    """A few integers that travel from the device to the host without a synchronising copy."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        self._values = torch.zeros(0, dtype=torch.int32)
        self._posted = torch.Size((0, 0))

    def post(self, counts: Tensor) -> None:
        """Send counts ``(k, b)`` int32 on their way."""
        if self._values.numel() < counts.numel():
            pinned = self._event is not None
            self._values = torch.zeros(counts.numel(), dtype=torch.int32, pin_memory=pinned)
        self._posted = counts.shape
        self._values[: counts.numel()].view(counts.shape).copy_(counts, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def read(self) -> Counts:
        """Wait until the counts that were sent last have arrived, and return them."""
        if self._event is not None:
            self._event.synchronize()
        return self._values[: self._posted.numel()].view(self._posted).tolist()


def drive(decoder: Decoder, call: Call, *, max_batch: int | None = None) -> Decoded:
    """Decode every prompt of the call, at most ``max_batch`` at a time."""
    return Drive(decoder, call, max_batch).run()


class Drive:
    """One call: the batch, the prompts that wait, the results."""

    def __init__(self, decoder: Decoder, call: Call, max_batch: int | None) -> None:
        self.decoder, self.call, self.runner = decoder, call, call.runner
        self.mailbox = Mailbox(call.device)
        self._watches = call.stops is not None and call.stops.watched
        self.results = Decoded.begin(call)
        self.forwards = 0
        prompts = range(len(call.prompt_lengths))
        slots = min(len(prompts), max_batch or len(prompts))
        self.waiting = deque(prompts[slots:])
        idle = [IDLE] * (self.runner.batch_size(slots) - slots)
        self.counts: Counts | None
        self.state, self.counts = self._begin(call, [*prompts[:slots], *idle])
        self.state = self.runner.static_buffer("state", self.state)

    def run(self) -> Decoded:
        """All steps; or, where Ctrl-C interrupts them, what there is."""
        try:
            for _ in self.steps():
                pass
        except KeyboardInterrupt:
            return self.finish(interrupted=True)
        return self.finish()

    def finish(self, *, interrupted: bool = False) -> Decoded:
        """The results of all prompts."""
        if self.state.live:
            self.results.collect(self.state, self.state.live)
        results = self.decoder.finish(self.call, self.results)
        return replace(results, interrupted=interrupted)

    def answers(self) -> Iterator[tuple[int, list[int]]]:
        """(prompt, new ids before the first that is not final) of the prompts in the batch."""
        call, live = self.call, self.state.live
        rows = self.state.x[torch.tensor(live, device=call.device)].tolist() if live else []
        settled = self.decoder.settled(self.state)
        limits = self.results.x.shape[1] if settled is None else settled.tolist()
        for slot, row in zip(live, rows, strict=True):
            prompt = self.state.prompts[slot]
            limit = limits if isinstance(limits, int) else limits[slot]
            yield prompt, call.decoded_front(prompt, row[:limit])

    def steps(self) -> Iterator[None]:
        """Run the steps, one a turn."""
        steps = 0
        while self.state.live:
            plan = self.decoder.plan(self.state, self.counts)
            if plan is None:
                break
            step = partial(self.decoder.step, self.state, plan)
            key = (plan.key, len(self.state.prompts))
            posted, self.state.carried = self.runner.run(key, step)
            steps += 1
            self._report(plan, self.state)
            self.counts = self._poll(plan, posted, steps)
            if self.counts is not None and max(self.counts[0]) <= 0:
                self._stop(self.counts)
                self._turn_over(self.counts)
            yield

    def _begin(self, call: Call, prompts: list[int]) -> tuple[State, Counts]:
        state, posted = self.decoder.begin(call, prompts)
        if posted is None:
            return state, [[min(prompt, 0) for prompt in prompts]]
        self.mailbox.post(posted)
        return state, self.mailbox.read()

    def _poll(self, plan: Plan, posted: Tensor, steps: int) -> Counts | None:
        """The counts that the host knows before the next step."""
        if plan.poll == 1 or (plan.poll and self._watches):
            self.mailbox.post(posted)
            return self.mailbox.read()
        counts = None
        if plan.poll and steps > plan.poll and steps % plan.poll == 1:
            counts = self.mailbox.read()
        if plan.poll and steps % plan.poll == 0:
            self.mailbox.post(posted)
        return counts

    def _report(self, plan: Plan, state: State) -> None:
        if not plan.is_forward:
            return
        self.forwards += 1
        state.forwards = [forwards + 1 for forwards in state.forwards]
        if self.call.on_step is None:
            return
        self.results.collect(state, state.live)
        call = self.call
        longest = padded_length(call.model, call.prompt_lengths, call.ends, fixed_shapes=False)
        x, step_map = (t[:, :longest].clone() for t in (self.results.x, self.results.step_map))
        self.call.on_step(Step(self.forwards, x, step_map, self.call.prompt_length.clone()))

    def _stop(self, counts: Counts) -> None:
        """End the sequences that have reached a stop which the device does not look for."""
        call, state, stopped = self.call, self.state, []
        slots = [slot for slot in state.live if counts[0][slot] >= 0]
        if call.stops is None or not self._watches or not slots:
            return
        rows = state.x[torch.tensor(slots, device=state.x.device)].tolist()
        for slot, row in zip(slots, rows, strict=True):
            prompt = state.prompts[slot]
            if call.mask_id in row[: call.prompt_lengths[prompt]]:
                continue
            if call.stops.reached(prompt, call.decoded_front(prompt, row)):
                stopped.append(slot)
                counts[0][slot] = -1
        if stopped:
            self.decoder.stop(state, stopped)

    def _turn_over(self, counts: Counts) -> None:
        """Take finished sequences out, give their slots to waiting prompts, close the gaps."""
        state, left = self.state, False
        while finished := self._finished(counts):  # an admitted one may finish in its first step
            left = True
            self.results.collect(state, finished)
            for slot in finished:
                state.prompts[slot] = IDLE
            free = [slot for slot, prompt in enumerate(state.prompts) if prompt == IDLE]
            admitted = [self.waiting.popleft() for _ in free[: len(self.waiting)]]
            if admitted:
                self._admit(counts, free[: len(admitted)], admitted)
        active = self.runner.active_slots(state.live, len(state.prompts))
        if left and state.live and active is not None:
            order = fill_holes(active)
            self.state = self.runner.static_buffer("state", state.take(order))
            self.counts = [[row[slot] for slot in order] for row in counts]

    def _finished(self, counts: Counts) -> list[int]:
        most = self.decoder.most_forwards(self.call)
        return [
            slot
            for slot in self.state.live
            if counts[0][slot] < 0 or (most is not None and self.state.forwards[slot] >= most)
        ]

    def _admit(self, counts: Counts, slots: list[int], prompts: list[int]) -> None:
        """Put waiting prompts into free slots, after their first step where they take it alone."""
        alone = self.decoder.opens_alone
        call = replace(self.call, runner=Eager(caches=alone))
        state, first = self._begin(call, prompts)
        if alone:
            plan = self.decoder.plan(state, first)
            posted, state.carried = self.decoder.step(state, plan)
            self.mailbox.post(posted)
            self._report(plan, state)
            first = self.mailbox.read()
        self.state.put(slots, state)
        # Not every step counts as much: what is missing, no plan asks for.
        for row, new in zip(counts, first, strict=False):
            for slot, count in zip(slots, new, strict=True):
                row[slot] = count
