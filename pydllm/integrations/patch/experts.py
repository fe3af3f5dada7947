"""Experts of transformers 5: fused parameters, called with the routes of the model's own router."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pydllm import ops, reference
from pydllm.integrations.patch.attention import Options
from pydllm.integrations.patch.checks import Check, difference, wants_grad

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
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
    if gate_up.dtype not in _DTYPES or gate_up.device.type == "meta" or down.dtype != gate_up.dtype:
        return f"weights in {gate_up.dtype} on {gate_up.device}"
    if activation(module) is None:
        return "its gate is neither SiLU nor tanh-approximated GELU"
    return None


def experts_forward(
    name: str, kind: str, options: Options, original: Callable[..., Any]
) -> Callable[..., Any]:
    """The ``forward`` that replaces the experts'."""
    check = Check(name) if options.self_check else None

    def forward(
        self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Any:
        weights = (self.gate_up_proj, self.down_proj)
        if not _free(options, hidden_states, top_k_weights, *weights):
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


def _free(options: Options, x: Tensor, *others: Tensor) -> bool:
    """Whether the op can take this call; counted."""
    reason = None
    if any(wants_grad(x, other) for other in others):
        reason = "a gradient is wanted"
    elif torch.is_autocast_enabled(x.device.type):
        reason = "autocast"
    elif x.dtype != others[-1].dtype or x.device != others[-1].device or x.ndim != 2:
        reason = "mixed devices or dtypes"
    elif x.device.type == "cpu" and options.backend == "auto":
        reason = "patched elsewhere, called on a CPU"
    options.count("experts" if reason is None else f"as before: {reason}")
    return reason is None
