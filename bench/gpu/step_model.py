"""What a decode step should take on an H100 or H200, kernel by kernel: a model, not a measurement.

    python -m bench.gpu.step_model                    # LLaDA-8B and Dream-7B, batch 1, 8 and 32
    python -m bench.gpu.step_model --kernels          # each kernel of a step
    python -m bench.gpu.step_model --gpu h200 --slots 4096
    python -m bench.gpu.step_model --linear --pdl     # what PYDLLM_PDL=1 and ops.linear may bring

A cached forward of ``Threshold`` with a window of 32 (Dream 33) rows. Grids come from the library's
own plan of a call, instructions of a key tile from its machine code (``make bars``); what is marked
"assumed" below comes from nowhere but experience. Nothing here ran on a GPU: expect 30 % either way
for a kernel, 15 % for a step. ``achievable`` is weights and visible keys and values once at 90 % of
the datasheet's bandwidth, or the products at 72 % of its tensor cores, whichever takes longer.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import NamedTuple
from unittest import mock

import click
import torch
from rich.console import Console
from rich.table import Table

from pydllm.kernels import _tiles


class Gpu(NamedTuple):
    """Datasheet: bytes and bf16 operations a second, multiprocessors, clock."""

    bandwidth: float
    flops: float = 989e12
    multiprocessors: int = 132
    clock: float = 1.755e9


GPUS = {"h100": Gpu(3.35e12), "h200": Gpu(4.8e12)}

STREAM = 0.90  # assumed: of the bandwidth that a streaming kernel reaches
GEMM = 0.65  # assumed: of the tensor cores that cuBLAS reaches on random bf16
GOAL = 0.72  # of the tensor cores that count as achievable
L2 = 5.0e12  # assumed: bytes a second from the second-level cache
GAP = 1.2e-6  # assumed: from the end of a kernel of a graph to the start of the next, seconds
GEMM_FIXED = 5.0e-6  # assumed: gap, ramp, tail and split-K of a skinny product, seconds
DRAM = 550  # assumed: cycles of a load that misses the cache
INGEST = 50  # assumed: bytes a cycle that a multiprocessor takes in
IPC = 0.60  # assumed: instructions a cycle and scheduler
PROLOGUE, EPILOGUE = 4500, 1200  # assumed: cycles, the prologue three dependent loads
HOST = 35e-6  # assumed: between two steps, seconds
SMALL_KERNELS = 2  # of torch, a step: ids and their embedding; bench.recorder counts them

# ops.linear, PYDLLM_PDL=1. All assumed: a kernel whose predecessor lets it start early begins where
# that one ends, but for the wait; a product has its first weights in L2 by then.
PDL_GAP = 0.4e-6
OWN_RAMP, OWN_RAMP_PDL = 2.0e-6, 1.0e-6

NORMED = ("out", "down")  # products that a norm follows

# Instructions of a warp a key tile, from `make bars`: rows of the tile -> (cached, on the window).
TILES = {64: (409, 727), 128: (354, 529)}


@dataclass(frozen=True)
class Model:
    layers: int
    width: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int
    window: int
    head_dim: int = 128

    @property
    def weight_bytes(self) -> int:
        projections = (2 * self.heads + 2 * self.kv_heads) * self.head_dim
        layer = self.width * (projections + 3 * self.inner)
        return 2 * (self.layers * layer + self.vocab * self.width)

    def cache_bytes(self, batch: int, slots: int) -> int:
        """Of one layer."""
        return batch * slots * self.kv_heads * self.head_dim * 4


MODELS = {
    "LLaDA-8B": Model(32, 4096, 32, 32, 12288, 126464, 32),
    "Dream-7B": Model(28, 3584, 28, 4, 18944, 152064, 33),
}


class Kernel(NamedTuple):
    """Launches a step, and seconds of one."""

    name: str
    count: int
    seconds: float
    note: str = ""


class Launching(NamedTuple):
    """What multiplies, and how long a kernel that is the library's own waits to begin."""

    linear: bool = False  # ops.linear, not cuBLAS
    pdl: bool = False

    @property
    def gap(self) -> float:
        return PDL_GAP if self.pdl else GAP


OFF = Launching()


def linear_tile(outputs: int, inputs: int) -> _tiles.LinearTile:
    """That of ``ops.linear`` for a bf16 weight on sm_90."""
    with mock.patch.object(_tiles, "arch", lambda device: 90):
        return _tiles.linear_tile(torch.device("meta"), outputs, inputs, 2, 2)


def gemm(
    gpu: Gpu, name: str, count: int, size: tuple[int, int, int], how: Launching
) -> list[Kernel]:
    """A product of all layers, and the merge of its splits where no norm merges them.

    ``ops.linear_swiglu`` stores half of what it computes.
    """
    rows, inputs, outputs = size
    fused = how.linear and name == "gate_up"
    stored = outputs // 2 if fused else outputs
    moved = 2 * (inputs * outputs + rows * (inputs + stored))
    flops = 2 * rows * inputs * outputs
    most = max(moved / (STREAM * gpu.bandwidth), flops / (GEMM * gpu.flops))
    if not how.linear:
        return [Kernel(f"linear {name}", count, GEMM_FIXED + most)]
    tile = linear_tile(outputs, inputs)
    with mock.patch.object(_tiles, "arch", lambda device: 90):
        height = _tiles.linear_height(torch.device("meta"), rows, 2, 2)
    blocks, columns = -(-rows // height), -(-outputs // tile.block_n)
    read = 2 * inputs * (blocks * outputs + columns * blocks * min(rows, height))
    ramp = how.gap + (OWN_RAMP_PDL if how.pdl else OWN_RAMP)
    note = f"{columns * tile.splits * blocks} programs"
    op = "ops.linear_swiglu" if fused else f"ops.linear {name}"
    found = [Kernel(op, count, ramp + max(most, read / L2), note)]
    if tile.splits > 1 and name not in NORMED:
        merged = (4 * tile.splits * outputs + 2 * stored) * rows / L2
        found.append(Kernel("  merge of splits", count, how.gap + 1.5e-6 + merged))
    return found


def norms(gpu: Gpu, model: Model, rows: int, how: Launching) -> list[Kernel]:
    """The norms of a step: the first one, and those after the products of ``NORMED``.

    One that merges the splits of a product reads them at the rate of one multiprocessor per row.
    """
    alone = how.gap + 1.5e-6 + 8 * rows * model.width / L2
    found = [Kernel("rms_norm", 1 + (0 if how.linear else 2 * model.layers), alone)]
    if how.linear:
        for name, inputs in (("out", model.heads * model.head_dim), ("down", model.inner)):
            splits = linear_tile(model.width, inputs).splits
            sums = 4 * splits * model.width * (splits > 1)
            waves = -(-rows // gpu.multiprocessors)
            merged = max(rows * sums / L2, waves * sums / INGEST / gpu.clock)
            note = f"merges {splits} splits"
            found.append(Kernel(f"rms_norm of {name}", model.layers, alone + merged, note))
    return found


def attention(gpu: Gpu, model: Model, batch: int, slots: int, how: Launching = OFF) -> list[Kernel]:
    group = model.heads // model.kv_heads
    arguments = (2, model.head_dim, batch * model.kv_heads, model.window, group, 1, slots)
    with mock.patch.object(_tiles, "arch", lambda device: 90):
        plan = _tiles.attention_plan(torch.device("meta"), *arguments)
    tile = plan.tile
    programs = -(-model.window * group // tile.block_m) * plan.groups * model.kv_heads * batch
    splits = -(-plan.splits // plan.groups)
    tiles = -(-slots // (plan.groups * tile.block_n))
    size = tile.block_n * model.head_dim * 4
    cached, fresh = (count * tile.num_warps / 4 / IPC for count in TILES[tile.block_m])
    # Copies run ahead, but each split begins by waiting for its first tile.
    shared_by = min(tile.resident, -(-programs // gpu.multiprocessors))  # a multiprocessor
    turn = max(size / INGEST, cached) * shared_by
    cycles = PROLOGUE + splits * DRAM + tiles * turn + 2 * fresh * shared_by + EPILOGUE
    waves = -(-programs // (gpu.multiprocessors * tile.resident))
    outer = batch * model.window * (2 * model.heads + 2 * model.kv_heads) * model.head_dim * 2
    stored = plan.walk != "all" and plan.split_tiles > 0
    part = 8 * plan.splits * batch * model.window * model.heads * model.head_dim if stored else 0
    moved = model.cache_bytes(batch, slots) + outer + part / 4
    seconds = how.gap + max(waves * cycles / gpu.clock, moved / (STREAM * gpu.bandwidth) + 3e-6)
    note = f"{programs} programs of {tile.block_m} rows, {plan.splits} splits, walk {plan.walk}"
    kernels = [Kernel("window_attention", model.layers, seconds, note)]
    if stored:
        kernels.append(Kernel("  merge", model.layers, how.gap + 1.6e-6 + part / 2 / L2))
    return kernels


def head_stats(gpu: Gpu, model: Model, rows: int, how: Launching) -> list[Kernel]:
    with mock.patch.object(_tiles, "arch", lambda device: 90):
        tile = _tiles.head_stats_tile(torch.device("meta"), 2, rows)
    tiles, blocks = -(-model.vocab // tile.block_v), -(-rows // tile.block_r)
    weight = 2 * model.vocab * model.width
    through = blocks * tiles * (min(rows, tile.block_r) + tile.block_v) * model.width * 2
    flops = 2 * rows * model.vocab * model.width
    seconds = max(weight / (0.88 * gpu.bandwidth), through / L2, flops / (GEMM * gpu.flops))
    return [
        Kernel("head_stats", 1, seconds + 3e-6, f"{tiles * blocks} programs"),
        Kernel("  merge", 1, how.gap + 2.5e-6),
    ]


def step(gpu: Gpu, model: Model, batch: int, slots: int, how: Launching = OFF) -> list[Kernel]:
    """Every kernel of a step, and the host between two."""
    rows, layers, width, inner = batch * model.window, model.layers, model.width, model.inner
    hidden = model.heads * model.head_dim
    qkv = hidden + 2 * model.kv_heads * model.head_dim
    products = {"qkv": (width, qkv), "out": (hidden, width)}
    products |= {"gate_up": (width, 2 * inner), "down": (inner, width)}
    swiglu = Kernel("swiglu", layers, how.gap + 1.2e-6 + 6 * rows * inner / L2)
    return [
        *(k for n, size in products.items() for k in gemm(gpu, n, layers, (rows, *size), how)),
        *attention(gpu, model, batch, slots, how),
        *norms(gpu, model, rows, how),
        *([] if how.linear else [swiglu]),  # else in the product of gate and up
        *head_stats(gpu, model, rows, how),
        Kernel("unmask", 1, GAP + 3.5e-6),
        Kernel("small kernels of torch", SMALL_KERNELS, GAP + 0.7e-6),
        Kernel("host between two steps", 1, HOST),
    ]


def achievable(gpu: Gpu, model: Model, batch: int, slots: int) -> float:
    moved = model.weight_bytes + model.layers * model.cache_bytes(batch, slots)
    flops = batch * model.window * model.weight_bytes
    return max(moved / (STREAM * gpu.bandwidth), flops / (GOAL * gpu.flops))


def refresh(gpu: Gpu, model: Model, rows: int) -> tuple[float, float]:
    """Attention of all layers over a whole prompt: predicted, and at 550 TFLOP/s."""
    group = model.heads // model.kv_heads
    arguments = (2, model.head_dim, model.kv_heads, rows, group, 1, rows)
    with mock.patch.object(_tiles, "arch", lambda device: 90):
        tile = _tiles.attention_plan(torch.device("meta"), *arguments).tile
    turns = -(-rows * group // tile.block_m) * model.kv_heads * -(-rows // tile.block_n)
    issue = 665 * tile.num_warps / 4 / IPC  # instructions of a turn, from `make bars`
    product = 4 * tile.block_m * tile.block_n * model.head_dim
    cycles = max(issue, product / (gpu.flops / gpu.multiprocessors / gpu.clock) / GOAL)
    # Keys are read, and written twice; values are copied to the cache.
    rotate = GAP + 5 * rows * model.kv_heads * model.head_dim * 2 / (STREAM * gpu.bandwidth)
    seconds = GAP + rotate + turns / gpu.multiprocessors * cycles / gpu.clock
    best = 4 * rows * rows * model.head_dim * model.heads / 550e12
    return model.layers * seconds, model.layers * best


@click.command()
@click.option("--gpu", "names", multiple=True, type=click.Choice(sorted(GPUS)))
@click.option("--slots", default=2048, show_default=True, help="Of the cache, all visible.")
@click.option("--kernels", is_flag=True, help="Each kernel of a step.")
@click.option("--linear", is_flag=True, help="Products by ops.linear, not by cuBLAS.")
@click.option("--pdl", is_flag=True, help="As with PYDLLM_PDL=1.")
def main(names: tuple[str, ...], slots: int, kernels: bool, linear: bool, pdl: bool) -> None:
    """Print the predicted time of a step."""
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print("Predictions of a model; nothing here was measured.")
    table = Table("GPU", "model", "batch", "launches", "achievable, ms", "predicted, ms", "ratio")
    for name in names or tuple(GPUS):
        for label, model in MODELS.items():
            for batch in (1, 8, 32):
                found = step(GPUS[name], model, batch, slots, Launching(linear, pdl))
                seconds = sum(kernel.count * kernel.seconds for kernel in found)
                best = achievable(GPUS[name], model, batch, slots)
                launches = sum(kernel.count for kernel in found) - 1
                cells = (name, label, batch, launches, f"{best * 1e3:.2f}", f"{seconds * 1e3:.2f}")
                table.add_row(*map(str, cells), f"{seconds / best:.2f}")
                if kernels:
                    each = Table("kernel", "count", "us each", "ms", "", title=f"{label}, {batch}")
                    for k in found:
                        us, ms = k.seconds * 1e6, k.count * k.seconds * 1e3
                        each.add_row(k.name, str(k.count), f"{us:.1f}", f"{ms:.2f}", k.note)
                    console.print(each)
    console.print(table)
    for label, model in MODELS.items():
        predicted, best = refresh(GPUS["h100"], model, slots)
        console.print(
            f"{label}, h100, attention of a refresh of {slots}: {predicted * 1e3:.1f} ms "
            f"predicted, {best * 1e3:.1f} ms at 550 TFLOP/s"
        )


if __name__ == "__main__":
    main()
