"""Which backend runs a call: decided here, from metadata alone.

``auto`` takes the first of triton, cuda, torch that supports the call, or of cuda, triton, torch
where ``preference.py`` has a measurement that says so, and logs once why the ones before it do not.
A backend asked for by name, in the call or in ``PYDLLM_BACKEND``, never falls back.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable

import torch

from pydllm._backend import env
from pydllm._backend.constants import capability, is_rocm
from pydllm._backend.cuda import available as cuda_missing
from pydllm._backend.errors import BackendError
from pydllm._backend.preference import prefers_cuda

Reason = str | None  # None: supported; otherwise why not, worded for a user


class _Once(logging.Filter):
    """Lets each distinct message through once."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in self._seen
        self._seen.add(message)
        return new


def _make_logger() -> logging.Logger:
    root = logging.getLogger("pydllm")
    if env.ERROR is None and env.LOG != "off":
        root.setLevel(env.LOG.upper())
        root.addHandler(logging.StreamHandler())
    logger = root.getChild("dispatch")
    logger.addFilter(_Once())
    return logger


_LOGGER = _make_logger()
MIN_CAPABILITY = 80  # below, the kernels spill registers or want more shared memory than there is
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def triton_missing(device: torch.device) -> Reason:
    """Why Triton kernels cannot run on ``device``; None if they can."""
    if not _TRITON_INSTALLED:
        return "triton is not installed (pip install 'triton>=3.6')"
    if env.TRITON_INTERPRET:
        return None
    if device.type == "cuda":
        return _gpu_missing(device.index)
    return (
        f"Triton kernels need a CUDA tensor, got one on {device.type} "
        "(set TRITON_INTERPRET=1 before starting Python to interpret them)"
    )


def _gpu_missing(index: int | None) -> Reason:
    """Why the Triton kernels are not launched on a GPU; None if they are."""
    if is_rocm():
        return "the Triton kernels are written for NVIDIA GPUs, this PyTorch is built for ROCm"
    if torch.cuda.is_available() and capability(index) < MIN_CAPABILITY:
        return (
            f"the Triton kernels need compute capability {MIN_CAPABILITY // 10}.0 (Ampere), the "
            f"device has {capability(index) // 10}.{capability(index) % 10}"
        )
    return None


def choose(
    op: str,
    backend: str | None,
    device: torch.device,
    *,
    triton: Callable[[], Reason] | None = None,
    cuda: Callable[[], Reason] | None = None,
) -> str:
    """The backend that runs ``op`` on ``device``: ``"cuda"``, ``"triton"`` or ``"torch"``.

    Args:
        op: name of the op, for messages.
        backend: the caller's choice; None takes ``PYDLLM_BACKEND`` (default ``auto``).
        device: where the tensors are.
        triton: what the Triton launcher says of this call beyond the device; None: no kernel.
        cuda: what the CUDA launcher says of it, likewise.

    Raises:
        ValueError: ``backend`` is not a backend's name.
        BackendError: a backend asked for by name cannot run the call.
    """
    wanted = env.BACKEND if backend is None else backend
    if wanted not in env.BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(env.BACKENDS)}, got {wanted!r}")
    if wanted == "torch":
        return "torch"

    def why_not(name: str) -> Reason:
        check = triton if name == "triton" else cuda
        if check is None:
            return f"{op} has no {name} kernel"
        missing = triton_missing(device) if name == "triton" else cuda_missing(device)
        return missing or check()

    if wanted != "auto":
        reason = why_not(wanted)
        if reason is not None:
            raise BackendError(f"{op}: backend {wanted!r} cannot run this call: {reason}")
        return wanted
    if device.type == "cpu":  # the interpreter is a debugging aid: only ever by name
        return "torch"
    for name in ("cuda", "triton") if prefers_cuda(op, device) else ("triton", "cuda"):
        reason = why_not(name)
        if reason is None:
            return name
        if not torch.compiler.is_compiling():
            _LOGGER.info("%s: not %s: %s", op, name, reason)
    return "torch"
