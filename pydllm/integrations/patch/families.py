"""Which modules are recognised, and what is put into each."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn

from pydllm._backend.signatures import check_called
from pydllm.integrations.patch import experts, hooks, interface, layers
from pydllm.integrations.patch.attention import Attention, Options

SUPPORTED = """\
  LLaDALlamaBlock, LLaDASequentialBlock, LLaDABlockDiffBlock with a _scaled_dot_product_attention
  DreamSdpaAttention, SDARAttention, LLaDAMoESdpaAttention, Fast_dLLM_QwenAttention
  modules that call ALL_ATTENTION_FUNCTIONS by config._attn_implementation (transformers, A2D,
    LLaDA2, DiffusionGemma), loaded with attn_implementation="sdpa"
  other modules named *Attention that call scaled_dot_product_attention"""

_BLOCKS = ("LLaDALlamaBlock", "LLaDASequentialBlock", "LLaDABlockDiffBlock")
# Their forwards repeat keys for SDPA and for nothing else.
_REPEATING = (
    "DreamSdpaAttention",
    "SDARAttention",
    "LLaDAMoESdpaAttention",
    "Fast_dLLM_QwenAttention",
)
_CAST = "_cast_attn_bias"  # of a block: the mask in the dtype of its keys
_NO_FASTER = "on a CPU the torch backend is no faster"
_SDPA = "SDPA, grouped: keys and values are not repeated"
Change = tuple[nn.Module, str, Any]


@dataclass(frozen=True)
class Found:
    """A module that was recognised.

    Attributes:
        name: its path in the model.
        kind: its class.
        part: what of it: attention, RMS norm, gated feed-forward layer or experts.
        op: what computes that now; None where nothing changed.
        reason: how it is reached, or why it was left.
    """

    name: str
    kind: str
    part: str
    op: str | None
    reason: str


class _Layer(NamedTuple):
    """A layer whose ``forward`` is replaced: how it is told, and why it may be left."""

    part: str
    op: str
    looks: Callable[[nn.Module], bool]
    reason: Callable[[nn.Module], str | None]
    forward: Callable[[str, nn.Module, Options], Callable[..., Any]]


_LAYERS = (
    _Layer("RMS norm", "rms_norm", layers.is_norm, layers.norm_reason, layers.norm_forward),
    _Layer("gated feed-forward", "swiglu", layers.is_mlp, layers.mlp_reason, layers.mlp_forward),
    _Layer(
        "experts",
        "experts",
        experts.is_experts,
        experts.experts_reason,
        experts.experts_forward,
    ),
)


def changes(model: nn.Module, options: Options) -> Iterator[tuple[Found, list[Change]]]:
    """Everything that is recognised in a model, and the attributes to set for it."""
    views: dict[int, Any] = {}
    for name, module in model.named_modules():
        found = Found(name, type(module).__name__, "attention", None, "")
        if found.kind.endswith(_BLOCKS) and hasattr(module, f"_{hooks.SDPA}"):
            yield _block(found, module, options)
        elif found.kind.endswith("Attention") and interface.uses_interface(module):
            yield _interface(found, module, options, views)
        elif found.kind.endswith("Attention"):
            pair = _forward(found, module, options)
            if pair is not None:
                yield pair
        elif (layer := next((each for each in _LAYERS if each.looks(module)), None)) is not None:
            yield _layer(found, layer, module, options)


def _block(found: Found, module: nn.Module, options: Options) -> tuple[Found, list[Change]]:
    if getattr(module, "flash_attn_func", None) is not None:
        return replace(found, reason="calls flash_attn"), []
    reason = _no_groups(module, options)
    if reason is not None:
        return replace(found, reason=reason), []
    ours = hooks.method_of_block(module, _attention(found, module, options))
    wanted: list[Change] = [(module, f"_{hooks.SDPA}", ours)]
    if hasattr(module, _CAST):
        cast = getattr(module, _CAST)
        check_called(type(module).__module__, cast, "mask, dtype")
        wanted.append((module, _CAST, options.masks.cast_once(cast)))
    return replace(found, op=_op(options), reason="its method"), wanted


def _interface(
    found: Found, module: nn.Module, options: Options, views: dict[int, Any]
) -> tuple[Found, list[Change]]:
    config: Any = module.config
    chosen = config._attn_implementation
    if chosen not in ("sdpa", interface.NAME):
        return replace(found, reason=f"attn_implementation is {chosen!r}, not 'sdpa'"), []
    reason = _no_groups(module, options)
    if reason is not None:
        return replace(found, reason=reason), []
    interface.register()
    done = replace(found, op=_op(options), reason="transformers' AttentionInterface")
    return done, [
        (module, interface.ATTRIBUTE, _attention(found, module, options)),
        (module, "config", interface.renamed(config, views)),
    ]


def _forward(
    found: Found, module: nn.Module, options: Options
) -> tuple[Found, list[Change]] | None:
    """Modules that call SDPA themselves; None for those that are no attention of that kind."""
    if type(module).__module__.startswith("torch.") or not any(module.children()):
        return None
    if any(type(child).__name__.endswith("Attention") for child in module.children()):
        return None  # the inner one computes
    reason = _no_groups(module, options)
    if reason is not None:
        return replace(found, reason=reason), []
    repeats = found.kind.endswith(_REPEATING)
    if options.backend is None and not repeats:
        return replace(found, reason=f"{_NO_FASTER}: no repeated keys that are known of"), []
    attention = _attention(found, module, options)
    ours: types.MethodType | None = None
    if "forward" not in module.__dict__:
        table = functools.partial(interface.attend_with, attention)
        ours = hooks.rebound(module, attention, table, repeats=repeats)
    how = "its forward, with SDPA bound to the op"
    if ours is None:
        ours = hooks.scoped(module, attention, functools.partial(options.miss, found.name))
        how = "SDPA within its forward"
    return replace(found, op=_op(options), reason=how), [(module, "forward", ours)]


def _layer(
    found: Found, layer: _Layer, module: nn.Module, options: Options
) -> tuple[Found, list[Change]]:
    reason = _NO_FASTER if options.backend is None else layer.reason(module)
    if reason is not None:
        return replace(found, part=layer.part, reason=reason), []
    forward = layer.forward(found.name, module, options)
    done = replace(found, part=layer.part, op=layer.op, reason="its forward")
    return done, [(module, "forward", types.MethodType(forward, module))]


def _op(options: Options) -> str:
    return _SDPA if options.backend is None else "window_attention"


def _attention(found: Found, module: nn.Module, options: Options) -> Attention:
    config = getattr(module, "config", None)
    size = next((s for s in (getattr(config, k, None) for k in ("block_size", "bd_size")) if s), 0)
    return Attention(found.name, options, size if isinstance(size, int) and size > 1 else None)


def _no_groups(module: nn.Module, options: Options) -> str | None:
    """Why attention stays on a CPU's SDPA; None where the op is called or reads less."""
    if options.backend is not None:
        return None
    groups = getattr(module, "num_key_value_groups", None)
    if groups is None:
        q, k = (getattr(module, f"{name}_proj", None) for name in "qk")
        if not isinstance(q, nn.Linear) or not isinstance(k, nn.Linear):
            return None
        groups = q.out_features // max(k.out_features, 1)
    return None if groups != 1 else f"{_NO_FASTER}: as many KV heads as query heads"
