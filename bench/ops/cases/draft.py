"""``draft`` at FreeDave's shapes: a name says sequences, branches and window rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pydllm import ops, reference

MASK = 126336
SLOTS = 1024
SHAPES = {
    f"{batch}x{branches}x{rows}": {"batch": batch, "branches": branches, "rows": rows}
    for batch in (1, 32)
    for branches, rows in ((8, 12), (8, 32), (32, 64))
}


def make(dtype: torch.dtype, device: str, *, batch: int, branches: int, rows: int) -> dict:
    """A window of masks, fp32 (fp64) scores whatever the dtype of the logits."""
    generator = torch.Generator().manual_seed(0)
    token = torch.randint(0, MASK, (batch, rows), generator=generator)
    score = torch.rand(batch, rows, generator=generator)
    number = torch.ones(batch, dtype=torch.int32, device=device)
    return {
        "x": torch.full((batch, SLOTS), MASK, device=device),
        "token": token.to(device),
        "score": score.to(device, torch.promote_types(dtype, torch.float32)),
        "mask_id": MASK,
        "start": number * 512,
        "length": number * rows,
        "branches": branches,
        "block_size": 4 if rows == 12 else None,
    }


def call(inputs: dict, backend: str) -> Tensor:
    return ops.draft(**inputs, backend=backend)


def _compiled() -> Callable[[dict], Tensor]:
    compiled = torch.compile(reference.draft)
    return lambda inputs: compiled(**inputs)


BASELINES = {"torch.compile": _compiled}


def bytes_moved(inputs: dict) -> int:
    """The ids once, and every candidate."""
    return (1 + inputs["branches"]) * inputs["x"].numel() * 8


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    from pydllm.kernels import draft as kernel

    for branches, rows in ((1, 12), (8, 32), (32, 64), (32, 128)):
        inputs = make(torch.float32, "meta", batch=4, branches=branches, rows=rows)
        yield f"{branches}x{rows}", lambda inputs=inputs: kernel.draft(*inputs.values())
