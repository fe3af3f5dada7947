"""FreeDave's candidates: the states that stale statistics lead to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydllm import reference
from pydllm._backend.library import Op
from pydllm._checks import (
    FLOATS,
    check_int,
    check_is_tensor,
    check_no_grad,
    check_tensor,
    check_token_id,
)

MAX_BRANCHES = 32


def draft(
    x: Tensor,
    token: Tensor,
    score: Tensor,
    *,
    mask_id: int,
    start: Tensor,
    length: Tensor,
    branches: int,
    block_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Nested candidates: candidate j is ``x`` with the j first masks of its window filled.

    The masks of sequence b are the rows ``i < length[b]`` with ``x[b, start[b] + i] == mask_id``,
    in the order in which static decoding with one token per step would fill them if a step did not
    change what the others predict: by block, then score, highest first, then position. Where there
    are fewer than j masks, all are filled. NaN counts as the lowest score (FreeDave,
    arXiv 2510.00294).

    Args:
        x: ``(B, L)`` int64 token ids.
        token: ``(B, T)`` int64, ``T <= L``: the choice for each row of the window.
        score: ``(B, T)`` fp32, fp16, bf16 or (torch backend) fp64, higher is better. Rows that are
            no masks may hold anything.
        mask_id: the mask's token id.
        start: ``(B,)`` int32, position of window row 0.
        length: ``(B,)`` int32, window rows in use, 0 to ``T``. Rows outside of ``x`` are ignored.
        branches: candidates, 1 to 32.
        block_size: positions of a block; blocks are filled one after the other and begin at
            multiples of it. None: the window is one block.
        backend: None (``PYDLLM_BACKEND``), ``"auto"``, ``"cuda"``, ``"triton"`` or ``"torch"``.

    Returns:
        ``(B, branches, L)`` int64; candidate 0 is ``x``.

    Raises:
        ValueError: shapes or devices do not fit, a number is out of range, a gradient is wanted, or
            an unknown backend.
        TypeError: a dtype that is not supported.
        BackendError: the named backend cannot run the call.

    Determinism: the same on every backend, bit for bit; a sequence does not depend on the others.
    CUDA graphs: safe. One launch, no host read. ``torch.compile``: one op.

    Kernels: ``kernels/draft.py``, ``csrc/draft.cu``.

    Example:
        >>> at = lambda n: torch.tensor([n], dtype=torch.int32)
        >>> draft(torch.tensor([[7, 0, 0, 0]]), torch.tensor([[1, 2, 3]]),
        ...       torch.tensor([[0.2, 0.9, 0.8]]), mask_id=0, start=at(1), length=at(3), branches=3)
        tensor([[[7, 0, 0, 0],
                 [7, 0, 2, 0],
                 [7, 0, 2, 3]]])
    """
    check_window(x, token, score, mask_id, start, length, block_size)
    check_tensor("token", token, (x.shape[0], "T"), torch.int64)
    check_int("branches", branches, 1, MAX_BRANCHES)
    check_no_grad("draft", score=score)
    return _OP(x, token, score, mask_id, start, length, branches, block_size, backend=backend)


def check_window(
    x: Tensor,
    token: Tensor,
    score: Tensor,
    mask_id: int,
    start: Tensor,
    length: Tensor,
    block_size: int | None,
) -> None:
    """What ``draft`` and ``verify`` have in common; a window is the last dimension of ``token``."""
    check_tensor("x", x, ("B", "L"), torch.int64)
    check_is_tensor("token", token)
    check_tensor("token", token, token.shape, torch.int64, x, "x")
    check_tensor("score", score, token.shape, FLOATS, x, "x")
    check_tensor("start", start, x.shape[:1], torch.int32, x, "x")
    check_tensor("length", length, x.shape[:1], torch.int32, x, "x")
    check_token_id("mask_id", mask_id)
    if block_size is not None:
        check_int("block_size", block_size, 1)
    if token.ndim == 0 or not 1 <= token.shape[-1] <= x.shape[1]:
        raise ValueError(
            f"token: expected 1 to {x.shape[1]} positions, those of x, "
            f"got shape {tuple(token.shape)}"
        )


def _fake(x: Tensor, token: Tensor, *rest: Any) -> Tensor:
    branches = rest[4]
    return x.new_empty(x.shape[0], branches, x.shape[1])


_OP = Op(
    "draft(Tensor x, Tensor token, Tensor score, int mask_id, Tensor start, Tensor length, "
    "int branches, int? block_size, str backend) -> Tensor",
    _fake,
    reference.draft,
)
