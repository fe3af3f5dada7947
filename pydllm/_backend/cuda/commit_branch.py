"""Launches csrc/commit_branch.cu."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pydllm._backend.cuda import DTYPES, call


def supports(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    branch: Tensor,
    start: Tensor,
    commit: Tensor,
    cos: Tensor,
    sin: Tensor,
    pad: Tensor | None,
    k_norm: Tensor | None,
    block_table: Tensor | None,
    *_: Any,
) -> str | None:
    """None if the kernel can run this call, otherwise why not; arguments as of the launcher."""
    if k.dtype not in DTYPES:
        return f"the kernel takes fp32, fp16 and bf16, got {k.dtype}"
    heads = {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache}
    for name, tensor in heads.items():
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"{name} must have contiguous heads, got strides {tensor.stride()}"
    dense = {"branch": branch, "start": start, "commit": commit, "cos": cos, "sin": sin}
    for name, maybe in (*dense.items(), ("pad", pad), ("k_norm", k_norm), ("table", block_table)):
        if maybe is not None and not maybe.is_contiguous():
            return f"{name} must be contiguous, got strides {maybe.stride()}"
    return None


def commit_branch(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    branch: Tensor,
    start: Tensor,
    commit: Tensor,
    cos: Tensor,
    sin: Tensor,
    pad: Tensor | None,
    k_norm: Tensor | None,
    block_table: Tensor | None,
    branches: int,
    eps: float,
) -> None:
    """Launch the kernel; arguments as in ``pydllm.ops.commit_branch``."""
    batch, rows, kv_heads, head_dim = k.shape
    page = k_cache.shape[1]
    strides = {
        f"stride_{name}_{axis}": stride
        for name, tensor in {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache}.items()
        for axis, stride in zip(("batch", "row", "head"), tensor.stride(), strict=False)
    }
    call(
        "commit_branch",
        k.device,
        k_cache=k_cache,
        v_cache=v_cache,
        k=k,
        v=v,
        branch=branch,
        start=start,
        commit=commit,
        pad=pad,
        cos=cos,
        sin=sin,
        k_norm=k_norm,
        block_table=block_table,
        dtype=k.dtype,
        batch=batch,
        window=rows // branches,
        branches=branches,
        kv_heads=kv_heads,
        head_dim=head_dim,
        half=cos.shape[1],
        slots=page * (1 if block_table is None else block_table.shape[1]),
        page=page,
        pages=0 if block_table is None else k_cache.shape[0],
        eps=eps,
        **strides,
    )
