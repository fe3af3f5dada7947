"""Try tile sizes of an op and print the change to ``kernels/_tiles.py``, to be read and pasted.

    python -m bench.ops.tune window_attention --head-dim 128      # on this machine's GPU
    python -m bench.ops.tune head_stats --shape llada-8b-32
    python -m bench.ops.tune window_attention --arch 90           # no GPU: which tiles would fit

Every candidate is compiled ahead of time first; what spills registers or does not fit the chip's
shared memory is left out. The others are checked against fp64 and timed on the shapes of
``bench/ops/run.py``; the best is the one with the smallest geometric mean of its times over the
present tile's. Nothing is written: the library has literal tables and no autotuner.
"""

from __future__ import annotations

import difflib
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import click
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.gpu.resources import SHARED_LIMIT, compile_launch, record
from bench.ops.cases import CASES
from bench.ops.run import DTYPES, copied, is_right
from bench.ops.timing import time_calls
from pydllm.kernels import _tiles

SOURCE = Path(_tiles.__file__)
Tile = _tiles.AttentionTile | _tiles.HeadTile | _tiles.StatsTile


@dataclass(frozen=True)
class Row:
    """A row of a table in ``_tiles.py``: what stands before the tile, the tile, and its rivals.

    Attributes:
        prefix: the source text up to the tile.
        lookup: the function of ``_tiles`` that finds the tile.
        rivals: candidates.
    """

    prefix: str
    present: Tile
    lookup: str
    rivals: tuple[Tile, ...]

    def replace(self, tile: Tile, source: str) -> str:
        old, new = (self.prefix + literal(each) for each in (self.present, tile))
        if source.count(old) != 1:
            raise click.ClickException(
                f"{SOURCE.name}: expected {old!r} once, got it {source.count(old)} times"
            )
        return source.replace(old, new)


def literal(tile: Tile) -> str:
    """The tile as it is written in the table, default fields left out."""
    values = list(tile)
    while values and values[-1] == type(tile)._field_defaults.get(tile._fields[len(values) - 1]):
        values.pop()
    return f"{type(tile).__name__}({', '.join(map(str, values))})"


def attention_row(arch: int, dtype: torch.dtype, head_dim: int) -> Row:
    with mock.patch.object(_tiles, "arch", lambda device: arch):
        present = _tiles.attention_tile(torch.device("cpu"), dtype.itemsize, head_dim)
    key = next(
        key
        for key, tile in _tiles.WINDOW_ATTENTION.items()
        if tile is present and key[1] == dtype.itemsize
    )
    rivals = itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4))
    return Row(
        f"{key}: ", present, "attention_tile", tuple(_tiles.AttentionTile(*r) for r in rivals)
    )


def head_row(arch: int, dtype: torch.dtype, head_dim: int) -> Row:
    present = _tiles.HEAD_STATS[dtype.itemsize]
    rivals = itertools.product((16, 32, 64, 128), (64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4))
    return Row(
        f"{dtype.itemsize}: ",
        present,
        "head_stats_tile",
        tuple(_tiles.HeadTile(*rival) for rival in rivals),
    )


def stats_row(arch: int, dtype: torch.dtype, head_dim: int) -> Row:
    (limit, small), (_, present) = _tiles.VOCAB_STATS
    rivals = itertools.product((1, 2, 4), (1024, 2048, 4096, 8192, 16384), (2, 4, 8))
    return Row(
        f"VOCAB_STATS = (({limit}, {literal(small)}), (None, ",
        present,
        "vocab_stats_tile",
        tuple(_tiles.StatsTile(*rival) for rival in rivals),
    )


ROWS: dict[str, Callable[[int, torch.dtype, int], Row]] = {
    "window_attention": attention_row,
    "head_stats": head_row,
    "vocab_stats": stats_row,
}


def fit(op: str, row: Row, tile: Tile, arch: int, case: str) -> dict[str, object]:
    """The resources of the op's largest kernel with this tile; a note if it cannot be used."""
    launch = next(launch for label, launch in CASES[op].launches() if label.startswith(case))
    with mock.patch.object(_tiles, row.lookup, lambda *_: tile):
        try:
            kernels = [compile_launch(each, arch) for each in record(launch, arch)]
        except Exception as error:  # what Triton and ptxas raise has no type in common
            return {"note": str(error).strip().splitlines()[0][:60] or type(error).__name__}
    found = max(kernels, key=lambda kernel: kernel["shared"])
    fits = not found["spills"] and found["shared"] <= SHARED_LIMIT[arch]
    return found | ({} if fits else {"note": "does not fit"})


def compare(op: str, row: Row, tiles: list[Tile], shapes: list[dict], dtype: str) -> dict:
    """Geometric mean of each tile's times over the present tile's; wrong ones are left out."""
    case = CASES[op]
    call = partial(case.call, backend="triton")

    def times(tile: Tile) -> Iterator[float]:
        with mock.patch.object(_tiles, row.lookup, lambda *_: tile):
            for sizes in shapes:
                inputs = case.make(DTYPES[dtype], "cuda", **sizes)
                if not is_right(case, inputs, call, strict=True):
                    yield math.inf
                    continue
                yield time_calls(call, partial(copied, inputs), "cuda", seconds=0.3).p50

    present = list(times(row.present))
    return {
        tile: math.exp(
            sum(math.log(one / base) for one, base in zip(times(tile), present, strict=True))
            / len(present)
        )
        for tile in tiles
    }


def proposal(row: Row, ratios: dict[Tile, float], least: float) -> str:
    """The change to the table as a diff; empty if no tile is at least so much faster."""
    best = min(ratios, key=lambda tile: ratios[tile], default=row.present)
    if ratios.get(best, 1.0) > 1 - least:
        return ""
    before = SOURCE.read_text()
    after = row.replace(best, before)
    name = f"kernels/{SOURCE.name}"
    lines = (text.splitlines(keepends=True) for text in (before, after))
    return "".join(difflib.unified_diff(*lines, f"a/{name}", f"b/{name}", n=1))


@click.command()
@click.argument("op", type=click.Choice(sorted(ROWS)))
@click.option("--head-dim", default=128, show_default=True, help="Of window_attention.")
@click.option("--dtype", default="bf16", show_default=True, type=click.Choice(sorted(DTYPES)))
@click.option("--shape", default="", help="Only shapes of the op whose name contains this.")
@click.option("--case", default="", help="Ahead-of-time case whose label begins with this.")
@click.option(
    "--arch", type=click.Choice([str(a) for a in SHARED_LIMIT]), help="Only compile, for this one."
)
@click.option("--limit", type=click.IntRange(1), help="Candidates at most.")
@click.option("--least", default=0.03, show_default=True, help="Smallest gain worth a change.")
def main(
    op: str,
    head_dim: int,
    dtype: str,
    shape: str,
    case: str,
    arch: str | None,
    limit: int | None,
    least: float,
) -> None:
    """Try the tiles of an op."""
    if arch is None and not torch.cuda.is_available():
        raise click.UsageError("expected a GPU, or --arch to compile for one, got neither")
    target = int(arch) if arch is not None else _tiles.arch(torch.device("cuda"))
    if op == "window_attention":
        case = case or f"{str(DTYPES[dtype]).removeprefix('torch.')} D{head_dim}/"
    if not any(label.startswith(case) for label, _ in CASES[op].launches()):
        known = ", ".join(label for label, _ in CASES[op].launches())
        raise click.BadParameter(f"expected the beginning of one of {known}, got {case!r}")
    shapes = [
        sizes
        for name, sizes in CASES[op].SHAPES.items()
        if shape in name and sizes.get("head_dim", head_dim) == head_dim
    ]
    if not shapes:
        raise click.BadParameter(f"no shape of {op} contains {shape!r}", param_hint="--shape")
    row = ROWS[op](target, DTYPES[dtype], head_dim)
    rivals = [row.present, *(tile for tile in row.rivals if tile != row.present)][:limit]
    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table("tile", "registers", "spills", "shared", "tensor cores", "note")
    fitting = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for tile in progress.track(rivals, description="compile"):
            used = fit(op, row, tile, target, case)
            keys = ("registers", "spills", "shared", "tensor_cores", "note")
            table.add_row(literal(tile), *(str(used.get(key, "")) for key in keys))
            if "note" not in used:
                fitting.append(tile)
    console.print(table)
    if arch is not None:
        console.print(f"{len(fitting)} of {len(rivals)} fit sm_{arch}; nothing was timed.")
        return
    ratios = compare(op, row, fitting, shapes, dtype)
    for tile, ratio in sorted(ratios.items(), key=lambda item: item[1])[:10]:
        console.print(f"{ratio:.3f} x the present time: {literal(tile)}")
    print(proposal(row, ratios, least) or "The present tile stays.")


if __name__ == "__main__":
    main()
