"""``edit_tokens`` on blocks of which half are masks, and half of the tokens are contradicted.

A name says the sequences and the block's length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pydllm import ops, reference

MASK = 156895
SHAPES = {
    f"{batch}x{rows}": {"batch": batch, "rows": rows}
    for batch, rows in ((1, 32), (32, 32), (256, 64), (8, 1024))
}


def make(dtype: torch.dtype, device: str, *, batch: int, rows: int) -> dict:
    """fp32 (fp64) scores whatever the dtype of the logits."""
    generator = torch.Generator().manual_seed(0)
    token = torch.randint(0, MASK, (batch, rows), generator=generator)
    x = torch.full((batch, 2 * rows), MASK)
    x[:, rows // 2 : rows] = token[:, : rows - rows // 2]
    x[:, rows // 2 : rows : 2] += 1
    zero = torch.zeros(batch, dtype=torch.int32, device=device)
    return {
        "x": x.to(device),
        "step_map": torch.full((batch, 2 * rows), -1, dtype=torch.int32, device=device),
        "nfe": zero + 7,
        "post_steps": zero.clone(),
        "complete": zero.bool(),
        "token": token.to(device),
        "score": (torch.rand(batch, rows, generator=generator) ** 0.2).to(
            device, torch.promote_types(dtype, torch.float32)
        ),
        "start": zero + rows // 2,
        "length": zero + rows,
        "editable_from": zero + rows // 2,
        "threshold": 0.7,
        "edit_threshold": 0.5,
        "min_tokens": 1,
        "max_post_steps": 16,
        "confirm": False,
    }


def call(inputs: dict, backend: str) -> tuple[Tensor, ...]:
    counts = ops.edit_tokens(**inputs, mask_id=MASK, backend=backend)
    names = ("x", "step_map", "nfe", "post_steps", "complete")
    return (*counts, *(inputs[name] for name in names))


def _compiled() -> Callable[[dict], tuple[Tensor, ...]]:
    compiled = torch.compile(reference.edit_tokens)

    def run(inputs: dict) -> tuple[Tensor, ...]:
        counts = compiled(**inputs, mask_id=MASK)
        names = ("x", "step_map", "nfe", "post_steps", "complete")
        return (*counts, *(inputs[name] for name in names))

    return run


BASELINES = {"torch.compile": _compiled}


def bytes_moved(inputs: dict) -> int:
    """Ids, tokens and scores once, what is written of ids and steps not counted."""
    return inputs["token"].numel() * (8 + 8 + inputs["score"].element_size())


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every tile, and both ways to end a block."""
    from pydllm.kernels import edit_tokens as kernel

    for rows in (20, 128, 1024):
        for confirm in (False, True):
            inputs = make(torch.float32, "meta", batch=4, rows=rows) | {"confirm": confirm}
            call = {"mask_id": MASK, **inputs}
            yield f"{rows}-{confirm}", lambda call=call: kernel.edit_tokens(**call)
