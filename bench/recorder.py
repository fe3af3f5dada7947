"""A CUDA graph in software: the operators of a step, recorded once, run again without its Python.

Without a GPU the tests and ``bench.steps`` have it in the place of captures. Like a CUDA graph it
keeps the tensors it was recorded with, the results of its own operators and every Python number as
they were; what a step takes from anywhere else is missing in the replay, and its tokens are wrong.
Results lie in the same tensors after every replay. A step that reads a value on the host, or whose
shapes depend on values, cannot be recorded, as it cannot be captured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pydllm._backend.errors import PydllmError

# Operators that wait for the device: they read a value, or their shapes depend on values.
HOST_READS = frozenset(
    f"aten::{name}"
    for name in (
        *("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero"),
        *("_unique2", "unique_dim", "unique_consecutive", "bincount", "repeat_interleave.Tensor"),
    )
)
# Python methods that read values without an operator, on a CPU.
HOST_METHODS = frozenset(
    getattr(Tensor, name)
    for name in ("tolist", "numpy", "item", "__bool__", "__int__", "__float__", "__index__", "cpu")
)


def reads_host(function: torch._ops.OpOverload, args: tuple[Any, ...]) -> bool:
    """Whether an operator makes the host wait for a GPU."""
    name = function.name()
    if name in HOST_READS or name.partition(".")[0] in HOST_READS:
        return True
    if name.startswith(("aten::index.", "aten::index_put", "aten::_index_put")):
        return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    # A tensor made of Python numbers is copied from memory that is not pinned.
    return name in ("aten::lift_fresh", "aten::lift_fresh_copy") and args[0].ndim > 0


class _Made:
    """The result of a recorded operator, by its number."""

    def __init__(self, number: int) -> None:
        self.number = number


class Recording:
    """The operators that one call of a step ran, to be run again on the same tensors."""

    def __init__(self, step: Callable[[], Any]) -> None:
        self._calls: list[tuple[Any, Any, Any, list[int]]] = []
        self._numbers: dict[int, int] = {}
        self._kept: list[Tensor] = []  # ids stay unique while their tensors live
        with _Functions(), _Operators(self):
            self.result = step()
        leaves = [t for t in pytree.tree_leaves(self.result) if isinstance(t, Tensor)]
        self._results = [(t, self._numbers[id(t)]) for t in leaves if id(t) in self._numbers]
        self._numbers, self._kept = {}, []

    @property
    def launches(self) -> int:
        """Operators that a replay runs."""
        return len(self._calls)

    def note(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Add a call that has just been made."""

        def name(leaf: Any) -> Any:
            made = isinstance(leaf, Tensor) and id(leaf) in self._numbers
            return _Made(self._numbers[id(leaf)]) if made else leaf

        call = pytree.tree_map(name, (args, kwargs))
        numbers = []
        for leaf in pytree.tree_leaves(result):
            if not isinstance(leaf, Tensor):
                continue
            # An operator that writes in place returns what it was given.
            if id(leaf) not in self._numbers:
                self._numbers[id(leaf)] = len(self._kept)
                self._kept.append(leaf)
            numbers.append(self._numbers[id(leaf)])
        self._calls.append((function, *call, numbers))

    def replay(self) -> Any:
        """Run the operators; returns what the step returned, overwritten."""
        made: dict[int, Tensor] = {}

        def find(leaf: Any) -> Any:
            return made[leaf.number] if isinstance(leaf, _Made) else leaf

        for function, args, kwargs, numbers in self._calls:
            args, kwargs = pytree.tree_map(find, (args, kwargs))
            result = function(*args, **kwargs)
            leaves = (leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))
            made.update(zip(numbers, leaves, strict=True))
        for tensor, number in self._results:
            tensor.copy_(made[number])
        return self.result


class _Operators(TorchDispatchMode):
    """Runs operators and notes them."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if reads_host(function, args):
            raise PydllmError(f"graph: a step must not wait for the device, got {function.name()}")
        with torch._C.DisableTorchFunction():
            result = function(*args, **kwargs)
        self._recording.note(function, args, kwargs, result)
        return result


class _Functions(TorchFunctionMode):
    """Refuses methods that read values past the dispatcher."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in HOST_METHODS:
            raise PydllmError(
                f"graph: a step must not wait for the device, got Tensor.{function.__name__}"
            )
        return function(*args, **(kwargs or {}))
