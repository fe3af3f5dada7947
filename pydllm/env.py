"""What is installed here and which backends work: ``pydllm.env()``, ``python -m pydllm.env``."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import pkgutil
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from pydllm import __version__, ops
from pydllm._backend import cuda, dispatch, env, preference

PACKAGES = ("torch", "triton", "numpy", "safetensors", "tokenizers", "transformers")


def report() -> dict[str, Any]:
    """Versions, devices and backends of this environment, in types that JSON has.

    Returns:
        ``pydllm``, ``python``, ``platform``: versions. ``packages``: name -> version, None if
        missing. ``torch_cuda``, ``driver``, ``nvcc``: versions, None if there is none. ``gpus``: a
        list of ``name``, ``capability``, ``memory_gib``. ``cuda_kernels``: the architectures that
        ``pydllm._C`` is compiled for, empty without it. ``backends``: name -> None if it works,
        otherwise why not. ``ops``: name -> ``kernels`` that there are, ``auto``, the backend that
        it asks first on the first GPU (on the CPU if there is none), and ``why``. ``settings``: the
        environment variables as they were read.
    """
    backends = {"cuda": cuda.available(), "triton": _triton(), "torch": None}
    return {
        "pydllm": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "torch_cuda": torch.version.cuda,
        "gpus": _gpus(),
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": _nvcc(),
        "cuda_kernels": cuda.archs(),
        "backends": backends,
        "ops": {op: _plan(op, backends) for op in _ops()},
        "settings": {
            "PYDLLM_BACKEND": env.BACKEND,
            "PYDLLM_LOG": env.LOG,
            "PYDLLM_PDL": "1" if env.PDL else "0",
            "TRITON_INTERPRET": "1" if env.TRITON_INTERPRET else "0",
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[dict[str, Any]]:
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        memory = round(properties.total_memory / 2**30, 1)
        gpus.append({"name": properties.name, "capability": capability, "memory_gib": memory})
    return gpus


def _ops() -> list[str]:
    names = (module.name for module in pkgutil.iter_modules(ops.__path__))
    return sorted(name for name in names if not name.startswith("_"))


def _plan(op: str, backends: dict[str, str | None]) -> dict[str, Any]:
    rooms = {"triton": f"pydllm.kernels.{op}", "cuda": f"pydllm._backend.cuda.{op}"}
    kernels = [name for name, room in rooms.items() if importlib.util.find_spec(room) is not None]
    plan: dict[str, Any] = {"kernels": kernels}
    if not torch.cuda.is_available():
        return plan | {"auto": "torch", "why": "there is no GPU"}
    major, minor = torch.cuda.get_device_capability()
    working = [name for name in kernels if backends[name] is None]
    if len(working) == 2:
        first = preference.prefers_cuda(op, torch.device("cuda"))
        why = preference.why(op, 10 * major + minor)
        return plan | {"auto": "cuda" if first else "triton", "why": why}
    if not working:
        return plan | {"auto": "torch", "why": "no kernel can run here"}
    other = "cuda" if working[0] == "triton" else "triton"
    missing = "there is no such kernel" if other not in kernels else backends[other]
    return plan | {"auto": working[0], "why": f"not {other}: {missing}"}


def _triton() -> str | None:
    missing = dispatch.triton_missing(torch.device("cuda"))
    if missing is not None or torch.cuda.is_available() or env.TRITON_INTERPRET:
        return missing
    return (
        "PyTorch finds no CUDA device "
        "(TRITON_INTERPRET=1 interprets the kernels on the CPU, for debugging)"
    )


def _nvcc() -> str | None:
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).exists():
        return None
    lines = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout.splitlines()
    return next((line.rpartition("V")[2] for line in lines if "release" in line), None)


def _first_line(program: str, *arguments: str) -> str | None:
    if shutil.which(program) is None:
        return None
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


def to_text(facts: dict[str, Any]) -> str:
    """A report as lines to read, and to paste into an issue."""
    lines = [
        ("pydllm", facts["pydllm"]),
        ("Python", f"{facts['python']} on {facts['platform']}"),
        *((name, version or "not installed") for name, version in facts["packages"].items()),
        ("torch's CUDA", facts["torch_cuda"] or "none: a build for the CPU"),
        ("driver", facts["driver"] or "none found"),
        ("nvcc", facts["nvcc"] or "not found"),
        ("CUDA kernels", ", ".join(facts["cuda_kernels"]) or "not built"),
    ]
    for gpu in facts["gpus"]:
        capability, memory = gpu["capability"], gpu["memory_gib"]
        lines.append(("GPU", f"{gpu['name']}, capability {capability}, {memory} GiB"))
    for name, reason in facts["backends"].items():
        lines.append((f"backend {name}", "works" if reason is None else f"no: {reason}"))
    for name, plan in facts["ops"].items():
        kernels = " and ".join(plan["kernels"]) or "no"
        lines.append((f"op {name}", f"{kernels} kernels; auto: {plan['auto']}, {plan['why']}"))
    lines += facts["settings"].items()
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def main(arguments: Sequence[str] = ()) -> None:
    """Print the report; ``--json`` among the arguments prints it as JSON."""
    parser = argparse.ArgumentParser("python -m pydllm.env", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    as_json = parser.parse_args(arguments).json
    facts = report()
    print(json.dumps(facts, indent=2) if as_json else to_text(facts))


class _Module(ModuleType):
    """Lets ``pydllm.env()`` be a call although ``pydllm.env`` is this module."""

    def __call__(self) -> dict[str, Any]:
        return report()


sys.modules[__name__].__class__ = _Module

if __name__ == "__main__":
    main(sys.argv[1:])
