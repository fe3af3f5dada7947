"""A model that shares the parameters of a loaded module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pydllm._backend.errors import CheckpointError
from pydllm.models.adapter import merged_state, peft_layers, unwrapped
from pydllm.models.config import Config
from pydllm.models.families import find_family
from pydllm.models.hooked import check_unhooked
from pydllm.models.layouts import read_layout
from pydllm.models.native import NativeModel
from pydllm.models.overrides import Overrides, make_spec
from pydllm.models.parity import warn_of_damage
from pydllm.models.weights import Found, check_tensors, check_tied, share, slots

_PATCH = "pydllm.patch(module) speeds it up as it stands"


def load_module(
    module: nn.Module,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    overrides: Overrides,
) -> NativeModel:
    """As ``load`` of a module. One with LoRA layers of PEFT is merged into weights of its own."""
    module = unwrapped(module)
    name = type(module).__name__
    check_unhooked(module)
    config = _module_config(module)
    family = find_family(config, *(kind.__name__ for kind in type(module).__mro__))
    sizes = family.sizes(config, family)
    generation = _module_config(module, "generation_config", required=False)
    spec = make_spec(config, family, sizes, generation=generation, overrides=overrides)
    wanted = list(slots(family.names, sizes))
    adapted = peft_layers(module)
    state = merged_state(module) if adapted else module.state_dict(keep_vars=True)
    _check_plain(name, state)
    found = {key: Found(tuple(value.shape), value.dtype) for key, value in state.items()}
    fused_in: dict[str, Tensor] = {}
    if sizes.moe is not None:
        found, parts = read_layout(found, family.names, sizes, name)
        fused_in = {key: state[part.stored] for key, part in parts.items()}
        state = {key: parts[key].of(fused_in[key]) if key in parts else state[key] for key in found}
    check_tensors(wanted, found, family.names, name)
    embedding, head = f"{family.names.embedding}.weight", f"{family.names.head}.weight"
    like = state[embedding]
    dtypes = {key: slot.dtype(like.dtype) for slot in wanted for key, _ in slot.sources}
    for key, wide in dtypes.items():
        tensor = state[key]
        if tensor.device != like.device or tensor.dtype not in (like.dtype, wide):
            raise CheckpointError(
                f"{name}: {key}: expected {like.dtype} on {like.device} as {embedding} is, "
                f"found {tensor.dtype} on {tensor.device}"
            )
    if sizes.tied and head in state:
        check_tied(config.where, head, like, state[head])
    if dtype not in (None, like.dtype):
        raise ValueError(f"dtype: expected {like.dtype}, that of the shared module, got {dtype}")
    if device is not None and not _same_device(torch.device(device), like.device):
        raise ValueError(f"device: expected {like.device}, that of the shared module, got {device}")
    if adapted:
        weights = {
            slot.name: torch.cat([state[key].detach() for key, _ in slot.sources])
            for slot in wanted
        }
        return NativeModel(spec, sizes, weights, None)
    warn_of_damage(module, getattr(module, "config", None), family.names, sizes, wanted, state)
    return NativeModel(spec, sizes, share(wanted, state, fused_in), None)


def _check_plain(name: str, state: Mapping[str, Any]) -> None:
    """Refuse what is not a tensor in memory: quantised weights, meta tensors."""
    for key, value in state.items():
        kind = type(value)
        if kind in (Tensor, nn.Parameter) and not value.is_quantized:
            if value.device.type == "meta":
                raise CheckpointError(
                    f"{name}: {key}: expected a tensor in memory, found one on the meta device "
                    f"(offloaded, or never loaded); {_PATCH}"
                )
            continue
        found = f"{value.dtype}" if isinstance(value, Tensor) and kind is Tensor else kind.__name__
        raise CheckpointError(
            f"{name}: {key}: expected a plain tensor, found {found} "
            f"(quantised and distributed weights are not supported); {_PATCH}"
        )


def _module_config(module: nn.Module, name: str = "config", required: bool = True) -> Config:
    where = f"{type(module).__name__}.{name}"
    config: Any = getattr(module, name, None)
    if config is not None and hasattr(config, "to_dict"):
        config = config.to_dict()
    elif config is not None and not isinstance(config, Mapping):
        config = vars(config)
    if config is None and required:
        raise CheckpointError(f"{where}: expected the configuration of the model, found none")
    return Config(config or {}, where)


def _same_device(asked: torch.device, own: torch.device) -> bool:
    return asked.type == own.type and asked.index in (None, own.index)
