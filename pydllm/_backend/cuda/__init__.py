"""The compiled CUDA kernels, ``pydllm._C``: found, checked and called here and nowhere else.

One file per op beside this one, with ``supports`` and a launcher of the same arguments as those of
``kernels/<op>.py``; they end in ``call``.
"""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from types import ModuleType

import torch
from torch import Tensor

from pydllm._backend.constants import constant_result

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # Dtype in csrc/dtype.h
REBUILD = "PYDLLM_BUILD_CUDA=1 pip install --no-deps --force-reinstall -e ."


class _Kernels:
    """Imports ``pydllm._C`` when it is first asked for, and remembers why it could not."""

    module: ModuleType | None = None
    missing: str | None = None

    def load(self) -> ModuleType | None:
        if self.module is None and self.missing is None:
            self.missing = self._import()
        return self.module

    def _import(self) -> str | None:
        from pydllm import __version__

        try:
            module = importlib.import_module("pydllm._C")
        except ModuleNotFoundError:
            return f"pydllm was installed without its CUDA kernels (in a checkout: {REBUILD})"
        except ImportError as error:
            return f"the CUDA kernels do not load here: {error} (in a checkout: {REBUILD})"
        if module.version() != __version__:
            return (
                f"the CUDA kernels are those of pydllm {module.version()}, this is {__version__} "
                f"(in a checkout: {REBUILD})"
            )
        self.module = module
        return None

    def why_not(self, device_type: str | None, index: int | None) -> str | None:
        """Why the kernels cannot run on a device; the type None stands for any GPU."""
        if device_type not in (None, "cuda"):
            return f"CUDA kernels need a CUDA tensor, got one on {device_type}"
        if self.load() is None:
            return self.missing
        if torch.version.cuda is None:
            return (
                f"PyTorch {torch.__version__} is built without CUDA (install a CUDA build of it: "
                "https://pytorch.org/get-started/locally)"
            )
        if not torch.cuda.is_available():
            return "PyTorch finds no CUDA device (run nvidia-smi: does the driver find one?)"
        major, minor = torch.cuda.get_device_capability(index)
        capability = 10 * major + minor
        if not any(runs_on(arch, capability) for arch in archs()):
            return (
                f"the CUDA kernels are compiled for {', '.join(archs())}, the device is "
                f"{capability} (in a checkout: PYDLLM_CUDA_ARCHS={capability} {REBUILD})"
            )
        return None

    def call(self, kernel: str, device: torch.device, arguments: dict[str, object]) -> None:
        """Run a launcher of ``pydllm._C`` on the current stream of ``device``."""
        module = self.load()
        if module is None:
            raise RuntimeError(self.missing)
        launcher = getattr(module, kernel, None)
        if launcher is None:
            raise RuntimeError(
                f"the CUDA kernels are of a time without {kernel} (in a checkout: {REBUILD})"
            )
        here = device.index in (None, torch.cuda.current_device())
        with nullcontext() if here else torch.cuda.device(device):
            launcher(**arguments, stream=torch.cuda.current_stream().cuda_stream)


_KERNELS = _Kernels()


def archs() -> list[str]:
    """The architectures compiled for; empty without the kernels."""
    module = _KERNELS.load()
    return [] if module is None else module.archs().split(";")


def available(device: torch.device | None = None) -> str | None:
    """None if the CUDA kernels can run (on ``device``), otherwise why not and what mends it."""
    if device is None:
        return _why_not(None, None)
    return _why_not(device.type, device.index)


@constant_result
def _why_not(device_type: str | None, index: int | None) -> str | None:
    return _KERNELS.why_not(device_type, index)


def call(
    kernel: str, device: torch.device, **arguments: Tensor | torch.dtype | float | None
) -> None:
    """Run a kernel's launcher in ``pydllm._C`` on the current stream of ``device``.

    Args:
        kernel: name of the launcher.
        arguments: as in ``csrc/binding.cpp``, without the stream. A tensor is passed as its
            address, None as the null pointer, a dtype as the number that csrc knows it by.

    Raises:
        RuntimeError: there are no kernels, or the launch failed; the message names the kernel.
    """
    passed: dict[str, object] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            passed[name] = value.data_ptr()
        elif isinstance(value, torch.dtype):
            passed[name] = DTYPES[value]
        else:
            passed[name] = 0 if value is None else value
    _KERNELS.call(kernel, device, passed)


def may_overlap(device: torch.device, wanted: bool) -> bool:
    """Whether a launch may use programmatic dependent launch where it is wanted."""
    return (
        wanted and device.type == "cuda" and torch.cuda.get_device_capability(device.index)[0] >= 9
    )


def runs_on(arch: str, capability: int) -> bool:
    """Whether code for ``arch``, one of ``PYDLLM_CUDA_ARCHS``, runs on a compute capability."""
    base = arch.removesuffix("+PTX")
    number = int(base.rstrip("af"))
    if base.endswith("a"):
        return capability == number
    if capability // 10 == number // 10:
        return capability >= number
    return arch != base and not base.endswith("f") and capability > number
