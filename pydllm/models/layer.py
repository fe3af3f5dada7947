"""What the native transformer holds of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pydllm.models.experts import TENSORS, Experts
from pydllm.models.families import Sizes
from pydllm.ops import QuantizedWeight


@dataclass(frozen=True)
class Layer:
    """Weights of a layer; None where the family has none."""

    attn_norm: Tensor
    qkv: Tensor | QuantizedWeight
    out: Tensor | QuantizedWeight
    mlp_norm: Tensor
    gate_up: Tensor | QuantizedWeight
    down: Tensor | QuantizedWeight
    qkv_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    out_bias: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    experts: Experts | None = None  # then gate_up and down are the experts', stacked
    # A LoRA of forward(adapter=True): (r, in) and, scaled, (hidden, r).
    out_lora_a: Tensor | None = None
    out_lora_b: Tensor | None = None

    @classmethod
    def of(cls, sizes: Sizes, weights: Mapping[str, Any], prefix: str) -> Layer:
        """That of the weights whose names begin with ``prefix``."""
        own = {
            name.removeprefix(prefix): tensor
            for name, tensor in weights.items()
            if name.startswith(prefix)
        }
        experts = None if sizes.moe is None else Experts.of(own, sizes.moe)
        return cls(**{k: v for k, v in own.items() if k not in TENSORS}, experts=experts)
