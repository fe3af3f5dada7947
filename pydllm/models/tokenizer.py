"""Tokenizers of a checkpoint: tokenizer.json, or byte-level BPE from vocab.json and merges.txt."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as pre

from pydllm._backend.errors import CheckpointError
from pydllm.models.checkpoint import read_json, read_text

# How Qwen 2 cuts a text: English contractions; a word, with one sign or space before it; a digit;
# signs, with a space before and line ends after them; line ends; spaces.
_QWEN2 = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_QWEN_LIKE = ("Qwen2Tokenizer", "Qwen2TokenizerFast", "DreamTokenizer", "SDARTokenizer")
_GPT2_LIKE = ("GPT2Tokenizer", "GPT2TokenizerFast")
_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# A normaliser may turn one character into this many; real ones stay below 20.
_GROWTH = 1000.0


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint; None where there is none, or one of another kind.

    Raises:
        CheckpointError: a file is damaged, or a normaliser lets texts grow without bound.
    """
    path = folder / "tokenizer.json"
    if path.exists():
        text = read_text(folder, path.name)
        _check_growth(read_json(folder, path.name))
        try:
            return Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(
                f"tokenizer.json: expected a file of the tokenizers library, found {error}"
            ) from error
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return _byte_level(folder)
    return None


def special_tokens(folder: Path) -> dict[str, str]:
    """The text of ``bos_token``, ``eos_token`` and the like, where the files name them."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        values = _object(folder, name)
        for key in _NAMED:
            token = _content(values.get(key))
            if token is not None:
                found[key] = token
    return found


def _content(token: Any) -> str | None:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _object(folder: Path, name: str) -> dict[str, Any]:
    if not (folder / name).exists():
        return {}
    values = read_json(folder, name)
    if not isinstance(values, dict):
        raise CheckpointError(f"{name}: expected a JSON object, found {type(values).__name__}")
    return values


def _byte_level(folder: Path) -> Tokenizer | None:
    """What transformers' classes in Python do with these files, in the tokenizers library."""
    config = _object(folder, "tokenizer_config.json")
    kind = config.get("tokenizer_class")
    if kind not in _QWEN_LIKE + _GPT2_LIKE:
        return None
    vocab = _object(folder, "vocab.json")
    if not all(type(token) is int and token >= 0 for token in vocab.values()):
        raise CheckpointError("vocab.json: expected a token id for each token")
    lines = read_text(folder, "merges.txt").split("\n")
    if lines[0].startswith("#version:"):
        lines = lines[1:]
    pairs = [line.split() for line in lines if line.strip()]
    if not all(len(pair) == 2 for pair in pairs):
        raise CheckpointError("merges.txt: expected two tokens on every line")
    merges = [(first, second) for first, second in pairs]
    added = list(_added_tokens(folder, config))
    whole = vocab | {token.content: number for token, number in added}
    try:
        tokenizer = Tokenizer(models.BPE(vocab=whole, merges=merges))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(
            f"merges.txt: expected merges of vocab.json, found {error}"
        ) from error
    spaced = bool(config.get("add_prefix_space", False))
    if kind in _QWEN_LIKE:
        tokenizer.normalizer = normalizers.NFC()
        split = pre.Split(Regex(_QWEN2), behavior="isolated")
        tokenizer.pre_tokenizer = pre.Sequence(
            [split, pre.ByteLevel(add_prefix_space=spaced, use_regex=False)]
        )
    else:
        tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=spaced)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token, _ in added if token.special])
    tokenizer.add_tokens([token for token, _ in added if not token.special])
    return tokenizer


def _added_tokens(folder: Path, config: dict[str, Any]) -> Iterator[tuple[AddedToken, int]]:
    """Tokens that are found in a text before it is cut, and their ids."""
    entries = config.get("added_tokens_decoder")
    if isinstance(entries, dict):
        for number, entry in entries.items():
            content = _content(entry)
            if content is None or not number.isdecimal():
                raise CheckpointError(
                    "tokenizer_config.json: added_tokens_decoder: expected an id and its token, "
                    f"found {number!r}: {entry!r:.80}"
                )
            flags = ("single_word", "lstrip", "rstrip", "special")
            options = {flag: bool(entry.get(flag, False)) for flag in flags}
            token = AddedToken(content, normalized=bool(entry.get("normalized")), **options)
            yield token, int(number)
        return
    special = set(special_tokens(folder).values())
    for values in (config, _object(folder, "special_tokens_map.json")):
        special |= {
            _content(token) or "" for token in values.get("additional_special_tokens") or ()
        }
    for content, number in _object(folder, "added_tokens.json").items():
        if type(number) is not int or number < 0:
            raise CheckpointError(
                f"added_tokens.json: {content}: expected its id, found {number!r}"
            )
        yield AddedToken(content, normalized=False, special=content in special), number


def _check_growth(values: Any) -> None:
    """Refuse normalisers and decoders whose replacements multiply a text beyond memory."""
    if not isinstance(values, dict):
        return
    for part in ("normalizer", "decoder"):
        growth = math.prod(_growth(step) for step in _steps(values.get(part)))
        if growth > _GROWTH:
            raise CheckpointError(
                f"tokenizer.json: {part}: expected at most {_GROWTH:g} characters for one, "
                f"found replacements that make {growth:.3g}"
            )


def _steps(entry: Any) -> Iterator[dict[str, Any]]:
    if isinstance(entry, dict):
        yield entry
        for key in ("normalizers", "decoders"):
            for inner in entry.get(key) or ():
                yield from _steps(inner)


def _growth(step: dict[str, Any]) -> float:
    """How many characters a step makes of one, at most."""
    if step.get("type") != "Replace" or not isinstance(step.get("content"), str):
        return 1.0
    pattern, made = step.get("pattern"), len(step["content"])
    text = pattern.get("String") if isinstance(pattern, dict) else None
    if isinstance(text, str) and text:
        return max(made / len(text), 1.0)
    return 1.0 + made  # a regular expression may match between any two characters
