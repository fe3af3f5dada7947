"""Programmatic dependent launch: in the machine code where it is asked for, and nowhere else."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from pydllm import ops
from pydllm._backend.library import Op

REPOSITORY = Path(__file__).resolve().parent.parent

# Kernels of a step's chain, compiled with and without it; of those in BIG, with it alone.
COMPILE = """
import json, re
import torch
from bench.gpu import resources
from bench.gpu.bars import LLADA, attention, head_stats, meta
from pydllm.kernels import head_stats as head, linear, rms_norm, swiglu, window_attention

def launches(pdl):
    hidden, weight = meta(32, 4096), meta(4096, 4096)
    yield lambda: rms_norm.rms_norm(hidden, meta(4096), 1e-5, hidden, pdl=pdl)
    yield lambda: swiglu.swiglu(meta(32, 24576), pdl=pdl)
    yield lambda: linear.linear(hidden, weight, None, None, pdl=pdl)
    yield lambda: linear.linear_swiglu(hidden, meta(24576, 4096), None, None, pdl=pdl)
    norm = meta(4096), 1e-5, hidden
    yield lambda: linear.linear_rms_norm(hidden, weight, None, None, *norm, pdl=pdl)
    yield attention(LLADA, 1, 32, 2048, pdl=pdl)
    index = meta(32, dtype=torch.int64)
    yield lambda: head.head_stats(
        hidden, meta(126464, 4096), None, 0.0, 5, None, None, False, None, None, index, pdl=pdl
    )

for arch, pdl in ((90, True), (90, False), (80, True)):
    for launch in launches(pdl):
        for recorded in resources.record(launch, arch):
            small = recorded.kernel.__name__ not in BIG
            if arch == 90 and (pdl or small) or small:
                code = resources.compile_kernel(recorded, arch)
                ptx = code.asm["ptx"]
                touches = re.finditer(r"\\b(ld|st|atom|cp\\.async)\\S*\\.global", ptx)
                wait = ptx.find("griddepcontrol.wait")
                print(json.dumps({
                    "kernel": recorded.kernel.__name__, "arch": arch, "asked": pdl,
                    "option": bool(recorded.options.get("launch_pdl")),
                    "waits": ptx.count("griddepcontrol.wait"),
                    "starts_next": ptx.count("griddepcontrol.launch_dependents"),
                    "early": [m[0] for m in touches if m.start() < wait],
                    "prefetches": ptx.count("prefetch.global.L2"),
                }))
"""
BIG = ["_window_attention_kernel", "_head_stats_tile_kernel"]
CHAIN = {
    *("_rms_norm_kernel", "_swiglu_kernel", "_linear_tile_kernel", "_linear_merge_kernel"),
    *("_window_attention_merge_kernel", "_row_stats_merge_kernel", *BIG),
}


@pytest.fixture(scope="module")
def compiled():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(REPOSITORY)
    done = subprocess.run(
        [sys.executable, "-c", f"BIG = {BIG}\n{COMPILE}"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_where_it_is_asked_for_a_kernel_waits_before_it_touches_memory(compiled):
    rows = [row for row in compiled if row["arch"] == 90 and row["asked"]]
    assert {row["kernel"] for row in rows} == CHAIN
    for row in rows:
        assert row["option"] and row["waits"] == row["starts_next"] == 1, row
        assert row["early"] == [], row
        assert (row["prefetches"] > 0) == (row["kernel"] == "_linear_tile_kernel"), row


def test_elsewhere_nothing_of_it_is_there(compiled):
    rows = [row for row in compiled if not (row["arch"] == 90 and row["asked"])]
    assert {(row["arch"], row["kernel"]) for row in rows} == {
        (arch, kernel) for arch in (80, 90) for kernel in CHAIN if kernel not in BIG
    }
    for row in rows:
        assert not row["option"], row
        assert row["waits"] == row["starts_next"] == row["prefetches"] == 0, row


def test_ops_name_the_backends_whose_launcher_takes_it():
    modules = [module for name, module in sys.modules.items() if name.startswith(ops.__name__)]
    found = [value for module in modules for value in vars(module).values()]
    declared = {op.name: op for op in found if isinstance(op, Op)}
    assert len(declared) > 20
    for op in declared.values():
        for backend in ("triton", "cuda"):
            op._load(backend)
            kernel = getattr(op, backend)
            takes = kernel is not None and "pdl" in inspect.signature(kernel.launch).parameters
            assert takes == (backend in op.pdl), (op.name, backend)


@pytest.mark.parametrize("value", ["0", "1"])
def test_the_environment_decides_what_launchers_are_given(value):
    code = (
        "from pydllm.ops.rms_norm import OP\n"
        "from pydllm.ops.unmask import _OP\n"
        "for op in (OP, _OP):\n"
        "    op._load('triton')\n"
        "print(*(getattr(op.triton.launch, 'keywords', None) for op in (OP, _OP)))"
    )
    environment = os.environ | {"PYDLLM_PDL": value, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.stdout.split("\n")[0] == ("{'pdl': True} None" if value == "1" else "None None"), (
        done.stderr[-2000:]
    )


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(
    "source, arch", [("swiglu", "90a"), ("window_attention", "90a"), ("swiglu", "80")]
)
def test_cuda_kernels_wait_before_they_touch_memory(source, arch, tmp_path):
    """Always: without the option of the launch they wait for nothing. Not before sm_90."""
    cubin = tmp_path / "x.cubin"
    command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{arch}", "-cubin", "-o", cubin]
    subprocess.run([*command, REPOSITORY / "csrc" / f"{source}.cu"], check=True)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    done = subprocess.run(
        [tools / "nvdisasm", "-c", cubin], check=True, capture_output=True, text=True
    )
    kernels = re.split(r"\n\.text\.", done.stdout)[1:]
    assert kernels
    for kernel in kernels:
        wait, access = kernel.find("ACQBULK"), re.search(r"\b(LDG|STG|LDGSTS)\.", kernel)
        assert access is not None
        assert 0 < wait < access.start() if arch == "90a" else wait < 0, kernel[:100]
