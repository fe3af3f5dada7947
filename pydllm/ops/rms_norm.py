"""Root-mean-square normalisation, with the residual addition before it."""

from __future__ import annotations

import torch
from torch import Tensor

from pydllm import reference
from pydllm._backend.dispatch import choose, launcher
from pydllm._backend.library import register
from pydllm.ops._checks import FLOATS, check_device, check_dtype, check_no_grad, check_shape


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Normalise rows to unit root mean square and scale them; optionally add a residual first.

    ``h = x + residual; y = (h / sqrt(mean(h^2) + eps)) * weight``, the normalised row rounded to
    the dtype of ``x`` before it is scaled, as LLaDA, Llama and Qwen do.

    Args:
        x: ``(..., D)`` fp32, fp16, bf16 or (torch backend) fp64.
        weight: ``(D,)``, dtype of ``x``.
        eps: added to the mean square.
        residual: ``(..., D)`` like ``x``; **updated in place** to ``x + residual``.
        backend: None (``PYDLLM_BACKEND``), ``"auto"``, ``"cuda"``, ``"triton"`` or ``"torch"``.

    Returns:
        ``y`` with the shape and dtype of ``x``.

    Raises:
        ValueError: shapes or devices differ, a gradient is wanted, or an unknown backend.
        TypeError: a dtype that is not supported, or dtypes that differ.
        BackendError: the named backend cannot run the call.

    Determinism: a row's bits depend on that row alone. CUDA graphs: safe. ``torch.compile``: one
    op.

    Kernels: ``kernels/rms_norm.py``, ``csrc/rms_norm.cu``.

    Example:
        >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2), 0.0)
        tensor([[0.8485, 1.1314]])
    """
    check_dtype("x", x, *FLOATS)
    if x.ndim == 0:
        raise ValueError("x: expected shape (..., D), got ()")
    check_shape("weight", weight, x.shape[-1])
    check_dtype("weight", weight, x.dtype)
    check_device("weight", weight, "x", x)
    if residual is not None:
        check_shape("residual", residual, *x.shape)
        check_dtype("residual", residual, x.dtype)
        check_device("residual", residual, "x", x)
    check_no_grad("rms_norm", x=x, weight=weight, residual=residual)

    def cuda() -> str | None:
        from pydllm._backend.cuda import rms_norm as kernel

        return kernel.supports(x, weight, residual)

    def triton() -> str | None:
        from pydllm.kernels import rms_norm as kernel

        return kernel.supports(x, weight, residual)

    chosen = choose("rms_norm", backend, x.device, triton=triton, cuda=cuda)
    if chosen == "torch":
        return reference.rms_norm(x, weight, eps, residual)
    return torch.ops.pydllm.rms_norm(x, weight, eps, residual, chosen)


def _run(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, backend: str) -> Tensor:
    if backend == "torch":
        return reference.rms_norm(x, weight, eps, residual)
    return launcher("rms_norm", backend)(x, weight, eps, residual)


def _fake(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, backend: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


register(
    "rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!)? residual, str backend) -> Tensor",
    _run,
    _fake,
)
