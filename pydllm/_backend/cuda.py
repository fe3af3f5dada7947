"""The compiled CUDA kernels, ``pydllm._C``: found, checked and launched here and nowhere else."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

MAX_BANNED = 128  # kMaxBanned in csrc/vocab_stats.h

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # Dtype in csrc/vocab_stats.h
_REBUILD = "PYDLLM_BUILD_CUDA=1 pip install --no-deps --force-reinstall -e ."


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
            return f"pydllm was installed without its CUDA kernels (in a checkout: {_REBUILD})"
        except ImportError as error:
            return f"the CUDA kernels do not load here: {error} (in a checkout: {_REBUILD})"
        if module.version() != __version__:
            return (
                f"the CUDA kernels are those of pydllm {module.version()}, this is {__version__} "
                f"(in a checkout: {_REBUILD})"
            )
        self.module = module
        return None


_KERNELS = _Kernels()


def archs() -> list[str]:
    """The architectures compiled for; empty without the kernels."""
    module = _KERNELS.load()
    return [] if module is None else module.archs().split(";")


def available(device: torch.device | None = None) -> str | None:
    """None if the CUDA kernels can run (on ``device``), otherwise why not and what mends it."""
    if device is not None and device.type != "cuda":
        return f"CUDA kernels need a CUDA tensor, got one on {device.type}"
    return _available(None if device is None else device.index)


@torch.compiler.assume_constant_result  # the compiler asks once instead of tracing an import
def _available(index: int | None) -> str | None:
    if _KERNELS.load() is None:
        return _KERNELS.missing
    if torch.version.cuda is None:
        return (
            f"PyTorch {torch.__version__} is built without CUDA (install a CUDA build of it: "
            "https://pytorch.org/get-started/locally)"
        )
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device (run nvidia-smi: does the driver find one?)"
    major, minor = torch.cuda.get_device_capability(index)
    capability = 10 * major + minor
    if not any(_runs_on(arch, capability) for arch in archs()):
        return (
            f"the CUDA kernels are compiled for {', '.join(archs())}, the device is {capability} "
            f"(in a checkout: PYDLLM_CUDA_ARCHS={capability} {_REBUILD})"
        )
    return None


def _runs_on(arch: str, capability: int) -> bool:
    """Whether code for ``arch``, one of ``PYDLLM_CUDA_ARCHS``, runs on a compute capability."""
    base = arch.removesuffix("+PTX")
    number = int(base.rstrip("af"))
    if base.endswith("a"):
        return capability == number
    if capability // 10 == number // 10:
        return capability >= number
    return arch != base and not base.endswith("f") and capability > number


def vocab_stats_supports(logits: Tensor, banned: Tensor | None) -> str | None:
    """None if the kernel can run this call, otherwise why not."""
    missing = available(logits.device)
    if missing is not None:
        return missing
    if logits.dtype not in _DTYPES:
        return f"the kernel takes fp32, fp16 and bf16, got {logits.dtype}"
    if logits.ndim != 2 or (logits.shape[1] > 1 and logits.stride(1) != 1):
        return (
            "the kernel takes logits (rows, vocab) with contiguous rows, "
            f"got shape {tuple(logits.shape)}, strides {logits.stride()}"
        )
    if banned is None:
        return None
    if banned.dtype != torch.int32 or banned.ndim != 1 or not banned.is_contiguous():
        return (
            "the kernel takes banned as one contiguous int32 dimension, "
            f"got {banned.dtype}, shape {tuple(banned.shape)}, strides {banned.stride()}"
        )
    if banned.numel() > MAX_BANNED:
        return f"the kernel takes up to {MAX_BANNED} banned ids, got {banned.numel()}"
    return None


def vocab_stats(
    logits: Tensor, banned: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernel on a call that ``vocab_stats_supports``.

    Args:
        logits: ``(rows, vocab)`` fp32, fp16 or bf16; any row stride.
        banned: ``(n,)`` int32 on the device of ``logits``, or None.

    Returns:
        token (int64), logsumexp, prob, entropy, margin (fp32), each ``(rows,)``.

    Raises:
        RuntimeError: there are no kernels, or the launch failed; the message names the kernel.
    """
    module = _KERNELS.load()
    if module is None:
        raise RuntimeError(_KERNELS.missing)
    rows, vocab = logits.shape
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logsumexp, prob, entropy, margin = (
        torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(4)
    )
    with torch.cuda.device(logits.device):
        module.vocab_stats(
            token=token.data_ptr(),
            logsumexp=logsumexp.data_ptr(),
            prob=prob.data_ptr(),
            entropy=entropy.data_ptr(),
            margin=margin.data_ptr(),
            logits=logits.data_ptr(),
            banned=0 if banned is None else banned.data_ptr(),
            dtype=_DTYPES[logits.dtype],
            rows=rows,
            vocab=vocab,
            banned_count=0 if banned is None else banned.numel(),
            stride_logits_row=logits.stride(0),
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return token, logsumexp, prob, entropy, margin
