"""The definition of ``rms_norm``."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor:
    """``(x + residual) / rms * weight``; ``residual`` becomes the sum. Statistics in fp32 up."""
    if residual is not None:
        x = residual.add_(x)
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    normed = torch.rms_norm(wide, x.shape[-1:], None, eps)
    normed = normed if wide is x else normed.to(x.dtype)
    return normed.contiguous().mul_(weight)
