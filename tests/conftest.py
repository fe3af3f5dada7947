"""Interpreted Triton, poisoned allocations, and the gpu marker."""

import os
import zlib

# Read by triton when it is imported, so before anything that imports it.
if os.environ.get("PYDLLM_TEST_GPU", "0") == "0":
    os.environ["TRITON_INTERPRET"] = "1"

# Read by OpenMP when torch is imported. Tests run side by side and are small: a second thread each
# would mostly wait for the first.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib.util

import pytest
import setuptools
import torch

from bench.recorder import Recording
from pydllm.decoding.graph import Graphs
from tests.emulation import emulated_kernels
from tests.interpreter import repair
from tests.packages import ROOT

HAS_GPU = torch.cuda.is_available()

if os.environ.get("TRITON_INTERPRET") == "1":
    repair()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "slow" not in item.keywords)  # or one process would end with them
    if HAS_GPU and os.environ.get("PYDLLM_TEST_GPU", "0") != "0":
        return
    skip = pytest.mark.skip(reason="needs a GPU and PYDLLM_TEST_GPU=1")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def recorded_steps(monkeypatch):
    """Without a GPU, steps are recorded where a GPU captures them."""
    monkeypatch.setattr(Graphs, "recorder", Recording)


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch):
    """Uninitialised memory that is read shows up: NaN, or a sentinel that is no valid index."""

    def poison(tensor):
        if tensor.device.type == "meta" or torch.compiler.is_compiling():
            return tensor
        if isinstance(tensor, torch._subclasses.FakeTensor):
            return tensor
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        if tensor.dtype in (torch.int32, torch.int64):
            return tensor.fill_(-(2**30))
        return tensor

    for name in ("empty", "empty_like", "empty_strided"):
        plain = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *args, plain=plain, **kwargs: poison(plain(*args, **kwargs))
        )


@pytest.fixture(scope="session")
def cuda_folder(request):
    """Where the CUDA kernels are compiled for the CPU, once for all processes of the session."""
    return request.config.cache.mkdir("emulation")


@pytest.fixture(scope="session")
def cuda_module(cuda_folder):
    """The CUDA kernels compiled for the CPU, in place of ``pydllm._backend.cuda._KERNELS``."""
    return emulated_kernels(cuda_folder)


@pytest.fixture
def cuda_on_cpu(cuda_module, monkeypatch, request):
    """``backend="cuda"`` runs the CUDA kernels on CPU tensors; half of the tests in each order."""
    from pydllm._backend import cuda

    order = ("ascending", "descending")[zlib.crc32(request.node.nodeid.encode()) % 2]
    monkeypatch.setenv("PYDLLM_EMULATION_ORDER", order)
    monkeypatch.setattr(cuda, "_KERNELS", cuda_module)
    return cuda_module


@pytest.fixture(autouse=True)
def emulate_the_parameter_cuda(request):
    """A test with ``backend="cuda"`` among its parameters needs nothing else to run on a CPU."""
    call = getattr(request.node, "callspec", None)
    if call is not None and "gpu" not in request.node.keywords and "cuda" in call.params.values():
        request.getfixturevalue("cuda_on_cpu")


@pytest.fixture
def setup_script(monkeypatch):
    """setup.py as a module, its ``setup()`` left out."""
    monkeypatch.setenv("PYDLLM_BUILD_CUDA", "0")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("pydllm_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("PYDLLM_BUILD_CUDA", "PYDLLM_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    monkeypatch.setattr(module, "USUAL_PLACE", ROOT / "nonexistent")
    monkeypatch.setattr(module, "SYSTEM_INCLUDES", ())
    monkeypatch.setenv("PATH", "/nonexistent")
    return module
