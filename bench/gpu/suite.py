"""Everything that needs a GPU, one command, in parts that are taken up where they stopped.

    python -m bench.gpu                     # all parts, as far as nine minutes go; then again
    python -m bench.gpu first               # what decides most, in six minutes
    python -m bench.gpu tests               # build, tests, sanitize, micro or e2e alone
    python -m bench.gpu --dry               # no GPU: collect the tests, compile, list the jobs
    python -m bench.gpu report              # tables and plots of what there is

A part is a list of jobs, each a command with a log. What a job did is kept in
``bench/results/<gpu>/state.json`` with the commit; a job that succeeded on this commit is not run
again. Exit status: 0 all done, 1 per job failed, 3 nothing failed and jobs are left (run it again).
"""

from __future__ import annotations

import compileall
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch

BENCH = Path(__file__).resolve().parents[1]
ROOT = BENCH.parent
PARTS = ("first", "build", "tests", "sanitize", "micro", "e2e")
BUDGET = 520  # seconds that jobs are started or run in, a call
MODELS = ("llada-8b", "dream-7b", "sdar-8b")
# (batch, prompt): from one short prompt to a batch, and to a long one.
SHAPES = ((1, 128), (1, 1024), (8, 1024), (32, 512), (1, 8192))
SANITIZED = (
    ("memcheck", "tests/ops/test_unmask_ending.py"),
    ("memcheck", "tests/ops/test_verify.py"),
    ("memcheck", "tests/ops/test_vocab_stats.py"),
    ("racecheck", "tests/ops/test_unmask_ending.py"),
)
# Plugins are not needed: neither xdist nor a cache of results.
PYTEST = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:xdist", "-p", "no:cacheprovider")


@dataclass(frozen=True)
class Job:
    """A command, and the seconds it may take."""

    name: str
    command: tuple[str, ...]
    limit: int
    environment: dict[str, str] = field(default_factory=dict)
    needs: str | None = None  # a program without which it is skipped


def python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)


def arch_of(capability: tuple[int, int]) -> str:
    """The name that ``PYDLLM_CUDA_ARCHS`` has for a compute capability."""
    number = 10 * capability[0] + capability[1]
    return "90a" if number == 90 else str(number)


def jobs(part: str, out: Path, arch: str) -> list[Job]:
    """What a part consists of."""
    if part == "first":
        command = python("-m", "bench.gpu.first", "--out", str(out), "--seconds", "345")
        return [Job("first", command, 360)]
    if part == "build":
        environment = {"PYDLLM_BUILD_CUDA": "1", "PYDLLM_CUDA_ARCHS": arch}
        check = (
            "from pydllm._backend import cuda; print(cuda.archs()); "
            "raise SystemExit(cuda.available() or 0)"
        )
        return [
            Job("build", python("setup.py", "build_ext", "--inplace"), 500, environment, "nvcc"),
            Job("build-loads", python("-c", check), 60),
        ]
    if part == "tests":
        on = {"PYDLLM_TEST_GPU": "1"}
        files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if has_gpu(path)]
        names = [str(path.relative_to(ROOT)) for path in files]
        return [Job(f"tests {name}", python(*PYTEST, name), 500, on) for name in names]
    if part == "sanitize":
        on = {"PYDLLM_TEST_GPU": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        found = []
        for tool, file in SANITIZED:
            command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1")
            command += python(*PYTEST, file)
            found.append(Job(f"{tool} {file}", command, 300, on, "compute-sanitizer"))
        return found
    if part == "micro":
        table = str(out / "ops.csv")
        ops = sorted(path.stem for path in (BENCH / "ops/cases").glob("[a-z]*.py"))
        run = ("--device", "cuda", "--seconds", "0.2", "--csv", table)
        return [Job(f"micro {op}", python("-m", "bench.ops", op, *run), 300) for op in ops]
    found = []
    for model in MODELS:
        for batch, prompt in SHAPES:
            name = f"e2e {model} batch {batch} prompt {prompt}"
            command = python("-m", "bench.steps", "--device", "cuda", "--model", model)
            command += ("--batch", str(batch), "--prompt", str(prompt), "--new", "64")
            command += ("--csv", str(out / "steps.csv"))
            command += ("--plot", str(out / f"steps-{model}-{batch}-{prompt}.png"))
            found.append(Job(name, command, 400))
    for algorithm in ("static", "freedave", "apd", "multiblock"):
        command = python("-m", "bench.decode", "--device", "cuda", "--model", "llada-8b")
        command += ("--algorithm", algorithm, "--csv", str(out / f"decode-{algorithm}.csv"))
        command += ("--compiled", "inductor") if algorithm == "static" else ()
        found.append(Job(f"e2e decode {algorithm}", command, 400))
    return found


def has_gpu(path: Path) -> bool:
    return bool(re.search(r"mark\.gpu\b", path.read_text()))


class Ledger:
    """What the jobs of this commit came to."""

    def __init__(self, out: Path) -> None:
        self._file, self.logs = out / "state.json", out / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        known = json.loads(self._file.read_text()) if self._file.exists() else {}
        self.commit = _commit()
        self.jobs: dict[str, dict[str, Any]] = (
            known.get("jobs", {}) if known.get("commit") == self.commit else {}
        )

    def note(self, name: str, status: str, seconds: float) -> None:
        self.jobs[name] = {"status": status, "seconds": round(seconds, 1)}
        self._file.write_text(json.dumps({"commit": self.commit, "jobs": self.jobs}, indent=1))

    def status(self, name: str) -> str:
        return self.jobs.get(name, {}).get("status", "to do")


def _commit() -> str:
    command = ("git", "describe", "--always", "--dirty", "--abbrev=12")
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def run(job: Job, ledger: Ledger, seconds: float) -> str:
    """Run a job for at most so long; returns what became of it."""
    if job.needs is not None and shutil.which(job.needs) is None and not _toolkit(job.needs):
        ledger.note(job.name, "skipped", 0.0)
        return f"skipped: no {job.needs} here"
    log = ledger.logs / (re.sub(r"[^\w.-]+", "-", job.name) + ".log")
    started = time.monotonic()
    environment = _importable() | job.environment
    if job.needs and (folder := _toolkit(job.needs)):
        environment["PATH"] = f"{folder}{os.pathsep}{environment['PATH']}"
    with log.open("w") as file:
        file.write(" ".join(job.command) + "\n")
        file.flush()
        try:
            done = subprocess.run(
                job.command,
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=min(job.limit, seconds),
            )
            # pytest exits with 5 where no test is left after selection.
            good = done.returncode in ((0, 5) if "pytest" in job.command else (0,))
            status = "ok" if good else f"failed ({done.returncode})"
        except subprocess.TimeoutExpired:
            # Cut off by the budget, not by its own limit: to be run again, with all of the budget.
            status = "too long" if job.limit <= seconds else "to do"
    ledger.note(job.name, status, time.monotonic() - started)
    return status


def _importable() -> dict[str, str]:
    """The environment of a command that imports the checkout."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return dict(os.environ) | {"PYTHONPATH": path}


def _toolkit(program: str) -> str | None:
    folder = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    return str(folder) if (folder / program).exists() else None


def dry(parts: tuple[str, ...], out: Path) -> int:
    """What can be told without a GPU; returns the exit status."""
    bad = 0
    if not compileall.compile_dir(BENCH, quiet=1, force=True):
        bad = 1
    for part in parts:
        for job in jobs(part, out, "90a"):
            missing = not _exists(job.command)
            bad |= missing
            click.echo(
                f"{part}: {' '.join(job.command[1:])}{'  (no such file)' if missing else ''}"
            )
    if "first" in parts:
        command = python("-m", "bench.gpu.first", "--dry", "--seconds", "345", "--out", str(out))
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=_importable())
        click.echo(done.stdout + done.stderr[-500:])
        bad |= done.returncode != 0
    if "tests" in parts:
        command = python("-m", "pytest", "--collect-only", "-q", "-m", "gpu", "tests")
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        click.echo((done.stdout.strip().splitlines() or [done.stderr.strip()])[-1])
        bad |= done.returncode != 0
    if "build" in parts:
        if shutil.which("nvcc") is None and not _toolkit("nvcc"):
            click.echo("csrc is not compiled: no nvcc here")
        else:
            click.echo("csrc for sm_90a: nvcc compiles it, which takes minutes (PART=tests: not)")
            bad |= not compiles("90a")
    return int(bad)


def _exists(command: tuple[str, ...]) -> bool:
    """Whether the module of this repository, or the script, that a command runs is there."""
    script = next((word for word in command[1:] if word.endswith(".py")), None)
    module = command[2].replace(".", "/") if command[1] == "-m" else ""
    if module.startswith("bench"):
        return (ROOT / f"{module}.py").exists() or (ROOT / module / "__main__.py").exists()
    return script is None or (ROOT / script).exists()


def compiles(arch: str) -> bool:
    """Whether csrc/ compiles for an architecture; nothing is left behind."""
    with tempfile.TemporaryDirectory() as folder:
        command = python("setup.py", "build_ext", "--build-lib", folder, "--build-temp", folder)
        environment = dict(os.environ) | {"PYDLLM_BUILD_CUDA": "1", "PYDLLM_CUDA_ARCHS": arch}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        built = [path.name for path in Path(folder).rglob("_C*")]
    click.echo(f"csrc for sm_{arch}: {', '.join(built) or done.stderr.strip()[-500:]}")
    return done.returncode == 0 and bool(built)


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open())) if path.exists() else []


def report(out: Path) -> str:
    """The results as Markdown: ops against the best of their baselines, steps against the floor."""
    lines = []
    best: dict[tuple, dict[str, float]] = {}
    for row in rows_of(out / "ops.csv"):
        if row["ms_p50"]:
            key = (row["op"], row["shape"], row["dtype"])
            best.setdefault(key, {})[row["backend"]] = float(row["ms_p50"])
    if best:
        lines += ["| op | shape | dtype | cuda ms | triton ms | best baseline ms | ratio |"]
        lines += ["|---|---|---|---:|---:|---:|---:|"]
    for (op, shape, dtype), times in sorted(best.items()):
        ours = {name: times[name] for name in ("cuda", "triton") if name in times}
        rest = {name: t for name, t in times.items() if name not in ("cuda", "triton")}
        if not ours or not rest:
            continue
        name = min(rest, key=lambda name: rest[name])
        cells = [
            op,
            shape,
            dtype,
            *(f"{ours[k]:.4f}" if k in ours else "" for k in ("cuda", "triton")),
        ]
        ratio = rest[name] / min(ours.values())
        lines.append(
            "| " + " | ".join([*cells, f"{rest[name]:.4f} ({name})", f"{ratio:.2f}x"]) + " |"
        )
    steps = [row for row in rows_of(out / "steps.csv") if row["floor_ms"]]
    if steps:
        lines += ["", "| model | batch | prompt | algorithm | rows | ms | floor ms | of floor |"]
        lines += ["|---|---:|---:|---|---:|---:|---:|---:|"]
    widest: dict[tuple, dict[str, str]] = {}
    for row in steps:  # the step that was taken most often stands for its algorithm
        key = (row["model"], int(row["batch"]), int(row["prompt"]), row["algorithm"])
        if int(row["count"]) >= int(widest.get(key, row)["count"]):
            widest[key] = row
    for key, row in sorted(widest.items()):
        numbers = [f"{float(row[name]):.2f}" for name in ("ms_p50", "floor_ms", "of_floor")]
        lines.append("| " + " | ".join([*map(str, key), row["rows"], *numbers]) + " |")
    if rows := (rows_of(out / "steps.csv") or rows_of(out / "ops.csv")):
        row = rows[-1]
        facts = [
            f"{name} {row[name]}" for name in ("torch", "triton", "cuda", "commit") if row[name]
        ]
        lines += ["", f"{row['gpu']}, {', '.join(facts)}, {row['date']}; `make gpu`."]
    return "\n".join(lines)


def insert(readme: Path, table: str) -> None:
    """Put the table between the markers of a README."""
    begin, end = "<!-- gpu results -->", "<!-- end of gpu results -->"
    text = readme.read_text()
    if begin not in text or end not in text:
        raise click.ClickException(f"{readme}: expected the lines {begin!r} and {end!r}")
    before, rest = text.split(begin, 1)
    readme.write_text(f"{before}{begin}\n\n{table}\n\n{end}{rest.split(end, 1)[1]}")


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice([*PARTS, "report"]))
@click.option("--dry", "is_dry", is_flag=True, help="List and check the jobs; needs no GPU.")
@click.option("--out", type=click.Path(path_type=Path), help="Default: bench/results/<gpu>.")
@click.option("--readme", type=click.Path(path_type=Path), help="Put the report's table into it.")
@click.option("--budget", default=BUDGET, show_default=True, help="Seconds.")
def main(
    parts: tuple[str, ...], is_dry: bool, out: Path | None, readme: Path | None, budget: int
) -> None:
    """Build, test, check and time on the GPU of this machine."""
    if parts == ("report",):
        folders = [out] if out else sorted((BENCH / "results").glob("*/"))
        table = "\n\n".join(filter(None, map(report, folders)))
        notes = [path.read_text() for folder in folders for path in folder.glob("first.md")]
        click.echo("\n".join(notes))
        if not table:
            raise click.ClickException("no results yet: run make gpu on a machine with a GPU")
        click.echo(table)
        if readme is not None:
            insert(readme, table)
        return
    if "report" in parts:
        raise click.UsageError("report: expected alone")
    parts = parts or PARTS
    if is_dry:
        sys.exit(dry(parts, out or BENCH / "results" / "gpu"))
    if not torch.cuda.is_available():
        raise click.ClickException("expected a CUDA device, torch finds none (--dry needs none)")
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()).strip("-")
    out = out or BENCH / "results" / name
    out.mkdir(parents=True, exist_ok=True)
    ledger, stop, left, failed = Ledger(out), time.monotonic() + budget, 0, 0
    arch = arch_of(torch.cuda.get_device_capability())
    for part in parts:
        for job in jobs(part, out, arch):
            status = ledger.status(job.name)
            if status not in ("ok", "skipped"):
                remaining = stop - time.monotonic()
                # A job that was not worth starting now has the whole budget in the next call.
                if remaining < min(30, budget / 4):
                    left += 1
                    continue
                status = run(job, ledger, remaining)
                click.echo(f"{job.name}: {status}")
            left += status == "to do"
            failed += status.startswith(("failed", "too long"))
    click.echo(f"{failed} failed, {left} left; {out}")
    if not left and not failed:
        click.echo(report(out))
    sys.exit(1 if failed else 3 if left else 0)


if __name__ == "__main__":
    main()
