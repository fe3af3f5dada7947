"""Texts with gaps: ``<mask:8>`` stands for eight tokens that a model fills in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydllm._checks import describe
from pydllm.decoding.driver import Algorithm
from pydllm.decoding.generate import generate
from pydllm.decoding.generation import Generation
from pydllm.models import Model, encode

_GAP = re.compile(r"<mask:(\d+)>")
_MOST = 2**16  # tokens of a gap


@dataclass(frozen=True)
class Infilled:
    """Texts whose gaps are filled.

    Attributes:
        text: the whole texts, with what was generated after them (before an EOS, with a stop).
        spans: of each text, what its gaps were filled with.
        generation: what ``generate`` returned.
    """

    text: list[str]
    spans: list[list[str]]
    generation: Generation


def infill(
    model: Model,
    texts: str | Sequence[str],
    algorithm: Algorithm,
    *,
    max_new_tokens: int | Sequence[int] = 0,
    suppress_ids: Sequence[int] | None = None,
    **options: Any,
) -> Infilled:
    """Fill gaps in texts, written ``<mask:N>`` for N tokens.

    Models with full attention see both sides of a gap, block-causal ones the blocks up to its own.

    Args:
        model: one that has a tokenizer.
        texts: a text, or several, each with one gap or more. Tokenized in pieces, from gap to gap.
        algorithm: one that fills masks in prompts: block-wise ones, ``FreeDave``, ``MultiBlock``.
        max_new_tokens: tokens that follow a text.
        suppress_ids: ids that are not predicted. Default: EOS where nothing follows the texts.
        options: further keywords of ``generate``; ``ignore_eos`` is True where nothing follows.

    Raises:
        ValueError, TypeError: a text without a gap, a gap of no tokens, a model without a
            tokenizer, and as ``generate``.

    Example:
        >>> filled = pydllm.infill(model, "<mask:3> is the capital of France.", pydllm.Static())
        >>> filled.text, filled.spans
    """
    single = [texts] if isinstance(texts, str) else texts
    if not isinstance(single, Sequence) or not single:
        raise TypeError(f"texts: expected a string or a list of them, got {describe(texts)}")
    if model.tokenizer is None or model.spec.mask_id is None:
        missing = "a tokenizer" if model.tokenizer is None else "a mask id"
        raise ValueError(f"model: expected one with {missing}, got one without")
    pieces = [_read(model, f"texts[{row}]", text) for row, text in enumerate(single)]
    follows = max_new_tokens != 0
    if suppress_ids is None:
        suppress_ids = () if follows else model.spec.eos_ids
    if not follows:
        options.setdefault("ignore_eos", True)
    prompts = [[token for piece, _ in rows for token in piece] for rows in pieces]
    made = generate(
        model,
        prompts,
        algorithm,
        max_new_tokens=max_new_tokens,
        suppress_ids=list(suppress_ids),
        **options,
    )
    whole, spans = [], []
    for row, (prompt, parts) in enumerate(zip(prompts, pieces, strict=True)):
        ids = made.sequences[row].tolist()
        new = len(made.new_tokens[row]) - (made.finish_reason[row] == "eos")
        whole.append(model.tokenizer.decode(ids[: len(prompt) + new]))
        places = [sum(len(piece) for piece, _ in parts[:n]) for n in range(len(parts) + 1)]
        gaps = (n for n, (_, is_gap) in enumerate(parts) if is_gap)
        spans.append([model.tokenizer.decode(ids[places[n] : places[n + 1]]) for n in gaps])
    return Infilled(whole, spans, made)


def _read(model: Model, name: str, text: Any) -> list[tuple[list[int], bool]]:
    """Ids of a text's pieces, and which of them are gaps."""
    if not isinstance(text, str):
        raise TypeError(f"{name}: expected a string, got {describe(text)}")
    parts = _GAP.split(text)  # every other one is the number of a gap
    if len(parts) == 1:
        raise ValueError(f"{name}: expected a gap such as <mask:8>, got {describe(text)}")
    if model.tokenizer is None or model.spec.mask_id is None:
        return []
    pieces: list[tuple[list[int], bool]] = []
    for place, part in enumerate(parts):
        if place % 2:
            if not 1 <= int(part) <= _MOST:
                raise ValueError(f"{name}: expected gaps of 1 to {_MOST} tokens, got {part}")
            pieces.append(([model.spec.mask_id] * int(part), True))
        elif place == 0:
            pieces.append((encode(model.tokenizer, part), False))
        else:
            ids = model.tokenizer.encode(part, add_special_tokens=False).ids
            pieces.append((ids, False))
    return pieces
