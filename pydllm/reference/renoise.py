"""The definition of ``renoise``."""

from __future__ import annotations

import torch
from torch import Tensor

from pydllm.reference.philox import philox
from pydllm.reference.unmask import LARGEST, ORDER, UNIT


def renoise(
    x: Tensor,
    token: Tensor,
    entropy: Tensor,
    bound: float,
    vocab_size: int,
    seed: int,
    request: Tensor,
    step: Tensor,
) -> Tensor:
    wide = torch.promote_types(entropy.dtype, torch.float32)
    # Numbers to compare with are rounded to the dtype of the entropies.
    limit = entropy.new_full((), bound, dtype=torch.float64).to(entropy.dtype).to(wide)
    cost = entropy.to(wide)
    cost, order = cost.masked_fill(cost.isnan(), torch.inf).sort(dim=1, stable=True)
    # In integers, so that the sum is exact whatever the order of the additions.
    units = (cost.clamp(0, LARGEST) / UNIT).to(torch.int64)
    passes = ((units.cumsum(1) - units).to(wide) * UNIT <= limit) & (cost < torch.inf)
    accepted = torch.zeros_like(passes).scatter(1, order, passes)
    position = torch.arange(x.shape[1], device=x.device)[None]
    words = philox(
        torch.full_like(position, ORDER), position, request[:, None], step[:, None], seed
    )
    x.copy_(torch.where(accepted, token, words[..., 1] * vocab_size >> 32))
    return accepted
