"""The extension module compiled for the CPU: CUDA kernels run by ``tests/host_emulation.h``.

It is built once for all the processes of a test session, and again only where a source changed.
``PYDLLM_TEST_SANITIZE=1`` builds it with the address and undefined-behaviour sanitizers
(``make csrc-sanitize``).
"""

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pydllm import __version__
from pydllm._backend import cuda

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
CXX = shutil.which("c++")
SANITIZE = os.environ.get("PYDLLM_TEST_SANITIZE", "0") != "0"


def _flags():
    import pybind11

    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
    flags += ["-fno-gnu-unique", "-DPYDLLM_HOST_EMULATION", f'-DPYDLLM_VERSION="{__version__}"']
    flags += ['-DPYDLLM_ARCHS="the host"', f"-I{ROOT / 'tests'}", f"-I{pybind11.get_include()}"]
    flags += [f"-I{sysconfig.get_path('include')}"]
    if SANITIZE:
        flags += ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    return flags


def _compile(source, text, headers, folder, flags):
    """The object of one source, from the cache where it was compiled before; ``text`` is it."""
    key = hashlib.sha256("\0".join((*flags, headers, text)).encode()).hexdigest()[:20]
    made = folder / f"{source.stem}-{key}.o"
    if made.exists():
        return made
    copy = folder / f"{source.stem}-{key}.cpp"
    copy.write_text(text)
    level = ["-O0"] if source.name == "binding.cpp" else []  # templates of pybind11, run seldom
    command = [CXX, *flags, *level, f"-I{source.parent}", "-c", copy, "-o", f"{made}.part"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source.name} does not compile for the CPU:\n{done.stderr}")
    os.replace(f"{made}.part", made)
    return made


def _written(texts, folder):
    """A folder with these files, named by what they hold."""
    key = hashlib.sha256("\0".join(f"{name}\0{text}" for name, text in texts.items()).encode())
    made = folder / f"include-{key.hexdigest()[:20]}"
    made.mkdir(exist_ok=True)
    for name, text in texts.items():
        (made / name).write_text(text)
    return made


def build(folder, texts=None):
    """Path of the module for the CPU, built in ``folder``.

    Args:
        folder: where objects and modules are kept; several processes may share it.
        texts: name of a source or header in csrc/ -> its text. Sources that include such a header
            themselves get it.
    """
    texts = texts or {}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    include = (*CSRC.glob("*.h"), *CSRC.glob("*.cuh"), *(ROOT / "tests").glob("*.h"))
    headers = "\0".join(path.read_text() for path in sorted(include))
    flags = _flags()
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        jobs = []
        for source in sorted((*CSRC.glob("*.cu"), CSRC / "binding.cpp")):
            text = texts.get(source.name) or source.read_text()
            replaced = {name: t for name, t in texts.items() if f'"{name}"' in text}
            include = [f"-I{_written(replaced, folder)}"] if replaced else []
            jobs.append((source, text, headers, folder, include + flags))
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # other processes wait for the lock
            objects = list(pool.map(lambda job: _compile(*job), jobs))
        key = hashlib.sha256("".join(path.name for path in objects).encode()).hexdigest()[:20]
        module = folder / key / "_C.so"
        if not module.exists():
            module.parent.mkdir(exist_ok=True)
            link = [CXX, "-shared", *(["-fsanitize=address,undefined"] if SANITIZE else [])]
            subprocess.run([*link, *map(str, objects), "-o", f"{module}.part"], check=True)
            os.replace(f"{module}.part", module)
    return module


def load(path):
    """The module at ``path``."""
    loader = importlib.machinery.ExtensionFileLoader("_C", str(path))
    spec = importlib.util.spec_from_loader("_C", loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules.pop("_C", None)
    return module


class EmulatedKernels(cuda._Kernels):
    """Stands for the compiled kernels, and takes CPU tensors."""

    def __init__(self, path):
        self.module = load(path)

    def why_not(self, device_type, index):
        return None if device_type in (None, "cpu") else "emulated kernels need a CPU tensor"

    def call(self, kernel, device, arguments):
        getattr(self.module, kernel)(**arguments, stream=0)


def emulated_kernels(folder):
    """The kernels on the CPU; skips the test where they cannot be built."""
    if CXX is None:
        pytest.skip("needs a C++ compiler")
    if os.uname().sysname != "Linux":
        pytest.skip("CUDA kernels are for Linux")
    return EmulatedKernels(build(folder))
