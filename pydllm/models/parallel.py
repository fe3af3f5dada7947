"""The native transformer spread over processes, one per device (tensor parallel).

All processes run the same program on the same prompts. Hidden states are equal on all of them,
weights and cache are parts: two sums of hidden states per layer and one after the embedding cross
the processes, and of the LM head a few numbers per row instead of logits. What decoding decides is
decided everywhere alike, since the statistics and the keyed noise are the same bits everywhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from pydllm import ops
from pydllm._backend.errors import PydllmError
from pydllm.models.layer import Layer
from pydllm.models.native import NativeModel
from pydllm.models.partition import Partition
from pydllm.models.spec import ModelSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def join_processes(size: int | None, device: torch.device) -> int:
    """The number of processes that hold a model, of which this is one.

    Uses the default process group, and makes it where ``torchrun`` started this process: NCCL for
    CUDA devices, gloo for CPUs.

    Args:
        size: how many there have to be; None: as many as there are.

    Raises:
        PydllmError: there are not ``size`` processes; says how to start them.
    """
    if not dist.is_available():
        if size in (None, 1):
            return 1
        raise PydllmError(f"tp: expected a torch with torch.distributed for {size} processes")
    if not dist.is_initialized() and dist.is_torchelastic_launched():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    running = dist.get_world_size() if dist.is_initialized() else 1
    if size not in (None, running):
        raise PydllmError(
            f"tp: expected {size} processes, got {running}: "
            f"start it with torchrun --nproc-per-node {size}"
        )
    return running


def is_first_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return not _running() or dist.get_rank() == 0


def wait_for_all_processes() -> None:
    if _running():
        dist.barrier()


def leave_processes() -> None:
    """End the default process group, at the end of a program."""
    if _running():
        dist.destroy_process_group()


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()


class ParallelModel(NativeModel):
    """A process's part of a model; implements ``Model``, whose calls every process has to make.

    Made by ``pydllm.load(..., tp=N)``.

    Attributes:
        partition: which part.
        calls, bytes: how many collectives this process took part in and what it gave to them, by
            kind: ``"embedding"``, ``"layers"``, ``"statistics"``, ``"logits"``. A captured graph
            counts once.
    """

    whole_products = False  # a process has a term of each sum

    def __init__(
        self,
        spec: ModelSpec,
        partition: Partition,
        weights: Mapping[str, Any],
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__(spec, partition.local, weights, tokenizer)
        self.partition = partition
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        # Rows past the vocabulary are padding, not tokens.
        rows = max(spec.vocab_size - partition.vocab_rows.start, 0)
        self._head = self._head[:rows]
        self._head_bias = None if self._head_bias is None else self._head_bias[:rows]

    def head(self, hidden: Tensor) -> Tensor:
        """Logits ``(..., vocab_size)``: gathered from all processes, so for few rows only."""
        logits = super().head(hidden)
        padding = self.partition.vocab_step - logits.shape[-1]
        parts = self._gather("logits", F.pad(logits, (0, padding)))
        return parts.movedim(0, -2).flatten(-2)[..., : self.spec.vocab_size]

    def head_stats(
        self, hidden: Tensor, rows: Tensor | None = None, **options: Any
    ) -> ops.VocabStats:
        """``ops.head_stats`` of the whole head, from each process's statistics of its own ids."""
        partial = ops.head_stats_partial(
            hidden,
            self._head,
            bias=self._head_bias,
            rows=rows,
            vocab_offset=self.partition.vocab_rows.start,
            batch_invariant=self.batch_invariant,
            **options,
        )
        values, ids = (field.squeeze(-1).T for field in ops.fold_stats(partial))
        # One collective: the bits of the floats travel as integers beside the ids.
        bits = values.contiguous().view(torch.int32)
        words = self._gather("statistics", torch.cat((bits, ids), 1))
        values = words[..., : bits.shape[1]].contiguous().view(values.dtype)
        ids = words[..., bits.shape[1] :]
        whole = (field.permute(2, 1, 0).contiguous() for field in (values, ids))
        return ops.merge_stats(ops.StatsPartial(*whole), backend=options.get("backend"))

    def _embed(self, ids: Tensor) -> Tensor:
        rows = self.partition.vocab_rows
        here = (ids >= rows.start) & (ids < rows.stop)
        own = (ids - rows.start).clamp_(0, rows.stop - rows.start - 1)
        found = F.embedding(own, self._embedding).masked_fill_(~here[..., None], 0)
        return self._sum("embedding", found)

    def deterministic(self) -> Self:
        """As ``NativeModel.deterministic``; for two processes, whose sums have one order.

        Raises:
            PydllmError: there are more: the order in which a collective adds is not ours.
        """
        if self.partition.size > 2:
            raise PydllmError(
                f"deterministic: expected at most 2 processes, got {self.partition.size}: a sum "
                "over more has an order that depends on its size"
            )
        return super().deterministic()

    def _project(
        self, layer: Layer, attended: Tensor, backend: str | None, adapter: Tensor | bool
    ) -> Tensor:
        own = attended[..., self.partition.own_values]
        return self._sum("layers", super()._project(layer, own, backend, adapter))

    def _mlp(self, layer: Layer, hidden: Tensor, window: dict) -> Tensor:
        whole = super()._mlp(layer, hidden, window)
        return whole if layer.experts is None else self._sum("layers", whole)

    def _contract(self, layer: Layer, inner: Tensor, backend: str | None) -> Tensor:
        return self._sum("layers", super()._contract(layer, inner, backend))

    def _sum(self, kind: str, term: Tensor) -> Tensor:
        """The sum of the processes' terms, in place."""
        self._count(kind, term)
        dist.all_reduce(term)
        return term

    def _gather(self, kind: str, part: Tensor) -> Tensor:
        """The parts of all processes, ``(size, *part.shape)``."""
        self._count(kind, part)
        whole = part.new_empty(self.partition.size, *part.shape)
        dist.all_gather(list(whole.unbind()), part.contiguous())
        return whole

    def _count(self, kind: str, payload: Tensor) -> None:
        self.calls[kind] += 1
        self.bytes[kind] += payload.nbytes
