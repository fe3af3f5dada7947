"""Prompts as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pydllm.models import Model


def encode_prompts(
    model: Model, prompts: Sequence[Sequence[int]] | Sequence[Tensor] | Sequence[str]
) -> list[list[int]]:
    """Token ids of the prompts, checked against the model's vocabulary.

    Raises:
        ValueError, TypeError: not a list of prompts, text without a tokenizer or that it cannot
            encode, an id outside of the vocabulary, a mask, an empty prompt of a shifted model.
    """
    if isinstance(prompts, (str, Tensor)) or not isinstance(prompts, Sequence) or not prompts:
        raise ValueError(f"prompts: expected a list of one or more prompts, got {prompts!r:.80}")
    return [_encode(model, f"prompts[{row}]", prompt) for row, prompt in enumerate(prompts)]


def _encode(model: Model, name: str, prompt: Any) -> list[int]:
    spec = model.spec
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise ValueError(
                f"{name}: expected token ids (the model has no tokenizer), got a string"
            )
        try:
            ids = model.tokenizer.encode(prompt).ids
        except Exception as error:  # what tokenizers raises has no type of its own
            raise ValueError(
                f"{name}: expected text that the tokenizer can encode, got {prompt!r:.80}: {error}"
            ) from error
    else:
        if isinstance(prompt, Tensor):
            if prompt.ndim != 1:
                raise ValueError(f"{name}: expected shape (n,), got {tuple(prompt.shape)}")
            prompt = prompt.tolist()
        if not isinstance(prompt, Sequence) or not all(type(token) is int for token in prompt):
            raise TypeError(f"{name}: expected a list of ints, got {prompt!r:.80}")
        ids = list(prompt)
    for place, token in enumerate(ids):
        if not 0 <= token < spec.vocab_size:
            raise ValueError(
                f"{name}[{place}]: expected a token id in [0, {spec.vocab_size}), got {token}"
            )
        if token == spec.mask_id:
            raise ValueError(
                f"{name}[{place}]: expected no mask in a prompt, got the mask id {token}"
            )
    if (spec.shift_logits or spec.seeded) and not ids:
        raise ValueError(
            f"{name}: expected at least one token (position i is predicted from i - 1), got none"
        )
    return ids
