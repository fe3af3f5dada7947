"""csrc/: registers and spills on every architecture, and the kernels' logic run on the CPU."""

import ctypes
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pydllm._backend import cuda
from pydllm.testing import error_budget, max_error

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
USUAL_NVCC = Path("/usr/local/cuda/bin/nvcc")
NVCC = str(USUAL_NVCC) if USUAL_NVCC.exists() else shutil.which("nvcc")
CXX = shutil.which("c++")
NAMES = ("logsumexp", "prob", "entropy", "margin")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Two blocks of 512 threads on a multiprocessor of 65536 registers.
MAX_REGISTERS = 64


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("source", sorted(path.name for path in CSRC.glob("*.cu")))
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_compiles_without_spills(source, arch, tmp_path):
    command = [NVCC, "-std=c++17", "-O3", f"-arch=sm_{arch}", "-Xptxas=-v", "-Werror=all-warnings"]
    command += ["-c", str(CSRC / source), "-o", str(tmp_path / "x.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = done.stdout + done.stderr
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    spills = re.findall(r"(\d+) bytes spill", report)
    assert registers and max(registers) <= MAX_REGISTERS, report
    assert spills and set(spills) == {"0"}, report


SHIM = """
#include "vocab_stats.cu"
extern "C" int vocab_stats(int64_t* token, float* logsumexp, float* prob, float* entropy,
                           float* margin, const void* logits, const int32_t* banned, int dtype,
                           int64_t rows, int64_t vocab, int64_t banned_count, int64_t stride) {
  return pydllm::vocab_stats(token, logsumexp, prob, entropy, margin, logits, banned,
                             static_cast<pydllm::Dtype>(dtype), rows, vocab, banned_count, stride,
                             nullptr);
}
"""


def build_emulation(folder, replace=("", "")):
    """The kernel as a library for the CPU, with one piece of its source replaced."""
    for path in CSRC.iterdir():
        shutil.copy(path, folder)
    source = (folder / "vocab_stats.cu").read_text()
    assert replace[0] in source
    (folder / "vocab_stats.cu").write_text(source.replace(*replace) if replace[0] else source)
    (folder / "shim.cpp").write_text(SHIM)
    command = [CXX, "-std=c++17", "-O1", "-fPIC", "-shared", "-DPYDLLM_HOST_EMULATION"]
    command += [f"-I{ROOT / 'tests'}", "shim.cpp", "-o", "emulation.so"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "emulation.so"


def emulate(library, logits, banned):
    """What the kernel gives for ``logits``, run on the CPU; as ``cuda.vocab_stats``."""
    rows, vocab = logits.shape
    token = torch.empty(rows, dtype=torch.int64)
    floats = [torch.empty(rows) for _ in NAMES]
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (token, *floats, logits, banned)]
    sizes = (rows, vocab, banned.numel(), logits.stride(0))
    dtype = list(DTYPES.values()).index(logits.dtype)
    call = ctypes.CDLL(str(library)).vocab_stats
    assert call(*pointers, dtype, *(ctypes.c_int64(size) for size in sizes)) == 0
    return token, *floats


def expected(logits, banned, dtype=torch.float64):
    """The contract, in plain torch: token, logsumexp, prob, entropy, margin."""
    x = logits.to(dtype)
    inside = banned[(banned >= 0) & (banned < x.shape[1])].long()
    x = x.index_fill(1, inside, -torch.inf)
    token = (x == x.amax(1, keepdim=True)).int().argmax(1)  # the first of a tie
    logsumexp = x.logsumexp(1)
    prob = (x - logsumexp[:, None]).exp()
    entropy = logsumexp - torch.where(prob > 0, x * prob, 0).sum(1)
    two = torch.nn.functional.pad(prob, (0, 1)).topk(2, 1).values
    result = [token, logsumexp, two[:, 0], entropy, two[:, 0] - two[:, 1]]
    nothing = (x == -torch.inf).all(1)
    nan = x.isnan().any(1)
    for index, value in enumerate((0, -torch.inf, 0, 0, 0)):
        result[index] = result[index].masked_fill(nothing, value)
        result[index] = result[index].masked_fill(nan, 0 if index == 0 else torch.nan)
    return result


def check(run, logits, banned):
    banned = torch.tensor(banned, dtype=torch.int32, device=logits.device)
    got = run(logits, banned)
    exact, single = expected(logits, banned), expected(logits, banned, torch.float32)
    assert torch.equal(got[0], exact[0])
    for name, value, wanted, same in zip(NAMES, got[1:], exact[1:], single[1:], strict=True):
        assert max_error(value, wanted) <= error_budget(wanted, same), name


def rows_of(count, vocab, dtype, *, offset=0, gap=0, scale=4.0, device="cpu"):
    """Random rows that start ``offset`` elements into their memory and lie ``gap`` apart.

    What lies between them is larger than any logit, so reading it would show.
    """
    generator = torch.Generator().manual_seed(vocab + offset)
    memory = torch.full((offset + count * (vocab + gap),), 60000.0)
    rows = memory[offset:].view(count, vocab + gap)[:, :vocab]
    rows.copy_(torch.randn(count, vocab, generator=generator) * scale)
    memory = memory.to(device, dtype)
    return memory[offset:].view(count, vocab + gap)[:, :vocab]


def special_rows(dtype, device="cpu"):
    """Ties, -inf, NaN and large values, one kind a row."""
    x = rows_of(10, 1031, dtype)
    x[0] = 1.5  # all tie
    x[1, [900, 17, 400]] = 40.0  # three tie for the best
    x[2] = -torch.inf
    x[3] = -torch.inf
    x[3, 1030] = -2.0  # one id alone
    x[4, 5:] = -torch.inf
    x[5, 700] = torch.nan
    x[6] = -torch.inf
    x[6, 3] = torch.nan
    x[7] = x[7] * 0.1 + 3000  # the entropy must not cancel
    x[8, 20] = 60000.0  # certain
    x[9, 11] = torch.nan  # banned below: not seen
    x[9, 12] = torch.inf
    return x.to(device)


def check_all(run, device="cpu", only=""):
    """Every case of the contract; ``run`` takes logits and banned ids."""
    for dtype in (dtype for name, dtype in DTYPES.items() if name.startswith(only)):
        for vocab in (1, 2, 7, 513, 4099):
            check(run, rows_of(3, vocab, dtype, device=device), [])
        # 2 of 3 rows start off a 16-byte boundary; the ids before and behind count as well
        check(run, rows_of(3, 1000, dtype, offset=1, gap=3, device=device), [0, 999, 500, -1, 1000])
        check(run, rows_of(2, 40009, dtype, offset=3, gap=1, device=device), [40008])
        check(run, rows_of(2, 3, dtype, offset=5, device=device), [1])
        check(run, special_rows(dtype, device), [11, 12])
        check(run, rows_of(2, 600, dtype, device=device), list(range(cuda.MAX_BANNED)))
    check(run, torch.zeros(0, 100, device=device), [])
    check(run, torch.zeros(2, 1, device=device), [0])


needs_cxx = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")


@needs_cxx
def test_vocab_stats_logic(tmp_path):
    library = build_emulation(tmp_path)
    check_all(lambda logits, banned: emulate(library, logits, banned))


@needs_cxx
def test_a_row_does_not_depend_on_its_neighbours(tmp_path):
    library = build_emulation(tmp_path)
    x = rows_of(4, 1024, torch.float32)
    none = torch.empty(0, dtype=torch.int32)
    together = emulate(library, x, none)
    for row in range(4):
        alone = emulate(library, x[row : row + 1], none)
        assert all(torch.equal(a, b[row : row + 1]) for a, b in zip(alone, together, strict=True))


MUTANTS = {
    "no barrier": ("  __syncthreads();\n  if (warp != 0)", "  if (warp != 0)"),
    "short shuffle": ("lanes = kWarpSize / 2", "lanes = kWarpSize / 4"),
    "last of a tie": ("b.id < a.id", "b.id > a.id"),
    "lane guard": ("lane < kWarps ? shared_stats[lane] : empty_stats()", "shared_stats[lane % 8]"),
    "-inf guard": ("adds ? shift * exponential : 0.f", "shift * exponential"),
    "no head": ("if (thread < head) add_one(thread);", ""),
    "no tail": ("if (tail + thread < vocab)", "if (false)"),
    "tail too long": ("if (tail + thread < vocab)", "if (tail + thread <= vocab)"),
    "second best": ("fmaxf(fminf(a.best, b.best), fmaxf", "fminf(fmaxf(a.best, b.best), fmaxf"),
    "banned": ("if (hit == i) x[i] = -INFINITY;", ""),
    "no rescaling": ("  rescale(b, best);\n", ""),
}


# One process for all: each mutant runs in a fork of it, since some end theirs.
CATCH = """
import os, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from tests.test_csrc import check_all, emulate
for library in sys.argv[2:]:
    child = os.fork()
    if child == 0:
        try:
            check_all(lambda logits, banned: emulate(library, logits, banned), only="fp32")
        except AssertionError:
            os._exit(70)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@needs_cxx
def test_broken_kernels_are_caught(tmp_path):
    """The checks above fail for each mutant, and pass for the kernel as it is."""
    libraries = []
    for replace in (("", ""), *MUTANTS.values()):
        folder = tmp_path / str(len(libraries))
        folder.mkdir()
        libraries.append(str(build_emulation(folder, replace)))
    command = [sys.executable, "-c", CATCH, str(ROOT), *libraries]
    done = subprocess.run(command, capture_output=True, text=True)
    codes = dict(zip(("unchanged", *MUTANTS), done.stdout.split(), strict=True))
    assert codes == dict.fromkeys(MUTANTS, "70") | {"unchanged": "0"}, done.stderr


@pytest.mark.gpu
def test_vocab_stats_on_the_gpu():
    reason = cuda.available(torch.device("cuda", 0))
    if reason is not None:
        pytest.skip(reason)
    check_all(cuda.vocab_stats, "cuda")


def test_the_constants_of_both_sides_agree():
    header = (CSRC / "vocab_stats.h").read_text()
    assert re.search(r"kMaxBanned = (\d+)", header)[1] == str(cuda.MAX_BANNED)
    assert re.findall(r"kFloat32 = (\d), kFloat16 = (\d), kBFloat16 = (\d)", header) == [
        tuple(str(cuda._DTYPES[dtype]) for dtype in DTYPES.values())
    ]


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
    assert cuda._runs_on(arch, capability) == runs


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
            cuda.vocab_stats(torch.zeros(1, 4), None)

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


UNSUPPORTED = {
    "dtype": (torch.zeros(2, 8, dtype=torch.float64), None, "fp32, fp16 and bf16"),
    "columns": (torch.zeros(8, 2).T, None, "contiguous rows"),
    "shape": (torch.zeros(8), None, "(rows, vocab)"),
    "banned, dtype": (torch.zeros(2, 8), torch.zeros(1, dtype=torch.int64), "int32"),
    "banned, too many": (torch.zeros(2, 8), torch.zeros(129, dtype=torch.int32), "up to 128"),
}


@pytest.mark.parametrize("logits, banned, message", UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_what_the_launcher_does_not_support(monkeypatch, logits, banned, message):
    monkeypatch.setattr(cuda, "available", lambda device: None)
    assert message in cuda.vocab_stats_supports(logits, banned)
    assert cuda.vocab_stats_supports(torch.zeros(2, 8), None) is None


def test_the_compiler_takes_the_availability_for_a_constant():
    @torch.compile(fullgraph=True, backend="eager")
    def double(x):
        return x if cuda._available(None) is None else 2 * x

    factor = 1 if cuda.available() is None else 2
    assert torch.equal(double(torch.ones(2)), torch.full((2,), float(factor)))


def test_gaps_of_the_cases_are_read_by_nobody():
    """The helper's own check: rows lie apart, and what is between is large."""
    rows = rows_of(3, 5, torch.float32, offset=1, gap=2)
    starts = [row.data_ptr() for row in rows]
    assert {b - a for a, b in pairwise(starts)} == {7 * 4}
    assert rows.max() < 60000
