"""Experts of transformers 5: fused parameters, called with the routes of the model's own router."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pydllm import ops, reference
from pydllm.integrations.patch.attention import Options
from pydllm.integrations.patch.checks import DTYPES, Check, difference

_PROBE = 64  # gates at which activations are told apart


def is_experts(module: nn.Module) -> bool:
    """Whether a module looks like the experts of a mixture, as transformers 5 holds them."""
    fused = (getattr(module, f"{name}_proj", None) for name in ("gate_up", "down"))
    return all(isinstance(t, Tensor) and t.ndim == 3 for t in fused) and hasattr(
        module, "num_experts"
    )


def activation(module: Any) -> str | None:
    """The op's activation that computes the module's gate; None: neither does."""
    like = module.gate_up_proj
    probe = torch.linspace(-4, 4, 2 * _PROBE, dtype=torch.float64).to(like.device, like.dtype)
    probe[_PROBE:] = 1.0
    gate = getattr(module, "_apply_gate", None)
    if gate is None:
        return None
    with torch.no_grad(), torch.autocast(probe.device.type, enabled=False):
        theirs = gate(probe[None])
    for name in ("silu", "gelu_tanh"):
        exact = reference.activate(probe.double()[None], name)
        far = 8 * torch.finfo(like.dtype).eps * exact.abs().max().item()
        if theirs.shape == exact.shape and difference(theirs, exact) <= far:
            return name
    return None


def experts_reason(module: Any) -> str | None:
    """Why ``experts`` is not what the module computes; None if it is."""
    gate_up, down = module.gate_up_proj, module.down_proj
    if "forward" in module.__dict__:
        return "its forward is replaced already"
    for name, wanted in (
        ("is_transposed", False),
        ("has_bias", False),
        ("has_gate", True),
        ("is_concatenated", True),
        ("has_post_expert_norm", False),
        ("_is_expert_parallel", False),
    ):
        if getattr(module, name, wanted) != wanted:
            return f"{name} is {getattr(module, name)}"
    count, hidden, inner = down.shape
    if tuple(gate_up.shape) != (count, 2 * inner, hidden):
        return f"parameters of shapes {tuple(gate_up.shape)} and {tuple(down.shape)}"
    if gate_up.dtype not in DTYPES or gate_up.device.type == "meta" or down.dtype != gate_up.dtype:
        return f"weights in {gate_up.dtype} on {gate_up.device}"
    if activation(module) is None:
        return "its gate is neither SiLU nor tanh-approximated GELU"
    return None


def experts_forward(name: str, module: nn.Module, options: Options) -> Callable[..., Any]:
    """The ``forward`` that replaces the experts'."""
    original, kind = module.forward, activation(module) or "silu"
    check = Check(name) if options.self_check else None

    def forward(
        self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Any:
        weights = (self.gate_up_proj, self.down_proj)
        if not options.takes("experts", hidden_states, top_k_weights, *weights):
            return original(hidden_states, top_k_index, top_k_weights)
        ids, scale = top_k_index.to(torch.int32), top_k_weights.to(torch.float32)
        y = ops.experts(
            hidden_states, *weights, ids, scale, activation=kind, backend=options.backend
        )
        if check is not None and not check.done:
            wide = (hidden_states.double(), *(w.double() for w in weights), ids, scale.double())
            exact = ops.experts(*wide, activation=kind, backend="torch")
            check(y, original(hidden_states, top_k_index, top_k_weights), exact)
        return y

    return forward
