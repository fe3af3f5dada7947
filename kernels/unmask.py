"""The accept rules: a window is one block, its masks are ranked without being sorted."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _tiles
from ._primitives import philox, sort_key
from ._ranking import RANDOM_ORDER, count, first_ranked, within_bound


@triton.jit
def _count_by_factor(good, value, factor, min_tokens, BLOCK_T: tl.constexpr):
    """The largest n whose n-th best is at least ``1 - factor / (n + 1)``: n of them must be;
    ``factor`` is ``(B, 1)``."""
    n = tl.zeros_like(min_tokens)
    step = BLOCK_T
    while step > 0:
        trial = n + step
        # Rounded like the definition: a quotient, then a difference.
        limit = 1.0 - tl.div_rn(factor, (trial + 1).to(tl.float32))
        n = tl.where(count(good & (value >= limit)) >= trial, trial, n)
        step = step // 2
    return tl.maximum(n, min_tokens)


# A new batch size or seed must not compile the kernel again.
@triton.jit(do_not_specialize=["batch", "rows", "min_tokens", "seed"])
def _unmask_kernel(
    # pointers
    remaining_ptr,  # (B,)
    accepted_ptr,  # (B,)
    x_ptr,  # (B, L), read and written
    step_map_ptr,  # (B, L), written
    nfe_ptr,  # (B,), read and written
    token_ptr,  # (B, T)
    score_ptr,  # (B, T)
    start_ptr,  # (B,)
    length_ptr,  # (B,)
    quota_ptr,  # (B,)
    request_ptr,  # (B,)
    done_ptr,  # (B,), read and written
    end_ptr,  # (B,)
    eos_ids_ptr,  # (E,)
    ends_from_ptr,  # (B,)
    # sizes
    batch,
    slots,
    rows,
    mask_id,
    min_tokens,
    limit,
    seed,
    # strides
    stride_x_row,
    stride_step_map_row,
    stride_token_row,
    stride_score_row,
    # constexprs
    RULE: tl.constexpr,
    HAS_QUOTA: tl.constexpr,
    AT_MOST_ONE: tl.constexpr,
    HAS_END: tl.constexpr,
    HAS_ENDS_FROM: tl.constexpr,
    N_EOS: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    offs_t = tl.arange(0, BLOCK_T)[None, :]
    mask_b = offs_b < batch
    start = tl.load(start_ptr + offs_b, mask=mask_b, other=0).to(tl.int64)
    length = tl.load(length_ptr + offs_b, mask=mask_b, other=0)
    nfe = tl.load(nfe_ptr + offs_b, mask=mask_b, other=0)
    if HAS_END:
        done = tl.load(done_ptr + offs_b, mask=mask_b, other=0) != 0
        length = tl.where(done, 0, length)
    end = tl.minimum(tl.minimum(length, rows), slots - start)
    inside = (offs_t >= -start) & (offs_t < end) & mask_b
    x_row = x_ptr + offs_b * stride_x_row + start
    token_row = token_ptr + offs_b * stride_token_row
    # [BLOCK_B, BLOCK_T]
    before = tl.load(x_row + offs_t, mask=inside, other=0)
    masked = inside & (before == mask_id)
    n_masks = count(masked)

    n = tl.zeros_like(length) + min_tokens
    if HAS_QUOTA:
        n = tl.load(quota_ptr + offs_b, mask=mask_b, other=0)
    if RULE == "random":
        request = tl.load(request_ptr + offs_b, mask=mask_b, other=0)
        seed_lo = seed.to(tl.int64)
        word, _, _, _ = philox(RANDOM_ORDER, start + offs_t, request, nfe, seed_lo, seed_lo >> 32)
    if RULE == "left_to_right":
        keep = masked & (tl.cumsum(masked.to(tl.int32), 1) <= n)
    elif RULE == "random":
        keep = first_ranked(masked, 0xFFFFFFFF - word, n)
    else:
        score = tl.load(score_ptr + offs_b * stride_score_row + offs_t, mask=masked, other=0.0)
        # Limits are rounded to the dtype of the scores.
        zero = tl.zeros_like(n).to(tl.float32)
        limit = (zero + limit).to(score.dtype).to(tl.float32)
        score = score.to(tl.float32)
        value = score
        if RULE == "entropy" or RULE == "entropy_bound":
            value = -score
        value = tl.where(value == value, value, -float("inf"))
        cost = 0.0 - value  # a negative zero becomes a zero
        key = sort_key(cost)
        good = masked & (cost < float("inf"))
        if RULE == "quota":
            keep = first_ranked(masked, key, n)
        elif RULE == "factor":
            n = _count_by_factor(good, value, limit, n, BLOCK_T)
            keep = first_ranked(masked, key, n)
        else:
            if RULE == "entropy":
                keep = good & (cost <= limit)
            elif RULE == "entropy_bound":
                keep = good & within_bound(masked, key, cost, limit)
            else:
                keep = good & (value >= limit)
            if AT_MOST_ONE:
                best_key = tl.min(tl.where(masked, key, 0xFFFFFFFF), 1, keep_dims=True)
                first = tl.where(masked & (key == best_key), offs_t, BLOCK_T)
                first = tl.min(first, 1, keep_dims=True)
                keep = keep | ((offs_t == first) & (count(keep) < n))
            else:
                keep = keep | first_ranked(masked, key, n)

    # Every thread has read the sequence before one writes it.
    tl.debug_barrier()
    step_map_row = step_map_ptr + offs_b * stride_step_map_row + start
    token = tl.load(token_row + offs_t, mask=keep, other=0)
    written, step = keep, tl.broadcast_to(nfe, keep.shape)
    if HAS_END:
        token = tl.where(keep, token, before)
        counted = inside
        if HAS_ENDS_FROM:
            first = tl.load(ends_from_ptr + offs_b, mask=mask_b, other=0)
            counted = inside & (start + offs_t >= first)
        complete = mask_b & (length > 0)
        if not LAST:
            complete = complete & (count(counted & (token == mask_id)) == 0)
        stop = tl.load(end_ptr + offs_b, mask=mask_b, other=0)
        finished = complete & (start + tl.minimum(length, rows) >= stop)
        if N_EOS > 0:
            is_end = token != token
            for index in tl.static_range(N_EOS):
                is_end = is_end | (token == tl.load(eos_ids_ptr + index))
            is_end = is_end & counted & complete & (start + offs_t < stop)
            fill = tl.load(eos_ids_ptr)
            place = tl.min(tl.where(is_end, offs_t, BLOCK_T), 1, keep_dims=True)
            finished = finished | (place < BLOCK_T)
            after_end = inside & (offs_t > place) & (start + offs_t < stop)
            token, step = tl.where(after_end, fill, token), tl.where(after_end, -1, step)
            written = written | after_end
            # What follows the window, one tile at a time; nothing where there is no end.
            first = tl.where(place < BLOCK_T, start + end, slots)
            stop = tl.minimum(stop, slots)
            x_all = x_ptr + offs_b * stride_x_row
            step_map_all = step_map_ptr + offs_b * stride_step_map_row
            for offset in range(0, tl.max(stop - first), BLOCK_T):
                at = first + offset + offs_t
                tl.store(x_all + at, tl.zeros_like(token) + fill, mask=at < stop)
                tl.store(step_map_all + at, tl.zeros_like(step) - 1, mask=at < stop)
        tl.store(done_ptr + offs_b, finished, mask=finished)
        remaining = count(inside & (token == mask_id))
        remaining = tl.where(done | finished, -1, remaining)
    else:
        remaining = n_masks - count(keep & (token != mask_id))
    tl.store(x_row + offs_t, token, mask=written)
    tl.store(step_map_row + offs_t, step, mask=written)
    tl.store(nfe_ptr + offs_b, nfe + 1, mask=mask_b & (n_masks > 0))
    tl.store(remaining_ptr + offs_b, remaining, mask=mask_b)
    tl.store(accepted_ptr + offs_b, count(keep), mask=mask_b)


def supports(
    x: torch.Tensor,
    step_map: torch.Tensor,
    nfe: torch.Tensor,
    token: torch.Tensor,
    score: torch.Tensor,
    mask_id: int,
    start: torch.Tensor,
    length: torch.Tensor,
    rule: str,
    quota: torch.Tensor | None,
    min_tokens: int,
    limit: float,
    seed: int,
    request: torch.Tensor | None,
    done: torch.Tensor | None,
    end: torch.Tensor | None,
    eos_ids: torch.Tensor | None,
    ends_from: torch.Tensor | None,
    last: bool,
) -> str | None:
    """None if the kernel can run this call, otherwise why not."""
    if score.dtype == torch.float64:
        return f"the kernel takes fp32, fp16 and bf16 scores, got {score.dtype}"
    if token.shape[1] > _tiles.UNMASK[-1][0]:
        return (
            f"the kernel takes windows of up to {_tiles.UNMASK[-1][0]} positions, "
            f"got {token.shape[1]}"
        )
    numbers = {"nfe": nfe, "start": start, "length": length, "quota": quota, "request": request}
    numbers |= {"done": done, "end": end, "ends_from": ends_from}
    rows = {"x": x, "step_map": step_map, "token": token, "score": score}
    for name, tensor in (rows | numbers).items():
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return f"{name} must have contiguous rows, got strides {tensor.stride()}"
    return None


def unmask(
    x: torch.Tensor,
    step_map: torch.Tensor,
    nfe: torch.Tensor,
    token: torch.Tensor,
    score: torch.Tensor,
    mask_id: int,
    start: torch.Tensor,
    length: torch.Tensor,
    rule: str,
    quota: torch.Tensor | None,
    min_tokens: int,
    limit: float,
    seed: int,
    request: torch.Tensor | None,
    done: torch.Tensor | None,
    end: torch.Tensor | None,
    eos_ids: torch.Tensor | None,
    ends_from: torch.Tensor | None,
    last: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel; arguments as in ``pydllm.reference.unmask``."""
    batch, rows = token.shape
    remaining, accepted = torch.empty_like(nfe), torch.empty_like(nfe)
    if batch == 0 or rows == 0:
        return remaining.zero_(), accepted.zero_()
    tile = _tiles.unmask_tile(x.device, rows)
    _unmask_kernel[(_tiles.cdiv(batch, tile.block_b),)](
        remaining_ptr=remaining,
        accepted_ptr=accepted,
        x_ptr=x,
        step_map_ptr=step_map,
        nfe_ptr=nfe,
        token_ptr=token,
        score_ptr=score,
        start_ptr=start,
        length_ptr=length,
        quota_ptr=nfe if quota is None else quota,
        request_ptr=nfe if request is None else request,
        done_ptr=nfe if done is None else done,
        end_ptr=nfe if end is None else end,
        eos_ids_ptr=x if eos_ids is None else eos_ids,
        ends_from_ptr=nfe if ends_from is None else ends_from,
        batch=batch,
        slots=x.shape[1],
        rows=rows,
        mask_id=mask_id,
        min_tokens=min_tokens,
        limit=limit,
        seed=seed,
        stride_x_row=x.stride(0),
        stride_step_map_row=step_map.stride(0),
        stride_token_row=token.stride(0),
        stride_score_row=score.stride(0),
        RULE=rule,
        HAS_QUOTA=quota is not None,
        AT_MOST_ONE=quota is None and min_tokens <= 1,
        HAS_END=done is not None,
        HAS_ENDS_FROM=ends_from is not None,
        N_EOS=0 if eos_ids is None else eos_ids.shape[0],
        LAST=last,
        BLOCK_B=tile.block_b,
        BLOCK_T=max(32, _tiles.next_power_of_2(rows)),
        num_warps=tile.num_warps,
    )
    return remaining, accepted
