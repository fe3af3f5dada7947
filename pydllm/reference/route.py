"""The definition of ``route``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def route(
    hidden: Tensor,
    router: Tensor,
    bias: Tensor | None,
    length: Tensor | None,
    start: Tensor | None,
    top_k: int,
    score: str,
    renormalize: bool,
    scale: float,
    groups: int,
    topk_groups: int,
    capacity: int | None,
    block_size: int | None,
    branches: int,
) -> tuple[Tensor, Tensor]:
    """The ``top_k`` experts of each row in descending order, and their weights.

    Sigmoid scores are of fp32 logits; softmax logits are rounded to the dtype of ``hidden`` first,
    as published models do. Choices are compared after the bias; a NaN counts as ``-inf``.
    """
    batch, rows, experts = hidden.shape[0], hidden.shape[1] // branches, router.shape[0]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = F.linear(hidden.to(wide), router.to(wide))
    if score == "sigmoid":
        scores = choice = logits.sigmoid()
    else:
        choice = logits.to(hidden.dtype).to(wide)
        scores = choice.softmax(-1)
    if bias is not None:
        choice = choice + bias.to(wide)
    choice = choice.masked_fill(choice.isnan(), -torch.inf)

    row = torch.arange(rows, device=hidden.device)
    live = row >= 0 if length is None else row < length[:, None]
    if start is not None:
        live = live & (start[:, None] + row >= 0)
    live = live.expand(batch, -1).repeat(1, branches)
    if capacity is not None and block_size is not None and start is not None:
        position = (start[:, None] + row).clamp(min=0)
        block = position // block_size - start[:, None].clamp(min=0) // block_size
        admitted = _pools(choice, live, block, rows // block_size + 2, capacity)
        choice = choice.masked_fill(~admitted, -torch.inf)
    elif groups > 1:
        grouped = choice.unflatten(-1, (groups, -1))
        best = _highest(grouped.topk(2).values.sum(-1), topk_groups)
        keep = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, True)
        choice = grouped.masked_fill(~keep[..., None], -torch.inf).flatten(-2)

    ids = _highest(choice, top_k)
    weights = scores.gather(-1, ids)
    if renormalize:
        weights = weights / (_in_order(weights) + (1e-20 if score == "sigmoid" else 0.0))
    weights = (weights * scale).masked_fill(~live[..., None], 0.0)
    return ids.masked_fill(~live[..., None], experts).int(), weights


def _pools(choice: Tensor, live: Tensor, block: Tensor, blocks: int, capacity: int) -> Tensor:
    """Which experts the block of each row admits: those of highest choice over its live rows."""
    branches = choice.shape[1] // block.shape[1]
    block = torch.cat([block + branch * blocks for branch in range(branches)], 1)
    block = block[..., None].expand_as(choice).long()
    best = choice.new_full((choice.shape[0], branches * blocks, choice.shape[2]), -torch.inf)
    best = best.scatter_reduce(1, block, choice.masked_fill(~live[..., None], -torch.inf), "amax")
    pool = _highest(best, capacity)
    return torch.zeros_like(best, dtype=torch.bool).scatter(-1, pool, True).gather(1, block)


def _highest(values: Tensor, count: int) -> Tensor:
    """Indices of the highest values in descending order, ties to the lower index."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _in_order(values: Tensor) -> Tensor:
    """The sum over the last dimension from the first element on."""
    total = values[..., :1]
    for slot in range(1, values.shape[-1]):
        total = total + values[..., slot : slot + 1]
    return total
