"""The definition of ``experts``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pydllm.reference.linear import dequantize

Weights = tuple[Tensor, Tensor | None]  # of all experts, and their scales
_FEW, _SHORT = 8, 512  # rows, columns: measured with MKL's fp32 product on a Zen CPU


def experts(
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    shared_gate_up: Tensor | None,
    shared_down: Tensor | None,
    activation: str,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
) -> Tensor:
    """Weighted sum of the chosen experts of each row, in slot order, plus the shared expert.

    Each matrix product and the activation are rounded to the dtype of ``hidden``; weighting and sum
    are fp32 (fp64), rounded once; the shared expert is added to what is rounded. With scales, the
    product is that of fp32 operands (fp64 for fp64), as in ``linear``.
    """
    rows, pairs = hidden.flatten(0, -2), ids.flatten(0, -2)
    scale, wide = weights.flatten(0, -2), weights.dtype
    count = gate_up.shape[0]
    routed = (pairs >= 0) & (pairs < count)
    pairs = torch.where(routed, pairs, count)
    first, second = (gate_up, gate_up_scale), (down, down_scale)
    if not hidden.is_cuda:
        each = _touched(rows, first, second, pairs, activation)
    elif hidden.dtype == torch.bfloat16 and gate_up_scale is None:
        each = experts_grouped(rows, gate_up, down, pairs, activation)
    else:
        each = _all(rows, first, second, pairs, activation)
    scale = scale.masked_fill(~routed, 0.0)  # where each is 0, too
    total = torch.zeros(rows.shape, dtype=wide, device=rows.device)
    for slot in range(pairs.shape[1]):
        total += each[:, slot].to(wide) * scale[:, slot, None]
    out = total.to(hidden.dtype)
    if shared_gate_up is not None and shared_down is not None:
        shared = F.linear(activate(F.linear(rows, shared_gate_up), activation), shared_down)
        out = (out + shared).masked_fill(~routed.any(1, keepdim=True), 0.0)
    return out.view(hidden.shape)


def activate(gate_up: Tensor, activation: str) -> Tensor:
    """``silu`` or ``gelu_tanh`` of the gate, rounded, times the up-projection."""
    gate, up = gate_up.chunk(2, -1)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def _product(x: Tensor, weights: Weights, expert: int) -> Tensor:
    """``x`` times one expert's matrix."""
    weight, scale = weights
    if scale is None:
        return F.linear(x, weight[expert])
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(wide), dequantize(weight[expert], scale[expert], wide)).to(x.dtype)


def _touched(
    rows: Tensor, gate_up: Weights, down: Weights, pairs: Tensor, activation: str
) -> Tensor:
    """``(R, K, H)``: each expert on its rows; an expert that no row chose is not read."""
    order = pairs.flatten().argsort(stable=True)
    counts = pairs.flatten().bincount(minlength=len(down[0]) + 1).tolist()[:-1]
    inner = _products(rows[order // pairs.shape[1]], gate_up, counts)
    y = _products(activate(inner, activation), down, counts)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    return y[place].unflatten(0, pairs.shape)


def _products(x: Tensor, weights: Weights, counts: list[int]) -> Tensor:
    """The rows of ``x``, sorted by expert, times their expert's matrix; the rest of them is 0.

    With a few rows a matrix library spends its time packing the weight. With the operands exchanged
    it packs the rows, where they are short. One row alone would be a matrix-vector product, which
    is slower, so the row that follows is multiplied with it.
    """
    (matrix, scale), first = weights, 0
    out = x.new_empty(len(x), matrix.shape[1])
    out[sum(counts) :] = 0
    short = scale is None and x.dtype == torch.float32 and x.shape[1] <= _SHORT
    for expert, count in enumerate(counts):
        own = slice(first, first + count)
        if short and 0 < count < _FEW:
            y = torch.mm(matrix[expert], x[first : first + max(count, 2)].t())
            out[own] = y.t()[:count]
        elif count:
            out[own] = _product(x[own], weights, expert)
        first += count
    return out


def experts_grouped(
    rows: Tensor, gate_up: Tensor, down: Tensor, pairs: Tensor, activation: str
) -> Tensor:
    """``(R, K, H)`` by two grouped matrix products; no value is read on the host."""
    order = pairs.flatten().argsort(stable=True)
    numbers = torch.arange(gate_up.shape[0], device=rows.device, dtype=pairs.dtype)
    ends = torch.searchsorted(pairs.flatten()[order], numbers, right=True, out_int32=True)
    taken = rows[order // pairs.shape[1]]
    inner = F.grouped_mm(taken, gate_up.transpose(-2, -1), offs=ends)
    y = F.grouped_mm(activate(inner, activation), down.transpose(-2, -1), offs=ends)
    row = torch.arange(len(order), device=rows.device)
    y = y.masked_fill((row >= ends[-1])[:, None], 0.0)  # which no product has written
    return torch.zeros_like(y).index_copy(0, order, y).unflatten(0, pairs.shape)


def _all(rows: Tensor, gate_up: Weights, down: Weights, pairs: Tensor, activation: str) -> Tensor:
    """``(R, K, H)`` by every expert on every row, where no grouped product takes the dtype."""
    each = rows.new_zeros(*pairs.shape, rows.shape[1])
    for expert in range(len(down[0])):
        y = _product(activate(_product(rows, gate_up, expert), activation), down, expert)
        each = torch.where((pairs == expert)[..., None], y[:, None], each)
    return each
