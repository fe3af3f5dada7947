"""``edit_block``: what each row of a block could become, then one step of the block.

The first kernel asks whether the block was there before. The second reads the logits once, several
programs per row. The third, one program per block, merges their results and does the rest without
sorting: masks are ranked as in ``unmask``, and a token's new position is the number of positions
that those before it take.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _tiles
from ._edit_block_passes import (
    NO_ID,
    _edit_block_candidates_kernel,
    _edit_block_repeats_kernel,
    better,
    block_of,
    number,
)
from ._primitives import sort_key
from ._ranking import count, first_ranked


@triton.jit(do_not_specialize=["batch", "max_post_steps"])
def _edit_block_kernel(
    # pointers
    remaining_ptr,  # (B,)
    changed_ptr,  # (B,)
    x_ptr,  # (B, L), read and written
    step_map_ptr,  # (B, L), written
    nfe_ptr,  # (B,), read and written
    original_ptr,  # (B, T), read and written
    post_steps_ptr,  # (B,), read and written
    updates_ptr,  # (B,), read and written
    seen_ptr,  # (B, S, T), written
    written_ptr,  # (B, S, T), written
    complete_ptr,  # (B,), read and written
    value_ptr,  # (B, T, SPLITS, 4)
    token_ptr,  # (B, T, SPLITS, 2)
    tried_ptr,  # (B,)
    logits_ptr,  # (B, T, V)
    start_ptr,  # (B,)
    length_ptr,  # (B,)
    editable_from_ptr,  # (B,)
    # sizes
    batch,
    slots,
    rows,
    kept,
    mask_id,
    delete_id,
    split_id,
    threshold,
    edit_threshold,
    max_post_steps,
    # strides
    stride_x_row,
    stride_step_map_row,
    stride_original_row,
    stride_seen_block,
    stride_written_block,
    stride_logits_block,
    stride_logits_row,
    # constexprs
    HAS_BUDGET: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    offs_t = tl.arange(0, BLOCK_T)[None, :]
    mask_b = offs_b < batch
    start, length = block_of(start_ptr, length_ptr, complete_ptr, offs_b, mask_b, rows, slots)
    editable_from = tl.load(editable_from_ptr + offs_b, mask=mask_b, other=0)
    nfe = tl.load(nfe_ptr + offs_b, mask=mask_b, other=0)
    updates = tl.load(updates_ptr + offs_b, mask=mask_b, other=0)
    post_steps = tl.load(post_steps_ptr + offs_b, mask=mask_b, other=0)
    tried = tl.load(tried_ptr + offs_b, mask=mask_b, other=0)
    # [BLOCK_B, BLOCK_T]
    inside = offs_t < length
    own = inside & (start + offs_t >= editable_from)
    x_row = x_ptr + offs_b * stride_x_row + start
    before = tl.load(x_row + offs_t, mask=inside, other=0)
    masked = own & (before == mask_id)
    original_row = original_ptr + offs_b * stride_original_row
    original = tl.load(original_row + offs_t, mask=inside, other=0) != 0
    original = tl.where(updates == 0, masked, original)
    old = masked & original

    # Merge the splits; the three special ids are candidates of their own.
    logits_row = logits_ptr + offs_b * stride_logits_block
    logits_row += offs_t.to(tl.int64) * stride_logits_row
    mask_value = number(tl.load(logits_row + mask_id, mask=own, other=0.0).to(tl.float32))
    delete_value = number(tl.load(logits_row + delete_id, mask=own, other=0.0).to(tl.float32))
    split_value = number(tl.load(logits_row + split_id, mask=own, other=0.0).to(tl.float32))
    peak = tl.full((BLOCK_B, BLOCK_T), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_B, BLOCK_T), tl.float32)
    ordinary, unwritten = peak, peak
    plain_token = tl.full((BLOCK_B, BLOCK_T), NO_ID, tl.int32)
    new_token = plain_token
    place = (offs_b * rows + offs_t) * SPLITS
    for split in range(SPLITS):
        at = place + split
        largest = tl.load(value_ptr + at * 4, mask=own, other=-float("inf"))
        part = tl.load(value_ptr + at * 4 + 1, mask=own, other=0.0)
        higher = tl.maximum(peak, largest)
        base = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(peak - base) + part * tl.exp(largest - base)
        peak = higher
        best = tl.load(value_ptr + at * 4 + 2, mask=own, other=-float("inf"))
        best_id = tl.load(token_ptr + at * 2, mask=own, other=NO_ID)
        ordinary, plain_token = better(ordinary, plain_token, best, best_id)
        best = tl.load(value_ptr + at * 4 + 3, mask=own, other=-float("inf"))
        best_id = tl.load(token_ptr + at * 2 + 1, mask=own, other=NO_ID)
        unwritten, new_token = better(unwritten, new_token, best, best_id)
    zero = tl.zeros_like(plain_token)
    other_value, other = better(ordinary, plain_token, delete_value, zero + delete_id)
    other_value, other = better(other_value, other, split_value, zero + split_id)
    value, token = better(other_value, other, mask_value, zero + mask_id)
    plain_token = tl.where(plain_token == NO_ID, 0, plain_token)
    new_token = tl.where(new_token == NO_ID, 0, new_token)
    # A row without a distribution has a NaN: below every threshold, and the worst mask.
    score = number(tl.div_rn(tl.exp(value - peak), total))
    other_score = number(tl.div_rn(tl.exp(other_value - peak), total))

    # [BLOCK_B, 1]
    n_old, n_masks = count(old), count(masked)
    post_steps += (n_old == 0).to(tl.int32)
    if HAS_BUDGET:
        last = post_steps >= max_post_steps
    else:
        last = n_old == 0
    last = last | (updates + 1 > length + max_post_steps)
    evades = old & (token == mask_id) & (last == 0)
    token = tl.where(evades, other, token)
    score = tl.where(evades, other_score, score)
    need = 1 + n_masks - n_old
    above = masked & (score > threshold)
    fill = tl.where(count(above) >= need, above, first_ranked(masked, sort_key(0.0 - score), need))
    fill = tl.where(last | (n_old == 0), masked, fill)
    if not HAS_BUDGET:
        last = last | (count(old & (fill == 0)) == 0)
        fill = tl.where(last, masked, fill)
    edit = own & (before != mask_id) & (score > edit_threshold) & (token != before)
    write = fill | edit
    takes_steps = count(write) > 0
    special = (token == mask_id) | (token == delete_id) | (token == split_id)
    token = tl.where(write & last & special, plain_token, token)
    changing = write & (token != before) & (last == 0) & (tried > 0)
    cost = tl.where(changing, score, float("inf"))
    weakest = changing & (cost == tl.min(cost, 1, keep_dims=True))
    weakest = offs_t == tl.min(tl.where(weakest, offs_t, BLOCK_T), 1, keep_dims=True)
    token = tl.where(weakest, new_token, token)

    # Positions that a row's token and a split's gap take.
    is_delete, is_split = write & (token == delete_id), write & (token == split_id)
    after = tl.where(write & (is_split == 0), token.to(tl.int64), before)
    size = tl.where(inside, 1 + is_split.to(tl.int32) - is_delete.to(tl.int32), 0)
    size_end = tl.cumsum(size, 1)
    gap = size_end - size
    to = gap + is_split.to(tl.int32)
    stays = inside & (size > 0) & (to < length)
    opens = is_split & (gap < length)
    pads = inside & (offs_t >= tl.max(size_end, 1, keep_dims=True))
    moved = stays & (tl.load(x_row + to, mask=stays, other=0) != after)
    emptied = opens & (tl.load(x_row + gap, mask=opens, other=0) != mask_id)
    emptied_end = pads & (before != mask_id)
    left = stays & (start + to >= editable_from) & (after == mask_id)

    # Every thread has read the block before one writes it.
    tl.debug_barrier()
    entry = inside & takes_steps & (last == 0) & (updates >= 0) & (updates < kept)
    slot = updates.to(tl.int64) * rows + offs_t
    tl.store(seen_ptr + offs_b * stride_seen_block + slot, before.to(tl.int32), mask=entry)
    written_token = tl.where(write, token, -1)
    tl.store(written_ptr + offs_b * stride_written_block + slot, written_token, mask=entry)
    mask_token, no_flag = tl.zeros_like(before) + mask_id, inside & (inside == 0)
    tl.store(x_row + to, after, mask=stays)
    tl.store(x_row + gap, mask_token, mask=opens)
    tl.store(x_row + offs_t, mask_token, mask=pads)
    tl.store(original_row + to, original, mask=stays)
    tl.store(original_row + gap, no_flag, mask=opens)
    tl.store(original_row + offs_t, no_flag, mask=pads)
    step_map_row = step_map_ptr + offs_b * stride_step_map_row + start
    tl.store(step_map_row + to, tl.where(after == mask_id, -1, zero + nfe), mask=moved)
    tl.store(step_map_row + gap, zero - 1, mask=emptied)
    tl.store(step_map_row + offs_t, zero - 1, mask=emptied_end)
    took_part = mask_b & (length > 0)
    tl.store(nfe_ptr + offs_b, nfe + 1, mask=took_part)
    tl.store(updates_ptr + offs_b, updates + 1, mask=took_part)
    tl.store(post_steps_ptr + offs_b, post_steps, mask=took_part)
    is_complete = took_part & (last | (takes_steps == 0))
    tl.store(complete_ptr + offs_b, is_complete, mask=is_complete)
    remaining = count(left) + count(opens) + count(pads)
    tl.store(remaining_ptr + offs_b, remaining, mask=mask_b)
    changed = count(moved) + count(emptied) + count(emptied_end)
    tl.store(changed_ptr + offs_b, changed, mask=mask_b)


def supports(
    x: torch.Tensor,
    step_map: torch.Tensor,
    nfe: torch.Tensor,
    original: torch.Tensor,
    post_steps: torch.Tensor,
    updates: torch.Tensor,
    seen: torch.Tensor,
    written: torch.Tensor,
    complete: torch.Tensor,
    logits: torch.Tensor,
    mask_id: int,
    delete_id: int,
    split_id: int,
    start: torch.Tensor,
    length: torch.Tensor,
    editable_from: torch.Tensor,
    threshold: float,
    edit_threshold: float,
    max_post_steps: int,
) -> str | None:
    """None if the kernel can run this call, otherwise why not."""
    if logits.dtype == torch.float64:
        return f"the kernel takes fp32, fp16 and bf16 logits, got {logits.dtype}"
    if (most := _tiles.EDIT_BLOCK_ROWS) < logits.shape[1]:
        return f"the kernel takes blocks of up to {most} positions, got {logits.shape[1]}"
    rows = {"x": x, "step_map": step_map, "original": original, "logits": logits}
    numbers = {"nfe": nfe, "post_steps": post_steps, "updates": updates, "complete": complete}
    numbers |= {"start": start, "length": length, "editable_from": editable_from}
    for name, tensor in (rows | numbers).items():
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return f"{name} must have contiguous rows, got strides {tensor.stride()}"
    for name, tensor in {"seen": seen, "written": written}.items():
        if tensor.shape[0] and not tensor[0].is_contiguous():
            return f"{name} must have a contiguous table, got strides {tensor.stride()}"
    return _tiles.exceeds_vocab(logits.shape[2])


def edit_block(
    x: torch.Tensor,
    step_map: torch.Tensor,
    nfe: torch.Tensor,
    original: torch.Tensor,
    post_steps: torch.Tensor,
    updates: torch.Tensor,
    seen: torch.Tensor,
    written: torch.Tensor,
    complete: torch.Tensor,
    logits: torch.Tensor,
    mask_id: int,
    delete_id: int,
    split_id: int,
    start: torch.Tensor,
    length: torch.Tensor,
    editable_from: torch.Tensor,
    threshold: float,
    edit_threshold: float,
    max_post_steps: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernels; arguments as in ``pydllm.reference.edit_block``."""
    batch, rows, vocab = logits.shape
    remaining, changed = torch.empty_like(nfe), torch.empty_like(nfe)
    if batch == 0 or rows == 0:
        return remaining.zero_(), changed.zero_()
    tile = _tiles.edit_block_tile(x.device, rows)
    tried = torch.empty_like(nfe)
    value = torch.empty(batch, rows, tile.splits, 4, dtype=torch.float32, device=x.device)
    token = torch.empty(batch, rows, tile.splits, 2, dtype=torch.int32, device=x.device)
    block_t = max(16, _tiles.next_power_of_2(rows))
    places = {"complete_ptr": complete, "start_ptr": start, "length_ptr": length}
    sizes = {"slots": x.shape[1], "rows": rows, "stride_x_row": x.stride(0)}
    ids = {"mask_id": mask_id, "delete_id": delete_id, "split_id": split_id}
    _edit_block_repeats_kernel[(_tiles.cdiv(batch, tile.block_b),)](
        tried_ptr=tried,
        x_ptr=x,
        updates_ptr=updates,
        seen_ptr=seen,
        batch=batch,
        kept=seen.shape[1],
        stride_seen_block=seen.stride(0),
        BLOCK_B=tile.block_b,
        BLOCK_T=block_t,
        BLOCK_U=tile.block_u,
        num_warps=tile.num_warps,
        **places,
        **sizes,
    )
    _edit_block_candidates_kernel[(_tiles.cdiv(batch * rows, tile.block_r), tile.splits)](
        value_ptr=value,
        token_ptr=token,
        tried_ptr=tried,
        logits_ptr=logits,
        x_ptr=x,
        original_ptr=original,
        written_ptr=written,
        editable_from_ptr=editable_from,
        count=batch * rows,
        vocab=vocab,
        stride_logits_block=logits.stride(0),
        stride_logits_row=logits.stride(1),
        stride_original_row=original.stride(0),
        stride_written_block=written.stride(0),
        SPLITS=tile.splits,
        BLOCK_R=tile.block_r,
        BLOCK_V=tile.block_v,
        num_warps=tile.num_warps,
        **places,
        **sizes,
        **ids,
    )
    _edit_block_kernel[(_tiles.cdiv(batch, tile.block_b),)](
        remaining_ptr=remaining,
        changed_ptr=changed,
        x_ptr=x,
        step_map_ptr=step_map,
        nfe_ptr=nfe,
        original_ptr=original,
        post_steps_ptr=post_steps,
        updates_ptr=updates,
        seen_ptr=seen,
        written_ptr=written,
        value_ptr=value,
        token_ptr=token,
        tried_ptr=tried,
        logits_ptr=logits,
        editable_from_ptr=editable_from,
        batch=batch,
        kept=seen.shape[1],
        threshold=threshold,
        edit_threshold=edit_threshold,
        max_post_steps=max_post_steps,
        stride_step_map_row=step_map.stride(0),
        stride_original_row=original.stride(0),
        stride_seen_block=seen.stride(0),
        stride_written_block=written.stride(0),
        stride_logits_block=logits.stride(0),
        stride_logits_row=logits.stride(1),
        HAS_BUDGET=max_post_steps > 0,
        SPLITS=tile.splits,
        BLOCK_B=tile.block_b,
        BLOCK_T=block_t,
        num_warps=tile.num_warps,
        **places,
        **sizes,
        **ids,
    )
    return remaining, changed
