"""Answers as they are decoded."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from pydllm._backend.context import compute_context
from pydllm.decoding.arguments import read_options
from pydllm.decoding.call import Call
from pydllm.decoding.driver import Algorithm
from pydllm.decoding.generate import Prepared, prepare
from pydllm.decoding.generation import Generation, collect
from pydllm.decoding.prompts import Prompt
from pydllm.models import Model
from pydllm.models.protocol import expect_model

Piece = tuple[int, str]
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # of a character whose last bytes are in a later token


class Stream(Iterator[Piece]):
    """An iterator of (index of the prompt, text) whose pieces, joined, are ``Generation.text``.

    Attributes:
        generation: what ``generate`` would have returned, once the iterator is exhausted; Ctrl-C
            during a step ends it early, with what was decoded. None before.
    """

    def __init__(self, prepared: Prepared) -> None:
        self.generation: Generation | None = None
        self._device = prepared.call.device
        self._pieces = _pieces(prepared)

    def __next__(self) -> Piece:
        # The caller's code runs in the caller's modes.
        with compute_context(self._device):
            try:
                return next(self._pieces)
            except StopIteration as stop:
                self.generation = stop.value if self.generation is None else self.generation
                raise StopIteration from None

    def close(self) -> None:
        """End decoding early and free what it holds."""
        self._pieces.close()


def stream(
    model: Model,
    prompts: Sequence[Prompt] | Tensor | Mapping[str, Any],
    algorithm: Algorithm,
    *,
    max_new_tokens: int | Sequence[int],
    **options: Any,
) -> Stream:
    """Decode as ``generate`` does, and yield each answer's text as soon as nothing can change it.

    That is text up to the first token that is not decoded yet: algorithms that fill a block in any
    order yield it when its front is complete. Text that may be the beginning of a stop waits.

    Args:
        model: one that has a tokenizer.
        prompts, algorithm, max_new_tokens, options: as in ``generate``.

    Returns:
        A ``Stream``: an iterator of (index of the prompt, text), with the attribute ``generation``.

    Raises:
        ValueError, TypeError: as ``generate``, before the first step.

    Example:
        >>> for index, text in pydllm.stream(model, ["how many ?"], pydllm.Static(),
        ...                                  max_new_tokens=64):
        ...     print(text, end="", flush=True)
    """
    read = read_options("stream", options)
    expect_model(model)
    if model.tokenizer is None:
        raise ValueError("model: expected one with a tokenizer to stream text, got one without")
    return Stream(prepare(model, prompts, algorithm, max_new_tokens, read))


def _pieces(prepared: Prepared) -> Generator[Piece, None, Generation]:
    with prepared.drive() as run:
        text = _Text(run.call)
        interrupted = False
        try:
            for _ in run.steps():
                # All at once: what is yielded must not be interrupted.
                yield from [p for each in run.answers() for p in text.grown(*each)]
        except KeyboardInterrupt:
            interrupted = True
        generation = collect(run.finish(interrupted=interrupted), run.call)
        for prompt, whole in enumerate(generation.text or ()):
            yield from text.say(prompt, whole)
        return generation


class _Text:
    """What has been said of each answer."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.said = [""] * len(call.prompt_lengths)
        stops = call.stops
        self.stops: list[list[str]] = [[] for _ in self.said]
        if stops is not None:
            pairs = zip(stops.texts, stops.raw_texts, strict=True)
            self.stops = [texts + raw for texts, raw in pairs]

    def grown(self, prompt: int, ids: list[int]) -> list[Piece]:
        """What is new and final of an answer after a step."""
        return self.say(prompt, self._final(prompt, ids))

    def say(self, prompt: int, text: str) -> list[Piece]:
        said = self.said[prompt]
        if len(text) <= len(said) or not text.startswith(said):
            return []
        self.said[prompt] = text
        return [(prompt, text[len(said) :])]

    def _final(self, prompt: int, ids: list[int]) -> str:
        """The text of an answer's decoded front that no later token changes."""
        call, tokenizer = self.call, self.call.model.tokenizer
        if tokenizer is None:
            return ""
        if not call.ignores_eos:
            ends = set(call.model.spec.eos_ids)
            at = next((place for place, token in enumerate(ids) if token in ends), None)
            ids = ids[:at]
        found = None if call.stops is None else call.stops.find(prompt, ids)
        if found is not None:
            return found.text or ""
        text = tokenizer.decode(ids).rstrip(_UNFINISHED)
        return text[: len(text) - _overlap(text, self.stops[prompt])]


def _overlap(text: str, stops: list[str]) -> int:
    """Characters at the end of ``text`` that may be the beginning of a stop."""
    longest = 0
    for stop in stops:
        for count in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:count]):
                longest = count
                break
    return longest
