"""Baselines that other packages compute. Where one is not installed, its row says so.

Written against FlashInfer 0.7.4, flash-attn 2.8 and Liger-Kernel 0.8.5; all need a GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pydllm._backend.errors import BackendError

INSTALL = {
    "flashinfer": "flashinfer-python",
    "flash_attn": "flash-attn",
    "liger_kernel": "liger-kernel",
}
HALVES = (torch.float16, torch.bfloat16)


def package(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...] = HALVES) -> ModuleType:
    """A peer's module, or a BackendError: why it cannot run on this tensor."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        top = name.partition(".")[0]
        raise BackendError(f"{top} is not installed (pip install {INSTALL[top]})") from error
    if not tensor.is_cuda:
        raise BackendError(f"{name} needs a GPU, the tensors are on {tensor.device.type}")
    if tensor.dtype not in dtypes:
        raise BackendError(f"{name} takes fp16 and bf16, got {tensor.dtype}")
    return module


def flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of ``(B, T, H, D)``; grouped heads are its own."""
    return package("flash_attn", q).flash_attn_func(q, k, v, causal=False)


def flashinfer_attention() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Of ``(B, T, H, D)``, through the ragged wrapper, which is planned once per shape."""
    planned: dict[tuple[object, ...], Any] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flashinfer = package("flashinfer", q)
        batch, rows, heads, head_dim = q.shape
        key = (q.shape, k.shape, q.dtype)
        if key not in planned:
            planned.clear()
            workspace = torch.empty(128 * 2**20, dtype=torch.uint8, device=q.device)
            wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
            steps = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
            wrapper.plan(
                steps * rows,
                steps * k.shape[1],
                heads,
                k.shape[2],
                head_dim,
                causal=False,
                q_data_type=q.dtype,
            )
            planned[key] = wrapper
        return planned[key].run(*(x.flatten(0, 1) for x in (q, k, v))).view(q.shape)

    return attend


def flashinfer_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Adds to ``residual`` in place, normalises in the place of ``x``."""
    package("flashinfer", x).fused_add_rmsnorm(x, residual, weight, eps)
    return x


def liger_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The sum is a new tensor."""
    module = package("liger_kernel.ops", x, (*HALVES, torch.float32))
    return module.LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps)[0]


def flashinfer_swiglu(gate_up: Tensor) -> Tensor:
    return package("flashinfer", gate_up).silu_and_mul(gate_up)


def liger_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Of two tensors, as the two products of its feed-forward layer leave them."""
    module = package("liger_kernel.ops", gate, (*HALVES, torch.float32))
    return module.LigerSiLUMulFunction.apply(gate, up)
