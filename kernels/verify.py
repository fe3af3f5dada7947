"""FreeDave's step, one program per sequence: candidates are compared by the one token that a step
writes, since candidate j + 1 has one token more than candidate j.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _tiles
from . import draft as _draft
from .draft import block_of, order_keys, write_candidates


@triton.jit(do_not_specialize=["slots", "rows", "branches", "drafts"])
def _verify_kernel(
    # pointers
    following_ptr,  # (B, drafts, L), written
    branch_ptr,  # (B,), as the next three, written
    accepted_ptr,
    remaining_ptr,
    complete_ptr,
    x_ptr,  # (B, L), read and written
    step_map_ptr,  # (B, L), written
    nfe_ptr,  # (B,), read and written
    candidates_ptr,  # (B, branches, L)
    token_ptr,  # (B, branches, T)
    score_ptr,  # (B, branches, T)
    start_ptr,  # (B,)
    length_ptr,  # (B,)
    # sizes
    slots,
    rows,
    branches,
    drafts,
    mask_id,
    # strides
    stride_x_row,
    stride_step_map_row,
    # constexprs
    BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    start = tl.load(start_ptr + batch).to(tl.int64)
    length = tl.maximum(tl.minimum(tl.load(length_ptr + batch), rows), 0)
    end = tl.minimum(length, slots - start)
    nfe = tl.load(nfe_ptr + batch)
    x_ptr += batch * stride_x_row
    step_map_ptr += batch * stride_step_map_row + start
    candidates_ptr += batch * branches * slots + start
    token_ptr += batch * branches * rows
    score_ptr += batch * branches * rows
    offs_t = tl.arange(0, BLOCK_T)[None, :]
    offs_d = tl.arange(0, BLOCK_D)[:, None].to(tl.int64)
    inside = (offs_t >= -start) & (offs_t < end)
    real = inside & (offs_d < branches)
    # [BLOCK_D, BLOCK_T]
    ids = tl.load(candidates_ptr + offs_d * slots + offs_t, mask=real, other=0)
    masked = real & (ids == mask_id)
    token = tl.load(token_ptr + offs_d * rows + offs_t, mask=masked, other=0)
    key = order_keys(tl.load(score_ptr + offs_d * rows + offs_t, mask=masked, other=0.0))

    # The token that a step writes from each candidate, [BLOCK_D, 1].
    block = tl.where(masked, block_of(start + offs_t, BLOCK_SIZE), slots)
    eligible = masked & (block == tl.min(block, 1, keep_dims=True))
    best = tl.min(tl.where(eligible, key, 0xFFFFFFFF), 1, keep_dims=True)
    place = tl.min(tl.where(eligible & (key == best), offs_t, BLOCK_T), 1, keep_dims=True)
    pick = tl.sum(tl.where(offs_t == place, token, 0), 1, keep_dims=True)
    moves = (place < BLOCK_T) & (pick != mask_id)
    next_ptr = candidates_ptr + (offs_d + 1) * slots + place
    next_id = tl.load(next_ptr, mask=moves & (offs_d + 1 < branches), other=mask_id)
    leads = moves & (next_id == pick)
    branch = tl.min(tl.where(leads, BLOCK_D, offs_d))
    is_last = offs_d == branch

    # [1, BLOCK_T]: the last accepted candidate, and the step from it
    ids = tl.sum(tl.where(is_last, ids, 0), 0, keep_dims=True)
    token = tl.sum(tl.where(is_last, token, 0), 0, keep_dims=True)
    key = tl.load(score_ptr + branch * rows + offs_t, mask=inside & (ids == mask_id), other=0.0)
    key = order_keys(key)
    place = tl.sum(tl.where(is_last, place, 0))
    first = tl.min(tl.where(inside & (ids == mask_id), offs_t, length))
    if BLOCK_SIZE > 0:
        first = (start + first) // BLOCK_SIZE * BLOCK_SIZE - start
    new = tl.where(offs_t == place, token, ids)
    before = tl.load(x_ptr + start + offs_t, mask=inside, other=0)
    n_masks = tl.sum((inside & (before == mask_id)).to(tl.int32), 1, keep_dims=True)
    changed = inside & (new != before) & (n_masks > 0)
    masked = inside & (new == mask_id)
    # The same along the other dimension, [BLOCK_T, 1].
    offs_col = tl.arange(0, BLOCK_T)[:, None]
    inside_col = (offs_col >= -start) & (offs_col < end)
    ids_col = tl.load(candidates_ptr + branch * slots + offs_col, mask=inside_col, other=0)
    masked_col = inside_col & (ids_col == mask_id)
    at_place = offs_col == place
    key_col = tl.load(score_ptr + branch * rows + offs_col, mask=masked_col, other=0.0)
    key_col = order_keys(key_col)
    pick = tl.sum(tl.where(offs_t == place, token, 0), 1, keep_dims=True)
    masked_col = masked_col & ((at_place == 0) | (pick == mask_id))

    # Every thread has read the sequence before one writes it.
    tl.debug_barrier()
    tl.store(x_ptr + start + offs_t, new, mask=changed)
    tl.store(step_map_ptr + offs_t, tl.broadcast_to(nfe, changed.shape), mask=changed)
    tl.store(nfe_ptr + batch, nfe + tl.minimum(tl.sum(n_masks), 1))
    tl.store(branch_ptr + batch, branch.to(tl.int32))
    tl.store(accepted_ptr + batch, tl.sum(changed.to(tl.int32)))
    tl.store(remaining_ptr + batch, tl.sum(masked.to(tl.int32)))
    tl.store(complete_ptr + batch, tl.maximum(first, 0).to(tl.int32))
    write_candidates(
        following_ptr + batch * drafts * slots,
        x_ptr,
        start,
        end,
        slots,
        drafts,
        inside,
        new,
        token,
        key,
        masked,
        key_col,
        masked_col,
        BLOCK_SIZE,
        BLOCK_F,
        BLOCK_T,
        BLOCK_L,
    )


def supports(
    x: torch.Tensor,
    step_map: torch.Tensor,
    nfe: torch.Tensor,
    candidates: torch.Tensor,
    token: torch.Tensor,
    score: torch.Tensor,
    mask_id: int,
    start: torch.Tensor,
    length: torch.Tensor,
    drafts: int,
    block_size: int | None,
) -> str | None:
    """None if the kernel can run this call, otherwise why not."""
    named = {"nfe": nfe, "candidates": candidates, "token": token, "score": score}
    for name, tensor in named.items():
        if not tensor.is_contiguous():
            return f"{name} must be contiguous, got strides {tensor.stride()}"
    if step_map.shape[1] > 1 and step_map.stride(1) != 1:
        return f"step_map must have contiguous rows, got strides {step_map.stride()}"
    return _draft.supports(x, token, score, mask_id, start, length, drafts, block_size)


def verify(
    x: torch.Tensor,
    step_map: torch.Tensor,
    nfe: torch.Tensor,
    candidates: torch.Tensor,
    token: torch.Tensor,
    score: torch.Tensor,
    mask_id: int,
    start: torch.Tensor,
    length: torch.Tensor,
    drafts: int,
    block_size: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the kernel; arguments as in ``pydllm.reference.verify``."""
    batch, branches, rows = token.shape
    following = candidates.new_empty(batch, drafts, x.shape[1])
    branch, accepted, remaining, complete = (torch.empty_like(nfe) for _ in range(4))
    if batch == 0:
        return following, branch, accepted, remaining, complete
    tile = _tiles.draft_tile(rows)
    _verify_kernel[(batch,)](
        following_ptr=following,
        branch_ptr=branch,
        accepted_ptr=accepted,
        remaining_ptr=remaining,
        complete_ptr=complete,
        x_ptr=x,
        step_map_ptr=step_map,
        nfe_ptr=nfe,
        candidates_ptr=candidates,
        token_ptr=token,
        score_ptr=score,
        start_ptr=start,
        length_ptr=length,
        slots=x.shape[1],
        rows=rows,
        branches=branches,
        drafts=drafts,
        mask_id=mask_id,
        stride_x_row=x.stride(0),
        stride_step_map_row=step_map.stride(0),
        BLOCK_SIZE=block_size or 0,
        BLOCK_D=_tiles.next_power_of_2(branches),
        BLOCK_F=_tiles.next_power_of_2(drafts),
        BLOCK_T=tile.block_t,
        BLOCK_L=_tiles.DRAFT_COPY,
        num_warps=tile.num_warps,
    )
    return following, branch, accepted, remaining, complete
