"""``window_attention`` in CUDA: fp16 and bf16, head sizes 64 and 128, on tensor cores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydllm._backend.cuda import call, may_overlap

KEYS = 64  # kAttentionKeys in csrc/window_attention.h
QUERIES = 64  # query rows of a block

_DTYPES = (torch.float16, torch.bfloat16)
_HEAD_DIMS = (64, 128)
_VECTOR = 8  # elements of 16 bytes
_LARGEST = 2**31 - 1

# Positions of a split of the keys: the same for every call, or a row's bits would depend on it.
# Kernels merge splits in one order, whether a block has one or all.
SPLIT = 512

# Key tiles in shared memory, 2 or 3; 0: as many as leave room for two blocks on a multiprocessor.
STAGES = 0


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: Tensor,
    length: Tensor,
    kv_len: Tensor,
    commit: Tensor,
    cos: Tensor,
    sin: Tensor,
    pad: Tensor | None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    block_table: Tensor | None = None,
    block_offset: Tensor | None = None,
    *_: Any,
) -> str | None:
    """None if the kernel can run this call, otherwise why not; arguments as of the launcher."""
    if q.dtype not in _DTYPES:
        return f"the kernel takes fp16 and bf16, got {q.dtype}"
    if q.shape[-1] not in _HEAD_DIMS:
        return f"the kernel takes head sizes 64 and 128, got {q.shape[-1]}"
    if cos.shape[1] % _VECTOR:
        return f"the kernel rotates a multiple of 16 dimensions, got {2 * cos.shape[1]}"
    heads = {"q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache}
    for name, tensor in heads.items():
        *strides, last = tensor.stride()
        if last != 1:
            return f"{name} must have contiguous heads, got strides {tensor.stride()}"
        if any(stride % _VECTOR for stride in strides) or _offset(tensor) % _VECTOR:
            return (
                f"heads of {name} must begin at 16 bytes, got strides {tensor.stride()} "
                f"and offset {_offset(tensor)} in elements"
            )
    vectors = {"cos": cos, "sin": sin, "q_norm": q_norm, "k_norm": k_norm}
    numbers = {"start": start, "length": length, "kv_len": kv_len, "commit": commit, "pad": pad}
    tables = {"block_table": block_table, "block_offset": block_offset}
    for name, dense in (vectors | numbers | tables).items():
        if dense is None:
            continue
        if not dense.is_contiguous():
            return f"{name} must be contiguous, got strides {dense.stride()}"
        if name in vectors and _offset(dense) * dense.itemsize % 16:
            return f"{name} must begin at 16 bytes, got offset {_offset(dense)} in elements"
    if q.shape[1] * q.shape[2] > _LARGEST - KEYS or slots_of(k_cache, block_table) > _LARGEST // 4:
        return f"sizes must fit 32 bits, got q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)}"
    return None


def _offset(tensor: Tensor) -> int:
    """Elements before the first; the compiler cannot ask, and leaves it to the launch."""
    return 0 if torch.compiler.is_compiling() else int(tensor.storage_offset())


def slots_of(k_cache: Tensor, block_table: Tensor | None) -> int:
    """Slots of a sequence."""
    return k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])


def multiprocessors(device: torch.device) -> int:
    """How many the device has; 0 for none."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def splits_of(blocks: int, slots: int, processors: int) -> int:
    """For how many splits of the keys there is a block of its own; 1: a block has all of them."""
    return -(-slots // SPLIT) if blocks < 2 * processors else 1


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: Tensor,
    length: Tensor,
    kv_len: Tensor,
    commit: Tensor,
    cos: Tensor,
    sin: Tensor,
    pad: Tensor | None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    block_table: Tensor | None = None,
    block_offset: Tensor | None = None,
    scale: float = 1.0,
    branches: int = 1,
    causal: bool = False,
    block_size: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    eps: float = 1e-6,
    leaves: int = 0,
    leaf_rows: int = 1,
    *,
    pdl: bool = False,
) -> Tensor:
    """Launch the kernel; arguments as in ``pydllm.ops.window_attention``."""
    batch, rows, heads, head_dim = q.shape
    slots = slots_of(k_cache, block_table)
    reach = slots + leaf_rows if leaves else slots  # leaves may stand past the last slot
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    blocks = -(-rows * heads // k.shape[2] // QUERIES) * k.shape[2] * batch
    splits = splits_of(blocks, reach, multiprocessors(q.device))
    part = state = None
    if reach > SPLIT:
        part = torch.empty(splits, *q.shape, dtype=torch.float32, device=q.device)
    if splits > 1:
        state = torch.empty(2, splits, batch, rows, heads, dtype=torch.float32, device=q.device)
    strides = {
        f"stride_{name}_{axis}": stride
        for name, tensor in {"q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache}.items()
        for axis, stride in zip(("batch", "row", "head"), tensor.stride(), strict=False)
    }
    call(
        "window_attention",
        q.device,
        out=out,
        k_cache=k_cache,
        v_cache=v_cache,
        q=q,
        k=k,
        v=v,
        start=start,
        length=length,
        kv_len=kv_len,
        commit=commit,
        pad=pad,
        cos=cos,
        sin=sin,
        q_norm=q_norm,
        k_norm=k_norm,
        table=block_table,
        block_offset=block_offset,
        part=part,
        state=state,
        dtype=q.dtype,
        batch=batch,
        rows=rows,
        heads=heads,
        kv_heads=k.shape[2],
        head_dim=head_dim,
        half=cos.shape[1],
        branches=1 + leaves if leaves else branches,
        leaf_rows=leaf_rows if leaves else 0,
        slots=slots,
        page=0 if block_table is None else k_cache.shape[1],
        pages=0 if block_table is None else k_cache.shape[0],
        stages=STAGES,
        splits=splits,
        split_tiles=SPLIT // KEYS,
        block_size=min(block_size or 0, _LARGEST),
        sliding_window=min(window or 0, _LARGEST),
        causal=causal and not leaves,  # a leaf's rows see each other
        pdl=may_overlap(q.device, pdl),
        eps=eps,
        scale=scale,
        softcap=softcap or 0.0,
        **strides,
    )
    return out
