"""``verify`` at FreeDave's shapes: a name says sequences, branches and window rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.ops.cases import draft
from pydllm import ops, reference

SHAPES = draft.SHAPES


def make(dtype: torch.dtype, device: str, *, batch: int, branches: int, rows: int) -> dict:
    """Every candidate predicts what the drafts assumed, so all are accepted."""
    inputs = draft.make(dtype, device, batch=batch, branches=branches, rows=rows)
    count = inputs.pop("branches")
    for name in ("token", "score"):
        inputs[name] = inputs[name][:, None].repeat(1, count, 1)
    candidates = inputs["x"][:, None].repeat(1, count, 1)
    if device != "meta":
        drafted = {n: t[:, 0] if n in ("token", "score") else t for n, t in inputs.items()}
        candidates = ops.draft(**drafted, branches=count, backend="torch")
    state = {
        "x": inputs.pop("x"),
        "step_map": torch.full((batch, draft.SLOTS), -1, dtype=torch.int32, device=device),
        "nfe": torch.ones(batch, dtype=torch.int32, device=device),
        "candidates": candidates,
    }
    inputs["drafts"] = count
    names = ("token", "score", "mask_id", "start", "length", "drafts", "block_size")
    return state | {name: inputs[name] for name in names}


def call(inputs: dict, backend: str) -> tuple[Tensor, ...]:
    verified = ops.verify(**inputs, backend=backend)
    return (*verified, inputs["x"], inputs["step_map"], inputs["nfe"])


def _compiled() -> Callable[[dict], tuple[Tensor, ...]]:
    compiled = torch.compile(reference.verify)

    def run(inputs: dict) -> tuple[Tensor, ...]:
        return (*compiled(**inputs), inputs["x"], inputs["step_map"], inputs["nfe"])

    return run


BASELINES = {"torch.compile": _compiled}


def bytes_moved(inputs: dict) -> int:
    """The window of every candidate with its statistics, and every next candidate."""
    window = inputs["token"].numel() * (8 + 8 + inputs["score"].element_size())
    return window + inputs["candidates"].numel() * 8


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    from pydllm.kernels import verify as kernel

    for branches, rows in ((1, 12), (8, 32), (32, 64), (32, 128)):
        inputs = make(torch.float32, "meta", batch=4, branches=branches, rows=rows)
        yield f"{branches}x{rows}", lambda inputs=inputs: kernel.verify(*inputs.values())
