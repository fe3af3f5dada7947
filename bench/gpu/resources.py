"""Compile every Triton kernel ahead of time, no GPU needed, and print what each one uses.

    python -m bench.gpu.resources                        # all ops, sm_80, sm_90 and sm_100
    python -m bench.gpu.resources rms_norm --arch 90     # one op, one architecture
    python -m bench.gpu.resources --summary              # every chip, a row per kernel

The launchers are called with meta tensors and the launches recorded, so what is compiled is what
the library would launch, its argument specialisation included. Exits with 1 if a kernel spills
registers or wants more shared memory than a block of that chip can have; the compiler does not
check the latter. The case "ones" of a kernel has a constant 1 for every size and stride.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import JITFunction

from bench.ops.cases import CASES
from pydllm.kernels import _tiles

# Most dynamic shared memory a block may opt in to, bytes (CUDA programming guide, compute
# capabilities).
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel, its signature, its options and its grid."""

    kernel: JITFunction
    signature: dict[str, str]
    constexprs: dict[str, object]
    attributes: dict[tuple[int], list]
    options: dict[str, int]
    grid: tuple[int, ...]

    def with_ones(self) -> Launch:
        """The same with every integer a 1, as in shapes of ones: Triton makes constants of them."""
        ones = {
            (p.num, p.name)
            for p in self.kernel.params
            if self.signature[p.name] in ("i32", "i64") and not p.do_not_specialize
        }
        names, numbers = {name for _, name in ones}, {number for number, _ in ones}
        return replace(
            self,
            signature=self.signature | dict.fromkeys(names, "constexpr"),
            constexprs=self.constexprs | dict.fromkeys(names, 1),
            attributes={at: kept for at, kept in self.attributes.items() if at[0] not in numbers},
        )

    def key(self) -> str:
        """What decides the machine code."""
        return repr((self.kernel.__name__, *(v for k, v in vars(self).items() if k != "grid")))


@dataclass(frozen=True)
class MachineCode:
    """What one launch compiles to."""

    asm: dict[str, Any]
    warps: int
    shared: int  # bytes of dynamic shared memory
    registers: int
    stack: int  # bytes

    @cached_property
    def sass(self) -> str:
        """The disassembly: a second or two, far longer than the resources take."""
        cubin = self.asm["cubin"]
        return cached("nvdisasm", cubin, lambda: _read(cubin, "nvdisasm", "-c"))

    @property
    def spills(self) -> int:
        """Loads from and stores to local memory; without a stack there is none."""
        return len(re.findall(r"\b(?:LDL|STL)\b", self.sass)) if self.stack else 0


def cached(tool: str, source: bytes, make: Callable[[], str]) -> str:
    """What a tool says of ``source``, kept in Triton's cache."""
    key = hashlib.sha256(f"{tool} {triton.__version__} ".encode() + source).hexdigest()
    cache = get_cache_manager(key)
    if (found := cache.get_file("said.txt")) is not None:
        return Path(found).read_text()
    said = make()
    cache.put(said, "said.txt", binary=False)
    return said


def _read(cubin: bytes, tool: str, flag: str) -> str:
    """What one of Triton's CUDA tools prints of a kernel."""
    if not (TOOLS / tool).exists():
        raise click.ClickException(f"Triton's wheel has {tool}, this one lacks {TOOLS / tool}")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / tool, flag, file.name]
        return subprocess.run(command, capture_output=True, text=True).stdout


def _describe(value: object, specialize: bool) -> tuple[str, bool]:
    """Triton's type of an argument, and whether the launch marks it divisible by 16."""
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype], value.storage_offset() * value.element_size() % 16 == 0
    if value is None or isinstance(value, bool) or (specialize and value == 1):
        return "constexpr", False
    if isinstance(value, int):
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), specialize and value % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    raise TypeError(f"kernel argument: expected tensor, int, float or None, got {type(value)}")


def record(launch, arch: int) -> list[Launch]:
    """Call ``launch`` and return the kernels that it would start on ``arch``."""
    recorded = []

    def run(kernel, *args, grid, warmup, **kwargs):
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        signature, constexprs, attributes = {}, {}, {}
        for index, parameter in enumerate(kernel.params):
            value = arguments.pop(parameter.name, parameter.default)
            kind, aligned = "constexpr", False
            if not parameter.is_constexpr:
                kind, aligned = _describe(value, not parameter.do_not_specialize)
            signature[parameter.name] = kind
            if kind == "constexpr":
                constexprs[parameter.name] = value
            elif aligned:
                attributes[index,] = [["tt.divisibility", 16]]
        recorded.append(Launch(kernel, signature, constexprs, attributes, arguments, tuple(grid)))

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(_tiles, "arch", lambda device: arch),
    ):
        launch()
    return recorded


def compile_kernel(launch: Launch, arch: int) -> MachineCode:
    """Compile one launch for ``arch`` with the options that the library launches it with."""
    source = ASTSource(
        launch.kernel, launch.signature, constexprs=launch.constexprs, attrs=launch.attributes
    )
    target = GPUTarget("cuda", arch, 32)
    compiled = triton.compile(source, target=target, options=dict(launch.options))
    cubin = compiled.asm["cubin"]
    usage = cached("cuobjdump", cubin, lambda: _read(cubin, "cuobjdump", "-res-usage"))
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource line for {launch.kernel.__name__}")
    registers, stack, _, local = map(int, found.groups())
    metadata = compiled.metadata
    return MachineCode(compiled.asm, metadata.num_warps, metadata.shared, registers, stack + local)


def compile_launch(launch: Launch, arch: int) -> dict[str, object]:
    """The resources of one launch, read from its machine code."""
    code = compile_kernel(launch, arch)
    units = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma.sync": "mma.sync"}
    return {
        "kernel": launch.kernel.__name__,
        "warps": code.warps,
        "registers": code.registers,
        "spills": code.spills,
        "stack": code.stack,
        "shared": code.shared,
        "tensor_cores": next((n for n, mark in units.items() if mark in code.asm["ptx"]), "-"),
    }


def rows(
    ops: tuple[str, ...], archs: tuple[int, ...], workers: int, every: int
) -> Iterator[dict[str, object]]:
    """One row per distinct specialisation, of each op every ``every``-th: its resources."""
    jobs = []
    for op in ops:
        for arch in archs:
            seen: dict[str, tuple[str, str, int, Launch]] = {}
            for label, launch in CASES[op].launches():
                for recorded in record(launch, arch):
                    seen.setdefault(recorded.key(), (op, label, arch, recorded))
            # The first launch of each kernel once more, for shapes of ones.
            kernels = {}
            for job in seen.values():
                kernels.setdefault(job[3].kernel.__name__, (op, "ones", arch, job[3].with_ones()))
            jobs += [*[*seen.values()][::every], *kernels.values()]
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(lambda job: compile_launch(job[3], job[2]), jobs)
        for (op, label, arch, _), result in zip(jobs, results, strict=True):
            # Of shapes of ones it matters that they compile.
            spilled = result["spills"] and label != "ones"
            fits = not spilled and result["shared"] <= SHARED_LIMIT[arch]
            yield {"op": op, "case": label, "arch": f"sm_{arch}", **result, "ok": fits}


def most_of_each(found: Iterable[dict[str, object]]) -> Iterator[dict[str, object]]:
    """A row per kernel and chip: the most registers, spills and bytes of its cases."""
    kernels: dict[tuple[object, ...], dict[str, Any]] = {}
    for row in found:
        key = row["op"], row["kernel"], row["arch"]
        most = kernels.setdefault(
            key, dict(zip(("op", "kernel", "arch"), key, strict=True)) | {"cases": 0}
        )
        most["cases"] += 1
        for name in ("registers", "spills", "shared"):
            most[name] = max(most.get(name, 0), row[name])
        most["ok"] = most.get("ok", True) and row["ok"]
    yield from kernels.values()


@click.command()
@click.argument("ops", nargs=-1, type=click.Choice(sorted(CASES)))
@click.option("--arch", "archs", multiple=True, type=click.Choice([str(a) for a in SHARED_LIMIT]))
@click.option("--workers", default=2, show_default=True, help="Kernels compiled at a time.")
@click.option("--every", default=1, show_default=True, help="Compile every N-th kernel of an op.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@click.option("--summary", is_flag=True, help="A row per kernel, with the most of its cases.")
def main(
    ops: tuple[str, ...],
    archs: tuple[str, ...],
    workers: int,
    every: int,
    as_json: bool,
    summary: bool,
) -> None:
    """Print the resources of every Triton kernel; exit with 1 if one spills or does not fit."""
    if not isinstance(triton.jit(_probe), JITFunction):
        raise click.ClickException("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    chosen = tuple(int(a) for a in archs) or (tuple(SHARED_LIMIT) if summary else (80, 90, 100))
    table, failed = None, 0
    found = rows(ops or tuple(sorted(CASES)), chosen, workers, every)
    if summary:
        found = most_of_each(row for row in found if row["case"] != "ones")
    for row in found:
        failed += not row["ok"]
        if as_json:
            print(json.dumps(row), flush=True)
            continue
        if table is None:
            table = Table(*row)
        table.add_row(*(str(value) for value in row.values()), style=None if row["ok"] else "red")
    if table is not None:
        Console(width=None if sys.stdout.isatty() else 160).print(table)
    sys.exit(failed > 0)


def _probe() -> None:
    """Decorated in ``main`` to see which decorator the environment gives."""


if __name__ == "__main__":
    main()
