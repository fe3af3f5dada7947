"""The definition of ``rms_norm``."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor:
    """``(x + residual) / rms * weight``; ``residual`` becomes the sum. Statistics in fp32 up."""
    if residual is not None:
        x = residual.add_(x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype).contiguous() * weight
