"""``renoise`` on canvases of DiffusionGemma's length and others.

A name says the sequences and the positions of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pydllm import ops, reference

VOCAB = 262144
SHAPES = {
    f"{batch}x{rows}": {"batch": batch, "rows": rows}
    for batch, rows in ((1, 32), (1, 256), (32, 256), (8, 2048))
}


def make(dtype: torch.dtype, device: str, *, batch: int, rows: int) -> dict:
    """fp32 (fp64) entropies whatever the dtype of the logits."""
    generator = torch.Generator().manual_seed(0)
    entropy = torch.rand(batch, rows, generator=generator) ** 4
    token = torch.randint(0, VOCAB, (batch, rows), generator=generator)
    zero = torch.zeros(batch, dtype=torch.int32, device=device)
    return {
        "x": torch.zeros(batch, rows, dtype=torch.int64, device=device),
        "token": token.to(device),
        "entropy": entropy.to(device, torch.promote_types(dtype, torch.float32)),
        "bound": 0.1,
        "vocab_size": VOCAB,
        "seed": 0,
        "request": zero,
        "step": zero,
    }


def call(inputs: dict, backend: str) -> tuple[Tensor, ...]:
    accepted = ops.renoise(**inputs, backend=backend)
    return accepted, inputs["x"]


def _compiled() -> Callable[[dict], tuple[Tensor, ...]]:
    compiled = torch.compile(reference.renoise)

    def run(inputs: dict) -> tuple[Tensor, ...]:
        return compiled(**inputs), inputs["x"]

    return run


BASELINES = {"torch.compile": _compiled}


def bytes_moved(inputs: dict) -> int:
    """Tokens and entropies once, ids and flags once."""
    return inputs["token"].numel() * (8 + 8 + 1 + inputs["entropy"].element_size())


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every tile, and a canvas shorter than a block."""
    from pydllm.kernels import renoise as kernel

    for rows in (20, 128, 1024, 2048):
        inputs = make(torch.float32, "meta", batch=4, rows=rows)
        yield str(rows), lambda inputs=inputs: kernel.renoise(**inputs)
