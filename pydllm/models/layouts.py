"""Stored layouts of mixtures of experts, read as one tensor for each expert and projection.

Experts are stored one by one, or fused: by LLaDA2's training code, by dInfer, by modules of
transformers 5, by MLX. A fused tensor is seen as parts by the names of the first layout, so that
nothing else knows of the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from pydllm._backend.errors import CheckpointError
from pydllm.models.families import Names, Shape, Sizes
from pydllm.models.weights import Found, Index

_PREFIXES = (("model.language_model.", "model."), ("model.lm_head.", "lm_head."))
_BIAS = ("mlp.gate.e_score_correction_bias", "mlp.gate.expert_bias")
_GATE, _UP, _DOWN = ("gate_proj",), ("up_proj",), ("down_proj",)
# Below a layer: the projections whose rows a tensor has, one after the other.
_FUSED = {
    "mlp.experts.gate_proj": _GATE,
    "mlp.experts.up_proj": _UP,
    "mlp.experts.down_proj": _DOWN,
    "mlp.w1": _GATE + _UP,
    "mlp.w2": _DOWN,
    "mlp.experts.w13_weight": _GATE + _UP,
    "mlp.experts.w2_weight": _DOWN,
    "mlp.experts.gate_up_proj": _GATE + _UP,
    "mlp.switch_mlp.gate_proj.weight": _GATE,
    "mlp.switch_mlp.up_proj.weight": _UP,
    "mlp.switch_mlp.down_proj.weight": _DOWN,
}
FUSED_QKV = "attention.query_key_value"


@dataclass(frozen=True)
class Part:
    """Rows of a stored tensor, of one expert where it has three dimensions."""

    stored: str
    expert: int | None
    rows: slice

    def index(self, index: Index) -> tuple[int | slice, ...]:
        """Where an index into the part is in what is stored."""
        first, count = self.rows.start, self.rows.stop - self.rows.start
        start, stop, _ = index[0].indices(count)
        rows = (slice(first + start, first + stop), *index[1:])
        return rows if self.expert is None else (self.expert, *rows)

    def of(self, tensor: Tensor) -> Tensor:
        """The part, a view."""
        whole = tensor.detach() if self.expert is None else tensor.detach()[self.expert]
        return whole[self.rows]


def read_layout(
    found: Mapping[str, Found], names: Names, sizes: Sizes, where: str
) -> tuple[dict[str, Found], dict[str, Part]]:
    """What a checkpoint has by the names of the first layout, and where the renamed parts are.

    Raises:
        CheckpointError: a fused tensor of another shape, or one tensor in two layouts.
    """
    seen: dict[str, Found] = {}
    parts: dict[str, Part] = {}
    for stored, entry in sorted(found.items()):  # a file lists its tensors in any order
        for name, part, shape in _parts(stored, entry.shape, names, sizes, where):
            if name in seen:
                before = parts[name].stored if name in parts else name
                raise CheckpointError(
                    f"{where}: {name}: expected one tensor, found {before} and {stored}"
                )
            seen[name] = Found(shape, entry.dtype)
            if part is not None:
                parts[name] = part
    return seen, parts


def _parts(
    stored: str, shape: Shape, names: Names, sizes: Sizes, where: str
) -> Iterator[tuple[str, Part | None, Shape]]:
    name = stored
    for prefix, plain in _PREFIXES:
        if name.startswith(prefix):
            name = plain + name.removeprefix(prefix)
    if name.endswith(_BIAS[0]):
        name = name.removesuffix(_BIAS[0]) + _BIAS[1]
    kind = next((kind for kind in _FUSED if name.endswith(f".{kind}")), None)
    moe = sizes.moe
    if kind is not None and moe is not None:
        source, projections = name.removesuffix(kind), _FUSED[kind]
        rows = sizes.hidden if projections == _DOWN else moe.width
        columns = moe.width if projections == _DOWN else sizes.hidden
        _check(where, stored, shape, (moe.experts, rows * len(projections), columns))
        for expert in range(moe.experts):
            for half, projection in enumerate(projections):
                part = Part(stored, expert, slice(half * rows, (half + 1) * rows))
                yield f"{source}mlp.experts.{expert}.{projection}.weight", part, (rows, columns)
        return
    if name.endswith(f"{FUSED_QKV}.weight") and FUSED_QKV in names.qkv[0]:
        q, kv = (count * sizes.head_dim for count in (sizes.heads, sizes.kv_heads))
        _check(where, stored, shape, (q + 2 * kv, sizes.hidden))
        source = name.removesuffix(f"{FUSED_QKV}.weight")
        first = 0
        for own, count in zip(names.qkv, (q, kv, kv), strict=True):
            part = Part(stored, None, slice(first, first + count))
            yield f"{source}{own}.weight", part, (count, sizes.hidden)
            first += count
        return
    renamed = name != stored and len(shape) > 0
    yield name, Part(stored, None, slice(0, shape[0])) if renamed else None, shape


def _check(where: str, stored: str, shape: Shape, expected: Shape) -> None:
    if shape != expected:
        raise CheckpointError(f"{where}: {stored}: expected shape {expected}, found {shape}")
