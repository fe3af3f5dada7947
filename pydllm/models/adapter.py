"""LoRA adapters of PEFT: read from a folder or found in a module, merged into the weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pydllm._backend.errors import CheckpointError
from pydllm.models.checkpoint import open_safetensors, read_object
from pydllm.models.config import Config
from pydllm.models.families import Shape
from pydllm.models.partition import Partition
from pydllm.models.weights import FLOATS, Index, Slot

CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.[^.]+)?\.weight")
# What changes the adapter's meaning and is not computed here, with the value that leaves it off.
_OFF: dict[str, Any] = {
    "use_dora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "use_qalora": False,
    "bias": "none",
}
_MERGE = "PEFT's merge_and_unload() makes of it a model that loads"
_ABSENT = ("layer_replication", "alora_invocation_tokens", "trainable_token_indices")


@dataclass(frozen=True)
class LowRank:
    """An update ``scale * b @ a`` of a weight: ``a`` is ``(r, in)``, ``b`` is ``(out, r)``."""

    a: Tensor
    b: Tensor
    scale: float

    def merged(self, weight: Tensor, index: Index, dtype: torch.dtype) -> Tensor:
        """The part ``index`` of the sum, where ``weight`` is that part of the base's.

        Computed in fp32 (fp64 for an fp64 model), to be rounded once.
        """
        wide = torch.promote_types(torch.promote_types(weight.dtype, dtype), torch.float32)
        delta = self.b[index[0]].to(wide) @ self.a[:, index[1]].to(wide)
        return weight.to(wide) + (delta * self.scale).to(weight.device)


@dataclass(frozen=True)
class Replaced:
    """A weight that was trained whole (``modules_to_save``)."""

    weight: Tensor

    def merged(self, weight: Tensor, index: Index, dtype: torch.dtype) -> Tensor:
        return self.weight[index]


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").exists()


def _check_plain(config: Config) -> None:
    """Refuse what is not a LoRA that is added to the weights as they are."""
    config.only("peft_type", "LORA", way_out=_MERGE)
    for key, off in _OFF.items():
        config.only(key, off, way_out=_MERGE)
    for key in _ABSENT:
        if config.get(key):
            raise config.unsupported(key, "none", _MERGE)
    # The others take their start out of the base's weights, which then are others.
    config.only("init_lora_weights", True, False, "gaussian", "orthogonal", way_out=_MERGE)


def base_of(folder: Path) -> tuple[str, str | None]:
    """The model that an adapter was trained on and its revision, as its configuration names them.

    A directory has no revision.
    """
    config = read_object(folder, CONFIG)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise config.wrong(
            "base_model_name_or_path", "the adapter's model, or load(model, adapter=folder)"
        )
    revision = config.get("revision")
    if revision is not None and not isinstance(revision, str):
        raise config.wrong("revision", "the name of a revision of the adapter's model")
    return base, None if Path(base).is_dir() else revision


def read_adapter(folder: Path, shapes: Mapping[str, Shape]) -> dict[str, LowRank | Replaced]:
    """The updates of an adapter folder by the name of the weight.

    Args:
        shapes: of every weight of the base model.

    Raises:
        CheckpointError: not a plain LoRA, or one of another model.
    """
    config = read_object(folder, CONFIG)
    _check_plain(config)
    path = folder / _WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{path}: expected the adapter's weights, found no such file")
    factors: dict[str, dict[str, Tensor]] = {}
    updates: dict[str, LowRank | Replaced] = {}
    with open_safetensors(path) as file:
        for key in sorted(file.keys()):
            found = _FACTOR.fullmatch(key)
            path_of = found.group(1) if found else key.removesuffix(".weight")
            name = _weight_name(path_of, shapes)
            if name is None or not (found or key.endswith(".weight")):
                raise CheckpointError(f"{path}: found {key}, which is of no weight of the model")
            tensor = file.get_tensor(key)
            if tensor.dtype not in FLOATS:
                raise CheckpointError(f"{path}: {key}: expected floats, found {tensor.dtype}")
            if found:
                factors.setdefault(name, {})[found.group(2)] = tensor
                continue
            if tuple(tensor.shape) != shapes[name]:
                raise CheckpointError(
                    f"{path}: {key}: expected {shapes[name]}, found {tuple(tensor.shape)}"
                )
            updates[name] = Replaced(tensor)
    for name, pair in factors.items():
        rank, scale = _scale(config, name.removesuffix(".weight"))
        updates[name] = LowRank(*_checked(path, name, pair, rank, shapes[name]), scale)
    if not updates:
        raise CheckpointError(f"{path}: expected lora_A and lora_B of some weights, found none")
    return updates


def _weight_name(path: str, shapes: Mapping[str, Shape]) -> str | None:
    """The base's weight that a path of the adapter means, whatever PEFT put before it."""
    parts = path.split(".")
    for first in range(len(parts)):
        name = ".".join(parts[first:]) + ".weight"
        if name in shapes:
            return name
    ends = [name for name in shapes if name.endswith(f".{path}.weight")]
    return ends[0] if len(ends) == 1 else None


def _scale(config: Config, module: str) -> tuple[int, float]:
    """Rank and scale of a module's update. PEFT's patterns are regular expressions; names alone,
    whole or the end of one, are read here: an expression of a stranger may never end.
    """
    values = {}
    for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        values[key] = config.number(key)
        patterns = config.section(pattern)
        for expression in sorted(patterns.keys()):
            name = expression.removeprefix("^")
            if not re.fullmatch(r"[\w.-]+", name):
                raise patterns.wrong(expression, "a module's name (patterns are not supported)")
            if module == name or (name == expression and module.endswith(f".{name}")):
                values[key] = patterns.number(expression)
    rank = values["r"]
    divisor = math.sqrt(rank) if config.flag("use_rslora") else rank
    return int(rank), values["lora_alpha"] / divisor


def _checked(
    path: Path, name: str, pair: Mapping[str, Tensor], rank: int, shape: Shape
) -> tuple[Tensor, Tensor]:
    if set(pair) != {"A", "B"}:
        raise CheckpointError(f"{path}: {name}: expected lora_A and lora_B, found {min(pair)}")
    a, b = pair["A"], pair["B"]
    for factor, tensor, expected in (("A", a, (rank, shape[1])), ("B", b, (shape[0], rank))):
        if len(shape) != 2 or tuple(tensor.shape) != expected:
            raise CheckpointError(
                f"{path}: {name}: lora_{factor}: expected {expected}, found {tuple(tensor.shape)}"
            )
    return a, b


def kept_beside(
    updates: Mapping[str, LowRank | Replaced],
    wanted: Sequence[Slot],
    device: torch.device,
    dtype: torch.dtype,
    partition: Partition | None,
) -> dict[str, Tensor]:
    """Tensors of the transformer that hold an adapter of attention outputs, scaled.

    ``layers.N.out_lora_a`` is ``(r, in)`` and ``layers.N.out_lora_b`` ``(hidden, r)``.

    Raises:
        CheckpointError: the adapter updates another weight.
    """
    kept, left = {}, dict(updates)
    for slot in wanted:
        if not slot.name.endswith(".out") or slot.sources[0][0] not in left:
            continue
        update = left.pop(slot.sources[0][0])
        index = slot.index if partition is None else partition.index(slot)
        if isinstance(update, LowRank) and index is not None:
            a, b = update.a[:, index[0][1]], update.b.double() * update.scale
            for name, tensor in (("a", a), ("b", b)):
                kept[f"{slot.name}_lora_{name}"] = tensor.to(device, dtype).contiguous()
    if left:
        raise CheckpointError(
            f"{min(left)}: expected a draft adapter of attention outputs alone, found an update"
        )
    return kept


def peft_layers(module: nn.Module) -> bool:
    """Whether PEFT wrapped some of a module's layers."""
    return any(hasattr(sub, "base_layer") for sub in module.modules())


def unwrapped(module: nn.Module) -> nn.Module:
    """The model inside a ``PeftModel``."""
    return module.get_base_model() if hasattr(module, "get_base_model") else module  # type: ignore[operator]


def merged_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's state as if its active LoRA adapters were merged; the module stays as it is.

    Raises:
        CheckpointError: an adapter of another kind; says how to merge it.
    """
    state = dict(module.state_dict(keep_vars=True))
    for name, layer in [*module.named_modules()]:
        if hasattr(layer, "base_layer"):
            for key in [key for key in state if key.startswith(f"{name}.")]:
                tensor = state.pop(key)
                inner = key.removeprefix(f"{name}.base_layer.")
                if inner != key:
                    state[f"{name}.{inner}"] = tensor
            weight = f"{name}.weight"
            for update in _active(name, layer):
                whole = (slice(None), slice(None))
                base = state[weight].detach()
                state[weight] = update.merged(base, whole, base.dtype).to(base.dtype)
        elif hasattr(layer, "original_module"):  # modules_to_save
            for key in [key for key in state if key.startswith(f"{name}.")]:
                tensor = state.pop(key)
                inner = re.sub(r"^modules_to_save\.[^.]+\.", "", key.removeprefix(f"{name}."))
                active = f"{name}.modules_to_save.{_one(layer.active_adapter)}."
                if key.startswith(active):
                    state[f"{name}.{inner}"] = tensor
    return state


def _one(adapters: Any) -> str:
    return adapters if isinstance(adapters, str) else adapters[0]


def _active(name: str, layer: Any) -> Iterator[LowRank]:
    if not hasattr(layer, "lora_A"):
        raise CheckpointError(
            f"{name}: expected a LoRA of PEFT, found {type(layer).__name__}: "
            "load(module.merge_and_unload()) loads it merged"
        )
    if layer.disable_adapters:
        return
    for adapter in layer.active_adapters:
        if adapter in layer.merged_adapters or adapter not in layer.lora_A:
            continue
        if layer.use_dora.get(adapter) or layer.fan_in_fan_out:
            raise CheckpointError(
                f"{name}: expected a plain LoRA, found a variant of it: "
                "load(module.merge_and_unload()) loads it merged"
            )
        a, b = (factors[adapter].weight.detach() for factors in (layer.lora_A, layer.lora_B))
        yield LowRank(a, b, layer.scaling[adapter])
