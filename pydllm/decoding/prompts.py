"""Prompts as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pydllm._backend.errors import PydllmError
from pydllm._checks import describe
from pydllm.models import Model, encode
from pydllm.models.protocol import expect_model

# One prompt: token ids, text, or chat messages.
Prompt = Sequence[int] | Tensor | str | Sequence[Mapping[str, Any]]


def encode_prompts(model: Model, prompts: Any) -> list[list[int]]:
    """Token ids of the prompts, checked against the model's vocabulary.

    Args:
        prompts: a list of prompts: token ids (lists, 1-D tensors or arrays), strings, or lists of
            chat messages, which the model's template renders. Or all of them in one: a ``(B, L)``
            tensor or array of ids, or a mapping such as transformers' ``BatchEncoding`` with
            ``input_ids`` and ``attention_mask``, whose padding is left out.

    Raises:
        ValueError, TypeError: none of these, text without a tokenizer or that it cannot encode,
            messages without a template, an id outside of the vocabulary, no token to begin with for
            a shifted model.
    """
    expect_model(model)
    if isinstance(prompts, Mapping):
        prompts = _without_padding(prompts)
    elif hasattr(prompts, "__array__") and not isinstance(prompts, str):
        matrix = torch.as_tensor(prompts)
        if matrix.ndim != 2:
            raise ValueError(f"prompts: expected shape (B, L), got {tuple(matrix.shape)}")
        prompts = list(matrix)
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
        raise ValueError(
            f"prompts: expected a list of one or more prompts, got {describe(prompts)}"
        )
    return [_encode(model, f"prompts[{row}]", prompt) for row, prompt in enumerate(prompts)]


def _without_padding(batch: Mapping[str, Any]) -> list[Tensor]:
    if "input_ids" not in batch:
        raise ValueError(f"prompts: expected a mapping with input_ids, got {', '.join(batch)}")
    ids = torch.as_tensor(batch["input_ids"])
    mask = torch.as_tensor(batch.get("attention_mask", torch.ones_like(ids)))
    if ids.ndim != 2 or mask.shape != ids.shape:
        raise ValueError(
            "prompts: expected input_ids and attention_mask of one shape (B, L), "
            f"got {tuple(ids.shape)} and {tuple(mask.shape)}"
        )
    return [row[kept != 0] for row, kept in zip(ids, mask, strict=True)]


def _encode(model: Model, name: str, prompt: Any) -> list[int]:
    spec = model.spec
    ids = _text_ids(model, name, prompt) if _is_text(prompt) else _given_ids(name, prompt)
    for place, token in enumerate(ids):
        if not 0 <= token < spec.vocab_size:
            raise ValueError(
                f"{name}[{place}]: expected a token id in [0, {spec.vocab_size}), got {token}"
            )
    if (spec.shift_logits or spec.seeded) and ids[:1] in ([], [spec.mask_id]):
        raise ValueError(
            f"{name}: expected at least one token (position i is predicted from i - 1), got none"
        )
    return ids


def _is_text(prompt: Any) -> bool:
    if isinstance(prompt, str):
        return True
    return isinstance(prompt, list | tuple) and bool(prompt) and isinstance(prompt[0], Mapping)


def _text_ids(model: Model, name: str, prompt: Any) -> list[int]:
    kind = "a string" if isinstance(prompt, str) else "messages"
    if model.tokenizer is None:
        raise ValueError(f"{name}: expected token ids (the model has no tokenizer), got {kind}")
    template = getattr(model, "chat_template", None)
    try:
        return encode(model.tokenizer, prompt, template)
    except (PydllmError, ValueError, TypeError) as error:
        raise ValueError(
            f"{name}: expected text that the tokenizer can encode, got {prompt!r:.80}: {error}"
        ) from error


def _given_ids(name: str, prompt: Any) -> list[int]:
    if hasattr(prompt, "__array__"):
        row = torch.as_tensor(prompt)
        if row.ndim != 1:
            raise ValueError(f"{name}: expected shape (n,), got {tuple(row.shape)}")
        if row.is_floating_point() or row.is_complex() or row.dtype == torch.bool:
            raise TypeError(f"{name}: expected integer token ids, got {row.dtype}")
        return row.tolist()
    if not isinstance(prompt, Sequence) or not all(type(token) is int for token in prompt):
        raise TypeError(f"{name}: expected a list of ints, got {describe(prompt)}")
    return list(prompt)
