"""The static KV cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class StaticCache:
    """Keys (after RoPE) and values of every layer, one slot per position, written in place.

    Addresses never change, so a forward can be captured in a CUDA graph. New caches hold zeros;
    which slots mean something the caller knows (``kv_len``), and the attention uses no other.

    Attributes:
        keys, values: ``(layers, B, L, Hkv, D)``.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    @classmethod
    def allocate(
        cls,
        layers: int,
        batch: int,
        max_len: int,
        kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> StaticCache:
        shape = (layers, batch, max_len, kv_heads, head_dim)
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return cls(keys, values)

    @property
    def batch(self) -> int:
        return self.keys.shape[1]

    @property
    def max_len(self) -> int:
        """Slots per sequence."""
        return self.keys.shape[2]

    def k(self, layer: int) -> Tensor:
        """Keys of a layer, a view ``(B, L, Hkv, D)``."""
        return self.keys[layer]

    def v(self, layer: int) -> Tensor:
        """Values of a layer, a view ``(B, L, Hkv, D)``."""
        return self.values[layer]

    def first(self, batch: int) -> StaticCache:
        """The first ``batch`` rows: a view, nothing is copied."""
        if not 0 <= batch <= self.batch:
            raise ValueError(f"batch: expected 0 to {self.batch}, got {batch}")
        return StaticCache(self.keys[:, :batch], self.values[:, :batch])

    def put(self, rows: Sequence[int], other: StaticCache) -> None:
        """Overwrite rows by those of another cache, its slots from the first on, in place."""
        index = torch.tensor(rows, device=self.keys.device)
        self.keys[:, index, : other.max_len] = other.keys
        self.values[:, index, : other.max_len] = other.values

    def take(self, rows: Sequence[int]) -> StaticCache:
        """Row i becomes what row ``rows[i]`` was, in place; a view of these rows.

        Only rows that change their place are copied. The rows after them mean nothing afterwards.
        """
        moved = [(to, row) for to, row in enumerate(rows) if to != row]
        if moved:
            to, source = torch.tensor(moved, device=self.keys.device).T
            for tensor in (self.keys, self.values):
                tensor[:, to] = tensor[:, source]
        return self.first(len(rows))
