"""The second pass of ``window_attention`` where its keys are split."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _tiles


@triton.jit
def _window_attention_merge_kernel(
    # pointers
    out_ptr,  # (rows, HEAD_DIM)
    part_ptr,  # (splits, rows, HEAD_DIM) fp32
    state_ptr,  # (2, splits, rows) fp32
    # sizes
    rows,
    splits,
    # constexprs
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Splits joined in order of position; a split without keys has sum 0 and changes nothing."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask_m = offs_m < rows
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    for split in range(0, splits):
        at = split * rows.to(tl.int64) + offs_m
        l_part = tl.load(state_ptr + splits * rows.to(tl.int64) + at, mask=mask_m, other=0.0)
        used = l_part != 0.0  # a NaN is not 0
        m_part = tl.load(state_ptr + at, mask=mask_m & used, other=float("-inf"))
        mask_part = used[:, None] & (offs_d < HEAD_DIM)
        # [BLOCK_M, BLOCK_D]
        part = tl.load(part_ptr + at[:, None] * HEAD_DIM + offs_d, mask=mask_part, other=0.0)
        m_new = tl.maximum(m_i, m_part)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha, beta = tl.exp2(m_i - shift), tl.exp2(m_part - shift)
        l_i = tl.fma(l_i, alpha, l_part * beta)
        acc = tl.fma(acc, tl.broadcast_to(alpha[:, None], acc.shape), part * beta[:, None])
        m_i = m_new
    y = acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]
    mask_out = mask_m[:, None] & (offs_d < HEAD_DIM)
    out_ptrs = out_ptr + offs_m[:, None] * HEAD_DIM + offs_d
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask_out)


def scratch(q: torch.Tensor, splits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(splits, B, T, Hq, D) weighted sums of values, (2, splits, B, T, Hq) maxima and sums."""
    part = torch.empty(splits, *q.shape, dtype=torch.float32, device=q.device)
    return part, torch.empty(2, splits, *q.shape[:3], dtype=torch.float32, device=q.device)


def merge(out: torch.Tensor, part: torch.Tensor, state: torch.Tensor) -> None:
    """Join ``part`` (splits, ..., D), not yet divided by its sums, with ``state`` into ``out``."""
    head_dim = out.shape[-1]
    rows = out.numel() // head_dim
    block_m, num_warps = _tiles.ATTENTION_MERGE
    _window_attention_merge_kernel[(triton.cdiv(rows, block_m),)](
        out_ptr=out,
        part_ptr=part,
        state_ptr=state,
        rows=rows,
        splits=part.shape[0],
        HEAD_DIM=head_dim,
        BLOCK_M=block_m,
        BLOCK_D=max(triton.next_power_of_2(head_dim), 32),
        num_warps=num_warps,
    )
