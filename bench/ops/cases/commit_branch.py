"""``commit_branch`` at FreeDave's shapes: a name says the model, branches and rows, sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.ops.cases.window_attention import rotary_tables
from pydllm import ops, reference
from pydllm.testing import random_normal

_MODELS = {
    "llada-8b": {"kv_heads": 32, "head_dim": 128},
    "sdar-8b": {"kv_heads": 8, "head_dim": 128},
}
_SIZES = {"llada-8b": (8, 32), "sdar-8b": (8, 4)}
SHAPES = {
    f"{name}-{batch}x{branches}x{rows}": {
        "batch": batch,
        "branches": branches,
        "rows": rows,
        **_MODELS[name],
    }
    for name, (branches, rows) in _SIZES.items()
    for batch in (1, 32)
}


def make(
    dtype: torch.dtype,
    device: str,
    *,
    batch: int,
    branches: int,
    rows: int,
    kv_heads: int,
    head_dim: int,
) -> dict[str, Tensor | int]:
    """The last branch of each sequence is accepted, all of its rows."""
    slots = 2 * rows
    kv = random_normal(
        2, batch, branches * rows, kv_heads, head_dim, seed=0, dtype=dtype, device=device
    )
    cache = torch.zeros(2, batch, slots, kv_heads, head_dim, dtype=dtype, device=device)
    cos, sin = rotary_tables(slots, head_dim, device)
    numbers = {"branch": branches - 1, "start": rows // 2, "commit": rows}
    return {
        **{"k": kv[0], "v": kv[1], "k_cache": cache[0], "v_cache": cache[1]},
        **{
            name: torch.full((batch,), value, dtype=torch.int32, device=device)
            for name, value in numbers.items()
        },
        **{"cos": cos, "sin": sin, "branches": branches},
    }


def call(inputs: dict[str, Tensor | int], backend: str) -> tuple[Tensor, Tensor]:
    ops.commit_branch(**inputs, backend=backend)
    return inputs["k_cache"], inputs["v_cache"]


def _compiled() -> Callable[[dict[str, Tensor | int]], tuple[Tensor, Tensor]]:
    compiled = torch.compile(reference.commit_branch)

    def run(inputs: dict[str, Tensor | int]) -> tuple[Tensor, Tensor]:
        compiled(**inputs, pad=None, k_norm=None, block_table=None, eps=1e-6)
        return inputs["k_cache"], inputs["v_cache"]

    return run


BASELINES = {"torch.compile": _compiled}


def bytes_moved(inputs: dict[str, Tensor | int]) -> int:
    """The rows of one branch, read and written, keys and values."""
    return 4 * inputs["k"].numel() // inputs["branches"] * inputs["k"].element_size()


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    from pydllm.kernels import commit_branch as kernel

    for dtype, head_dim, paged in (
        (torch.bfloat16, 128, False),
        (torch.bfloat16, 80, True),
        (torch.float32, 512, False),
    ):

        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        k, cache = empty(4, 128, 8, head_dim), empty(4, 2048, 8, head_dim)
        number = empty(4, dtype=torch.int32)
        table = empty(2048, head_dim // 2, dtype=torch.float32)
        pages = empty(4, 128, dtype=torch.int32) if paged else None
        if paged:
            cache = empty(512, 16, 8, head_dim)
        arguments = (k, k, cache, cache, number, number, number, table, table)
        arguments += (number, None, pages, 4, 1e-6)
        name = f"{str(dtype).removeprefix('torch.')} D{head_dim}{' paged' * paged}"
        yield name, lambda arguments=arguments: kernel.commit_branch(*arguments)
