"""Time the ops against each other, the reference and what else there is.

    python -m bench.ops --list
    python -m bench.ops vocab_stats --backend triton --backend torch --dtype bf16 --device cuda
    python -m bench.ops rms_norm --csv bench/results/h100.csv
    python -m bench.ops linear swiglu --plot out/roofline.png --json > results.jsonl
    python -m bench.ops unmask --base main~3        # the same on an older commit, and the ratio

Every case is checked against fp64 before it is timed; one that is wrong prints ✗ and no time.
"""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import click
import torch
from rich.console import Console
from rich.table import Table

from bench.ops.cases import CASES
from bench.ops.plot import draw
from bench.ops.timing import copy_rate, matmul_rate, time_calls
from pydllm._backend.errors import BackendError
from pydllm.testing import error_budget, max_error

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
COLUMNS = (
    *("op", "shape", "dtype", "backend", "resolved_backend", "ms_p20", "ms_p50", "ms_p80"),
    *("gbps", "peak_frac", "gpu", "driver", "torch", "triton", "cuda", "commit", "command", "date"),
)
REPOSITORY = Path(__file__).resolve().parents[2]


def _tensors(result: object) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else [t for t in result if t is not None]


def copied(inputs: dict, dtype: torch.dtype | None = None) -> dict:
    def copy(value):
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(dtype, copy=True) if dtype and value.is_floating_point() else value.clone()

    return {name: copy(value) for name, value in inputs.items()}


def is_right(
    case: ModuleType, inputs: dict, function: Callable[[dict], object], *, strict: bool
) -> bool:
    """Whether the outputs are as near to fp64 as plain torch's, integers equal.

    Not ``strict``, for baselines: floats to three digits, since others may be less exact.
    """
    exact = _tensors(case.call(copied(inputs, torch.float64), "torch"))
    plain = _tensors(case.call(copied(inputs), "torch"))
    got = _tensors(function(copied(inputs)))
    for one, want, same_dtype in zip(got, exact, plain, strict=False):
        if one.is_floating_point():
            budget = error_budget(want.cpu(), same_dtype.cpu())
            loose = budget + 1e-3 * want.abs().max().item() if want.numel() else 0.0
            if max_error(one.cpu(), want.cpu()) > (budget if strict else loose):
                return False
        elif strict and not torch.equal(one.cpu(), same_dtype.cpu()):
            return False
    return True


def shapes(case: ModuleType, grid: bool) -> dict[str, dict]:
    """The named shapes of a case, with ``grid`` those of its large grid too, if it has one."""
    return (getattr(case, "GRID", {}) if grid else {}) | case.SHAPES


def measure(
    op: str,
    backends: tuple[str, ...],
    dtype: str,
    device: str,
    shape: str | None,
    seconds: float,
    grid: bool = False,
) -> Iterator[dict[str, object]]:
    """One row per shape and backend or baseline."""
    case = CASES[op]
    count = getattr(case, "operations", lambda inputs: None)
    peak = copy_rate(device)
    for name, sizes in shapes(case, grid).items():
        if shape is not None and shape not in name:
            continue
        inputs = case.make(DTYPES[dtype], device, **sizes)
        contenders: dict[str, Callable[[dict], object]] = {
            backend: lambda inputs, backend=backend: case.call(inputs, backend)
            for backend in backends
        }
        contenders |= {label: make() for label, make in case.BASELINES.items()}
        for label, function in contenders.items():
            row = {"op": op, "shape": name, "dtype": dtype, "backend": label}
            row["resolved_backend"] = label if label in backends else ""
            row |= {"bytes": case.bytes_moved(inputs), "operations": count(inputs)}
            try:
                right = is_right(case, inputs, function, strict=label in backends)
            except Exception as error:
                # Whatever a baseline raises, the run goes on.
                known = isinstance(error, BackendError)
                if label in backends and not known:
                    raise
                reason = str(error) if known else f"{type(error).__name__}: {error}"
                yield row | {"note": reason.partition("\n")[0]}
                continue
            if not right:
                yield row | {"note": "✗ too far from fp64"}
                continue
            timing = time_calls(function, partial(copied, inputs), device, seconds=seconds)
            rate = row["bytes"] / (timing.p50 * 1e-3)
            row |= {"ms_p20": timing.p20, "ms_p50": timing.p50, "ms_p80": timing.p80}
            yield row | {"gbps": rate / 1e9, "peak_frac": rate / peak}


def provenance(device: str) -> dict[str, str]:
    def run(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
        except FileNotFoundError:
            return ""
        return done.stdout.strip().splitlines()[0] if done.stdout.strip() else ""

    on_gpu = device.startswith("cuda")
    try:
        triton_version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton_version = ""
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu else f"cpu {platform.machine()}",
        "driver": run(*query) if on_gpu else "",
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda or "",
        "commit": run("git", "rev-parse", "--short", "HEAD"),
        "command": "python -m bench.ops " + " ".join(sys.argv[1:]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def _print(rows: list[dict], base: dict[tuple, float] | None) -> None:
    table = Table("op", "shape", "dtype", "backend", "ms p50", "p20 - p80", "GB/s", "of copy rate")
    if base is not None:
        table.add_column("base / this")
    for row in rows:
        cells = [row["op"], row["shape"], row["dtype"], row["backend"]]
        if "note" in row:
            table.add_row(*cells, row["note"])
            continue
        cells += [f"{row['ms_p50']:.4f}", f"{row['ms_p20']:.4f} - {row['ms_p80']:.4f}"]
        cells += [f"{row['gbps']:.1f}", f"{row['peak_frac']:.2f}"]
        if base is not None:
            before = base.get((row["op"], row["shape"], row["dtype"], row["backend"]))
            cells.append("-" if before is None else f"{before / row['ms_p50']:.2f}x")
        table.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _print_json(rows: list[dict], base: dict[tuple, float] | None, origin: dict[str, str]) -> None:
    for row in rows:
        key = (row["op"], row["shape"], row["dtype"], row["backend"])
        older = {} if base is None else {"base_ms_p50": base.get(key)}
        click.echo(json.dumps(row | older | origin))


def _append(rows: list[dict], origin: dict[str, str], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    new = not file.exists()
    with file.open("a", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS, extrasaction="ignore")
        if new:
            writer.writeheader()
        writer.writerows(row | origin for row in rows)


def _run_base(reference: str, arguments: list[str]) -> dict[tuple, float]:
    """Run the same command on another commit, in a worktree of its own; p50 by case."""
    with tempfile.TemporaryDirectory() as folder:
        tree, results = Path(folder) / "tree", Path(folder) / "base.csv"
        add = ["git", "worktree", "add", "--detach", str(tree), reference]
        subprocess.run(add, cwd=REPOSITORY, check=True, capture_output=True)
        try:
            command = [sys.executable, "-m", "bench.ops", *arguments, "--csv", str(results)]
            # `env` rather than os.environ: the worktree's package has to win over an installed one.
            subprocess.run(["env", f"PYTHONPATH={tree}", *command], cwd=tree, check=True)
            with results.open() as file:
                return {
                    (r["op"], r["shape"], r["dtype"], r["backend"]): float(r["ms_p50"])
                    for r in csv.DictReader(file)
                    if r["ms_p50"]
                }
        finally:
            remove = ["git", "worktree", "remove", "--force", str(tree)]
            subprocess.run(remove, cwd=REPOSITORY, check=True, capture_output=True)


@click.command()
@click.argument("ops", metavar="[OP]...", nargs=-1, type=click.Choice(sorted(CASES)))
@click.option("--list", "list_cases", is_flag=True, help="Print the ops and shapes; then exit.")
@click.option(
    "--backend", "backends", multiple=True, type=click.Choice(["cuda", "triton", "torch"])
)
@click.option(
    "--dtype", type=click.Choice(sorted(DTYPES)), help="Default: bf16 on cuda, else fp32."
)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--shape", help="Only shapes whose name contains this.")
@click.option("--grid", is_flag=True, help="The op's large grid of shapes too, if it has one.")
@click.option("--seconds", default=0.5, show_default=True, help="Time spent on each measurement.")
@click.option(
    "--csv", "csv_file", type=click.Path(path_type=Path), help="Append rows to this file."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per row, and no table.")
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Draw a roofline to this file, one per op."
)
@click.option("--base", help="A commit to compare with.")
def main(
    ops: tuple[str, ...],
    list_cases: bool,
    backends: tuple[str, ...],
    dtype: str | None,
    device: str,
    shape: str | None,
    grid: bool,
    seconds: float,
    csv_file: Path | None,
    as_json: bool,
    plot: Path | None,
    base: str | None,
) -> None:
    """Time ops; without a name all of them."""
    if list_cases:
        for name, case in sorted(CASES.items()):
            click.echo(f"{name}: {', '.join(case.SHAPES)} (baselines: {', '.join(case.BASELINES)})")
        return
    on_gpu = device.startswith("cuda")
    backends = backends or (("cuda", "triton", "torch") if on_gpu else ("torch",))
    dtype = dtype or ("bf16" if on_gpu else "fp32")
    names = ops or tuple(sorted(CASES))
    found = [op for op in names if any((shape or "") in n for n in shapes(CASES[op], grid))]
    if not found:
        raise click.BadParameter(
            f"no shape of {', '.join(names)} contains {shape!r}", param_hint="--shape"
        )
    origin, wrong = provenance(device), False
    for op in found:
        rows = list(measure(op, backends, dtype, device, shape, seconds, grid))
        before = None
        if base is not None:
            arguments = [op, "--dtype", dtype, "--device", device, "--seconds", str(seconds)]
            arguments += [part for name in backends for part in ("--backend", name)]
            arguments += [] if shape is None else ["--shape", shape]
            arguments += ["--grid"] if grid else []
            before = _run_base(base, arguments)
        if as_json:
            _print_json(rows, before, origin)
        else:
            _print(rows, before)
        if plot is not None:
            file = plot if len(found) == 1 else plot.with_name(f"{op}-{plot.name}")
            if any("ms_p50" in row for row in rows):
                draw(rows, copy_rate(device), matmul_rate(device, DTYPES[dtype]), file)
        if csv_file is not None:
            _append(rows, origin, csv_file)
        wrong |= any("✗" in str(row.get("note", "")) for row in rows)
    if wrong:
        raise click.ClickException("a case is further from fp64 than plain torch")


if __name__ == "__main__":
    main()
