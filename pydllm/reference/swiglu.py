"""The definition of ``swiglu``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of rows ``[gate | up]``; ``silu`` is rounded before the product."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)
