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
# of the other ops is much the same on all: `make aot` compiles those for each, this for one.
TENSOR_CORES = ("head_stats", "linear", "window_attention")
CASES = [(op, arch) for op in OPS for arch in (80, 90, 100) if arch == 90 or op in TENSOR_CORES]


@pytest.mark.parametrize("op, arch", CASES)
def test_kernels_compile_and_fit(op, arch):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(REPOSITORY)
    done = subprocess.run(
        [sys.executable, "bench/resources.py", op, "--arch", str(arch), "--json"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=580,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    bad = [row for row in rows if not row["ok"]]
    assert done.returncode == 0, f"{bad}\n{done.stderr[-2000:]}"
    assert {row["arch"] for row in rows} == {f"sm_{arch}"}
    assert all(row["spills"] == 0 for row in rows)
    if op == "window_attention" and arch == 90:  # its 64-row tiles
        wide = re.compile(r"b?float16 D(64|80|96|128)/")
        units = {
            row["tensor_cores"] for row in rows if wide.match(row["case"]) and row["kernel"] == MAIN
        }
        assert units == {"wgmma"}


def test_a_kernel_that_does_not_fit_is_reported(monkeypatch):
    """The check can fail: with a limit of 4 bytes every kernel is over it."""
    code = (
        "import sys; sys.argv = ['resources.py', 'rms_norm', '--arch', '90', '--json']\n"
        "sys.path.insert(0, 'bench'); import resources\n"
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
