"""Classifier-free guidance: every forward twice, with the prompt and with masks in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pydllm import ops
from pydllm.models import Model, StaticCache
from pydllm.models.protocol import Fresh


class GuidedCache(StaticCache):
    """Rows ``2 b`` and ``2 b + 1`` of keys and values are those of sequence b, with the prompt and
    without.
    """

    @property
    def batch(self) -> int:
        return self.keys.shape[1] // 2

    @property
    def rows(self) -> StaticCache:
        """The cache of twice the sequences that the model sees."""
        return StaticCache(self.keys, self.values)

    def first(self, batch: int) -> GuidedCache:
        part = self.rows.first(2 * batch)
        return GuidedCache(part.keys, part.values)

    def put(self, rows: Sequence[int], other: StaticCache) -> None:
        self.rows.put(_both(rows), StaticCache(other.keys, other.values))

    def take(self, rows: Sequence[int]) -> GuidedCache:
        part = self.rows.take(_both(rows))
        return GuidedCache(part.keys, part.values)


class GuidedModel:
    """A model whose logits are ``without + (1 + scale) (with - without)``, as LLaDA has it.

    Hidden states of both forwards stand side by side, ``(..., 2 hidden)``. ``forward`` also takes
    ``prompt_length (B,)`` int32. With a cache, each forward has keys and values of its own.

    Args:
        unguided: the model.
        scale: how far from the logits without the prompt, above 0.
    """

    def __init__(self, unguided: Model, scale: float) -> None:
        self.unguided, self.scale = unguided, scale
        self.spec, self.tokenizer = unguided.spec, unguided.tokenizer
        self.device, self.dtype = unguided.device, unguided.dtype
        if hasattr(unguided, "graphs"):
            self.graphs = unguided.graphs

    def new_cache(self, batch: int, max_len: int) -> GuidedCache:
        both = self.unguided.new_cache(2 * batch, max_len)
        return GuidedCache(both.keys, both.values)

    def forward(
        self,
        ids: Tensor,
        start: Tensor,
        cache: GuidedCache,
        *,
        prompt_length: Tensor,
        branches: int = 1,
        **options: Any,
    ) -> Tensor:
        """As ``Model.forward``; tensors have one number per sequence."""
        offset = torch.arange(ids.shape[1] // branches, device=ids.device).repeat(branches)
        given = start[:, None] + offset < prompt_length[:, None]
        without = ids.masked_fill(given, self.spec.mask_id or 0)
        hidden = self.unguided.forward(
            torch.stack((ids, without), 1).flatten(0, 1),
            _twice(start),
            cache.rows,
            branches=branches,
            **_all_twice(options),
        )
        return hidden.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2)

    def commit_branch(self, fresh: Fresh, cache: GuidedCache, **options: Any) -> None:
        """As ``Model.commit_branch``."""
        self.unguided.commit_branch(fresh, cache.rows, **_all_twice(options))

    def head(self, hidden: Tensor) -> Tensor:
        """Guided logits, fp32 or fp64."""
        logits, without = (self.unguided.head(part) for part in hidden.chunk(2, -1))
        wide = torch.promote_types(logits.dtype, torch.float32)
        without = without.to(wide)
        return without + (1 + self.scale) * (logits.to(wide) - without)

    def head_stats(
        self, hidden: Tensor, rows: Tensor | None = None, **options: Any
    ) -> ops.VocabStats:
        """Statistics of guided logits, which are stored."""
        return ops.vocab_stats(
            self.head(hidden if rows is None else hidden[rows.long()]), **options
        )


def _both(rows: Sequence[int]) -> list[int]:
    return [2 * row + part for row in rows for part in (0, 1)]


def _all_twice(options: dict[str, Any]) -> dict[str, Any]:
    return {n: _twice(v) if isinstance(v, Tensor) else v for n, v in options.items()}


def _twice(numbers: Tensor) -> Tensor:
    return numbers.repeat_interleave(2)
