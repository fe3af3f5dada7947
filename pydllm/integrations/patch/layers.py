"""RMS norms and gated feed-forward layers: recognised by name, attributes and numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydllm import ops, reference
from pydllm.integrations.patch.attention import Options
from pydllm.integrations.patch.checks import DTYPES, Check, difference

_NORMS = ("RMSNorm", "RMSLayerNorm")
_EPS = ("variance_epsilon", "eps", "epsilon")
_PROBE = 3  # rows of the random input


def is_norm(module: nn.Module) -> bool:
    """Whether a module looks like an RMS norm with a weight."""
    return type(module).__name__.endswith(_NORMS) and norm_eps(module) is not None


def norm_eps(module: nn.Module) -> float | None:
    """What a norm adds to the mean square."""
    eps = next((e for e in (getattr(module, name, None) for name in _EPS) if e is not None), None)
    return float(eps) if isinstance(eps, float | int) else None


def norm_reason(module: nn.Module) -> str | None:
    """Why ``rms_norm`` is not what the module computes; None if it is."""
    weight, eps = getattr(module, "weight", None), norm_eps(module) or 0.0
    if not isinstance(weight, Tensor) or weight.ndim != 1:
        return "no weight"
    if getattr(module, "bias", None) is not None:
        return "has a bias"
    if "forward" in module.__dict__:
        return "its forward is replaced already"
    if weight.dtype not in DTYPES or weight.device.type == "meta":
        return f"weight in {weight.dtype} on {weight.device}"
    x = _random(weight, _PROBE, len(weight))
    exact = reference.rms_norm(x.double(), weight.detach().double(), eps, None)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        theirs = type(module).forward(module, x)
    if not isinstance(theirs, Tensor) or not difference(theirs, exact) <= _far(x, exact):
        return "computes something else on a random input"
    return None


def mlp_reason(module: nn.Module) -> str | None:
    """Why ``swiglu`` between two matrix products is not what the module computes; None if it is."""
    gate, up, down = (getattr(module, f"{name}_proj") for name in ("gate", "up", "down"))
    for part in (gate, up, down):
        if type(part) is not nn.Linear or "forward" in part.__dict__ or _hooked(part):
            return "its projections are no plain Linear"
    if "forward" in module.__dict__:
        return "its forward is replaced already"
    if gate.weight.shape != up.weight.shape:
        return "gate and up differ in shape"
    if gate.weight.dtype not in DTYPES or gate.weight.device.type == "meta":
        return f"weights in {gate.weight.dtype} on {gate.weight.device}"
    x = _random(gate.weight, _PROBE, gate.in_features)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        act = getattr(module, "act_fn", None)
        if not callable(act) or not difference(act(x), F.silu(x.double())) <= _far(x, x):
            return "its activation is not SiLU"
        theirs, ours = type(module).forward(module, x), _mlp(module, x, None)
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
        return "returns something else than a tensor like ours"
    # The same products of the same matrices: what differs is how SiLU is rounded.
    if not (theirs - ours).double().norm() <= 16 * _eps(x) * theirs.double().norm():
        return "computes something else on a random input"
    return None


def is_mlp(module: nn.Module) -> bool:
    """Whether a module looks like a gated feed-forward layer."""
    names = ("gate_proj", "up_proj", "down_proj")
    return type(module).__name__.endswith("MLP") and all(
        isinstance(getattr(module, name, None), nn.Module) for name in names
    )


def _random(like: Tensor, rows: int, width: int) -> Tensor:
    """The same numbers for every module; the global generators are left alone."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, rows, width, generator=generator, dtype=torch.float64)
    return x.to(like.device, like.dtype)


def _eps(x: Tensor) -> float:
    return torch.finfo(x.dtype).eps


def _far(x: Tensor, values: Tensor) -> float:
    """Some roundings of the largest value: modules that compute something else are further off."""
    return 8 * _eps(x) * values.abs().max().item()


def norm_forward(name: str, module: nn.Module, options: Options) -> Callable[..., Any]:
    """The ``forward`` that replaces a norm's."""
    original, eps = module.forward, norm_eps(module) or 0.0
    check = Check(name) if options.self_check else None

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        weight = self.weight
        plain = not args and not kwargs and isinstance(weight, Tensor)
        if not plain or not options.takes("rms_norm", x, weight):
            return original(x, *args, **kwargs)
        y = ops.rms_norm(x, weight, eps, backend=options.backend)
        if check is not None and not check.done:
            wide = reference.rms_norm(x.double(), weight.double(), eps, None)
            check(y, original(x), wide)
        return y

    return forward


def mlp_forward(name: str, module: nn.Module, options: Options) -> Callable[..., Any]:
    """The ``forward`` that replaces a gated feed-forward layer's."""
    original, check = module.forward, Check(name) if options.self_check else None

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        # A compiler fuses the gate itself, and knows no product written into part of a tensor.
        plain = not args and not kwargs and not torch.compiler.is_compiling()
        parts = (self.gate_proj, self.up_proj)
        plain = plain and all(type(p) is nn.Linear and not _hooked(p) for p in parts)
        if not plain or not options.takes("swiglu", x, parts[0].weight):
            return original(x, *args, **kwargs)
        y = _mlp(self, x, options.backend)
        if check is not None and not check.done:
            check(y, original(x), _wide_mlp(self, x))
        return y

    return forward


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _mlp(module: Any, x: Tensor, backend: str | None) -> Tensor:
    """Both products write one tensor, side by side: no weight is fused, nothing is copied."""
    gate, up = module.gate_proj, module.up_proj
    rows = x.reshape(-1, x.shape[-1])
    both = rows.new_empty(len(rows), 2 * gate.out_features)
    for part, out in zip((gate, up), both.chunk(2, -1), strict=True):
        if part.bias is None:
            torch.mm(rows, part.weight.t(), out=out)
        else:
            torch.addmm(part.bias, rows, part.weight.t(), out=out)
    y = ops.swiglu(both, backend="torch" if backend is None else backend)
    return module.down_proj(y.view(*x.shape[:-1], -1))


def _wide_mlp(module: Any, x: Tensor) -> Tensor:
    def linear(part: nn.Linear, y: Tensor) -> Tensor:
        return F.linear(y, part.weight.double(), None if part.bias is None else part.bias.double())

    wide = x.double()
    y = F.silu(linear(module.gate_proj, wide)) * linear(module.up_proj, wide)
    return linear(module.down_proj, y)
