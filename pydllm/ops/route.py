"""The router of a mixture-of-experts layer: which experts compute each row, and their weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pydllm import reference
from pydllm._backend.library import Op
from pydllm._checks import (
    FLOATS,
    check_bool,
    check_choice,
    check_int,
    check_no_grad,
    check_number,
    check_tensor,
)

SCORES = ("sigmoid", "softmax")


class Routes(NamedTuple):
    """The experts of each row.

    Attributes:
        ids: ``(B, T, top_k)`` int32, experts in descending order of choice; the number of experts
            where the row is routed nowhere.
        weights: ``(B, T, top_k)`` fp32 (fp64 for fp64 hidden states); 0 where routed nowhere.
    """

    ids: Tensor
    weights: Tensor


def route(
    hidden: Tensor,
    router: Tensor,
    bias: Tensor | None = None,
    *,
    top_k: int,
    score: str,
    renormalize: bool = True,
    scale: float = 1.0,
    groups: int = 1,
    topk_groups: int = 1,
    capacity: int | None = None,
    block_size: int | None = None,
    length: Tensor | None = None,
    start: Tensor | None = None,
    branches: int = 1,
    backend: str | None = None,
) -> Routes:
    """Choose the experts of each row and compute their weights.

    ``logits = hidden @ router.T``, ``s = sigmoid(logits)`` or ``softmax(logits)``; the ``top_k``
    highest of ``c = s + bias`` are chosen, and ``w = s / (sum of the chosen s) * scale``. The bias
    chooses and does not weigh. Ties go to the lower expert at every stage; a NaN is never preferred
    to a number.

    Args:
        hidden: ``(B, T, H)`` fp32, fp16, bf16 or (torch backend) fp64, normalised hidden states:
            ``branches`` windows of ``T / branches`` rows for each sequence.
        router: ``(E, H)``. For ``"sigmoid"`` fp32 (fp64 with fp64 hidden states), and logits are
            fp32; for ``"softmax"`` in the dtype of ``hidden``, and logits are rounded to it.
        bias: ``(E,)`` fp32 (fp64 with fp64), or None; for ``"sigmoid"`` alone.
        top_k: experts of a row, 1 to E.
        score: ``"sigmoid"`` or ``"softmax"``.
        renormalize: divide the weights by their sum (plus 1e-20 for ``"sigmoid"``).
        scale: factor of the weights.
        groups: contiguous groups of E / groups experts; a row chooses within the ``topk_groups``
            groups whose two best ``c`` have the highest sum. For ``"sigmoid"`` alone.
        topk_groups: see ``groups``.
        capacity: experts that one block admits, or None. A block is the live rows of ``block_size``
            consecutive positions of one branch; it admits the experts of the highest ``max over
            its rows of c``. For ``"sigmoid"``, without groups, and with ``start``.
        block_size: positions of a block, with ``capacity``.
        length: ``(B,)`` int32, leading rows of each window that are live; None: all. Other rows are
            routed nowhere.
        start: ``(B,)`` int32, position of row 0 of each window; rows at negative positions are
            routed nowhere. None: 0.
        branches: windows of each sequence, one after the other along ``T``.
        backend: None (``PYDLLM_BACKEND``), ``"auto"``, ``"cuda"``, ``"triton"`` or ``"torch"``.

    Returns:
        ``Routes(ids, weights)``.

    Raises:
        ValueError: shapes or devices do not fit, a number is out of range, a gradient is wanted, or
            an unknown backend.
        TypeError: a dtype that is not supported.
        BackendError: the named backend cannot run the call.

    Determinism: a row depends on its hidden state alone; with ``capacity`` on the live rows of its
    block. CUDA graphs: safe, no host read. ``torch.compile``: one op.

    Kernels: ``kernels/route.py``, ``csrc/route.cu``.

    Example:
        >>> hidden, router = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[0.0, 1], [2, 0], [1, 0]])
        >>> route(hidden, router, top_k=2, score="softmax")
        Routes(ids=tensor([[[1, 2]]], dtype=torch.int32), weights=tensor([[[0.7311, 0.2689]]]))
    """
    check_choice("score", score, SCORES)
    check_tensor("hidden", hidden, ("B", "T", "H"), FLOATS)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    dtype = wide if score == "sigmoid" else hidden.dtype
    check_tensor("router", router, ("E", hidden.shape[2]), dtype, hidden, "hidden")
    experts = router.shape[0]
    if bias is not None:
        if score != "sigmoid":
            raise ValueError(f"bias: expected None with score {score!r}, got a tensor")
        check_tensor("bias", bias, (experts,), wide, hidden, "hidden")
    for name, tensor in (("length", length), ("start", start)):
        if tensor is not None:
            check_tensor(name, tensor, (hidden.shape[0],), torch.int32, hidden, "hidden")
    check_int("top_k", top_k, 1, experts)
    check_bool("renormalize", renormalize)
    check_number("scale", scale, 0.0, above=True)
    _check_groups(experts, top_k, score, groups, topk_groups)
    check_int("branches", branches, 1)
    if hidden.shape[1] % branches:
        raise ValueError(
            f"branches: expected a divisor of the {hidden.shape[1]} rows, got {branches}"
        )
    if capacity is not None:
        if score != "sigmoid" or groups != 1 or start is None or block_size is None:
            raise ValueError(
                "capacity: expected score 'sigmoid', one group, a start and a block_size with it"
            )
        check_int("capacity", capacity, top_k, experts)
        check_int("block_size", block_size, 1)
    elif block_size is not None:
        raise ValueError(f"block_size: expected None without a capacity, got {block_size}")
    check_no_grad("route", hidden=hidden, router=router, bias=bias)
    tensors = (hidden, router, bias, length, start)
    numbers = (top_k, score, renormalize, float(scale), groups, topk_groups)
    return Routes(*_OP(*tensors, *numbers, capacity, block_size, branches, backend=backend))


def _check_groups(experts: int, top_k: int, score: str, groups: int, topk_groups: int) -> None:
    check_int("groups", groups, 1, experts)
    if experts % groups or (groups > 1 and experts // groups < 2):
        raise ValueError(
            f"groups: expected a divisor of the {experts} experts that leaves at least 2 for each "
            f"group, got {groups}"
        )
    if groups > 1 and score != "sigmoid":
        raise ValueError(f"groups: expected 1 with score {score!r}, got {groups}")
    check_int("topk_groups", topk_groups, 1, groups)
    if top_k > topk_groups * (experts // groups):
        raise ValueError(
            f"topk_groups: expected groups of {experts // groups} that hold {top_k} experts "
            f"together, got {topk_groups}"
        )


def _fake(hidden: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    shape = (*hidden.shape[:2], rest[4])
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty(shape, dtype=torch.int32), hidden.new_empty(shape, dtype=wide)


_OP = Op(
    "route(Tensor hidden, Tensor router, Tensor? bias, Tensor? length, Tensor? start, int top_k, "
    "str score, bool renormalize, float scale, int groups, int topk_groups, int? capacity, "
    "int? block_size, int branches, str backend) -> (Tensor, Tensor)",
    _fake,
    reference.route,
    opaque=True,
)
