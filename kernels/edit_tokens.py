"""``edit_tokens``: one step of a window that fills masks and replaces tokens, a window is one
block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _tiles
from ._primitives import sort_key
from ._ranking import count, first_ranked


# A new batch size must not compile the kernel again.
@triton.jit(do_not_specialize=["batch", "rows", "min_tokens", "max_post_steps"])
def _edit_tokens_kernel(
    # pointers
    remaining_ptr,  # (B,)
    filled_ptr,  # (B,)
    edited_ptr,  # (B,)
    x_ptr,  # (B, L), read and written
    step_map_ptr,  # (B, L), written
    nfe_ptr,  # (B,), read and written
    post_steps_ptr,  # (B,), read and written
    complete_ptr,  # (B,), read and written
    token_ptr,  # (B, T)
    score_ptr,  # (B, T)
    start_ptr,  # (B,)
    length_ptr,  # (B,)
    editable_from_ptr,  # (B,)
    # sizes
    batch,
    slots,
    rows,
    mask_id,
    threshold,
    edit_threshold,
    min_tokens,
    max_post_steps,
    # strides
    stride_x_row,
    stride_step_map_row,
    stride_token_row,
    stride_score_row,
    # constexprs
    CONFIRM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    offs_t = tl.arange(0, BLOCK_T)[None, :]
    mask_b = offs_b < batch
    start = tl.load(start_ptr + offs_b, mask=mask_b, other=0).to(tl.int64)
    length = tl.load(length_ptr + offs_b, mask=mask_b, other=0)
    first = tl.load(editable_from_ptr + offs_b, mask=mask_b, other=0)
    nfe = tl.load(nfe_ptr + offs_b, mask=mask_b, other=0)
    post_steps = tl.load(post_steps_ptr + offs_b, mask=mask_b, other=0)
    length = tl.where(tl.load(complete_ptr + offs_b, mask=mask_b, other=1) != 0, 0, length)
    end = tl.minimum(tl.minimum(length, rows), slots - start)
    inside = (offs_t >= -start) & (offs_t < end) & mask_b
    own = inside & (start + offs_t >= first)
    x_row = x_ptr + offs_b * stride_x_row + start
    # [BLOCK_B, BLOCK_T]
    before = tl.load(x_row + offs_t, mask=inside, other=0)
    token = tl.load(token_ptr + offs_b * stride_token_row + offs_t, mask=own, other=0)
    score = tl.load(score_ptr + offs_b * stride_score_row + offs_t, mask=own, other=0.0)
    masked = own & (before == mask_id)
    has_mask = count(masked) > 0
    takes_part = count(inside) > 0
    # Limits are rounded to the dtype of the scores.
    zero = tl.zeros_like(nfe).to(tl.float32)
    limit = (zero + threshold).to(score.dtype).to(tl.float32)
    edit_limit = (zero + edit_threshold).to(score.dtype).to(tl.float32)
    score = score.to(tl.float32)
    score = tl.where(score == score, score, -float("inf"))
    cost = 0.0 - score  # a negative zero becomes a zero

    post_steps += (takes_part & (has_mask == 0)).to(tl.int32)
    over = post_steps > max_post_steps
    best = first_ranked(masked, sort_key(cost), tl.zeros_like(nfe) + min_tokens)
    fill = masked & ((score > limit) | best)
    edit = own & (before != mask_id) & (token != before) & (token != mask_id)
    edit = edit & (score > edit_limit)
    if CONFIRM:
        edit = edit & (has_mask | (over == 0))
    written = fill | edit
    n_edits = count(edit)
    remaining = count(own & (tl.where(written, token, before) == mask_id))
    is_complete = (has_mask == 0) & (n_edits == 0)
    if not CONFIRM:
        is_complete = is_complete | ((remaining == 0) & (post_steps >= max_post_steps))

    # Every thread has read the sequence before one writes it.
    tl.debug_barrier()
    tl.store(x_row + offs_t, token, mask=written)
    step_map_row = step_map_ptr + offs_b * stride_step_map_row + start
    tl.store(step_map_row + offs_t, tl.broadcast_to(nfe, written.shape), mask=written)
    took_part = mask_b & takes_part
    tl.store(nfe_ptr + offs_b, nfe + 1, mask=took_part)
    tl.store(post_steps_ptr + offs_b, post_steps, mask=took_part)
    tl.store(complete_ptr + offs_b, is_complete, mask=took_part & is_complete)
    tl.store(remaining_ptr + offs_b, remaining, mask=mask_b)
    tl.store(filled_ptr + offs_b, count(fill), mask=mask_b)
    tl.store(edited_ptr + offs_b, n_edits, mask=mask_b)


def supports(
    x: torch.Tensor,
    step_map: torch.Tensor,
    nfe: torch.Tensor,
    post_steps: torch.Tensor,
    complete: torch.Tensor,
    token: torch.Tensor,
    score: torch.Tensor,
    mask_id: int,
    start: torch.Tensor,
    length: torch.Tensor,
    editable_from: torch.Tensor,
    threshold: float,
    edit_threshold: float,
    min_tokens: int,
    max_post_steps: int,
    confirm: bool,
) -> str | None:
    """None if the kernel can run this call, otherwise why not."""
    if score.dtype == torch.float64:
        return f"the kernel takes fp32, fp16 and bf16 scores, got {score.dtype}"
    if (most := _tiles.EDIT_TOKENS_ROWS) < token.shape[1]:
        return f"the kernel takes windows of up to {most} positions, got {token.shape[1]}"
    tensors = {"x": x, "step_map": step_map, "token": token, "score": score, "nfe": nfe}
    tensors |= {"post_steps": post_steps, "complete": complete, "start": start, "length": length}
    for name, tensor in (tensors | {"editable_from": editable_from}).items():
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return f"{name} must have contiguous rows, got strides {tensor.stride()}"
    return None


def edit_tokens(
    x: torch.Tensor,
    step_map: torch.Tensor,
    nfe: torch.Tensor,
    post_steps: torch.Tensor,
    complete: torch.Tensor,
    token: torch.Tensor,
    score: torch.Tensor,
    mask_id: int,
    start: torch.Tensor,
    length: torch.Tensor,
    editable_from: torch.Tensor,
    threshold: float,
    edit_threshold: float,
    min_tokens: int,
    max_post_steps: int,
    confirm: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the kernel; arguments as in ``pydllm.reference.edit_tokens``."""
    batch, rows = token.shape
    remaining, filled, edited = (torch.empty_like(nfe) for _ in range(3))
    if batch == 0 or rows == 0:
        return remaining.zero_(), filled.zero_(), edited.zero_()
    tile = _tiles.unmask_tile(x.device, rows)
    _edit_tokens_kernel[(_tiles.cdiv(batch, tile.block_b),)](
        remaining_ptr=remaining,
        filled_ptr=filled,
        edited_ptr=edited,
        x_ptr=x,
        step_map_ptr=step_map,
        nfe_ptr=nfe,
        post_steps_ptr=post_steps,
        complete_ptr=complete,
        token_ptr=token,
        score_ptr=score,
        start_ptr=start,
        length_ptr=length,
        editable_from_ptr=editable_from,
        batch=batch,
        slots=x.shape[1],
        rows=rows,
        mask_id=mask_id,
        threshold=threshold,
        edit_threshold=edit_threshold,
        min_tokens=min_tokens,
        max_post_steps=max_post_steps,
        stride_x_row=x.stride(0),
        stride_step_map_row=step_map.stride(0),
        stride_token_row=token.stride(0),
        stride_score_row=score.stride(0),
        CONFIRM=confirm,
        BLOCK_B=tile.block_b,
        BLOCK_T=max(32, _tiles.next_power_of_2(rows)),
        num_warps=tile.num_warps,
    )
    return remaining, filled, edited
