"""``renoise``: acceptance by entropy, one sequence or a few per program, a canvas is one block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _tiles
from ._primitives import philox, sort_key
from ._ranking import RANDOM_ORDER, within_bound


# A new batch size or seed must not compile the kernel again.
@triton.jit(do_not_specialize=["batch", "vocab_size", "seed"])
def _renoise_kernel(
    # pointers
    accepted_ptr,  # (B, T)
    x_ptr,  # (B, T), written
    token_ptr,  # (B, T)
    entropy_ptr,  # (B, T)
    request_ptr,  # (B,)
    step_ptr,  # (B,)
    # sizes
    batch,
    rows,
    bound,
    vocab_size,
    seed,
    # strides
    stride_accepted_row,
    stride_x_row,
    stride_token_row,
    stride_entropy_row,
    # constexprs
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    offs_t = tl.arange(0, BLOCK_T)[None, :]
    mask_b = offs_b < batch
    inside = mask_b & (offs_t < rows)
    # [BLOCK_B, BLOCK_T]
    entropy = tl.load(entropy_ptr + offs_b * stride_entropy_row + offs_t, mask=inside, other=0.0)
    token = tl.load(token_ptr + offs_b * stride_token_row + offs_t, mask=inside, other=0)
    request = tl.load(request_ptr + offs_b, mask=mask_b, other=0)
    step = tl.load(step_ptr + offs_b, mask=mask_b, other=0)
    # The bound is rounded to the dtype of the entropies.
    limit = (tl.zeros_like(step).to(tl.float32) + bound).to(entropy.dtype).to(tl.float32)
    cost = entropy.to(tl.float32)
    cost = tl.where(cost == cost, cost, float("inf")) + 0.0  # a negative zero becomes a zero
    accepted = inside & (cost < float("inf")) & within_bound(inside, sort_key(cost), cost, limit)
    seed = seed.to(tl.int64)
    _, word, _, _ = philox(RANDOM_ORDER, offs_t, request, step, seed, seed >> 32)
    noise = tl.umulhi(word, tl.zeros_like(word) + vocab_size.to(tl.uint32)).to(tl.int64)
    tl.store(x_ptr + offs_b * stride_x_row + offs_t, tl.where(accepted, token, noise), mask=inside)
    tl.store(accepted_ptr + offs_b * stride_accepted_row + offs_t, accepted, mask=inside)


def supports(
    x: torch.Tensor,
    token: torch.Tensor,
    entropy: torch.Tensor,
    bound: float,
    vocab_size: int,
    seed: int,
    request: torch.Tensor,
    step: torch.Tensor,
) -> str | None:
    """None if the kernel can run this call, otherwise why not."""
    if entropy.dtype == torch.float64:
        return f"the kernel takes fp32, fp16 and bf16 entropies, got {entropy.dtype}"
    if x.shape[1] > _tiles.UNMASK[-1][0]:
        return f"the kernel takes up to {_tiles.UNMASK[-1][0]} positions, got {x.shape[1]}"
    tensors = {"x": x, "token": token, "entropy": entropy, "request": request, "step": step}
    for name, tensor in tensors.items():
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return f"{name} must have contiguous rows, got strides {tensor.stride()}"
    return None


def renoise(
    x: torch.Tensor,
    token: torch.Tensor,
    entropy: torch.Tensor,
    bound: float,
    vocab_size: int,
    seed: int,
    request: torch.Tensor,
    step: torch.Tensor,
) -> torch.Tensor:
    """Launch the kernel; arguments as in ``pydllm.reference.renoise``."""
    batch, rows = x.shape
    accepted = torch.empty_like(x, dtype=torch.bool, memory_format=torch.contiguous_format)
    if batch == 0 or rows == 0:
        return accepted
    tile = _tiles.unmask_tile(x.device, rows)
    _renoise_kernel[(_tiles.cdiv(batch, tile.block_b),)](
        accepted_ptr=accepted,
        x_ptr=x,
        token_ptr=token,
        entropy_ptr=entropy,
        request_ptr=request,
        step_ptr=step,
        batch=batch,
        rows=rows,
        bound=bound,
        vocab_size=vocab_size,
        seed=seed,
        stride_accepted_row=accepted.stride(0),
        stride_x_row=x.stride(0),
        stride_token_row=token.stride(0),
        stride_entropy_row=entropy.stride(0),
        BLOCK_B=tile.block_b,
        BLOCK_T=max(32, _tiles.next_power_of_2(rows)),
        num_warps=tile.num_warps,
    )
    return accepted
