"""Launches csrc/route.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from pydllm._backend.cuda import DTYPES, call

MAX_EXPERTS = 1024  # kRouteExperts in csrc/route.h
ROWS = 8  # kLogitRows in csrc/route.cu
GRID = 65535  # blocks along the second dimension of a grid


def supports(
    hidden: Tensor,
    router: Tensor,
    bias: Tensor | None,
    length: Tensor | None,
    start: Tensor | None,
    top_k: int,
    score: str,
    renormalize: bool,
    scale: float,
    groups: int,
    topk_groups: int,
    capacity: int | None,
    block_size: int | None,
    branches: int,
) -> str | None:
    """None if the kernel can run this call, otherwise why not."""
    if hidden.dtype not in DTYPES:
        return f"the kernel takes fp32, fp16 and bf16, got {hidden.dtype}"
    named = {"hidden": hidden, "router": router, "bias": bias, "length": length, "start": start}
    for name, tensor in named.items():
        if tensor is not None and not tensor.is_contiguous():
            return f"{name} must be contiguous, got strides {tensor.stride()}"
    if router.shape[0] > MAX_EXPERTS:
        return f"the kernel takes up to {MAX_EXPERTS} experts, got {router.shape[0]}"
    batch, rows, _ = hidden.shape
    if batch * rows > GRID * ROWS:
        return f"the kernel takes up to {GRID * ROWS} rows, got {batch * rows}"
    blocks = rows // branches // (block_size or 1) + 2
    if capacity is not None and blocks > GRID:
        return f"the kernel takes up to {GRID} blocks in a window, got {blocks}"
    return None


def route(
    hidden: Tensor,
    router: Tensor,
    bias: Tensor | None,
    length: Tensor | None,
    start: Tensor | None,
    top_k: int,
    score: str,
    renormalize: bool,
    scale: float,
    groups: int,
    topk_groups: int,
    capacity: int | None,
    block_size: int | None,
    branches: int,
) -> tuple[Tensor, Tensor]:
    """Launch the kernels; arguments as in ``pydllm.ops.route``."""
    batch, height, width = hidden.shape
    experts, rows, device = router.shape[0], height // branches, hidden.device
    ids = torch.empty(batch, height, top_k, dtype=torch.int32, device=device)
    weights = torch.empty(batch, height, top_k, dtype=torch.float32, device=device)
    blocks = 0 if block_size is None else rows // block_size + 2
    pool = None
    if capacity is not None:
        pool = torch.empty(batch * branches, blocks, experts, dtype=torch.uint8, device=device)
    call(
        "route",
        device,
        ids=ids,
        weights=weights,
        logits=torch.empty(batch * height, experts, dtype=torch.float32, device=device),
        pool=pool,
        hidden=hidden,
        router=router,
        bias=bias,
        start=start,
        length=length,
        dtype=hidden.dtype,
        sigmoid=score == "sigmoid",
        renormalize=renormalize,
        batch=batch,
        branches=branches,
        rows=rows,
        width=width,
        experts=experts,
        top_k=top_k,
        groups=groups,
        topk_groups=topk_groups,
        capacity=capacity or 0,
        block_size=block_size or 0,
        blocks=blocks,
        scale=scale,
    )
    return ids, weights
