"""``multiblock_step``: one program per sequence, whose tile is blocks by positions.

What is known of blocks are vectors; the decisions between two forwards are reductions of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _tiles

_FINISHED = tl.constexpr(0)
_FULL = tl.constexpr(1)
_COMMIT = tl.constexpr(3)
_REFRESH = tl.constexpr(4)
_NONE = tl.constexpr(2**31 - 1)  # after every position and block


@triton.jit
def _any(mask):
    return tl.max(mask.to(tl.int32)) > 0


@triton.jit
def _first(mask, offs):
    return tl.min(tl.where(mask, offs, _NONE))


@triton.jit
def _best(mask, cost, offs):
    """The first of the cheapest."""
    tied = mask & (cost <= tl.min(tl.where(mask, cost, float("inf"))))
    return tied & (offs == _first(tied, offs))


# A new length or threshold must not compile the kernel again.
@triton.jit(
    do_not_specialize=[
        *("slots", "columns", "count", "ends", "mask_id", "new", "size"),
        *("limit", "add", "full_at", "delay", "refresh", "tail"),
    ]
)
def _multiblock_step_kernel(
    # pointers
    x_ptr,  # (B, L), read and written, as all that is not said to be read
    step_map_ptr,  # (B, L)
    numbers_ptr,  # (11, B)
    blocks_ptr,  # (4, B, K)
    eligible_ptr,  # (B, L)
    token_ptr,  # (B, S), read
    entropy_ptr,  # (B, S), read
    prompt_ptr,  # (B,), read
    eos_ptr,  # (E,), read
    # sizes
    slots,
    columns,
    count,
    ends,
    mask_id,
    new,
    size,
    limit,
    add,
    full_at,
    delay,
    refresh,
    tail,
    # strides
    stride_x_row,
    stride_step_map_row,
    stride_numbers_row,
    stride_blocks_plane,
    stride_blocks_row,
    stride_eligible_row,
    stride_token_row,
    stride_entropy_row,
    # constexprs
    HAS_EOS: tl.constexpr,
    EARLY_STOP: tl.constexpr,
    CACHED: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    # A row of the state is up to ten strides away.
    stride_numbers_row = tl.cast(stride_numbers_row, tl.int64)
    stride_blocks_plane = tl.cast(stride_blocks_plane, tl.int64)
    numbers_ptr += row
    mode = tl.load(numbers_ptr + 4 * stride_numbers_row)
    if mode == _FINISHED:
        return
    nfe = tl.load(numbers_ptr)
    decoded = tl.load(numbers_ptr + stride_numbers_row)
    created = tl.load(numbers_ptr + 2 * stride_numbers_row)
    prefix = tl.load(numbers_ptr + 3 * stride_numbers_row)
    first = tl.load(numbers_ptr + 9 * stride_numbers_row)
    # Any other prompt would be written elsewhere.
    prompt = tl.minimum(tl.maximum(tl.load(prompt_ptr + row), 0), slots - new)
    created = tl.minimum(tl.maximum(created, 1), count)

    offs_k = tl.arange(0, BLOCK_K)
    offs_n = tl.arange(0, BLOCK_N)[None, :]
    mask_k = offs_k < count
    blocks_ptr += row * stride_blocks_row + offs_k
    # [BLOCK_K]
    masks = tl.load(blocks_ptr, mask=mask_k, other=0)
    full = tl.load(blocks_ptr + stride_blocks_plane, mask=mask_k, other=0) > 0
    done = tl.load(blocks_ptr + 2 * stride_blocks_plane, mask=mask_k, other=-1)
    kept = tl.load(blocks_ptr + 3 * stride_blocks_plane, mask=mask_k, other=0) > 0
    # [BLOCK_K, BLOCK_N]
    offs = offs_k[:, None] * size + offs_n
    at = prompt + offs
    inside = (offs_n < size) & (offs < new) & (at < slots)
    x_row = x_ptr + row * stride_x_row
    eligible_row = eligible_ptr + row * stride_eligible_row
    ids = tl.load(x_row + at, mask=inside, other=0)
    candidates = tl.load(eligible_row + at, mask=inside, other=0) != 0

    # Accept.
    column = at - first
    candidates = candidates & (column >= 0) & (column < columns)
    entropy_row = entropy_ptr + row * stride_entropy_row
    cost = tl.load(entropy_row + column, mask=candidates, other=float("inf"))
    # The limit is rounded to the dtype of the entropies.
    bound = (tl.zeros_like(cost).to(tl.float32) + limit).to(cost.dtype).to(tl.float32)
    cost = cost.to(tl.float32)
    cost = tl.where(cost == cost, cost, float("inf"))
    accept = candidates & (cost < float("inf"))
    if SHIFTED:
        accept = accept & (cost < bound)
    else:
        accept = (accept & (cost <= bound)) | _best(candidates, cost, offs)
    focus = _first(full & (masks > 0) & (offs_k < created), offs_k)
    in_focus = candidates & (offs_k == focus)[:, None]
    if not _any(accept & in_focus):
        accept = accept | _best(in_focus, cost, offs)
    token = tl.load(token_ptr + row * stride_token_row + column, mask=accept, other=0)
    ids = tl.where(accept, token, ids)
    decided = nfe - 1
    decoded += tl.sum(accept.to(tl.int32))

    # What follows an end of the sequence: filled at once with early_stop, otherwise at the end.
    last = tl.full((), _NONE, tl.int32)
    if HAS_EOS:
        is_eos = inside & (ids != ids)
        for end in range(ends):
            is_eos = is_eos | (inside & (ids == tl.load(eos_ptr + end)))
        last = _first(is_eos, offs)
        if not EARLY_STOP:
            last = tl.where(_any(inside & (ids == mask_id)), _NONE, last)
        ids = tl.where(inside & (offs > last), tl.load(eos_ptr), ids)
    after_eos = inside & (offs > last)
    masked = inside & (ids == mask_id)
    masks = tl.sum(masked.to(tl.int32), 1)
    over = _any(masked) == 0
    nfe += tl.where(over, 0, 1)

    # Every thread has read the sequence and its blocks before one writes them, and the counts are
    # written before each is read by the next block's.
    tl.debug_barrier()
    changed = accept | after_eos
    tl.store(x_row + at, ids, mask=changed)
    step_map_row = step_map_ptr + row * stride_step_map_row
    tl.store(step_map_row + at, tl.where(after_eos, -1, decided), mask=changed)
    tl.store(blocks_ptr, masks, mask=mask_k)
    tl.debug_barrier()
    before = tl.load(blocks_ptr - 1, mask=mask_k & (offs_k > 0), other=0)

    # Blocks: at most one is created, those after a nearly decoded one are promoted.
    got = size - tl.sum(tl.where(offs_k == created - 1, masks, 0))
    opens = ((got >= add) | (got == size)) & (created < count) & (last == _NONE)
    created += tl.where(opens, 1, 0)
    exists = offs_k < created
    full = full | (exists & (size - before >= full_at))
    candidates = masked & (offs < created * size)

    # The cache: commit a finished prefix that has waited, refresh while one waits.
    stop = tl.minimum(prompt + new, prompt + created * size + tail)
    start = prefix * 0
    commit = prefix * 0
    mode = prefix * 0 + _FULL
    if CACHED:
        at_end = prompt + tl.minimum((offs_k + 1) * size, new)
        pending = exists & (at_end > prefix)
        reached = pending & (offs_k < _first(pending & (masks > 0), offs_k))
        waiting = prompt > prefix  # the prompt, finished before the first forward
        done = tl.where(reached & (done < 0), nfe, done)
        ready = reached & (nfe - done >= delay) & (kept == 0)
        kept = kept | ready
        upto = tl.where(waiting & (nfe >= delay), prompt, prefix)
        upto = tl.maximum(upto, tl.max(tl.where(ready, at_end, 0)))
        stable = exists & (masks == 0) & (done >= 0) & (kept == 0)
        due = _any(stable) | ((refresh > 0) & (nfe % tl.maximum(refresh, 1) == 0))
        grows = upto > prefix
        some = prefix > 0
        fresh = some & due
        mode = tl.where(grows, _COMMIT, mode + tl.where(some, 1, 0))
        mode = tl.where(fresh, _REFRESH, mode)
        start = prefix
        if SHIFTED:
            start = prefix - tl.where(some, 1, 0)
        start = tl.where(fresh, 0, start)
        commit = tl.where((mode == _COMMIT) | fresh, upto - start, 0)
        prefix = upto
        candidates = candidates & (at >= start)

    candidates = candidates & (over == 0)
    low = tl.minimum(_first(candidates, offs), new)
    rows = tl.maximum(tl.max(tl.where(candidates, offs + 1, 0)) - low, 0)
    tl.store(eligible_row + at, candidates, mask=inside)
    tl.store(blocks_ptr + stride_blocks_plane, full.to(tl.int32), mask=mask_k)
    tl.store(blocks_ptr + 2 * stride_blocks_plane, done, mask=mask_k)
    tl.store(blocks_ptr + 3 * stride_blocks_plane, kept.to(tl.int32), mask=mask_k)
    tl.store(numbers_ptr, nfe)
    tl.store(numbers_ptr + stride_numbers_row, decoded)
    tl.store(numbers_ptr + 2 * stride_numbers_row, created)
    tl.store(numbers_ptr + 3 * stride_numbers_row, prefix)
    tl.store(numbers_ptr + 4 * stride_numbers_row, tl.where(over, _FINISHED, mode))
    tl.store(numbers_ptr + 5 * stride_numbers_row, start)
    tl.store(numbers_ptr + 6 * stride_numbers_row, tl.where(over, 0, stop - start))
    tl.store(numbers_ptr + 7 * stride_numbers_row, stop)
    tl.store(numbers_ptr + 8 * stride_numbers_row, tl.where(over, 0, commit))
    tl.store(numbers_ptr + 9 * stride_numbers_row, prompt + low)
    tl.store(numbers_ptr + 10 * stride_numbers_row, rows)


def supports(
    x: torch.Tensor,
    step_map: torch.Tensor,
    numbers: torch.Tensor,
    blocks: torch.Tensor,
    eligible: torch.Tensor,
    token: torch.Tensor,
    entropy: torch.Tensor,
    mask_id: int,
    prompt: torch.Tensor,
    eos: torch.Tensor | None,
    new: int,
    size: int,
    limit: float,
    add: int,
    full_at: int,
    delay: int,
    refresh: int,
    early_stop: bool,
    cached: bool,
    tail: int,
    shifted: bool,
) -> str | None:
    """None if the kernel can run this call, otherwise why not."""
    if entropy.dtype == torch.float64:
        return f"the kernel takes fp32, fp16 and bf16 entropies, got {entropy.dtype}"
    block_k, block_n = _shape(new, size)
    most = _tiles.MULTIBLOCK_STEP[-1][0]
    if block_k * block_n > most:
        return (
            f"the kernel takes up to {most} positions (blocks times "
            f"positions, each rounded up to a power of two), got {block_k} times {block_n}"
        )
    tensors = {"x": x, "step_map": step_map, "numbers": numbers, "blocks": blocks}
    tensors |= {"eligible": eligible, "token": token, "entropy": entropy}
    for name, tensor in (tensors | {"prompt_length": prompt, "eos_ids": eos}).items():
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return f"{name} must have contiguous rows, got strides {tensor.stride()}"
    return None


def _shape(new: int, size: int) -> tuple[int, int]:
    """Blocks and positions of the tile."""
    return _tiles.next_power_of_2(_tiles.cdiv(new, size)), _tiles.next_power_of_2(min(size, new))


def multiblock_step(
    x: torch.Tensor,
    step_map: torch.Tensor,
    numbers: torch.Tensor,
    blocks: torch.Tensor,
    eligible: torch.Tensor,
    token: torch.Tensor,
    entropy: torch.Tensor,
    mask_id: int,
    prompt: torch.Tensor,
    eos: torch.Tensor | None,
    new: int,
    size: int,
    limit: float,
    add: int,
    full_at: int,
    delay: int,
    refresh: int,
    early_stop: bool,
    cached: bool,
    tail: int,
    shifted: bool,
) -> None:
    """Launch the kernel; arguments as in ``pydllm.reference.multiblock_step``."""
    if x.shape[0] == 0:
        return
    block_k, block_n = _shape(new, size)
    _multiblock_step_kernel[(x.shape[0],)](
        x_ptr=x,
        step_map_ptr=step_map,
        numbers_ptr=numbers,
        blocks_ptr=blocks,
        eligible_ptr=eligible,
        token_ptr=token,
        entropy_ptr=entropy,
        prompt_ptr=prompt,
        eos_ptr=x if eos is None else eos,
        slots=x.shape[1],
        columns=token.shape[1],
        count=blocks.shape[2],
        ends=0 if eos is None else eos.shape[0],
        mask_id=mask_id,
        new=new,
        size=size,
        limit=limit,
        add=add,
        full_at=full_at,
        delay=delay,
        refresh=refresh,
        tail=tail,
        stride_x_row=x.stride(0),
        stride_step_map_row=step_map.stride(0),
        stride_numbers_row=numbers.stride(0),
        stride_blocks_plane=blocks.stride(0),
        stride_blocks_row=blocks.stride(1),
        stride_eligible_row=eligible.stride(0),
        stride_token_row=token.stride(0),
        stride_entropy_row=entropy.stride(0),
        HAS_EOS=eos is not None,
        EARLY_STOP=early_stop,
        CACHED=cached,
        SHIFTED=shifted,
        BLOCK_K=block_k,
        BLOCK_N=block_n,
        num_warps=_tiles.multiblock_step_warps(block_k * block_n),
    )
