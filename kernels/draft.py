"""FreeDave's candidates: one program per sequence ranks its window's masks by comparing pairs.

``order_keys`` and ``write_candidates`` serve ``verify`` too, which drafts in the same launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _tiles
from ._primitives import sort_key


@triton.jit
def order_keys(score):
    """Unsigned integers of the scores' shape: the better the score, the smaller; NaN is worst."""
    score = score.to(tl.float32)
    score = tl.where(score == score, score, -float("inf"))
    return sort_key(0.0 - score)  # a negative zero becomes a zero


@triton.jit
def block_of(position, BLOCK_SIZE: tl.constexpr):
    """Index of the block; positions before 0 are no masks, whatever comes out for them."""
    if BLOCK_SIZE == 0:
        block = position * 0
    else:
        block = position // BLOCK_SIZE
    return block


@triton.jit
def write_candidates(
    candidates_ptr,  # of the sequence, (branches, L) contiguous
    x_ptr,  # of the sequence
    start,
    end,  # of the window rows in use
    slots,
    branches,
    inside,  # [1, BLOCK_T]
    new,  # [1, BLOCK_T], the window's ids
    token,  # [1, BLOCK_T]
    key,  # [1, BLOCK_T]
    masked,  # [1, BLOCK_T]
    key_col,  # [BLOCK_T, 1], the same once more
    masked_col,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    offs_t = tl.arange(0, BLOCK_T)[None, :]
    offs_col = tl.arange(0, BLOCK_T)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[:, None]
    block, block_col = (
        block_of(start + offs_t, BLOCK_SIZE),
        block_of(start + offs_col, BLOCK_SIZE),
    )
    # [BLOCK_T, BLOCK_T]: does the row come before the column
    tied = (key_col < key) | ((key_col == key) & (offs_col < offs_t))
    before = masked_col & ((block_col < block) | ((block_col == block) & tied))
    rank = tl.sum(before.to(tl.int32), 0, keep_dims=True)
    rank = tl.where(masked, rank, BLOCK_T)
    # [BLOCK_D, BLOCK_T]
    filled = tl.where(rank < offs_d, token, new)
    rows = candidates_ptr + offs_d.to(tl.int64) * slots
    tl.store(rows + start + offs_t, filled, mask=inside & (offs_d < branches))
    for begin in range(0, slots, BLOCK_L):
        offs_l = begin + tl.arange(0, BLOCK_L)[None, :]
        at = offs_l - start
        # What lies outside of the window, or inside of it but not in use, is as it is.
        rest = (offs_l < slots) & ((at < 0) | (at >= end))
        ids = tl.load(x_ptr + offs_l, mask=rest, other=0)
        shape = tl.zeros([BLOCK_D, BLOCK_L], tl.int64)
        tl.store(rows + offs_l, ids + shape, mask=rest & (offs_d < branches))


@triton.jit(do_not_specialize=["slots", "rows", "branches"])
def _draft_kernel(
    # pointers
    candidates_ptr,  # (B, branches, L), written
    x_ptr,  # (B, L)
    token_ptr,  # (B, T)
    score_ptr,  # (B, T)
    start_ptr,  # (B,)
    length_ptr,  # (B,)
    # sizes
    slots,
    rows,
    branches,
    mask_id,
    # strides
    stride_x_row,
    stride_token_row,
    stride_score_row,
    # constexprs
    BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    start = tl.load(start_ptr + batch).to(tl.int64)
    end = tl.minimum(tl.minimum(tl.load(length_ptr + batch), rows), slots - start)
    x_ptr += batch * stride_x_row
    token_ptr += batch * stride_token_row
    score_ptr += batch * stride_score_row
    offs_t = tl.arange(0, BLOCK_T)[None, :]
    inside = (offs_t >= -start) & (offs_t < end)
    ids = tl.load(x_ptr + start + offs_t, mask=inside, other=0)
    masked = inside & (ids == mask_id)
    token = tl.load(token_ptr + offs_t, mask=masked, other=0)
    key = order_keys(tl.load(score_ptr + offs_t, mask=masked, other=0.0))
    offs_col = tl.arange(0, BLOCK_T)[:, None]
    inside_col = (offs_col >= -start) & (offs_col < end)
    ids_col = tl.load(x_ptr + start + offs_col, mask=inside_col, other=0)
    masked_col = inside_col & (ids_col == mask_id)
    key_col = order_keys(tl.load(score_ptr + offs_col, mask=masked_col, other=0.0))
    write_candidates(
        candidates_ptr + batch * branches * slots,
        x_ptr,
        start,
        end,
        slots,
        branches,
        inside,
        ids,
        token,
        key,
        masked,
        key_col,
        masked_col,
        BLOCK_SIZE,
        BLOCK_D,
        BLOCK_T,
        BLOCK_L,
    )


def supports(
    x: torch.Tensor,
    token: torch.Tensor,
    score: torch.Tensor,
    mask_id: int,
    start: torch.Tensor,
    length: torch.Tensor,
    branches: int,
    block_size: int | None,
) -> str | None:
    """None if the kernel can run this call, otherwise why not."""
    if score.dtype == torch.float64:
        return f"the kernel takes fp32, fp16 and bf16 scores, got {score.dtype}"
    if token.shape[-1] > _tiles.DRAFT[-1][0]:
        return (
            f"the kernel takes windows of up to {_tiles.DRAFT[-1][0]} positions, "
            f"got {token.shape[-1]}"
        )
    named = {"x": x, "token": token, "score": score, "start": start, "length": length}
    for name, tensor in named.items():
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return f"{name} must have contiguous rows, got strides {tensor.stride()}"
    return None


def draft(
    x: torch.Tensor,
    token: torch.Tensor,
    score: torch.Tensor,
    mask_id: int,
    start: torch.Tensor,
    length: torch.Tensor,
    branches: int,
    block_size: int | None,
) -> torch.Tensor:
    """Launch the kernel; arguments as in ``pydllm.reference.draft``."""
    batch, slots = x.shape
    rows = token.shape[1]
    candidates = x.new_empty(batch, branches, slots)
    if batch == 0:
        return candidates
    tile = _tiles.draft_tile(rows)
    _draft_kernel[(batch,)](
        candidates_ptr=candidates,
        x_ptr=x,
        token_ptr=token,
        score_ptr=score,
        start_ptr=start,
        length_ptr=length,
        slots=slots,
        rows=rows,
        branches=branches,
        mask_id=mask_id,
        stride_x_row=x.stride(0),
        stride_token_row=token.stride(0),
        stride_score_row=score.stride(0),
        BLOCK_SIZE=block_size or 0,
        BLOCK_D=_tiles.next_power_of_2(branches),
        BLOCK_T=tile.block_t,
        BLOCK_L=_tiles.DRAFT_COPY,
        num_warps=tile.num_warps,
    )
    return candidates
