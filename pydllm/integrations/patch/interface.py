"""transformers' ``AttentionInterface``: one registered name, and a configuration that says it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pydllm._backend.signatures import check_called, check_replaced
from pydllm.integrations.patch.attention import Attention
from pydllm.integrations.patch.hooks import TABLE, code_names

NAME = "pydllm"
ATTRIBUTE = "_pydllm_attention"  # of a patched module
# transformers' sdpa_attention_forward; position_bias came with 5.18.
_SDPA = {
    "4.57": "module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs",
    "5.18": "module, query, key, value, attention_mask, dropout, scaling, is_causal, "
    "position_bias, **kwargs",
}
# Arguments with which a call asks for more than attention.
_OTHER = ("softcap", "position_bias", "cache", "s_aux", "head_mask", "block_table")


def uses_interface(module: nn.Module) -> bool:
    """Whether the module asks ``config._attn_implementation`` which attention to call."""
    names = code_names(type(module).forward)
    return TABLE in names and "_attn_implementation" in names and hasattr(module, "config")


def attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """The registered function: that of "sdpa", with the op where the module was patched."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attention = getattr(module, ATTRIBUTE, None)
    return attend_with(attention, ALL_ATTENTION_FUNCTIONS["sdpa"], module, *args, **kwargs)


def attend_with(
    attention: Attention | None,
    sdpa: Callable[..., tuple[Tensor, Tensor | None]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """A call of transformers' interface, ``(B, H, T, D)`` in and ``(B, T, H, D)`` out.

    ``sliding_window`` is a hint: what is hidden, the mask hides. DiffusionGemma's decoder passes it
    although its keys are cut already and the canvas sees all of itself.

    Args:
        sdpa: what is called where the op is not.
    """

    def original() -> tuple[Tensor, Tensor | None]:
        given = kwargs if is_causal is None else {**kwargs, "is_causal": is_causal}
        states = (query, key, value, attention_mask)
        return sdpa(module, *states, dropout=dropout, scaling=scaling, **given)

    mask, more = attention_mask, any(kwargs.get(name) is not None for name in _OTHER)
    known = mask is None or isinstance(mask, Tensor)
    if attention is None:
        return original()
    if dropout or more or not known or key.ndim != 4:
        attention.leave("dropout" if dropout else "arguments of its own")
        return original()
    if mask is not None and mask.ndim == 4 and mask.shape[3] > key.shape[2]:
        mask = mask[..., : key.shape[2]]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    out = attention(
        lambda: original()[0].transpose(1, 2),
        query,
        key,
        value,
        mask,
        causal=query.shape[2] > 1 and mask is None and bool(causal),
        scale=scaling,
        window=kwargs.get("sliding_window"),
    )
    return out.transpose(1, 2).contiguous(), None


def register() -> None:
    """Give transformers the function and its masks, those of "sdpa", under ``NAME``."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    for interface in (AttentionInterface, AttentionMaskInterface):
        check_called("transformers", interface.register, "key, value")
    check_replaced("transformers", AttentionInterface()["sdpa"], _SDPA)
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def renamed(config: Any, known: dict[int, Any]) -> Any:
    """``config`` as it is but for ``_attn_implementation``: another view of the same attributes.

    Writing to either shows in both; the model that shares ``config`` is not affected. One view a
    configuration, kept in ``known``.
    """
    if id(config) not in known:
        kind = type(config)

        def reduce(self: Any, protocol: Any = None) -> Any:
            return config.__reduce_ex__(2 if protocol is None else protocol)

        body = {
            "_attn_implementation": property(
                lambda self: NAME,
                lambda self, value: setattr(config, "_attn_implementation", value),
            ),
            "__reduce_ex__": reduce,
            "__module__": kind.__module__,
            "__doc__": kind.__doc__,
        }
        view: Any = object.__new__(type(kind.__name__, (kind,), body))
        object.__setattr__(view, "__dict__", config.__dict__)
        known[id(config)] = view
    return known[id(config)]
