"""The machine code of every Triton kernel at 8B shapes against the bars that it is held to; no GPU.

    python -m bench.gpu.bars                       # every kernel on sm_90a
    python -m bench.gpu.bars --arch 80 --arch 100  # registers, spills and shared memory there
    python -m bench.gpu.bars window_attention      # one op
    python -m bench.gpu.bars --grid                # programs and waves of window_attention alone

Each launch is compiled as the library would launch it and its SASS is read. The bars:

=============  ====================================================================================
narrow         no 8- or 16-bit global load in a loop
overlap        a loop with tensor cores leaves copies in flight where it waits for one; attention:
               but for the turns on the window, of which a program has one to three
serial         at most 3 waits for wgmma a loop, and no remark of ptxas that wgmma is serialised
twice          no warp computes rows that another computes
issue          attention: at most 118 warp instructions for 64 query rows and a KiB of keys and
               values (a multiprocessor gets 14.5 bytes a cycle on an H100, 20.7 on an H200; at 0.6
               instructions a cycle and scheduler that is 170 and 118)
flight         attention: at least 32 KiB of keys and values on their way to a multiprocessor
barrier        what threads pass through global memory is ordered by a barrier over all memory
spill          no local memory
shared         no more shared memory than a block of the chip can have
=============  ====================================================================================

Exits with 1 if a bar is missed that is not in ``EXPECTED``. What Triton compiled, and what was read
of it, stays in Triton's cache: a second run compiles what has changed.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import click
import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.runtime.jit import JITFunction

from bench.gpu import resources, sass
from bench.gpu.resources import SHARED_LIMIT, TOOLS, Launch, MachineCode
from bench.ops.cases import CASES

MULTIPROCESSORS = 132  # of an H100 or H200
SHARED, REGISTERS, THREADS = 228 * 1024, 65536, 2048  # of a multiprocessor
ISSUE, FLIGHT, WAITS = 118, 32 * 1024, 3
MAIN = "_window_attention_kernel"


class Miss(NamedTuple):
    """A bar that is missed, in cases whose label contains ``case``, and why that stands."""

    kernel: str
    bars: tuple[str, ...]
    case: str
    reason: str


UNALIGNED = "rows that begin at no multiple of 16 bytes are loaded by element, in registers"
EXPECTED = (
    Miss("certainty_loss_forward", ("narrow",), " 92 ", "rows of 92 ids are not aligned"),
    Miss("mixture_accept_sparse", ("narrow",), "", "one value of the head's bias per candidate"),
    Miss("mixture_draft", ("narrow",), "", "gathers the few ids of a nucleus"),
    Miss("experts_expand", ("narrow", "overlap"), "unaligned", UNALIGNED),
    Miss("experts_contract", ("narrow", "overlap"), "unaligned", UNALIGNED),
)


@dataclass(frozen=True)
class Shape:
    """Attention heads of a model."""

    heads: int
    kv_heads: int
    head_dim: int = 128


LLADA, SDAR, DREAM = Shape(32, 32), Shape(32, 8), Shape(28, 4)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def attention(
    shape: Shape, batch: int, rows: int, slots: int, **options: object
) -> Callable[[], object]:
    """A launch of ``window_attention``: views of one projection, caches of one layer."""
    from pydllm.kernels import window_attention as kernel

    heads, kv_heads, head_dim = shape.heads, shape.kv_heads, shape.head_dim
    qkv = meta(batch, rows, heads + 2 * kv_heads, head_dim)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), 2)
    cache = meta(batch, slots, kv_heads, head_dim)
    number = meta(batch, dtype=torch.int32)
    table = meta(max(slots, 4096), head_dim // 2, dtype=torch.float32)
    arguments = (q, k, v, cache, cache, *(number,) * 4, table, table, None)
    return lambda: kernel.window_attention(*arguments, scale=head_dim**-0.5, **options)


def head_stats(rows: int, temperature: float = 0.0) -> Callable[[], object]:
    from pydllm.kernels import head_stats as kernel

    hidden, weight = meta(rows, 4096), meta(126464, 4096)
    counter, suppress_ids = meta(rows, 3, dtype=torch.int32), meta(1, dtype=torch.int32)
    index = meta(rows, dtype=torch.int64)
    rest = (None, temperature, 5, counter, suppress_ids, False, None, None, index)
    return lambda: kernel.head_stats(hidden, weight, *rest)


def rms_norm(rows: int, width: int) -> Callable[[], object]:
    from pydllm.kernels import rms_norm as kernel

    return lambda: kernel.rms_norm(meta(rows, width), meta(width), 1e-5, meta(rows, width))


# The ops whose launches depend on a shape; of the others, those of bench/ops/cases at 8B shapes.
LAUNCHES: dict[str, dict[str, Callable[[], object]]] = {
    "window_attention": {
        "LLaDA, 32 rows, 1k": attention(LLADA, 1, 32, 1024),
        "LLaDA, 32 rows, 2k": attention(LLADA, 1, 32, 2048),
        "LLaDA, batch 8, 2k": attention(LLADA, 8, 32, 2048),
        "SDAR, 32 rows, 2k": attention(SDAR, 1, 32, 2048),
        "Dream, 33 rows, 2k": attention(DREAM, 1, 33, 2048),
        "Dream, batch 32, 2k": attention(DREAM, 32, 33, 2048),
        "LLaDA, refresh of 2k": attention(LLADA, 1, 2048, 2048),
        "Dream, refresh of 2k": attention(DREAM, 1, 2048, 2048),
        "LLaDA, 8 branches of 32": attention(LLADA, 1, 256, 2048, branches=8),
        "SDAR, 8 leaves of 8": attention(SDAR, 1, 72, 2048, causal=True, leaves=8, leaf_rows=8),
        "LLaDA, 8 leaves of 8": attention(LLADA, 1, 72, 2048, causal=True, leaves=8, leaf_rows=8),
        "SDAR, a mask after each of 8": attention(
            SDAR, 1, 16, 2048, causal=True, leaves=8, leaf_rows=1
        ),
    },
    "head_stats": {
        "32 rows": head_stats(32),
        "32 rows, noise": head_stats(32, 0.7),
        "128 rows": head_stats(128),
    },
    "rms_norm": {"4096": rms_norm(32, 4096), "3584": rms_norm(33, 3584)},
}
LARGE = {  # (op, cases of bench/ops/cases that stand for it)
    "vocab_stats": ("bf16 126464", "torch.bfloat16 126464", "top"),
    "mixture_draft": ("torch.bfloat16",),
    "mixture_accept": ("torch.bfloat16",),
    "swiglu": ("12288 torch.bfloat16",),
    "unmask": ("20", "threshold"),
    "multiblock_step": ("256",),
}


def launches(op: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """(label, launch) of an op at 8B shapes."""
    if op in LAUNCHES:
        yield from LAUNCHES[op].items()
        return
    found = list(CASES[op].launches())
    wanted = [case for case in found if any(mark in case[0] for mark in LARGE.get(op, ("",)))]
    yield from wanted or found


def resident(code: MachineCode) -> int:
    """Programs of a kernel that one multiprocessor of sm_90 can hold."""
    registers = -(-code.registers // 8) * 8 * 32 * code.warps
    by_shared = SHARED // (code.shared + 1024)
    return max(1, min(REGISTERS // registers, by_shared, THREADS // (32 * code.warps)))


def rows_twice(ttgir: str, block_m: int) -> bool:
    """Whether a tensor-core layout has more warps along the rows than the tile has rows."""
    layouts = re.findall(
        r"nvidia_mma<\{[^}]*warpsPerCTA = \[(\d+), \d+\], instrShape = \[(\d+)", ttgir
    )
    return any(int(warps) * int(rows) > block_m for warps, rows in layouts)


def serialised(ptx: str) -> list[str]:
    """Remarks of ptxas that it serialises wgmma (C75xx)."""
    if "wgmma" not in ptx:
        return []
    version = re.search(r"\.version (\d+)\.(\d+)", ptx)
    new = version is not None and (int(version[1]), int(version[2])) > (8, 8)
    ptxas = TOOLS / ("ptxas-blackwell" if new and (TOOLS / "ptxas-blackwell").exists() else "ptxas")

    def remarks() -> str:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "x.ptx")
            source.write_text(ptx)
            command = [ptxas, "-v", "--gpu-name", "sm_90a", source, "-o", Path(folder, "x.cubin")]
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise click.ClickException(done.stderr)
        return done.stderr

    return sorted(set(re.findall(r"C75\d\d", resources.cached("ptxas", ptx.encode(), remarks))))


def missed(launch: Launch, code: MachineCode, remarks: bool = True) -> dict[str, str]:
    """The bars that a kernel misses on sm_90a, and by how much."""
    found = list(sass.loops(code.sass))
    bad: dict[str, str] = {}
    if narrow := sum(loop.narrow_loads for loop in found):
        bad["narrow"] = f"{narrow} loads"
    products = [loop for loop in found if loop.mma]
    streams = [loop for loop in products if loop.copies]
    if launch.kernel.__name__ != MAIN:
        streams = products
    if (products and not streams) or any(
        loop.loads_used_at_once or not loop.copies_in_flight for loop in streams
    ):
        bad["overlap"] = "waits for loads of the same turn"
    if (waits := max((loop.mma_waits for loop in found), default=0)) > WAITS:
        bad["serial"] = f"{waits} waits"
    elif remarks and (codes := serialised(code.asm["ptx"])):
        bad["serial"] = " ".join(codes)
    block_m = launch.constexprs.get("BLOCK_M", launch.constexprs.get("BLOCK_R"))
    if isinstance(block_m, int) and rows_twice(code.asm["ttgir"], block_m):
        bad["twice"] = f"{code.warps} warps, {block_m} rows"
    if launch.kernel.__name__ == MAIN:
        work = tile_bytes(launch) / 1024 * int(launch.constexprs["BLOCK_M"]) / 64
        spent = max((loop.instructions * code.warps / work for loop in streams), default=0)
        if spent > ISSUE:
            bad["issue"] = f"{spent:.0f}"
        stages = int(launch.options.get("num_stages", 1)) - 1
        flight = stages * tile_bytes(launch) * resident(code)
        if flight < FLIGHT:
            bad["flight"] = f"{flight // 1024} KiB"
    if narrower := set(re.findall(r"ttg\.barrier (\w+)", code.asm["ttgir"])) - {"all"}:
        bad["barrier"] = " ".join(sorted(narrower))
    return bad | fits(code, 90)


def tile_bytes(launch: Launch) -> int:
    """Keys and values of one step of ``window_attention``."""
    size = {"*bf16": 2, "*fp16": 2, "*fp32": 4}[launch.signature["k_cache_ptr"]]
    return 2 * size * int(launch.constexprs["BLOCK_N"]) * int(launch.constexprs["HEAD_DIM"])


def fits(code: MachineCode, arch: int) -> dict[str, str]:
    """The bars of every chip."""
    bad = {}
    if spilled := code.spills:
        bad["spill"] = f"{spilled} instructions"
    if code.shared > SHARED_LIMIT[arch]:
        bad["shared"] = f"{code.shared} bytes"
    return bad


def grid() -> Iterator[dict[str, object]]:
    """Programs of ``window_attention`` and how full their last wave is, by the resources."""
    held: dict[str, int] = {}  # by a multiprocessor
    for name, shape, rows in (("LLaDA", LLADA, 32), ("SDAR", SDAR, 32), ("Dream", DREAM, 33)):
        for batch in (1, 8):
            for slots in (1024, 2048, 4096, 8192):
                recorded = resources.record(attention(shape, batch, rows, slots), 90)
                main = next(r for r in recorded if r.kernel.__name__ == MAIN)
                programs = 1
                for size in main.grid:
                    programs *= size
                if main.key() not in held:
                    held[main.key()] = resident(resources.compile_kernel(main, 90))
                a_wave = MULTIPROCESSORS * held[main.key()]
                waves = -(-programs // a_wave)
                last = programs - (waves - 1) * a_wave
                part = last / (a_wave if waves > 1 else MULTIPROCESSORS)
                yield {
                    "model": name,
                    "batch": batch,
                    "slots": slots,
                    "programs": programs,
                    "a wave": a_wave,
                    "waves": waves,
                    "last wave": f"{min(part, 1):.0%}",
                    "met": "yes" if programs >= MULTIPROCESSORS and part >= 0.7 else "no",
                }


def measure(
    op: str, archs: tuple[int, ...], workers: int, case: str = ""
) -> Iterator[dict[str, object]]:
    """One row a distinct kernel of an op and chip; the bars of machine code on sm_90a alone."""
    jobs = []
    for arch in archs:
        seen = set()
        for label, launch in launches(op):
            if case not in label:
                continue
            for recorded in resources.record(launch, arch):
                if recorded.key() not in seen:
                    seen.add(recorded.key())
                    jobs.append((label, arch, recorded))

    def run(job: tuple[str, int, Launch]) -> dict[str, object]:
        label, arch, recorded = job
        code = resources.compile_kernel(recorded, arch)
        bad = missed(recorded, code) if arch == 90 else fits(code, arch)
        found = [loop for loop in sass.loops(code.sass) if loop.mma or loop.instructions > 40]
        return {
            "op": op,
            "case": label,
            "kernel": recorded.kernel.__name__.removesuffix("_kernel").lstrip("_"),
            "arch": f"sm_{arch}{'a' if arch == 90 else ''}",
            "warps": code.warps,
            "regs": code.registers,
            "shared": code.shared,
            "loops": " ".join(str(loop.instructions) for loop in found) or "-",
            "missed": "; ".join(f"{bar}: {value}" for bar, value in bad.items()) or "-",
            "bars": set(bad),
        }

    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(run, jobs)


def expected(kernel: str, case: str) -> set[str]:
    """The bars that a kernel is known to miss in a case."""
    known = (miss for miss in EXPECTED if miss.kernel == kernel and miss.case in case)
    return {bar for miss in known for bar in miss.bars}


@click.command()
@click.argument("ops", nargs=-1, type=click.Choice(sorted(CASES)))
@click.option("--arch", "archs", multiple=True, type=click.Choice([str(a) for a in SHARED_LIMIT]))
@click.option("--workers", default=2, show_default=True, help="Kernels compiled at a time.")
@click.option("--case", default="", help="Only cases whose label contains this.")
@click.option("--grid", "grid_alone", is_flag=True, help="Programs of window_attention, no bars.")
def main(
    ops: tuple[str, ...], archs: tuple[str, ...], workers: int, case: str, grid_alone: bool
) -> None:
    """Print the bars of the machine code; exit with 1 if one is missed without a reason."""
    if not isinstance(triton.jit(_probe), JITFunction):
        raise click.ClickException("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    console = Console(width=None if sys.stdout.isatty() else 170)
    failed = 0
    if not grid_alone:
        for op in ops or sorted(CASES):
            table = None  # one per op, printed when it is done
            for row in measure(op, tuple(map(int, archs)) or (90,), workers, case):
                wrong = row.pop("bars") - expected(row["kernel"], row["case"])
                failed += bool(wrong)
                table = table or Table(*row)
                table.add_row(*map(str, row.values()), style="red" if wrong else None)
            if table is not None:
                console.print(table)
        for miss in EXPECTED:
            console.print(f"{miss.kernel} {miss.case}: {', '.join(miss.bars)}: {miss.reason}")
    if grid_alone or not (ops or case):
        rows = list(grid())
        table = Table(*rows[0], title="window_attention: programs on 132 multiprocessors")
        for row in rows:
            table.add_row(*map(str, row.values()), style=None if row["met"] == "yes" else "red")
        console.print(table)
    sys.exit(failed > 0)


def _probe() -> None:
    """Decorated in ``main`` to see which decorator the environment gives."""


if __name__ == "__main__":
    main()
