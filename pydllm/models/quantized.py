"""Linear layers with 8-bit weights: quantised while loading, or read from quantised checkpoints.

The projections of the transformer's layers alone; norms, embedding and head keep their dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from pydllm._backend.errors import CheckpointError
from pydllm.models.checkpoint import Shards
from pydllm.models.config import Config
from pydllm.models.partition import Partition
from pydllm.models.weights import Found, Index, Slot, Updates
from pydllm.ops import QuantizedWeight, quantize
from pydllm.reference.linear import SCALE_BLOCK

KINDS = ("fp8", "int8")  # of load(weights=)
_LINEAR = ("qkv", "out", "gate_up", "down")
_STORED = {"F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8}
_FORMATS = ("float-quantized", "int-quantized", "naive-quantized")
_IGNORED = (".input_scale", ".k_scale", ".v_scale")  # activations and caches stay unquantised


def check_scheme(config: Config) -> None:
    """Refuse quantised checkpoints of another kind than the two that are read.

    They are block-wise FP8 (``quant_method`` "fp8", blocks of 128 x 128) and compressed-tensors
    with 8-bit symmetric weights, one scale per channel, tensor or block of 128 x 128. What they
    say about activations is not followed: those keep their dtype.
    """
    if config.get("quantization_config") is None:
        return
    section = config.section("quantization_config")
    method = section.get("quant_method")
    if method == "fp8":
        if section.get("weight_block_size") not in ([SCALE_BLOCK] * 2, None):
            raise section.wrong("weight_block_size", f"[{SCALE_BLOCK}, {SCALE_BLOCK}]")
    elif method == "compressed-tensors":
        section.only("format", *_FORMATS)
        groups = section.get("config_groups")
        if not isinstance(groups, Mapping):
            raise section.wrong("config_groups", "an object")
        for name in groups:
            weights = section.section("config_groups").section(name).section("weights")
            weights.only("num_bits", 8)
            weights.only("type", "float", "int")
            weights.only("symmetric", True)
            weights.only("strategy", "channel", "tensor", "block")
            weights.only("block_structure", [SCALE_BLOCK] * 2)
    else:
        raise section.wrong("quant_method", "'fp8' or 'compressed-tensors'")


def split_scales(found: Mapping[str, Found]) -> tuple[dict[str, Found], dict[str, str]]:
    """What a checkpoint would hold unquantised, and the scale of each quantised tensor by name."""
    scales = {}
    for name, tensor in found.items():
        if tensor.dtype not in _STORED:
            continue
        keys = (f"{name}_scale_inv", f"{name}_scale")
        scale = next((key for key in keys if key in found), None)
        if scale is not None:  # without one it is refused later, by its dtype
            scales[name] = scale
    known = {*scales.values(), *(f"{name}_shape" for name in scales)}
    dense = {
        name: Found(tensor.shape, torch.float32) if name in scales else tensor
        for name, tensor in found.items()
        if name not in known and not name.endswith(_IGNORED)
    }
    return dense, scales


def load_quantized(
    shards: Shards,
    wanted: Sequence[Slot],
    scales: Mapping[str, str],
    kind: str | None,
    device: torch.device,
    partition: Partition | None,
    updates: Updates | None,
    experts: int | None = None,
) -> dict[str, QuantizedWeight]:
    """The linear layers with 8-bit weights: those that are stored so, and with ``kind`` all.

    One layer at a time: nothing else of the model is in memory twice. Each of the ``experts`` that
    a slot has one after the other is a matrix of its own: ``(experts, N, K)``.
    """
    loaded = {}
    for slot in wanted:
        stored = [name for name, _ in slot.sources if name in scales]
        if stored:
            _check_stored(slot, stored, updates)
            small = _read(shards, slot, scales, device, partition)
            loaded[slot.name] = _each_expert(small, experts) if slot.of_experts else small
        elif kind is not None and slot.name.rpartition(".")[2] in _LINEAR:
            whole = shards.load([slot], device, torch.float32, partition, updates)[slot.name]
            if slot.of_experts and experts is not None:
                whole = whole.view(experts, -1, whole.shape[1])
            try:
                loaded[slot.name] = quantize(whole, kind)
            except ValueError as error:
                raise CheckpointError(f"{slot.sources[0][0]}: {error}") from error
    return loaded


def _each_expert(stacked: QuantizedWeight, experts: int | None) -> QuantizedWeight:
    """One matrix for each expert from those that were read one below the other."""
    values, scale = stacked.values.view(torch.uint8), stacked.scale
    values = values.view(experts or 1, -1, values.shape[1]).view(stacked.values.dtype)
    return QuantizedWeight(values, scale.view(experts or 1, -1, *scale.shape[1:]))


def _check_stored(slot: Slot, stored: Sequence[str], updates: Updates | None) -> None:
    if slot.name.rpartition(".")[2] not in _LINEAR:
        raise CheckpointError(
            f"{stored[0]}: expected fp32, fp16, bf16 or fp64, found 8 bits: of quantised weights, "
            "those of attention, MLP and experts are supported"
        )
    for name, _ in slot.sources:
        if name not in stored:
            raise CheckpointError(f"{name}: expected 8 bits as {stored[0]}, found none")
        if updates and name in updates:
            raise CheckpointError(f"{name}: expected a dense weight to merge an adapter into")


def _read(
    shards: Shards,
    slot: Slot,
    scales: Mapping[str, str],
    device: torch.device,
    partition: Partition | None,
) -> QuantizedWeight:
    indices = slot.index if partition is None else partition.index(slot)
    parts = list(_parts(shards, slot, scales, indices or ()))
    if len({(values.dtype, scale.ndim) for values, scale in parts}) > 1:
        names = ", ".join(name for name, _ in slot.sources)
        raise CheckpointError(f"{names}: expected one dtype and one kind of scale, found several")
    if parts[0][1].ndim == 2:
        for (name, _), (values, _) in zip(slot.sources[:-1], parts, strict=False):
            if values.shape[0] % SCALE_BLOCK:
                raise CheckpointError(
                    f"{name}: expected a multiple of {SCALE_BLOCK} rows before other rows in one "
                    f"matrix, since a scale is that of {SCALE_BLOCK}, found {values.shape[0]}"
                )
    # Bytes are joined and copied: not every device does it for e4m3.
    values = torch.cat([values.view(torch.uint8) for values, _ in parts]).to(device)
    scale = torch.cat([scale for _, scale in parts]).to(device)
    return QuantizedWeight(values.view(parts[0][0].dtype), scale)


def _parts(
    shards: Shards, slot: Slot, scales: Mapping[str, str], indices: Sequence[Index]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Values and scales of each source: ``(N,)``, or blocks."""
    for (name, shape), index in zip(slot.sources, indices, strict=True):
        values = shards.tensor(name)[index].contiguous()
        if values.dtype == torch.float8_e4m3fn and bool(values.isnan().any()):
            raise CheckpointError(f"{name}: expected numbers, found NaN")
        key = scales[name]
        scale = shards.tensor(key).float()
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise CheckpointError(f"{key}: expected finite positive numbers, found others")
        rows, columns = (slice(*part.indices(n)) for part, n in zip(index, shape, strict=True))
        blocks = tuple(-(-n // SCALE_BLOCK) for n in shape)
        if tuple(scale.shape) == blocks and values.dtype == torch.float8_e4m3fn:
            yield values, scale[_blocks(name, rows, shape[0]), _blocks(name, columns, shape[1])]
        elif scale.numel() == 1:
            yield values, scale.reshape(1).expand(values.shape[0])
        elif tuple(scale.shape) in ((shape[0],), (shape[0], 1)):
            yield values, scale.reshape(-1)[rows]
        else:
            raise CheckpointError(
                f"{key}: expected one scale, {shape[0]} or, for FP8, {blocks} (blocks of "
                f"{SCALE_BLOCK} x {SCALE_BLOCK}), found {tuple(scale.shape)}"
            )


def _blocks(name: str, part: slice, size: int) -> slice:
    """The blocks of rows or columns that a process takes."""
    if part.start % SCALE_BLOCK or (part.stop % SCALE_BLOCK and part.stop != size):
        raise CheckpointError(
            f"{name}: expected processes to take multiples of {SCALE_BLOCK} rows and columns, "
            f"since a scale is that of {SCALE_BLOCK}, got {part.start} to {part.stop}"
        )
    return slice(part.start // SCALE_BLOCK, -(-part.stop // SCALE_BLOCK))
