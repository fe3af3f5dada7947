"""The second pass of ``window_attention`` where the splits of its keys are apart."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _tiles
from ._attention_tiles import OnlineSoftmax, merge_split, no_keys
from ._primitives import wait_for_previous


@triton.jit
def _window_attention_merge_kernel(
    # pointers
    out_ptr,  # (rows, HEAD_DIM)
    values_ptr,  # (splits, rows, HEAD_DIM) fp32
    state_ptr,  # (2, splits, rows) fp32
    # sizes
    rows,
    splits,
    # constexprs
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Splits merged in order of position."""
    wait_for_previous(PDL)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask_m = offs_m < rows
    total = no_keys(BLOCK_M, BLOCK_D)
    for split in range(0, splits):
        at = split * tl.cast(rows, tl.int64) + offs_m
        l_split = tl.load(state_ptr + splits * tl.cast(rows, tl.int64) + at, mask=mask_m, other=0.0)
        used = mask_m & (l_split != 0.0)
        m_split = tl.load(state_ptr + at, mask=used, other=float("-inf"))
        mask = used[:, None] & (offs_d < HEAD_DIM)
        # [BLOCK_M, BLOCK_D]
        values = tl.load(values_ptr + at[:, None] * HEAD_DIM + offs_d, mask=mask, other=0.0)
        total = merge_split(total, OnlineSoftmax(values, m_split, l_split))
    y = total.acc / tl.where(total.l_i == 0.0, 1.0, total.l_i)[:, None]
    mask_out = mask_m[:, None] & (offs_d < HEAD_DIM)
    out_ptrs = out_ptr + offs_m[:, None] * HEAD_DIM + offs_d
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask_out)


def scratch(q: torch.Tensor, splits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(splits, B, T, Hq, D) weighted sums of values, (2, splits, B, T, Hq) maxima and sums."""
    values = torch.empty(splits, *q.shape, dtype=torch.float32, device=q.device)
    return values, torch.empty(2, splits, *q.shape[:3], dtype=torch.float32, device=q.device)


def merge(
    out: torch.Tensor, values: torch.Tensor, state: torch.Tensor, *, pdl: bool = False
) -> None:
    """Merge ``values`` (splits, ..., D), not yet divided by their sums, with ``state``."""
    head_dim = out.shape[-1]
    rows = out.numel() // head_dim
    block_m, num_warps = _tiles.ATTENTION_MERGE
    _window_attention_merge_kernel[(_tiles.cdiv(rows, block_m),)](
        out_ptr=out,
        values_ptr=values,
        state_ptr=state,
        rows=rows,
        splits=values.shape[0],
        HEAD_DIM=head_dim,
        BLOCK_M=block_m,
        BLOCK_D=max(_tiles.next_power_of_2(head_dim), 32),
        num_warps=num_warps,
        **_tiles.pdl(out.device, pdl),
    )
