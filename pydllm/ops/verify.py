"""FreeDave's step: follow the candidates that are states of static decoding."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pydllm import reference
from pydllm._backend.library import Op
from pydllm._checks import (
    check_device,
    check_int,
    check_is_tensor,
    check_no_grad,
    check_tensor,
    check_written,
)
from pydllm.ops.draft import MAX_BRANCHES, check_window


class Verified(NamedTuple):
    """What ``verify`` did, per sequence."""

    candidates: Tensor  # (B, drafts, L) int64: the next ones
    branch: Tensor  # (B,) int32: the last accepted candidate
    accepted: Tensor  # (B,) int32: tokens written
    remaining: Tensor  # (B,) int32: masks left in the window
    complete: Tensor  # (B,) int32: leading window rows whose blocks that candidate completes


def verify(
    x: Tensor,
    step_map: Tensor,
    nfe: Tensor,
    candidates: Tensor,
    token: Tensor,
    score: Tensor,
    *,
    mask_id: int,
    start: Tensor,
    length: Tensor,
    drafts: int,
    block_size: int | None = None,
    backend: str | None = None,
) -> Verified:
    """Accept the longest chain of candidates, take the step that follows it, draft the next ones.

    Candidate 0 is the state ``x``. A step fills the first mask, in the order of ``draft``, by the
    statistics of the candidate it starts from. Candidate j + 1 is accepted if candidate j is and a
    step leads from j to j + 1: then it is a state of static decoding with one token per step, and
    so is the state that one more step leads to from the last accepted one. ``x`` becomes that one,
    and the statistics of the last accepted candidate give the next candidates, as in ``draft``
    (FreeDave, arXiv 2510.00294).

    What is written has ``step_map = nfe[b]``; then ``nfe[b] += 1`` if the window had a mask. A
    sequence without one is not touched. A token that is ``mask_id`` itself leads nowhere.

    Args:
        x: ``(B, L)`` int64 token ids, **updated in place**.
        step_map: ``(B, L)`` int32, the forward at which a position became certain, **updated in
            place**.
        nfe: ``(B,)`` int32, forwards in which the sequence took part, **updated in place**.
        candidates: ``(B, branches, L)`` int64, as ``draft`` or ``verify`` made them of ``x``; at
            most 32.
        token: ``(B, branches, T)`` int64: what each candidate predicts in its window.
        score: ``(B, branches, T)`` fp32, fp16, bf16 or (torch backend) fp64, higher is better.
        drafts: how many next candidates, 1 to 32.
        mask_id, start, length, block_size: as in ``draft``; the window has to hold all in which the
            candidates differ.
        backend: None (``PYDLLM_BACKEND``), ``"auto"``, ``"cuda"``, ``"triton"`` or ``"torch"``.

    Returns:
        ``Verified(candidates, branch, accepted, remaining, complete)``. ``complete`` counts window
        rows before the block that holds the last accepted candidate's first mask: what
        ``commit_branch`` can store of ``branch``, multiples of ``block_size`` (1 if None).

    Raises:
        ValueError: shapes or devices do not fit, a number is out of range, a gradient is wanted, or
            an unknown backend.
        TypeError: a dtype that is not supported.
        BackendError: the named backend cannot run the call.

    Determinism: the same on every backend, bit for bit; a sequence does not depend on the others.
    CUDA graphs: safe. One launch, no host read. ``torch.compile``: one op.

    Kernels: ``kernels/verify.py``, ``csrc/verify.cu``.

    Example:
        >>> at = lambda *n: torch.tensor(n, dtype=torch.int32)
        >>> x, steps, nfe = torch.tensor([[7, 0, 0, 0]]), at(-1, -1, -1, -1)[None], at(4)
        >>> candidates = torch.tensor([[[7, 0, 0, 0], [7, 0, 2, 0], [7, 0, 2, 3]]])
        >>> token = torch.tensor([[[1, 2, 3], [5, 2, 3], [5, 2, 3]]])
        >>> score = torch.tensor([[[0.2, 0.9, 0.8], [0.9, 0.1, 0.8], [0.5, 0.1, 0.1]]])
        >>> got = verify(x, steps, nfe, candidates, token, score, mask_id=0, start=at(1),
        ...              length=at(3), drafts=2)
        >>> x, steps, got.branch, got.remaining
        (tensor([[7, 5, 2, 0]]), tensor([[-1,  4,  4, -1]], dtype=torch.int32), \
tensor([1], dtype=torch.int32), tensor([1], dtype=torch.int32))
    """
    check_is_tensor("x", x)
    check_tensor("candidates", candidates, (x.shape[0], "branches", x.shape[-1]), torch.int64)
    check_tensor("token", token, (*candidates.shape[:2], "T"), torch.int64)
    check_window(x, token, score, mask_id, start, length, block_size)
    if not 1 <= candidates.shape[1] <= MAX_BRANCHES:
        raise ValueError(
            f"candidates: expected 1 to {MAX_BRANCHES} branches, got {candidates.shape[1]}"
        )
    check_int("drafts", drafts, 1, MAX_BRANCHES)
    check_tensor("step_map", step_map, x.shape, torch.int32, x, "x")
    check_tensor("nfe", nfe, x.shape[:1], torch.int32, x, "x")
    check_device("candidates", candidates, "x", x)
    for name, tensor in (("x", x), ("step_map", step_map), ("nfe", nfe)):
        check_written(name, tensor)
    check_no_grad("verify", score=score)
    state = (x, step_map, nfe, candidates, token, score)
    rule = (mask_id, start, length, drafts, block_size)
    return Verified(*_OP(*state, *rule, backend=backend))


def _fake(
    x: Tensor, step_map: Tensor, nfe: Tensor, candidates: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    drafts = rest[5]
    following = candidates.new_empty(x.shape[0], drafts, x.shape[1])
    return following, *(nfe.new_empty(nfe.shape) for _ in range(4))


_OP = Op(
    "verify(Tensor(a!) x, Tensor(b!) step_map, Tensor(c!) nfe, Tensor candidates, Tensor token, "
    "Tensor score, int mask_id, Tensor start, Tensor length, int drafts, int? block_size, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
    reference.verify,
)
