"""Where answers stop before their length: strings and token ids, found on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydllm._checks import check_int, describe

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What ends an answer: a text, a token id, or several of these.
Stop = str | int | Sequence[str | int]
_BYTES = 4  # tokens that one character takes at most, with byte-level tokenizers


@dataclass(frozen=True)
class Found:
    """The first stop of an answer.

    Attributes:
        tokens: leading tokens of the answer that are kept, those of the stop included.
        text: the answer before the stop; None without a tokenizer.
    """

    tokens: int
    text: str | None


@dataclass
class Stops:
    """The stops of each prompt of a call, and how far its answer has been searched.

    Attributes:
        texts: per prompt, looked for in the answer without its special tokens.
        raw_texts: per prompt, those that hold a special token, looked for with them.
        ids: per prompt.
        tokenizer: of the model, or None.
        on_device: whether ids that stop every answer are looked for on the device.
    """

    texts: list[list[str]]
    raw_texts: list[list[str]]
    ids: list[set[int]]
    tokenizer: Tokenizer | None
    on_device: bool = True
    _searched: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._searched = [0] * len(self.texts)

    @property
    def shared_ids(self) -> list[int]:
        """Ids that stop every answer, and are looked for on the device."""
        return sorted(set.intersection(*self.ids)) if self.on_device else []

    @property
    def watched(self) -> bool:
        """Whether the host has to look at the answers while they are decoded."""
        texts = any(self.texts) or any(self.raw_texts)
        return texts or any(ids != set(self.shared_ids) for ids in self.ids)

    def reached(self, prompt: int, answer: Sequence[int]) -> bool:
        """Whether an answer that has grown since the last question stops in its new part."""
        before, self._searched[prompt] = self._searched[prompt], len(answer)
        new = answer[before:]
        if not new:
            return False
        if not self.ids[prompt].isdisjoint(new):
            return True
        return any(
            holds(_decode(self.tokenizer, answer[max(0, before - _reach(texts)) :], raw), texts)
            for texts, raw in self._searches(prompt)
        )

    def find(self, prompt: int, answer: Sequence[int]) -> Found | None:
        """The first stop of an answer."""
        ids, tokenizer = self.ids[prompt], self.tokenizer
        at = next((place for place, token in enumerate(answer) if token in ids), None)
        before = answer[:at]
        found = [
            _cut(tokenizer, texts, before, raw)
            for texts, raw in self._searches(prompt)
            if holds(_decode(tokenizer, before, raw), texts)
        ]
        if found:
            return min(found, key=lambda each: each.tokens)
        if at is None:
            return None
        return Found(at + 1, None if tokenizer is None else _decode(tokenizer, before, False))

    def _searches(self, prompt: int) -> list[tuple[list[str], bool]]:
        """Texts, and whether special tokens are written out for them."""
        searches = [(self.texts[prompt], False), (self.raw_texts[prompt], True)]
        return [search for search in searches if search[0]]


def _cut(tokenizer: Tokenizer | None, texts: Sequence[str], ids: Sequence[int], raw: bool) -> Found:
    """Cut an answer that holds one of the texts."""

    def decode(count: int) -> str:
        return _decode(tokenizer, ids[:count], raw)

    kept = _first(len(ids), lambda count: holds(decode(count), texts))
    whole = decode(kept)
    end = min(whole.find(text) for text in texts if text in whole)
    if not raw:
        return Found(kept, whole[:end])
    # The special tokens before the stop are left out.
    count = _first(kept, lambda count: len(decode(count)) > end) - 1
    while not whole[:end].startswith(decode(count)):
        count -= 1
    return Found(kept, _decode(tokenizer, ids[:count], False) + whole[len(decode(count)) : end])


def read_stops(
    stop: Any,
    prompts: int,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    *,
    on_device: bool = True,
) -> Stops | None:
    """The stops of a call: ``stop`` is None; a text, an id or a list of them, for all prompts; or a
    list with such a list, or None, for each prompt.

    Raises:
        ValueError, TypeError: anything else, an empty text, a text without a tokenizer, an id
            outside of the vocabulary.
    """
    if stop is None:
        return None
    per_prompt = isinstance(stop, list | tuple) and any(
        entry is None or isinstance(entry, list | tuple) for entry in stop
    )
    if per_prompt and len(stop) != prompts:
        raise ValueError(f"stop: expected {prompts} lists, one per prompt, got {len(stop)}")
    special: dict[str, int] = {}
    if tokenizer is not None:
        added = tokenizer.get_added_tokens_decoder()
        special = {token.content: number for number, token in added.items()}
    texts: list[list[str]] = []
    raw_texts: list[list[str]] = []
    ids: list[set[int]] = []
    for entry in stop if per_prompt else [stop] * prompts:
        values = () if entry is None else (entry if isinstance(entry, list | tuple) else (entry,))
        for value in values:
            _check_stop(value, vocab_size, tokenizer)
        strings = [value for value in values if isinstance(value, str) and value not in special]
        raw_texts.append([text for text in strings if holds(text, list(special))])
        texts.append([text for text in strings if text not in raw_texts[-1]])
        numbers = [value for value in values if not isinstance(value, str)]
        ids.append({*numbers, *(special[value] for value in values if value in special)})
    return Stops(texts, raw_texts, ids, tokenizer, on_device)


def _check_stop(value: Any, vocab_size: int, tokenizer: Tokenizer | None) -> None:
    if not isinstance(value, str):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"stop: expected strings and token ids, got {describe(value)}")
        return check_int("stop", value, 0, vocab_size - 1)
    if not value:
        raise ValueError("stop: expected a string of at least one character, got ''")
    if tokenizer is None:
        raise ValueError(
            f"stop: expected token ids (the model has no tokenizer), got {describe(value)}"
        )
    return None


def _decode(tokenizer: Tokenizer | None, ids: Sequence[int], raw: bool) -> str:
    return "" if tokenizer is None else tokenizer.decode(list(ids), skip_special_tokens=not raw)


def _reach(texts: Sequence[str]) -> int:
    """Tokens before an answer's new part in which one of the texts can begin."""
    return _BYTES * max(map(len, texts))


def holds(text: str, parts: Sequence[str]) -> bool:
    """Whether a text has one of the parts in it."""
    return any(part in text for part in parts)


def _first(last: int, holds: Callable[[int], bool]) -> int:
    """The least count in [1, last] for which ``holds``; it does from there on, and for ``last``."""
    low, high = 1, last
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
