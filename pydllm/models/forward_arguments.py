"""What a forward of the native transformer refuses before it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pydllm.models.cache import StaticCache

if TYPE_CHECKING:
    from pydllm.models.native import NativeModel


def check_forward(
    model: NativeModel,
    ids: Tensor,
    cache: StaticCache,
    numbers: Mapping[str, Tensor],
    branches: int,
    attached: int,
) -> None:
    """What can be told from metadata; the values are the caller's business."""
    if ids.dtype != torch.int64:
        raise TypeError(f"ids: expected dtype torch.int64, got {ids.dtype}")
    if ids.ndim != 2 or ids.shape[0] != cache.batch:
        raise ValueError(f"ids: expected shape ({cache.batch}, T), got {tuple(ids.shape)}")
    if branches < 1 or ids.shape[1] % branches:
        raise ValueError(f"branches: expected a divisor of the {ids.shape[1]} rows, got {branches}")
    rows = (ids.shape[1] - attached) // branches
    if rows > cache.max_len > 0:
        raise ValueError(
            f"ids: expected at most the {cache.max_len} slots of the cache, got {rows}"
        )
    sizes = model.sizes
    shape = (sizes.layers, cache.batch, cache.max_len, sizes.kv_heads, sizes.head_dim)
    if tuple(cache.keys.shape) != shape or cache.keys.dtype != model.dtype:
        raise ValueError(
            f"cache: expected a cache of this model, {shape} {model.dtype}, "
            f"got {tuple(cache.keys.shape)} {cache.keys.dtype}"
        )
    for name, tensor in {"ids": ids, **numbers}.items():
        if tensor.device != model.device:
            raise ValueError(f"{name}: expected device {model.device}, got {tensor.device}")
    for name, tensor in numbers.items():
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name}: expected dtype torch.int32, got {tensor.dtype}")
        if tuple(tensor.shape) != (cache.batch,):
            raise ValueError(f"{name}: expected shape ({cache.batch},), got {tuple(tensor.shape)}")
