"""What a kind of step computes, how long its replays take, and the least that they could take."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.ops.timing import copy_rate, matmul_rate
from pydllm.decoding.graph import Graphs
from pydllm.models import NativeModel


@dataclass
class Rates:
    """What the machine does: bytes and operations a second, both measured."""

    copy: float
    matmul: float

    @classmethod
    def measure(cls, device: str, dtype: torch.dtype) -> Rates:
        return cls(copy_rate(device), matmul_rate(device, dtype))


@dataclass
class Work:
    """One forward of a step."""

    model: NativeModel
    batch: int
    rows: int  # whole batch
    seen: int  # slots of the cache that they see, whole batch


@dataclass
class Kind:
    """Steps of one kind: what they compute, and how long their replays took."""

    work: list[Work] = field(default_factory=list)
    heads: list[tuple[NativeModel, int]] = field(default_factory=list)  # rows of the LM head
    ms: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    launches: int = 0

    def floor(self, rates: Rates) -> tuple[float, str]:
        """Milliseconds, and what takes them."""
        moved = operations = 0
        for work in self.work:
            sizes, layers = work.model.sizes, parameters(work.model)[0]
            used = experts(work.model, work.rows)[1]
            slot = 2 * sizes.layers * sizes.kv_heads * sizes.head_dim
            moved += weight_bytes(work.model, work.rows)
            moved += work.model.dtype.itemsize * slot * (work.seen + work.rows)
            pairs = work.rows * (work.seen + work.rows) // work.batch
            operations += 2 * (layers + used) * work.rows
            operations += 4 * sizes.layers * sizes.heads * sizes.head_dim * pairs
        for model, rows in self.heads:
            head = parameters(model)[1]
            moved += model.dtype.itemsize * head
            operations += 2 * head * rows
        moving, computing = moved / rates.copy, operations / rates.matmul
        return 1e3 * max(moving, computing), "bytes" if moving > computing else "flops"


def parameters(model: NativeModel) -> tuple[int, int]:
    """Of the layers but for experts, and of the head; the embedding is looked up."""
    return sum(t.numel() for t in _every_row(model)), model._head.numel()


def _every_row(model: NativeModel) -> Iterator[Tensor]:
    """Tensors of the layers that every row goes through: all but the experts'."""
    for layer in model._layers:
        own = dict(vars(layer))
        if layer.experts is not None:
            own |= vars(layer.experts) | {"gate_up": None, "down": None}
        yield from (t for t in own.values() if isinstance(t, Tensor))


def weight_bytes(model: NativeModel, rows: int) -> float:
    """Bytes of weights that a forward reads, but for the head; a router may be fp32."""
    every = sum(t.nbytes for t in _every_row(model))
    return every + model.dtype.itemsize * experts(model, rows)[0]


def experts(model: NativeModel, rows: int) -> tuple[float, int]:
    """Parameters of the experts that a forward reads, and that a row takes part in.

    The former is what even and independent routes touch; where rows share experts it is less.
    """
    moe = model.sizes.moe
    if moe is None:
        return 0.0, 0
    one = 3 * moe.width * model.sizes.hidden * sum(moe.sparse)
    touched = moe.experts * (1 - (1 - moe.top_k / moe.experts) ** rows)
    return touched * one, moe.top_k * one


class Watch:
    """Notes what the steps of one kind of call compute, and times their replays one by one."""

    def __init__(self, graphs: Graphs, context: int, *models: NativeModel | None) -> None:
        self.kinds: dict[Hashable, Kind] = {}
        self._graphs, self._plain, self._context = graphs, graphs.run, context
        self._models = [model for model in models if model is not None]
        self._now: Kind | None = None

    def __enter__(self) -> Watch:
        # On these instances alone; captured anew, so that the steps' Python runs once more.
        self._graphs.steps.clear()
        self._graphs.run = self._run  # type: ignore[method-assign]
        for model in self._models:
            for name, noted in (("forward", self._forward), ("head_stats", self._head)):
                setattr(model, name, partial(noted, model, getattr(model, name)))
            model.head = partial(self._head, model, model.head)  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        del self._graphs.run
        for model in self._models:
            del model.forward, model.head_stats, model.head

    def _run(self, key: Hashable, step: Callable[[], Any]) -> Any:
        kind, replays = self.kinds.setdefault(key, Kind()), key in self._graphs.steps
        self._now = None if replays else kind
        result, milliseconds, host = self._timed(lambda: self._plain(key, step))
        self._now = None
        if replays:
            kind.ms.append(milliseconds)
            kind.host.append(host)
        return result

    def _timed(self, call: Callable[[], Any]) -> tuple[Any, float, float]:
        on_gpu = self._models[0].device.type == "cuda"
        if not on_gpu:
            started = time.perf_counter()
            result = call()
            took = time.perf_counter() - started
            return result, 1e3 * took, 1e6 * took
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        started = time.perf_counter()
        begin.record()
        result = call()
        end.record()
        host = 1e6 * (time.perf_counter() - started)
        end.synchronize()
        return result, begin.elapsed_time(end), host

    def _forward(
        self, model: NativeModel, plain: Callable, ids: Tensor, start: Tensor, cache: Any, **kw: Any
    ) -> Any:
        if self._now is not None:
            branches = kw.get("branches", 1)
            rows, batch = ids.numel(), len(ids)
            seen = max(0, self._context - rows // batch // branches) * batch
            self._now.work.append(Work(model, batch, rows, seen if cache.max_len else 0))
        return plain(ids, start, cache, **kw)

    def _head(
        self, model: NativeModel, plain: Callable, hidden: Tensor, rows: Any = None, **kw: Any
    ) -> Any:
        if self._now is not None:
            count = hidden[..., 0].numel() if rows is None else len(rows)
            self._now.heads.append((model, count))
        return plain(hidden) if rows is None and not kw else plain(hidden, rows, **kw)


def count_launches(step: Any) -> int:
    """Kernels of a replay; on a CPU operators."""
    if not torch.cuda.is_available():
        return step.launches
    activity = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as profile:
        step.replay()
        torch.cuda.synchronize()
    kernels = (e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    return sum(1 for _ in kernels)
