"""csrc/ without a GPU: what nvcc says of it, how it runs on the CPU, and when it can run at all."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bench.gpu import cuda_resources
from pydllm import ops
from pydllm._backend import cuda
from tests import emulation

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
USUAL_NVCC = Path("/usr/local/cuda/bin/nvcc")
NVCC = str(USUAL_NVCC) if USUAL_NVCC.exists() else shutil.which("nvcc")


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("arch", ["80", "120"])
def test_the_oldest_and_the_newest_architectures_compile(arch):
    """One small file; test_packaging.py has all files for sm_90a, `make resources` all for all."""
    pytest.importorskip("triton")
    rows = cuda_resources.compile_file("swiglu", arch)
    names = {f"swiglu_kernel<{name}>" for name in ("float", "__half", "__nv_bfloat16")}
    assert {row["kernel"] for row in rows} == names
    for row in rows:
        assert (row["arch"], row["spills"], row["threads"]) == (f"sm_{arch}", 0, 256)
        assert 8 <= row["registers"] <= 64 and row["occupancy"] >= 0.5


def test_occupancy():
    # Registers are given in units of 8 a thread, warps in units of 4.
    assert cuda_resources.occupancy("90a", 32, 1024, 0) == 1
    assert cuda_resources.occupancy("90a", 33, 1024, 0) == 0.5
    assert cuda_resources.occupancy("90a", 80, 256, 0) == 3 * 256 / 2048
    assert cuda_resources.occupancy("86", 16, 128, 15 * 1024) == 6 * 128 / 1536
    assert cuda_resources.occupancy("86", 16, 32, 0) == 16 * 32 / 1536


# Kernels that are right, and kernels with an error that the emulation has to find.
PROGRAM = r"""
#include <cstdio>

#include "common.cuh"

#define CHECK(condition) \
  if (!(condition)) emulation::fail_in_kernel(#condition)

__global__ void right(int* out) {
  PYDLLM_DYNAMIC_SHARED(shared);
  __shared__ int counter;
  const int thread = threadIdx.x, lane = thread % 32;
  CHECK(__float_as_uint(reinterpret_cast<float*>(shared)[thread]) == 0xffffffffu);
  __syncthreads();
  if (thread == 0) counter = 0;
  reinterpret_cast<int*>(shared)[thread] = thread;
  __syncthreads();
  CHECK(reinterpret_cast<int*>(shared)[95 - thread] == 95 - thread);
  CHECK(__shfl_sync(~0u, lane, 35) == 3 && __shfl_sync(~0u, lane, 5, 8) == lane / 8 * 8 + 5);
  CHECK(__shfl_up_sync(~0u, lane, 3, 8) == (lane % 8 < 3 ? lane : lane - 3));
  CHECK(__shfl_down_sync(~0u, lane, 3, 8) == (lane % 8 > 4 ? lane : lane + 3));
  CHECK(__shfl_xor_sync(~0u, 1.5 * lane, 16) == 1.5 * (lane ^ 16));
  CHECK(__ballot_sync(~0u, lane % 2) == 0xaaaaaaaau);
  CHECK(__any_sync(~0u, lane == 7) && !__any_sync(~0u, lane == 32) && !__all_sync(~0u, lane));
  CHECK(__all_sync(~0u, lane < 32));
  CHECK(__match_any_sync(~0u, lane / 16) == 0xffffu << lane / 16 * 16);
  if (lane < 8) {
    CHECK(__shfl_xor_sync(0xffu, lane, 4) == (lane ^ 4));
    __syncwarp(0xffu);
  } else {
    CHECK(__reduce_add_sync(~0xffu, lane) == 468);
  }
  atomicAdd(&counter, 1);
  atomicMax(out, thread);
  CHECK(__syncthreads_count(lane == 0) == 3);
  __syncthreads();
  CHECK(counter == 96 && blockIdx.y < gridDim.y);
  if (thread == 0) atomicAdd(out + 1, 1);
}

__global__ void partial_barrier() {
  if (threadIdx.x < 32) __syncthreads();
}
__global__ void partial_shuffle() {
  if (threadIdx.x != 7) __shfl_xor_sync(~0u, 1, 1);
}
__global__ void barrier_against_shuffle() {
  if (threadIdx.x < 5) __syncwarp();
  else __shfl_xor_sync(~0u, 1, 1);
}
__global__ void lane_outside() {
  if (threadIdx.x < 16) __shfl_sync(0xffffu, 1, 20);
}
__global__ void not_in_mask() {
  __syncwarp(0xffu);
}
__global__ void unaligned(const float* p) {
  pydllm::load_vector(p + 1);
}
// Wrong on a GPU; in one of the orders the result shows it.
__global__ void low_writer(int* out) {
  __shared__ int value;
  if (threadIdx.x == 0) value = 1;
  if (threadIdx.x == 63) *out = value;
  if (threadIdx.x == 63) value = 0;
}

int main(int, char** arguments) {
  alignas(16) static float memory[8];
  static int numbers[2];
  int* const out = numbers;
  const dim3 one(1), warps(64);
  const std::string name = arguments[1];
  try {
    if (name == "right") {
      PYDLLM_LAUNCH(right, dim3(2, 3, 4), dim3(96), 96 * 4, nullptr, out);
      std::printf("%d %d", out[0], out[1]);
    }
    if (name == "partial_barrier") PYDLLM_LAUNCH(partial_barrier, one, warps, 0, nullptr);
    if (name == "partial_shuffle") PYDLLM_LAUNCH(partial_shuffle, one, warps, 0, nullptr);
    if (name == "mixed") PYDLLM_LAUNCH(barrier_against_shuffle, one, warps, 0, nullptr);
    if (name == "lane_outside") PYDLLM_LAUNCH(lane_outside, one, warps, 0, nullptr);
    if (name == "not_in_mask") PYDLLM_LAUNCH(not_in_mask, one, warps, 0, nullptr);
    if (name == "unaligned") PYDLLM_LAUNCH(unaligned, one, warps, 0, nullptr, memory);
    if (name == "low_writer") {
      PYDLLM_LAUNCH(low_writer, one, warps, 0, nullptr, out);
      std::printf("%d", out[0]);
    }
    for (const dim3 block : {dim3(1025), dim3(32, 32, 2), dim3(0)}) {
      PYDLLM_LAUNCH(low_writer, one, block, 0, nullptr, out);
      if (cudaGetLastError() == cudaSuccess) return 1;
    }
    PYDLLM_LAUNCH(low_writer, one, one, 1 << 18, nullptr, out);
    if (cudaGetLastError() == cudaSuccess || cudaGetLastError() != cudaSuccess) return 1;
  } catch (const std::exception& error) {
    std::printf("%s", error.what());
  }
}
"""

FOUND = {
    "right": "95 24",
    "partial_barrier": "__syncthreads was reached by a part of the block (partial_barrier, block 0",
    "partial_shuffle": "a shuffle was reached by a part of its warp",
    "mixed": "lanes of a warp wait for each other at different operations",
    "lane_outside": "a shuffle from a lane that takes no part",
    "not_in_mask": "a lane is not in the mask that it gives",
    "unaligned": "a vector is not aligned",
}


@pytest.mark.skipif(emulation.CXX is None, reason="needs a C++ compiler")
def test_the_emulation_runs_what_is_right_and_finds_what_is_not(tmp_path):
    (tmp_path / "x.cpp").write_text(PROGRAM)
    command = [emulation.CXX, "-std=c++17", "-DPYDLLM_HOST_EMULATION", f"-I{CSRC}"]
    command += [f"-I{ROOT / 'tests'}", "-Wall", "-Wno-unused", "x.cpp", "-o", "x"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def run(name, order):
        environment = {"PYDLLM_EMULATION_ORDER": order}
        done = subprocess.run(
            [tmp_path / "x", name], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done
        return done.stdout

    for name, message in FOUND.items():
        for order in ("ascending", "descending"):
            assert message in run(name, order)
    assert {run("low_writer", order) for order in ("ascending", "descending")} == {"0", "1"}


def test_an_error_in_a_kernel_is_an_exception_and_the_next_launch_works(cuda_on_cpu):
    x = torch.ones(2, 8)
    with pytest.raises(RuntimeError, match=r"rms_norm: invalid argument \(cudaErrorInvalidValue\)"):
        cuda.call(
            "rms_norm",
            x.device,
            y=x,
            residual=None,
            x=x,
            partial=None,
            scale=None,
            bias=None,
            weight=x,
            dtype=x.dtype,
            rows=2,
            width=2**20,
            splits=0,
            eps=0.0,
            stride_x_row=8,
            stride_residual_row=8,
            pdl=False,
        )
    assert torch.equal(ops.rms_norm(x, x[0], 0.0, backend="cuda"), x)


def test_the_constants_of_both_sides_agree(cuda_module):
    from pydllm._backend.cuda import draft, head_stats, rms_norm, route, verify, vocab_stats
    from pydllm.ops.vocab_stats import MAX_SUPPRESS_IDS

    module = cuda_module.module
    assert module.DRAFT_ROWS == draft.MAX_ROWS
    assert module.MAX_SUPPRESS_IDS == MAX_SUPPRESS_IDS
    assert module.MAX_PIECES == head_stats.MAX_PIECES
    assert module.RMS_NORM_WIDTH == rms_norm.MAX_WIDTH
    widths = (CSRC / "rms_norm.h").read_text()
    assert f"kRmsNormMergedWidth = {rms_norm.MAX_MERGED_WIDTH};" in widths
    assert module.ROUTE_EXPERTS == route.MAX_EXPERTS
    assert module.VERIFY_BRANCHES == verify.MAX_BRANCHES
    assert module.VOCAB_PIECE == vocab_stats.PIECE
    assert module.CUT_DIGITS == vocab_stats.CUT_DIGITS
    header = (CSRC / "dtype.h").read_text()
    names = {torch.float32: "kFloat32", torch.float16: "kFloat16", torch.bfloat16: "kBFloat16"}
    for dtype, number in cuda.DTYPES.items():
        assert f"{names[dtype]} = {number}" in header


RUNS = {
    "90 on itself": ("90", 90, True),
    "80 on its family": ("80", 89, True),
    "89 on an older one": ("89", 86, False),
    "80 on the next generation": ("80", 90, False),
    "80+PTX on the next generation": ("80+PTX", 90, True),
    "90a on itself": ("90a", 90, True),
    "100a on its family": ("100a", 103, False),
    "90a+PTX on the next generation": ("90a+PTX", 100, False),
    "100f on its family": ("100f", 103, True),
    "100f+PTX on the next generation": ("100f+PTX", 120, False),
}


@pytest.mark.parametrize("arch, capability, runs", RUNS.values(), ids=RUNS.keys())
def test_where_code_runs(arch, capability, runs):
    assert cuda.runs_on(arch, capability) == runs


def fake_kernels(version):
    module = ModuleType("pydllm._C")
    module.version = lambda: version
    module.archs = lambda: "90a"
    return module


def test_why_the_kernels_cannot_run(monkeypatch):
    from pydllm import __version__

    assert "got one on cpu" in cuda.available(torch.device("cpu"))
    installed = {
        None: "without its CUDA kernels (in a checkout: PYDLLM_BUILD_CUDA=1 pip install",
        "0.0.1": f"those of pydllm 0.0.1, this is {__version__}",
    }
    for version, message in installed.items():
        monkeypatch.setattr(cuda, "_KERNELS", cuda._Kernels())
        module = None if version is None else fake_kernels(version)
        monkeypatch.setitem(sys.modules, "pydllm._C", module)
        assert message in cuda.available()
        with pytest.raises(RuntimeError, match=re.escape(message[:30])):
            cuda.call("rms_norm", torch.device("cuda"))

    monkeypatch.setattr(cuda, "_KERNELS", cuda._Kernels())
    monkeypatch.setitem(sys.modules, "pydllm._C", fake_kernels(__version__))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in cuda.available()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "finds no CUDA device" in cuda.available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    assert "compiled for 90a, the device is 80" in cuda.available()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert cuda.available() is None and cuda.archs() == ["90a"]


def test_the_compiler_takes_the_availability_for_a_constant():
    @torch.compile(fullgraph=True, backend="eager")
    def double(x):
        return x if cuda.available() is None else 2 * x

    factor = 1 if cuda.available() is None else 2
    assert torch.equal(double(torch.ones(2)), torch.full((2,), float(factor)))
