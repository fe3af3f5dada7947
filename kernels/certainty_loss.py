"""Cross-entropy and certainty of rows of logits: one program per row forward, tiles backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _tiles

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# e to this power is 0, and times 0 it is not NaN, as -inf would be.
_NEGLIGIBLE = tl.constexpr(-1e4)
_NO_ID = tl.constexpr(2**31 - 1)


@triton.jit
def _below(x, best):
    """``x - best``, -inf where ``x`` is."""
    return x - tl.where(best == float("-inf"), 0.0, best)


@triton.jit
def _finite(exponent):
    """The exponent of a term, finite where the term is 0; a NaN comes through."""
    return tl.where(exponent < _NEGLIGIBLE, _NEGLIGIBLE, exponent)


@triton.jit
def _certainty_loss_forward_kernel(
    # pointers
    cross_entropy_ptr,  # (rows,) fp32, and the other statistics
    entropy_ptr,
    correct_ptr,  # (rows,) int8
    largest_ptr,
    log_sum_ptr,
    log_sum_tempered_ptr,
    logits_ptr,  # (rows, vocab)
    target_ptr,  # (rows,) int64
    # sizes
    vocab,
    inverse_temperature,
    # strides
    stride_logits_row,
    # constexprs
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits_row
    best = tl.full((), float("-inf"), tl.float32)
    best_id = tl.full((), 0, tl.int32)
    mass = tl.full((), 0.0, tl.float32)
    mass_tempered = tl.full((), 0.0, tl.float32)
    weighted = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        # [BLOCK_V]
        x = tl.load(row_ptr + offs_v, mask=offs_v < vocab, other=float("-inf")).to(tl.float32)
        tile_best = tl.max(x, 0)
        if tile_best > best:  # a tie keeps the lower id
            best_id = tl.min(tl.where(x == tile_best, offs_v, _NO_ID), 0)
        new_best = tl.maximum(best, tile_best)
        # Sums so far are relative to the old maximum.
        drop = _below(best, new_best)
        drop_tempered = _finite(drop * inverse_temperature)
        scale = tl.exp(drop_tempered)
        shift = _below(x, new_best)
        tempered = _finite(shift * inverse_temperature)
        terms = tl.exp(tempered)
        mass = mass * tl.exp(drop) + tl.sum(tl.exp(shift), 0)
        weighted = scale * (weighted + drop_tempered * mass_tempered) + tl.sum(terms * tempered, 0)
        mass_tempered = mass_tempered * scale + tl.sum(terms, 0)
        best = new_best
    target = tl.load(target_ptr + row)
    inside = (target >= 0) & (target < vocab)
    aimed = tl.load(row_ptr + target, mask=inside, other=float("nan")).to(tl.float32)
    log_tempered = tl.log(mass_tempered)
    entropy = log_tempered - weighted / mass_tempered
    # A row without a finite largest logit has none of the statistics.
    bounded = (best > float("-inf")) & (best < float("inf"))
    log_sum = tl.where(bounded, tl.log(mass), float("nan"))
    correct = (target == best_id) & (log_sum == log_sum)
    tl.store(cross_entropy_ptr + row, log_sum + (best - aimed))
    tl.store(entropy_ptr + row, tl.where(correct, entropy, 0.0))
    tl.store(correct_ptr + row, correct.to(tl.int8))
    tl.store(largest_ptr + row, best)
    tl.store(log_sum_ptr + row, log_sum)
    tl.store(log_sum_tempered_ptr + row, log_tempered)


@triton.jit
def _certainty_loss_backward_kernel(
    # pointers
    grad_ptr,  # (rows, vocab) contiguous
    logits_ptr,  # (rows, vocab)
    target_ptr,  # (rows,) int64
    grad_cross_entropy_ptr,  # (rows,) fp32, and what follows
    grad_entropy_ptr,
    entropy_ptr,
    correct_ptr,  # (rows,) int8
    largest_ptr,
    log_sum_ptr,
    log_sum_tempered_ptr,
    # sizes
    vocab,
    inverse_temperature,
    # strides
    stride_logits_row,
    # constexprs
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_v < vocab
    # [BLOCK_V]
    x = tl.load(logits_ptr + row * stride_logits_row + offs_v, mask=mask_v, other=float("-inf"))
    x = x.to(tl.float32)
    target = tl.load(target_ptr + row)
    shift = x - tl.load(largest_ptr + row)
    prob = tl.exp(shift - tl.load(log_sum_ptr + row))
    slope = tl.load(grad_cross_entropy_ptr + row) * (prob - (offs_v == target).to(tl.float32))
    if tl.load(correct_ptr + row) != 0:
        log_q = _finite(shift * inverse_temperature - tl.load(log_sum_tempered_ptr + row))
        weight = tl.load(grad_entropy_ptr + row) * inverse_temperature
        slope -= weight * tl.exp(log_q) * (log_q + tl.load(entropy_ptr + row))
    tl.store(grad_ptr + row * vocab + offs_v, slope.to(grad_ptr.dtype.element_ty), mask=mask_v)


def supports(logits: torch.Tensor, target: torch.Tensor, temperature: float) -> str | None:
    """None if the kernels can run this call, otherwise why not."""
    if logits.dtype not in _DTYPES:
        return f"the kernel takes fp32, fp16 and bf16, got {logits.dtype}"
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        return f"logits must be rows of contiguous elements, got strides {logits.stride()}"
    if not target.is_contiguous():
        return f"target must be contiguous, got strides {target.stride()}"
    block, _ = _tiles.certainty_loss_tile(logits.device, "backward")
    return _tiles.exceeds_grid("ids", logits.shape[1], block)


def certainty_loss(
    logits: torch.Tensor, target: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, ...]:
    """Launch the forward kernel; returns what ``pydllm.reference.certainty_loss`` does."""
    rows, vocab = logits.shape
    cross_entropy, entropy, largest, log_sum, log_sum_tempered = (
        torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(5)
    )
    correct = torch.empty(rows, dtype=torch.bool, device=logits.device)
    if rows:
        block, warps = _tiles.certainty_loss_tile(logits.device, "forward")
        _certainty_loss_forward_kernel[(rows,)](
            cross_entropy_ptr=cross_entropy,
            entropy_ptr=entropy,
            correct_ptr=correct.view(torch.int8),
            largest_ptr=largest,
            log_sum_ptr=log_sum,
            log_sum_tempered_ptr=log_sum_tempered,
            logits_ptr=logits,
            target_ptr=target,
            vocab=vocab,
            inverse_temperature=1 / temperature,
            stride_logits_row=logits.stride(0),
            BLOCK_V=block,
            num_warps=warps,
            enable_fp_fusion=True,
        )
    return cross_entropy, entropy, correct, largest, log_sum, log_sum_tempered


def certainty_loss_backward(
    logits: torch.Tensor,
    target: torch.Tensor,
    temperature: float,
    grad_cross_entropy: torch.Tensor,
    grad_entropy: torch.Tensor,
    entropy: torch.Tensor,
    correct: torch.Tensor,
    largest: torch.Tensor,
    log_sum: torch.Tensor,
    log_sum_tempered: torch.Tensor,
) -> torch.Tensor:
    """Launch the backward kernel; arguments as in ``pydllm.reference``."""
    rows, vocab = logits.shape
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if rows:
        block, warps = _tiles.certainty_loss_tile(logits.device, "backward")
        _certainty_loss_backward_kernel[(rows, _tiles.cdiv(vocab, block))](
            grad_ptr=grad,
            logits_ptr=logits,
            target_ptr=target,
            grad_cross_entropy_ptr=grad_cross_entropy,
            grad_entropy_ptr=grad_entropy,
            entropy_ptr=entropy,
            correct_ptr=correct.view(torch.int8),
            largest_ptr=largest,
            log_sum_ptr=log_sum,
            log_sum_tempered_ptr=log_sum_tempered,
            vocab=vocab,
            inverse_temperature=1 / temperature,
            stride_logits_row=logits.stride(0),
            BLOCK_V=block,
            num_warps=warps,
            enable_fp_fusion=True,
        )
    return grad
