"""Compile csrc/ for each architecture, no GPU needed, and print what each CUDA kernel uses.

    python -m bench.gpu.cuda_resources                       # every file, sm_80 to sm_120
    python -m bench.gpu.cuda_resources rms_norm --arch 90a   # one file, one architecture
    python -m bench.gpu.cuda_resources --wheels              # build time and size of wheels instead

Occupancy is the part of a multiprocessor's threads that can be resident, by registers, threads,
blocks and static shared memory; what a launch asks for as dynamic shared memory comes on top. Exits
with 1 if a kernel spills registers. Needs nvcc, and Triton for its cuobjdump.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import click
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path.stem for path in (ROOT / "csrc").glob("*.cu"))
BUILT_FROM = ("csrc", "kernels", "pydllm", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml")


class Multiprocessor(NamedTuple):
    """What the blocks on one share (CUDA programming guide, compute capabilities)."""

    threads: int
    blocks: int
    shared: int  # bytes
    registers: int = 65536


ARCHS = {
    "80": Multiprocessor(2048, 32, 164 * 1024),
    "86": Multiprocessor(1536, 16, 100 * 1024),
    "89": Multiprocessor(1536, 24, 100 * 1024),
    "90a": Multiprocessor(2048, 32, 228 * 1024),
    "100": Multiprocessor(2048, 32, 228 * 1024),
    "120": Multiprocessor(1536, 24, 100 * 1024),
}
RESERVED = 1024  # bytes of shared memory that the system takes of each block


def occupancy(arch: str, registers: int, threads: int, shared: int) -> float:
    """Resident threads of a kernel, as a part of those that a multiprocessor can have."""
    limits = ARCHS[arch]
    warps = -(-threads // 32)
    of_warp = -(-registers // 8) * 8 * 32
    by_registers = limits.registers // of_warp // 4 * 4 // warps
    by_shared = limits.shared // (shared + RESERVED)
    blocks = min(limits.blocks, limits.threads // (32 * warps), by_registers, by_shared)
    return 32 * warps * blocks / limits.threads


def parse(report: str, elf: str) -> list[dict[str, int | str]]:
    """One row a kernel from what ``nvcc -Xptxas=-v`` and ``cuobjdump -elf`` print."""
    threads = {}
    for section in elf.split(".nv.info.")[1:]:
        if found := re.search(
            r"EIATTR_MAX_THREADS\s+Format:\s+\S+\s+Value:\s+(0x[0-9a-f]+)", section
        ):
            threads.setdefault(section.split()[0], int(found[1], 16))
    kernels = []
    for part in report.split("Compiling entry function ")[1:]:
        name = part.split("'")[1]
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        if spills is None or used is None:
            raise RuntimeError(f"nvcc reports no registers for {name}")
        kernels.append(
            {
                "kernel": name,
                "registers": int(used[1]),
                "spills": int(spills[1]) + int(spills[2]),
                "shared": int(shared[1]) if shared else 0,
                "threads": threads.get(name, 1024),
            }
        )
    return kernels


def nvcc() -> str:
    for path in ("/usr/local/cuda/bin/nvcc", shutil.which("nvcc")):
        if path and Path(path).exists():
            return path
    raise click.ClickException("nvcc was not found: install the CUDA toolkit")


def cuobjdump() -> Path:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        raise click.ClickException("cuobjdump comes with Triton: pip install 'triton>=3.6'")
    return Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"


def compile_file(source: str, arch: str) -> list[dict[str, int | str | float]]:
    """Rows of one file for one architecture."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/x.cubin"
        command = [nvcc(), "-std=c++17", "-O3", f"-arch=sm_{arch}", "-Xptxas=-v", "-cubin"]
        command += ["-Werror=all-warnings"]
        command += [str(ROOT / "csrc" / f"{source}.cu"), "-o", cubin]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise click.ClickException(done.stderr)
        elf = subprocess.run([cuobjdump(), "-elf", cubin], capture_output=True, text=True).stdout
    rows = []
    for row in parse(done.stdout + done.stderr, elf):
        used = (int(row["registers"]), int(row["threads"]), int(row["shared"]))
        part = round(occupancy(arch, *used), 2)
        name = readable(str(row["kernel"]))
        rows.append(
            {"file": source, "arch": f"sm_{arch}", **row, "kernel": name, "occupancy": part}
        )
    return rows


def readable(name: str) -> str:
    """``rms_norm_kernel<float, 128, 1>`` from the linker's name, where c++filt is installed."""
    if shutil.which("c++filt") is None:
        return name
    shown = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip()
    shown = re.sub(r"^void |pydllm::|\(anonymous namespace\)::|\([A-Za-z_ ]+\)(?=[\d-])", "", shown)
    return shown[: shown.rfind("(")] if shown.endswith(")") else shown


def wheels(archs: tuple[str, ...]) -> Iterator[dict[str, object]]:
    """Build a wheel for each of ``archs``, one for all, and time it."""
    with tempfile.TemporaryDirectory() as folder:
        for name in (*BUILT_FROM, "setup.py"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            options = {"symlinks": True} if copy is shutil.copytree else {}
            copy(ROOT / name, Path(folder, name), **options)
        for chosen in dict.fromkeys((*archs, ";".join(archs))):
            shutil.rmtree(f"{folder}/build", ignore_errors=True)
            environment = os.environ | {"PYDLLM_CUDA_ARCHS": chosen, "PYDLLM_BUILD_CUDA": "1"}
            out = Path(folder, "dist", chosen.replace(";", "_"))
            command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps"]
            command += ["--no-build-isolation", "-w", str(out), folder]
            begin = time.perf_counter()
            subprocess.run(command, check=True, env=environment)
            seconds = time.perf_counter() - begin
            (wheel,) = out.glob("*.whl")
            (library,) = Path(folder, "build").glob("lib*/pydllm/_C*.so")
            yield {
                "archs": chosen,
                "wheel": wheel.name,
                "wheel_kib": wheel.stat().st_size // 1024,
                "extension_kib": library.stat().st_size // 1024,
                "seconds": round(seconds, 1),
            }


@click.command()
@click.argument("files", nargs=-1, type=click.Choice(SOURCES))
@click.option("--arch", "archs", multiple=True, type=click.Choice(list(ARCHS)))
@click.option("--workers", default=2, show_default=True, help="Compilers at a time.")
@click.option("--wheels", "of_wheels", is_flag=True, help="Build wheels: their size and time.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def main(
    files: tuple[str, ...], archs: tuple[str, ...], workers: int, of_wheels: bool, as_json: bool
) -> None:
    """Print the resources of every CUDA kernel; exit with 1 if one spills."""
    archs = archs or tuple(ARCHS)
    table, failed = None, 0

    def rows() -> Iterator[dict[str, object]]:
        if of_wheels:
            yield from wheels(archs)
            return
        jobs = [(source, arch) for source in files or SOURCES for arch in archs]
        with ThreadPoolExecutor(workers) as pool:
            for found in pool.map(lambda job: compile_file(*job), jobs):
                yield from found

    for row in rows():
        spills = bool(row.get("spills"))
        failed += spills
        if as_json:
            print(json.dumps(row), flush=True)
            continue
        if table is None:
            table = Table(*row)
        table.add_row(*(str(value) for value in row.values()), style="red" if spills else None)
    if table is not None:
        Console(width=None if sys.stdout.isatty() else 160).print(table)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
