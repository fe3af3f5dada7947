"""A step of a model that edits its own tokens: masks become tokens, and tokens become others."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pydllm import reference
from pydllm._backend.library import Op
from pydllm._checks import (
    FLOATS,
    check_bool,
    check_int,
    check_no_grad,
    check_number,
    check_tensor,
    check_token_id,
    check_written,
)


class Edited(NamedTuple):
    """What ``edit_tokens`` did, per sequence, ``(B,)`` int32 each."""

    remaining: Tensor  # masks left in the window
    filled: Tensor  # masks that a token was written to
    edited: Tensor  # tokens that were replaced


def edit_tokens(
    x: Tensor,
    step_map: Tensor,
    nfe: Tensor,
    post_steps: Tensor,
    complete: Tensor,
    token: Tensor,
    score: Tensor,
    *,
    mask_id: int,
    start: Tensor,
    length: Tensor,
    editable_from: Tensor,
    threshold: float,
    edit_threshold: float | None,
    min_tokens: int = 1,
    max_post_steps: int,
    confirm: bool = False,
    backend: str | None = None,
) -> Edited:
    """Fill masks and replace tokens of each window in one step (LLaDA2.1), in place, on the device.

    Row j of sequence b is position ``start[b] + j``, for ``j < length[b]``. Positions before
    ``editable_from[b]`` are given: neither filled nor replaced, whatever they hold. Of the others

    * a mask becomes ``token[b, j]`` if ``score[b, j] > threshold``, or if it is among the
      ``min_tokens`` masks of highest score (ties by position);
    * another token becomes ``token[b, j]`` if ``score[b, j] > edit_threshold`` and the two differ.
      It never becomes a mask.

    What is written gets ``step_map = nfe[b]``; then ``nfe[b] += 1``. A step that begins without a
    mask is a post step: ``post_steps[b] += 1``. The window is complete, ``complete[b] = True``,

    * after a post step that replaces nothing;
    * when no mask is left and ``max_post_steps`` post steps are done; or with ``confirm`` in one
      post step more, which writes nothing.

    A window that is complete is not touched.

    Args:
        x: ``(B, L)`` int64 token ids, **updated in place**.
        step_map: ``(B, L)`` int32, the step at which a position was last written, **updated in
            place**.
        nfe: ``(B,)`` int32, steps in which the sequence took part, **updated in place**.
        post_steps: ``(B,)`` int32, post steps of the window so far, **updated in place**.
        complete: ``(B,)`` bool, **updated in place**.
        token: ``(B, T)`` int64, ``T <= L``: the choice for each row of the window.
        score: ``(B, T)`` fp32, fp16, bf16 or (torch backend) fp64: its probability. NaN exceeds
            nothing and is the worst mask. Thresholds are rounded to this dtype.
        mask_id: the mask's token id. A mask whose token is ``mask_id`` is filled, and still a mask.
        start: ``(B,)`` int32, position of window row 0.
        length: ``(B,)`` int32, window rows in use, 0 to ``T``. Rows outside of ``x`` are ignored.
        editable_from: ``(B,)`` int32, the end of the prompt.
        threshold: a probability in [0, 1]; at 1 only ``min_tokens`` fills.
        edit_threshold: a probability in [0, 1]; 0 replaces at every disagreement, None never.
        min_tokens: masks that a step fills at least, at least 1.
        max_post_steps: at least 0; with 0 and no ``confirm`` a window is complete with its last
            mask.
        confirm: see above. SGLang ends a block like this, so that the keys of its last forward are
            those of the final tokens.
        backend: None (``PYDLLM_BACKEND``), ``"auto"``, ``"cuda"``, ``"triton"`` or
            ``"torch"``.

    Returns:
        ``Edited(remaining, filled, edited)``, ``(B,)`` int32 each; 0 where nothing was touched.

    Raises:
        ValueError: shapes or devices do not fit, a number is out of range, a gradient is wanted.
        TypeError: a dtype that is not supported.
        BackendError: the named backend cannot run the call.

    Determinism: the same on every backend, bit for bit; a sequence does not depend on the others.
    CUDA graphs: safe; one launch, no host read. ``torch.compile``: one op.

    Kernels: ``kernels/edit_tokens.py``, ``csrc/edit_tokens.cu``.

    Example:
        >>> at = lambda *n: torch.tensor(n, dtype=torch.int32)
        >>> x, steps = torch.tensor([[7, 5, 0, 0]]), at(-1, 1, -1, -1)[None]
        >>> edit_tokens(x, steps, at(4), at(0), torch.tensor([False]), torch.tensor([[6, 2, 3]]),
        ...             torch.tensor([[0.95, 0.2, 0.8]]), mask_id=0, start=at(1), length=at(3),
        ...             editable_from=at(1), threshold=0.7, edit_threshold=0.9, max_post_steps=16)
        Edited(remaining=tensor([1], dtype=torch.int32), filled=tensor([1], dtype=torch.int32), \
edited=tensor([1], dtype=torch.int32))
        >>> x, steps
        (tensor([[7, 6, 0, 3]]), tensor([[-1,  4, -1,  4]], dtype=torch.int32))
    """
    check_tensor("x", x, ("B", "L"), torch.int64)
    check_tensor("step_map", step_map, x.shape, torch.int32, x, "x")
    check_tensor("token", token, (x.shape[0], "T"), torch.int64, x, "x")
    check_tensor("score", score, token.shape, FLOATS, x, "x")
    numbers = {"nfe": nfe, "post_steps": post_steps, "start": start, "length": length}
    for name, tensor in (numbers | {"editable_from": editable_from}).items():
        check_tensor(name, tensor, x.shape[:1], torch.int32, x, "x")
    check_tensor("complete", complete, x.shape[:1], torch.bool, x, "x")
    updated = {"x": x, "step_map": step_map, "nfe": nfe, "post_steps": post_steps}
    for name, tensor in (updated | {"complete": complete}).items():
        check_written(name, tensor)
    if token.shape[1] > x.shape[1]:
        raise ValueError(
            f"token: expected windows of at most {x.shape[1]} rows, the length of x, "
            f"got {token.shape[1]}"
        )
    check_token_id("mask_id", mask_id)
    check_number("threshold", threshold, 0, 1)
    if edit_threshold is not None:
        check_number("edit_threshold", edit_threshold, 0, 1)
    check_int("min_tokens", min_tokens, 1)
    check_int("max_post_steps", max_post_steps, 0)
    check_bool("confirm", confirm)
    check_no_grad("edit_tokens", score=score)
    limits = (float(threshold), float("inf") if edit_threshold is None else float(edit_threshold))
    window = (x, step_map, nfe, post_steps, complete, token, score, mask_id, start, length)
    steps = (min_tokens, max_post_steps, confirm)
    return Edited(*_OP(*window, editable_from, *limits, *steps, backend=backend))


def _fake(x: Tensor, step_map: Tensor, nfe: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return nfe.new_empty(nfe.shape), nfe.new_empty(nfe.shape), nfe.new_empty(nfe.shape)


_OP = Op(
    "edit_tokens(Tensor(a!) x, Tensor(b!) step_map, Tensor(c!) nfe, Tensor(d!) post_steps, "
    "Tensor(e!) complete, Tensor token, Tensor score, int mask_id, Tensor start, Tensor length, "
    "Tensor editable_from, float threshold, float edit_threshold, int min_tokens, "
    "int max_post_steps, bool confirm, str backend) -> (Tensor, Tensor, Tensor)",
    _fake,
    reference.edit_tokens,
)
