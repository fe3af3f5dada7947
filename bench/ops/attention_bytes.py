"""Bytes that ``window_attention`` loads and stores at the bench shapes, against the least; no GPU.

    python -m bench.ops.attention_bytes                          # tiles of sm_90
    python -m bench.ops.attention_bytes --arch 80 --shape sdar

Counted lane by lane while the kernel runs in Triton's interpreter with the tiles of that
architecture: one sequence and one KV head of each shape, scaled up, fp16. ``of least`` counts a
byte each time it is asked for; what programs ask for together the L2 cache may give them at once.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import click
import torch
from rich.console import Console
from rich.table import Table
from triton.runtime.interpreter import InterpreterBuilder

from bench.ops.cases import window_attention as case
from pydllm.kernels import _tiles


def moved(sizes: dict[str, int], arch: int) -> tuple[Counter[str], int]:
    """Bytes loaded and stored by the launches for one KV head of one sequence, and the least."""
    inputs = case.make(torch.float16, "cpu", **sizes)
    count: Counter[str] = Counter()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def size(pointers) -> int:
        return max(pointers.get_element_ty().primitive_bitwidth // 8, 1)

    def counted_load(self, pointers, mask, *rest):
        count["loaded"] += int(mask.data.sum()) * size(pointers)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        count["stored"] += int(mask.data.sum()) * size(pointers)
        return store(self, pointers, value, mask, *rest)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", counted_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counted_store),
        mock.patch.object(_tiles, "arch", lambda device: arch),
    ):
        case.call(inputs, "triton")
    return count, case.bytes_moved(inputs)


@click.command()
@click.option("--arch", default=90, show_default=True, help="Whose tiles.")
@click.option("--shape", default="", help="Only shapes whose name has this in it.")
@click.option("--largest", default=2048, show_default=True, help="Longest refresh, in slots.")
def main(arch: int, shape: str, largest: int) -> None:
    """Print the table."""
    table = Table("shape", "loaded MB", "stored MB", "least MB", "of least")
    for name, sizes in case.SHAPES.items():
        if shape not in name or (sizes["rows"] == sizes["slots"] > largest):
            continue
        group, copies = sizes["heads"] // sizes["kv_heads"], sizes["batch"] * sizes["kv_heads"]
        count, least = moved(sizes | {"batch": 1, "heads": group, "kv_heads": 1}, arch)
        row = [value * copies / 1e6 for value in (count["loaded"], count["stored"], least)]
        ratio = (count["loaded"] + count["stored"]) / least
        table.add_row(name, *(f"{value:.2f}" for value in row), f"{ratio:.2f}")
    Console(width=None if sys.stdout.isatty() else 100).print(table)


if __name__ == "__main__":
    main()
