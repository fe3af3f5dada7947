"""The native transformer's tensors: what goes into each, and taking them from a loaded module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pydllm._backend.errors import CheckpointError
from pydllm.models.families import Names, Shape, Sizes
from pydllm.models.moe import expert_tensors

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Buffers that some checkpoints carry along; the tables are computed here.
_IGNORED = ("inv_freq", "v_head.weight", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
_SHOWN = 4
Index = tuple[slice, ...]


class Update(Protocol):
    """What an adapter does to a weight."""

    def merged(self, weight: Tensor, index: Index, dtype: torch.dtype) -> Tensor:
        """The part ``index`` of the weight with the update, not yet rounded to ``dtype``."""


Updates = Mapping[str, Update]


class Found(NamedTuple):
    """A tensor that a checkpoint has; the type of an unknown kind is the name the file gives it."""

    shape: Shape
    dtype: torch.dtype | str


@dataclass(frozen=True)
class Slot:
    """One tensor of the native transformer: the checkpoint's tensors stacked along dimension 0.

    A wide one is fp32, or fp64 in an fp64 model.
    """

    name: str
    sources: tuple[tuple[str, Shape], ...]
    wide: bool = False

    @property
    def shape(self) -> Shape:
        return (sum(shape[0] for _, shape in self.sources), *self.sources[0][1][1:])

    def dtype(self, model: torch.dtype) -> torch.dtype:
        """The tensor's dtype in a model of a dtype."""
        return torch.promote_types(model, torch.float32) if self.wide else model

    @property
    def of_experts(self) -> bool:
        """Whether the sources are those of one expert after the other."""
        return ".mlp.experts." in self.sources[0][0]

    @property
    def index(self) -> tuple[Index, ...]:
        """What to take of each source: all of it."""
        return tuple((slice(None),) * len(shape) for _, shape in self.sources)

    def views(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The part of ``tensor`` that belongs to each source."""
        rows = [shape[0] for _, shape in self.sources]
        names = [name for name, _ in self.sources]
        return zip(names, tensor.split(rows), strict=True)


def slots(names: Names, sizes: Sizes) -> Iterator[Slot]:
    """Every tensor of the transformer."""

    def linear(
        slot: str, sources: Sequence[str], rows: Sequence[int], columns: int, bias: bool
    ) -> Iterator[Slot]:
        pairs = list(zip(sources, rows, strict=True))
        yield Slot(slot, tuple((f"{name}.weight", (count, columns)) for name, count in pairs))
        if bias:
            yield Slot(f"{slot}_bias", tuple((f"{name}.bias", (count,)) for name, count in pairs))

    def norm(slot: str, source: str, width: int) -> Slot:
        return Slot(slot, ((f"{source}.weight", (width,)),))

    hidden, rows = sizes.hidden, sizes.embeddings
    q_rows, kv_rows = (count * sizes.head_dim for count in (sizes.heads, sizes.kv_heads))
    mlp = sizes.intermediate
    yield from linear("embedding", [names.embedding], [rows], hidden, False)
    for layer in range(sizes.layers):
        slot, source = f"layers.{layer}.", names.layer.format(layer)
        qkv = [source + name for name in names.qkv]
        yield norm(slot + "attn_norm", source + names.attn_norm, hidden)
        yield from linear(slot + "qkv", qkv, [q_rows, kv_rows, kv_rows], hidden, sizes.qkv_bias)
        if sizes.qk_norm:
            yield norm(slot + "q_norm", source + names.q_norm, sizes.head_dim)
            yield norm(slot + "k_norm", source + names.k_norm, sizes.head_dim)
        yield from linear(slot + "out", [source + names.out], [hidden], q_rows, sizes.out_bias)
        yield norm(slot + "mlp_norm", source + names.mlp_norm, hidden)
        if sizes.moe is not None and sizes.moe.sparse[layer]:
            for name, sources, wide in expert_tensors(source, hidden, sizes.moe):
                yield Slot(slot + name, sources, wide)
            continue
        gate_up = [source + name for name in names.gate_up]
        yield from linear(slot + "gate_up", gate_up, [mlp, mlp], hidden, sizes.mlp_bias)
        yield from linear(slot + "down", [source + names.down], [hidden], mlp, sizes.mlp_bias)
    yield norm("norm", names.norm, hidden)
    if not sizes.tied:
        yield from linear("head", [names.head], [rows], hidden, sizes.head_bias)


def check_tensors(
    wanted: Sequence[Slot], found: Mapping[str, Found], names: Names, where: str
) -> None:
    """Raise CheckpointError unless the checkpoint has the tensors, their shapes, and no others."""
    expected = {name: shape for slot in wanted for name, shape in slot.sources}
    missing = [name for name in expected if name not in found]
    if missing:
        shapes = [f"{name} {expected[name]}" for name in missing]
        raise CheckpointError(f"{where}: expected {_some(shapes)}, found no such tensor")
    wrong = [name for name, shape in expected.items() if found[name].shape != shape]
    if wrong:
        first = wrong[0]
        raise CheckpointError(
            f"{where}: {first}: expected shape {expected[first]}, found {found[first].shape}"
            + (f" (and {len(wrong) - 1} more of another shape)" if len(wrong) > 1 else "")
        )
    for name in expected:
        if found[name].dtype not in FLOATS:
            raise CheckpointError(
                f"{where}: {name}: expected fp32, fp16, bf16 or fp64, found {found[name].dtype}"
            )
    known = {*expected, f"{names.head}.weight"}  # a tied head may be stored all the same
    extra = [name for name in found if name not in known and not name.endswith(_IGNORED)]
    if extra:
        raise CheckpointError(f"{where}: found {_some(sorted(extra))}, which this model has not")


def _some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def share(
    wanted: Sequence[Slot], state: Mapping[str, Tensor], fused_in: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The transformer's tensors by name, in the memory of a module's parameters.

    What is fused is concatenated once, and the module's parameters become views of the result:
    memory does not double, the module computes as before, and both see later changes in place. A
    wide tensor of a module in another dtype is a copy.

    Args:
        state: the module's parameters, or parts of them, by the names of the slots' sources.
        fused_in: for such a part, the parameter that has it.
    """
    shared = {}
    for slot in wanted:
        parts = [state[name] for name, _ in slot.sources]
        fused = parts[0].detach() if len(parts) == 1 else _joined(parts)
        if fused is None:
            fused = torch.cat([part.detach() for part in parts])
            first: dict[int, list[Tensor]] = {}
            for part, (name, view) in zip(parts, slot.views(fused), strict=True):
                if name in fused_in:
                    first.setdefault(id(fused_in[name]), []).append(view)
                else:
                    part.data = view
            for parameter in {id(p): p for p in fused_in.values() if id(p) in first}.values():
                _spread(parameter, first[id(parameter)])
        shared[slot.name] = fused.to(slot.dtype(fused.dtype))
    return shared


def _spread(parameter: Tensor, views: Sequence[Tensor]) -> None:
    """Let a parameter of experts be those views, which are equally far from each other."""
    place = [view.storage_offset() for view in views]
    step = place[1] - place[0] if len(place) > 1 else views[0].numel()
    parameter.data = views[0].as_strided(
        (len(views), *views[0].shape), (step, *views[0].stride()), place[0]
    )


def _joined(parts: Sequence[Tensor]) -> Tensor | None:
    """The tensor whose consecutive rows the parts are, where a module has been shared before."""
    first, place = parts[0], parts[0].storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or not part.is_contiguous() or part.storage_offset() != place:
            return None
        place += part.numel()
    rows = sum(part.shape[0] for part in parts)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def check_tied(where: str, name: str, embedding: Tensor, head: Tensor) -> None:
    """A head that is stored although it is tied must be the embedding."""
    if head.data_ptr() == embedding.data_ptr():
        return
    if head.shape != embedding.shape or not torch.equal(head.to(embedding), embedding):
        raise CheckpointError(
            f"{where}: the head is tied to the embedding, found another matrix in {name}"
        )
