"""Every Triton kernel, at every tile row, compiles for real GPUs without spilling.

In a process of its own: under TRITON_INTERPRET, which the other tests set, kernels are Python.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
MAIN = "_window_attention_kernel"
OPS = sorted(path.stem for path in (REPOSITORY / "kernels").glob("[!_]*.py"))
# Tensor cores, and with them registers and shared memory, are those of an architecture. The code
# of the other ops is much the same on all. A sample: `make aot` compiles all kernels for each.
TENSOR_CORES = ["head_stats", "linear", "window_attention"]
MANY = ["experts", "unmask", "vocab_stats", "window_attention"]  # kernels
REST = [op for op in OPS if op not in MANY]
# Ops, architectures, every N-th kernel; a process for several ops, since it starts slowly.
CASES = [
    (MANY[::2], ["90"], 3),
    (MANY[1::2], ["90"], 3),
    (REST, ["90"], 3),
    (TENSOR_CORES, ["80", "100"], 5),
]


def compiled(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(REPOSITORY)
    return subprocess.run(
        [sys.executable, "-m", "bench.gpu.resources", *arguments, "--json"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=580,
    )


@pytest.mark.slow
@pytest.mark.parametrize("ops, archs, every", CASES)
def test_kernels_compile_and_fit(ops, archs, every):
    chosen = [word for arch in archs for word in ("--arch", arch)]
    done = compiled(*ops, *chosen, "--every", str(every))
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    bad = [row for row in rows if not row["ok"]]
    assert done.returncode == 0, f"{bad}\n{done.stderr[-2000:]}"
    expected = {(op, f"sm_{arch}") for op in ops for arch in archs}
    assert {(row["op"], row["arch"]) for row in rows} == expected
    assert all(row["spills"] == 0 for row in rows if row["case"] != "ones")
    if "window_attention" in ops and archs == ["90"]:  # its 64-row tiles
        wide = re.compile(r"b?float16 D(64|80|96|128)/")
        units = {
            row["tensor_cores"] for row in rows if wide.match(row["case"]) and row["kernel"] == MAIN
        }
        assert units == {"wgmma"}


def test_a_kernel_that_does_not_fit_is_reported(monkeypatch):
    """The check can fail: with a limit of 4 bytes every kernel is over it."""
    code = (
        "import sys\n"
        "sys.argv = 'resources.py rms_norm --arch 90 --every 9 --json'.split()\n"
        "from bench.gpu import resources\n"
        "resources.SHARED_LIMIT[90] = 4\n"
        "resources.main()"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(REPOSITORY)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr[-2000:]
    assert '"ok": false' in done.stdout
