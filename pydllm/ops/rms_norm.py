"""Root-mean-square normalisation, with the residual addition before it."""

from __future__ import annotations

import torch
from torch import Tensor

from pydllm import reference
from pydllm._backend.library import Op
from pydllm._checks import (
    FLOATS,
    check_is_tensor,
    check_no_grad,
    check_number,
    check_tensor,
    check_written,
)


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
        eps: added to the mean square, at least 0.
        residual: ``(..., D)`` like ``x``; **updated in place** to ``x + residual``.
        backend: None (``PYDLLM_BACKEND``), ``"auto"``, ``"cuda"``, ``"triton"`` or ``"torch"``.

    Returns:
        ``y`` with the shape and dtype of ``x``.

    Raises:
        ValueError: shapes or devices differ, ``eps`` is negative or not finite, a gradient is
            wanted, or an unknown backend.
        TypeError: a dtype that is not supported, or dtypes that differ.
        BackendError: the named backend cannot run the call.

    Determinism: a row's bits depend on that row alone. CUDA graphs: safe. ``torch.compile``: one
    op.

    Kernels: ``kernels/rms_norm.py``, ``csrc/rms_norm.cu``.

    Example:
        >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2), 0.0)
        tensor([[0.8485, 1.1314]])
    """
    check_is_tensor("x", x)
    if x.ndim == 0:
        raise ValueError("x: expected shape (..., D), got ()")
    check_tensor("x", x, x.shape, FLOATS)
    check_tensor("weight", weight, x.shape[-1:], x.dtype, x, "x")
    check_number("eps", eps, 0)
    if residual is not None:
        check_tensor("residual", residual, x.shape, x.dtype, x, "x")
        check_written("residual", residual)
    check_no_grad("rms_norm", x=x, weight=weight, residual=residual)
    return OP(x, weight, eps, residual, backend=backend)


def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


OP = Op(
    "rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!)? residual, str backend) -> Tensor",
    _fake,
    reference.rms_norm,
    pdl=("triton", "cuda"),
)
