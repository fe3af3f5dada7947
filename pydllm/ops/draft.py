"""FreeDave's candidates: the states that stale statistics lead to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydllm import reference
from pydllm._backend.dispatch import choose, launcher
from pydllm._backend.library import register
from pydllm.ops._checks import FLOATS, check_device, check_dtype, check_no_grad, check_shape


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
    in the order in which static decoding with one token a step would fill them if a step did not
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
    check_window(x, token, score, mask_id, start, length, branches, block_size)
    check_shape("token", token, x.shape[0], "T")
    check_no_grad("draft", score=score)
    arguments = (x, token, score, mask_id, start, length, branches, block_size)

    def cuda() -> str | None:
        from pydllm._backend.cuda import draft as kernel

        return kernel.supports(x, token, score, start, length)

    def triton() -> str | None:
        from pydllm.kernels import draft as kernel

        return kernel.supports(x, token, score, start, length)

    chosen = choose("draft", backend, x.device, triton=triton, cuda=cuda)
    if chosen == "torch":
        return reference.draft(*arguments)
    return torch.ops.pydllm.draft(*arguments, chosen)


def check_window(
    x: Tensor,
    token: Tensor,
    score: Tensor,
    mask_id: int,
    start: Tensor,
    length: Tensor,
    branches: int,
    block_size: int | None,
) -> None:
    """What ``draft`` and ``verify`` have in common; a window is the last dimension of ``token``."""
    check_shape("x", x, "B", "L")
    check_dtype("x", x, torch.int64)
    check_dtype("token", token, torch.int64)
    check_shape("score", score, *token.shape)
    check_dtype("score", score, *FLOATS)
    for name, tensor in (("start", start), ("length", length)):
        check_shape(name, tensor, x.shape[0])
        check_dtype(name, tensor, torch.int32)
    named = {"token": token, "score": score, "start": start, "length": length}
    for name, tensor in named.items():
        check_device(name, tensor, "x", x)
    if not isinstance(mask_id, int):
        raise TypeError(f"mask_id: expected an int, got {mask_id!r}")
    if not isinstance(branches, int) or not 1 <= branches <= 32:
        raise ValueError(f"branches: expected an int in [1, 32], got {branches!r}")
    if block_size is not None and (not isinstance(block_size, int) or block_size < 1):
        raise ValueError(f"block_size: expected an int of at least 1 or None, got {block_size!r}")
    if not 1 <= token.shape[-1] <= x.shape[1]:
        raise ValueError(
            f"token: expected 1 to {x.shape[1]} positions, those of x, got {token.shape[-1]}"
        )


def _run(*arguments: Any) -> Tensor:
    if arguments[-1] == "torch":
        return reference.draft(*arguments[:-1])
    return launcher("draft", arguments[-1])(*arguments[:-1])


def _fake(x: Tensor, token: Tensor, *rest: Any) -> Tensor:
    branches = rest[4]
    return x.new_empty(x.shape[0], branches, x.shape[1])


register(
    "draft(Tensor x, Tensor token, Tensor score, int mask_id, Tensor start, Tensor length, "
    "int branches, int? block_size, str backend) -> Tensor",
    _run,
    _fake,
)
