"""Two decoding functions on the same model and prompts: the same tokens? how many forwards, how
fast? ``pydllm compare --original ... --patched ...``.
"""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pydllm._backend.errors import PydllmError
from pydllm.integrations.entrypoint import read_sequences
from pydllm.models import load
from pydllm.models.native import NativeModel


@dataclass(frozen=True)
class Side:
    """What one of the functions did.

    Attributes:
        name: as it was given.
        answers: new token ids of each prompt.
        forwards: of the model in all calls: what the function returned of them, else what was
            counted; None where neither is known (a captured graph replays unseen).
        seconds: median over the rounds, of all prompts.
    """

    name: str
    answers: list[list[int]]
    forwards: int | None
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """The two sides.

    Attributes:
        equal_tokens: share of the original's tokens that the patched function gives at the same
            place, 1 where all are; tokens that only one side has count as different.
        equal_prompts: prompts whose answers are the same.
        first_difference: (prompt, token), or None.
    """

    original: Side
    patched: Side
    equal_tokens: float
    equal_prompts: int
    first_difference: tuple[int, int] | None

    @property
    def speedup(self) -> float:
        return self.original.seconds / self.patched.seconds

    def rows(self) -> list[dict[str, Any]]:
        """A row a side, for a table or a CSV file."""
        found = []
        for side in (self.original, self.patched):
            tokens = sum(map(len, side.answers))
            mine = side is self.patched
            forwards = side.forwards
            found.append(
                {
                    "function": side.name,
                    "prompts": len(side.answers),
                    "tokens": tokens,
                    "forwards": "" if forwards is None else forwards,
                    "seconds": round(side.seconds, 4),
                    "ms_per_forward": round(1e3 * side.seconds / forwards, 3) if forwards else "",
                    "tokens_per_second": round(tokens / side.seconds, 2),
                    "speedup": round(self.speedup if mine else 1.0, 3),
                    "equal_tokens": round(self.equal_tokens if mine else 1.0, 5),
                    "equal_prompts": self.equal_prompts if mine else len(side.answers),
                }
            )
        return found


class CallableModel(NativeModel):
    """A model of ours that published loops can call: ``model(ids).logits``."""

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        """Logits ``(B, L, V)`` of whole sequences, as ``.logits``; no padding, no cache."""
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError("attention_mask: expected no padding with the default --loader")
        batch, length = input_ids.shape
        full = torch.full((batch,), length, dtype=torch.int32, device=input_ids.device)
        hidden = self.forward(
            input_ids,
            torch.zeros_like(full),
            self.new_cache(batch, 0),
            length=full,
            kv_len=full,
            commit=torch.zeros_like(full),
        )
        return SimpleNamespace(logits=self.head(hidden))


def load_callable(source: str, device: str | None = None) -> CallableModel:
    """The default of ``--loader``: ``pydllm.load``, as a model that both kinds of code can use."""
    model = load(source, device=device)
    found = CallableModel.__new__(CallableModel)
    found.__dict__.update(vars(model))
    return found


class _Forwards(TorchFunctionMode):
    """Counts look-ups of embeddings: one a forward, whoever's code makes it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._counts: dict[int, int] = {}
        self._own = None
        if isinstance(model, torch.nn.Module):
            self._own = {parameter.data_ptr() for parameter in model.parameters()}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is F.embedding:
            weight = args[1] if len(args) > 1 else (kwargs or {})["weight"]
            if self._own is None or weight.data_ptr() in self._own:
                self._counts[weight.data_ptr()] = self._counts.get(weight.data_ptr(), 0) + 1
        return func(*args, **(kwargs or {}))

    @property
    def count(self) -> int | None:
        """Of the table that was looked up first: a verifier comes after the model it verifies."""
        return next(iter(self._counts.values()), None)


def compare(
    model: Any,
    prompts: Sequence[Sequence[int]],
    functions: Mapping[str, Callable[..., Any]],
    *,
    settings: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {}),
    batch_size: int = 1,
    repeat: int = 3,
    prepare: Callable[[Any], Any] | None = None,
    on_call: Callable[[], None] = lambda: None,
) -> Comparison:
    """Call both functions as ``function(model, ids, **settings)`` and compare what they return.

    A first round counts forwards and warms up; then the two take turns for ``repeat`` timed rounds.

    Args:
        model: what both are given; has a ``device``.
        prompts: token ids. ``ids (B, P)`` holds up to ``batch_size`` prompts of one length.
        functions: the original and the patched one, by name. What they return: see
            ``read_sequences``; the prompt may stand before the new tokens or not.
        settings: keyword arguments of each.
        prepare: is called with the model before each call of the patched function, for instance
            ``pydllm.patch``; the ``restore`` of what it returns is called afterwards.
        on_call: called after every call.

    Raises:
        ValueError: no prompts, or not two functions.
        PydllmError: a result that is not token ids, or has another number of sequences; a model
            without a device, or one that a function calls and that cannot be called.
    """
    if len(functions) != 2 or not prompts:
        raise ValueError(
            f"expected two functions and at least one prompt, got {len(functions)} and "
            f"{len(prompts)}"
        )
    if repeat < 1 or batch_size < 1:
        raise ValueError(f"repeat, batch_size: expected at least 1, got {repeat}, {batch_size}")
    if not hasattr(model, "device"):
        raise PydllmError(
            f"--loader: expected a model with a `device`, got {type(model).__name__} without"
        )
    sides = []
    device = torch.device(model.device)
    for index, (name, function) in enumerate(functions.items()):
        sides.append(
            _Caller(name, function, settings[index], prepare if index else None, device, on_call)
        )
    groups = _groups(prompts, batch_size)
    for side in sides:
        side.run(model, prompts, groups, counting=True)
    for _ in range(repeat):
        for side in sides:
            side.run(model, prompts, groups, counting=False)
    original, patched = (side.result() for side in sides)
    return _compared(original, patched)


@dataclass
class _Caller:
    """One of the functions, and what came of it."""

    name: str
    function: Callable[..., Any]
    settings: Mapping[str, Any]
    prepare: Callable[[Any], Any] | None
    device: torch.device
    on_call: Callable[[], None]
    answers: dict[int, list[int]] = field(default_factory=dict)
    forwards: int | None = 0
    seconds: list[float] = field(default_factory=list)

    def run(
        self, model: Any, prompts: Sequence[Sequence[int]], groups: list[list[int]], counting: bool
    ) -> None:
        seconds = 0.0
        prepared = self.prepare(model) if self.prepare is not None else None
        try:
            for group in groups:
                ids = torch.tensor([list(prompts[i]) for i in group], device=self.device)
                if counting:
                    with _Forwards(model) as counter:
                        value = self._call(model, ids)
                    self._keep(value, counter.count, prompts, group)
                else:
                    started = time.perf_counter()
                    self._call(model, ids)
                    if self.device.type == "cuda":
                        torch.cuda.synchronize(self.device)
                    seconds += time.perf_counter() - started
                self.on_call()
        finally:
            if prepared is not None and hasattr(prepared, "restore"):
                prepared.restore()
        if not counting:
            self.seconds.append(seconds)

    def _call(self, model: Any, ids: Tensor) -> Any:
        try:
            return self.function(model, ids, **self.settings)
        except TypeError as error:
            if callable(model) or f"'{type(model).__name__}' object is not" not in str(error):
                raise
            raise PydllmError(
                f"{self.name}: expected a callable model from --loader, since this function calls "
                f"it, got {type(model).__name__}, which is not"
            ) from error

    def _keep(
        self,
        value: Any,
        counted: int | None,
        prompts: Sequence[Sequence[int]],
        group: list[int],
    ) -> None:
        rows, reported = read_sequences(value, self.name)
        if len(rows) != len(group):
            raise PydllmError(f"{self.name}: expected {len(group)} sequences, got {len(rows)}")
        for index, row in zip(group, rows, strict=True):
            prompt = list(prompts[index])
            whole = row[: len(prompt)] == prompt
            self.answers[index] = row[len(prompt) :] if whole else row
        forwards = counted if reported is None else reported
        known = self.forwards is not None and forwards is not None
        self.forwards = self.forwards + forwards if known else None  # type: ignore[operator]

    def result(self) -> Side:
        answers = [self.answers[index] for index in sorted(self.answers)]
        return Side(self.name, answers, self.forwards, statistics.median(self.seconds))


def _groups(prompts: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Prompts of one length together, at most ``batch_size``."""
    lengths: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        lengths.setdefault(len(prompt), []).append(index)
    return [
        same[first : first + batch_size]
        for same in lengths.values()
        for first in range(0, len(same), batch_size)
    ]


def _compared(original: Side, patched: Side) -> Comparison:
    equal = total = whole = 0
    first = None
    for index, (a, b) in enumerate(zip(original.answers, patched.answers, strict=True)):
        same = [left == right for left, right in zip(a, b, strict=False)]
        equal, total = equal + sum(same), total + max(len(a), len(b))
        whole += a == b
        if a != b and first is None:
            first = (index, same.index(False) if False in same else len(same))
    return Comparison(original, patched, equal / max(total, 1), whole, first)


def write_csv(comparison: Comparison, path: Path) -> None:
    rows = comparison.rows()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
