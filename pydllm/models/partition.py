"""Which part of every weight one of N processes holds (tensor and expert parallel).

Attention is spread over its heads, MLP and experts over their inner columns, embedding and LM head
over the vocabulary. With expert parallelism a process holds some experts whole instead. The
matrices that lead back to the hidden states (attention output, MLP down) hold columns, so that each
process has a term of a sum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pydllm.models.families import Shape, Sizes
from pydllm.models.weights import Index, Slot

# A number of the noise generator serves four ids, so a shard begins at a multiple of four.
_ID_STEP = 4


@dataclass(frozen=True)
class Partition:
    """The part that process ``rank`` of ``size`` has of a model of these sizes.

    Where there are more processes than heads, several compute the same head and each takes its
    share of the head's values to the output; where there are more than K/V heads, several store
    the same.

    Attributes:
        expert_parallel: whether a process holds ``E / size`` experts whole, instead of a part of
            each; the shared expert and dense layers are spread over their inner columns all the
            same.
    """

    rank: int
    size: int
    sizes: Sizes
    vocab: int
    expert_parallel: bool = False

    def __post_init__(self) -> None:
        sizes, size = self.sizes, self.size
        if size < 1 or not 0 <= self.rank < size:
            raise ValueError(f"rank: expected one of {size} processes, got {self.rank}")
        if sizes.heads % size and (size % sizes.heads or sizes.head_dim % (size // sizes.heads)):
            raise ValueError(
                f"tp: expected a number that divides the {sizes.heads} heads or splits each of "
                f"them ({sizes.head_dim} values) evenly, got {size}"
            )
        if sizes.kv_heads % size and size % sizes.kv_heads:
            raise ValueError(
                f"tp: expected a divisor or a multiple of the {sizes.kv_heads} key-value heads, "
                f"got {size}"
            )
        if self.expert_parallel and sizes.moe is not None and sizes.moe.experts % size:
            raise ValueError(
                f"expert_parallel: expected a divisor of the {sizes.moe.experts} experts, "
                f"got {size} processes"
            )
        for name, columns in self._inner():
            if columns % size:
                raise ValueError(
                    f"tp: expected a divisor of the {name}'s {columns} columns, got {size}"
                )
        if (size - 1) * self.vocab_step >= self.vocab:
            raise ValueError(
                f"tp: expected every process to get some of the {self.vocab} ids, {_ID_STEP} at a "
                f"time, got {size} processes"
            )

    def _inner(self) -> list[tuple[str, int]]:
        """The inner columns that are spread."""
        moe = self.sizes.moe
        dense = moe is None or not all(moe.sparse)
        inner = [("MLP", self.sizes.intermediate)] if dense else []
        if moe is not None:
            inner.append(("shared expert", moe.shared))
            if not self.expert_parallel:
                inner.append(("experts", moe.width))
        return inner

    @property
    def held(self) -> range | None:
        """The experts that this process holds; None: a part of each, or there are none."""
        if not self.expert_parallel or self.sizes.moe is None:
            return None
        share = self.sizes.moe.experts // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    @property
    def local(self) -> Sizes:
        """Sizes of the part."""
        sizes = self.sizes
        rows, moe = self.vocab_rows, sizes.moe
        if moe is not None:
            width = moe.width if self.expert_parallel else moe.width // self.size
            moe = replace(moe, width=width, shared=moe.shared // self.size, held=self.held)
        return replace(
            sizes,
            moe=moe,
            heads=max(sizes.heads // self.size, 1),
            kv_heads=max(sizes.kv_heads // self.size, 1),
            intermediate=sizes.intermediate // self.size,
            embeddings=rows.stop - rows.start,
        )

    @property
    def vocab_step(self) -> int:
        """Ids from one process's first to the next one's."""
        return -(-self.sizes.embeddings // (self.size * _ID_STEP)) * _ID_STEP

    @property
    def vocab_rows(self) -> slice:
        """The ids whose rows of embedding and head this process holds; the last may have fewer."""
        first = self.rank * self.vocab_step
        return slice(first, min(first + self.vocab_step, self.sizes.embeddings))

    @property
    def own_values(self) -> slice:
        """Which of the local heads' values this process takes to the output: all, or its share."""
        whole = self.local.heads * self.sizes.head_dim
        share = self.sizes.heads * self.sizes.head_dim // self.size
        first = self.rank * share % whole
        return slice(first, first + share)

    def own(self, slot: Slot) -> Slot:
        """The slot without the sources of experts that other processes hold."""
        held, moe = self.held, self.sizes.moe
        if held is None or moe is None or not slot.of_experts:
            return slot
        each = len(slot.sources) // moe.experts
        return replace(slot, sources=slot.sources[held.start * each : held.stop * each])

    def index(self, slot: Slot) -> tuple[Index, ...] | None:
        """What to take of each of a slot's sources; None: another process adds this bias.

        The slot is one that ``own`` returned.
        """
        name = slot.name.rpartition(".")[2]
        shapes = [shape for _, shape in slot.sources]
        if self.expert_parallel and slot.of_experts:
            return slot.index
        if name in ("out_bias", "down_bias"):
            return tuple(_all(shape) for shape in shapes) if self.rank == 0 else None
        if name in ("out", "down", "shared_down"):
            return tuple((slice(None), self._share(shape[1])) for shape in shapes)
        if name in ("embedding", "head", "head_bias"):
            rows = [self.vocab_rows] * len(shapes)
        elif name in ("gate_up", "gate_up_bias", "shared_gate_up"):
            rows = [self._share(shape[0]) for shape in shapes]
        elif name in ("qkv", "qkv_bias"):
            rows = [self._heads(n) for n in (self.sizes.heads, *[self.sizes.kv_heads] * 2)]
        else:  # norms, routers
            rows = [slice(None)] * len(shapes)
        return tuple((row, *_all(shape)[1:]) for row, shape in zip(rows, shapes, strict=True))

    def _share(self, count: int) -> slice:
        share = count // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def _heads(self, heads: int) -> slice:
        """Rows of the projection to this process's heads."""
        count, width = max(heads // self.size, 1), self.sizes.head_dim
        first = self.rank * heads // self.size
        return slice(first * width, (first + count) * width)


def _all(shape: Shape) -> Index:
    return (slice(None),) * len(shape)
