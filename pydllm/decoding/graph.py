"""Steps as CUDA graphs over static buffers.

A step is a function without arguments that reads and writes tensors at fixed addresses. ``run``
calls it once or a few times, then captures it and replays it from then on.
What a step reads lies in buffers that ``static_buffer`` fills; what it is captured with besides
them, Python numbers and shapes, is in its key. Sequences and window rows are rounded up to buckets,
so there are few keys: rows past a window's length mean nothing, and finished sequences are not
touched by any op.

Without a GPU the steps run as they are, over the same buffers.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Hashable
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from pydllm._backend.errors import PydllmError
from pydllm.models import Model, StaticCache
from pydllm.models.workspace import Workspace

# Calls of one kind share buffers, among them a cache of keys and values, and captured steps. This
# is how many kinds a model keeps, those used last.
KINDS = 4
# With "auto" a step is captured when it has run so often: a capture takes as long as a few steps.
WORTH_IT = 3
Tree = TypeVar("Tree")
_LOG = logging.getLogger("pydllm")


class Runner(Protocol):
    """How the steps of a call are run."""

    fixed_shapes: bool

    def static_buffer(self, name: str, tree: Tree) -> Tree:
        """The same tensors, at an address that steps may read whenever they are run."""

    def cache(self, name: str, model: Model, batch: int, max_len: int) -> StaticCache:
        """A cache of keys and values; what is in it means nothing."""

    def run(self, key: Hashable, step: Callable[[], Tree]) -> Tree:
        """Do the step. What it returns is overwritten when a step of that key is run again."""

    def batch_size(self, count: int) -> int:
        """Slots of a batch of ``count`` sequences, at least that many."""

    def width(self, rows: int, most: int) -> int:
        """Rows of a window or a selection that needs ``rows``, at most ``most``."""

    def active_slots(self, live: list[int], batch: int) -> list[int] | None:
        """Slots of the batch to go on with, ascending; None for all."""


class Captured(Protocol):
    """A step that can be run again; ``result`` is overwritten each time."""

    result: Any

    def replay(self) -> Any: ...


class Eager:
    """Every step as it is; finished sequences leave at once.

    Args:
        caches: without, caches keep nothing.
    """

    fixed_shapes = False

    def __init__(self, *, caches: bool = True) -> None:
        self._caches = caches

    def static_buffer(self, name: str, tree: Tree) -> Tree:
        return tree

    def cache(self, name: str, model: Model, batch: int, max_len: int) -> StaticCache:
        return model.new_cache(batch, max_len if self._caches else 0)

    def run(self, key: Hashable, step: Callable[[], Tree]) -> Tree:
        return step()

    def batch_size(self, count: int) -> int:
        return count

    def width(self, rows: int, most: int) -> int:
        return rows

    def active_slots(self, live: list[int], batch: int) -> list[int] | None:
        return live if len(live) < batch else None


class Graphs:
    """Captured steps of one kind of call, and the buffers they work on.

    Attributes:
        batch, max_len: slots of its buffers, and positions of each; calls may have fewer.
        steps: the captured steps by their keys.

        recorder: what tests have in the place of a capture without a GPU; None: nothing.

    Args:
        device: where the model is.
        after: runs of a step before it is captured, at least one.
        strict: raise if a step cannot be captured; otherwise say so once and go on without.
    """

    fixed_shapes = True
    recorder: ClassVar[Any] = None

    def __init__(
        self, device: torch.device, batch: int, max_len: int, *, after: int, strict: bool
    ) -> None:
        self._device, self.after, self.strict = device, after, strict
        self.batch, self.max_len = batch, max_len
        self._buffers: dict[Hashable, Tensor] = {}
        self._caches: dict[Hashable, StaticCache] = {}
        self._seen: dict[Hashable, int] = {}
        self.steps: dict[Hashable, Captured] = {}
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        # Held by the call that uses the buffers; another one runs without.
        self.lock = threading.Lock()
        self._broken = False

    def static_buffer(self, name: str, tree: Tree) -> Tree:
        def place(path: str, tensor: Tensor) -> Tensor:
            key = (path, tuple(tensor.shape), tensor.dtype)
            if key not in self._buffers:
                self._buffers[key] = torch.empty(
                    tensor.shape, dtype=tensor.dtype, device=tensor.device
                )
            buffer = self._buffers[key]
            if buffer is not tensor:
                buffer.copy_(tensor)
            return buffer

        return map_tensors(place, tree, name)

    def cache(self, name: str, model: Model, batch: int, max_len: int) -> StaticCache:
        if (name, max_len) not in self._caches:
            self._caches[name, max_len] = model.new_cache(self.batch, max_len)
        return self._caches[name, max_len].first(batch)

    def run(self, key: Hashable, step: Callable[[], Tree]) -> Tree:
        known = self.steps.get(key)
        if known is not None:
            return known.replay()
        # The first run compiles kernels and makes the buffers.
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._broken or self._seen[key] <= self.after:
            return step()
        if self._device.type != "cuda":
            if self.recorder is None:
                return step()
            self.steps[key] = recording = self.recorder(step)
            return recording.result
        try:
            if self._stream is None:
                # The stream that torch takes by itself is of the first device that captured.
                self._pool = torch.cuda.graph_pool_handle()
                self._stream = torch.cuda.Stream(self._device)
            captured = _Captured(step, self._pool, self._stream)
        except RuntimeError as error:
            message = f"graph: the step {key} cannot be captured: {error}"
            if self.strict:
                raise PydllmError(message) from error
            self._broken = True
            _LOG.warning("%s; decoding goes on without graphs", message)
            return step()
        self.steps[key] = captured
        return captured.replay()

    def batch_size(self, count: int) -> int:
        return power_of_two(count)

    def width(self, rows: int, most: int) -> int:
        return min(bucket(rows), most)

    def active_slots(self, live: list[int], batch: int) -> list[int] | None:
        count = power_of_two(len(live))
        if count >= batch:
            return None
        finished = [row for row in range(batch) if row not in set(live)]
        return sorted(live + finished[: count - len(live)])


class _Captured:
    """A step in a CUDA graph. Other threads may use the device while it is captured."""

    def __init__(self, step: Callable[[], Any], pool: Any, stream: torch.cuda.Stream) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool, stream, capture_error_mode="thread_local"):
            self.result = step()

    def replay(self) -> Any:
        self._graph.replay()
        return self.result


def bucket(rows: int) -> int:
    """Window rows that a graph is captured for: multiples of 16, 32 or 128.

    Steps are wide where rows cost little: up to about 256, a forward mostly reads weights.
    """
    size = 16 if rows <= 64 else 32 if rows <= 256 else 128
    return -(-rows // size) * size


def power_of_two(number: int) -> int:
    """The least one that is not smaller."""
    return 1 << max(0, number - 1).bit_length()


def map_tensors(place: Callable[[str, Tensor], Tensor], tree: Any, path: str = "") -> Any:
    """The tree with each tensor replaced by ``place(path, tensor)``; dataclasses and tuples."""
    if isinstance(tree, Tensor):
        return place(path, tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        fields = {f.name: getattr(tree, f.name) for f in dataclasses.fields(tree) if f.init}
        new = {n: map_tensors(place, v, f"{path}.{n}") for n, v in fields.items()}
        changed = any(new[name] is not fields[name] for name in new)
        return dataclasses.replace(tree, **new) if changed else tree
    if isinstance(tree, tuple):
        parts = [map_tensors(place, part, f"{path}.{n}") for n, part in enumerate(tree)]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return tree


def cache_key(value: Any) -> Hashable:
    """What a step may have been captured with, as a dictionary's key."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (f for f in dataclasses.fields(value) if f.compare)
        return (type(value), *((f.name, cache_key(getattr(value, f.name))) for f in fields))
    if isinstance(value, list | tuple):
        return tuple(map(cache_key, value))
    return value


def graphs_of(model: Model, kind: Hashable, batch: int, max_len: int, *, auto: bool) -> Graphs:
    """The graphs of a kind of call over a model, large enough; it keeps those used last."""
    kept: Workspace = model.graphs  # type: ignore[attr-defined]
    with kept.lock:
        large = [key for key in kept if key[0] == kind and key[1] >= batch and key[2] >= max_len]
        key = min(large, key=lambda key: key[1:], default=(kind, batch, max_len))
        if key not in kept:
            while len(kept) >= KINDS:
                kept.popitem(last=False)
            kept[key] = Graphs(model.device, batch, max_len, after=1, strict=False)
        kept.move_to_end(key)
        graphs = kept[key]
    graphs.after, graphs.strict = (WORTH_IT, False) if auto else (1, True)
    return graphs
