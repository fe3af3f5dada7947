"""``edit_block`` on blocks of which half are masks, and half of the tokens are contradicted.

A name says the sequences, the block's length and the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pydllm import ops, reference

IDS = {"mask_id": 895, "delete_id": 930, "split_id": 931}
SHAPES = {
    f"{batch}x{rows}x{vocab}": {"batch": batch, "rows": rows, "vocab": vocab}
    for batch, rows, vocab in ((1, 32, 157184), (8, 32, 157184), (4, 64, 157184))
}
BUDGET, STATE = 16, ("x", "step_map", "nfe")


def make(dtype: torch.dtype, device: str, *, batch: int, rows: int, vocab: int) -> dict:
    """The second step of a block that an earlier step began with as well."""
    generator = torch.Generator().manual_seed(0)
    x = torch.full((batch, 2 * rows), IDS["mask_id"])
    tokens = torch.randint(0, vocab, (batch, rows), generator=generator)
    x[:, rows // 2 : rows : 2] = tokens[:, : len(range(rows // 2, rows, 2))]
    logits = torch.randn(batch, rows, vocab, generator=generator)
    zero = torch.zeros(batch, dtype=torch.int32, device=device)
    edits = ops.BlockEdits.make(batch, rows, BUDGET)
    edits.updates.fill_(1)
    edits.seen[:, 0] = x[:, rows // 2 : rows // 2 + rows]
    edits.original.copy_(x[:, rows // 2 : rows // 2 + rows] == IDS["mask_id"])
    edits.written.fill_(-1)
    return {
        "x": x.to(device),
        "step_map": torch.full((batch, 2 * rows), -1, dtype=torch.int32, device=device),
        "nfe": zero + 7,
        **{name: field.to(device) for name, field in edits._asdict().items()},
        "logits": logits.to(device, dtype),
        **IDS,
        "start": zero + rows // 2,
        "length": zero + rows,
        "editable_from": zero + rows // 2 + 3,
        "threshold": 0.5,
        "edit_threshold": 0.0,
        "max_post_steps": BUDGET,
    }


def call(inputs: dict, backend: str) -> tuple[Tensor, ...]:
    edits = ops.BlockEdits(*(inputs[name] for name in ops.BlockEdits._fields))
    others = {name: inputs[name] for name in inputs if name not in ops.BlockEdits._fields}
    counts = ops.edit_block(**others, edits=edits, backend=backend)
    return (*counts, *(inputs[name] for name in STATE), *edits)


def _compiled() -> Callable[[dict], tuple[Tensor, ...]]:
    compiled = torch.compile(reference.edit_block)

    def run(inputs: dict) -> tuple[Tensor, ...]:
        counts = compiled(**inputs)
        return (*counts, *(inputs[name] for name in (*STATE, *ops.BlockEdits._fields)))

    return run


BASELINES = {"torch.compile": _compiled}


def bytes_moved(inputs: dict) -> int:
    """The logits once; what else is read and written is a thousandth of it."""
    return inputs["logits"].numel() * inputs["logits"].element_size()


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every tile, with a budget and without."""
    from pydllm.kernels import edit_block as kernel

    for rows in (20, 64, 256):
        for budget in (0, 16):
            inputs = make(torch.bfloat16, "meta", batch=4, rows=rows, vocab=5000)
            inputs |= {"max_post_steps": budget}
            yield f"{rows}-{budget}", lambda inputs=inputs: kernel.edit_block(**inputs)
