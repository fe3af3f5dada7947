"""A step of a model that also deletes and inserts tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pydllm import reference
from pydllm._backend.library import Op
from pydllm._checks import (
    FLOATS,
    check_int,
    check_no_grad,
    check_number,
    check_tensor,
    check_written,
)


class BlockEdits(NamedTuple):
    """What ``edit_block`` carries from step to step of a block, all on the device.

    A block begins with ``updates``, ``post_steps`` and ``complete`` at 0; nothing else is read
    then.
    """

    original: Tensor  # (B, T) bool, the position holds, or held, a mask that the block began with
    post_steps: Tensor  # (B,) int32, steps that began without such a mask
    updates: Tensor  # (B,) int32, steps
    seen: Tensor  # (B, T + max_post_steps, T) int32, what each step began with
    written: Tensor  # (B, T + max_post_steps, T) int32, what it wrote; -1: nothing
    complete: Tensor  # (B,) bool

    @classmethod
    def make(
        cls,
        batch: int,
        block_length: int,
        max_post_steps: int,
        device: torch.device | str | None = None,
    ) -> BlockEdits:
        """Blocks that have yet to begin."""
        zero = torch.zeros(batch, dtype=torch.int32, device=device)
        table = zero.new_zeros(batch, block_length + max_post_steps, block_length)
        original = zero.new_zeros(batch, block_length, dtype=torch.bool)
        return cls(original, zero, zero.clone(), table, table.clone(), zero.bool())


class EditedBlock(NamedTuple):
    """What ``edit_block`` did, per sequence, ``(B,)`` int32 each."""

    remaining: Tensor  # masks left in the block
    changed: Tensor  # positions whose id is another


def edit_block(
    x: Tensor,
    step_map: Tensor,
    nfe: Tensor,
    edits: BlockEdits,
    logits: Tensor,
    *,
    mask_id: int,
    delete_id: int,
    split_id: int,
    start: Tensor,
    length: Tensor,
    editable_from: Tensor,
    threshold: float,
    edit_threshold: float | None,
    max_post_steps: int,
    backend: str | None = None,
) -> EditedBlock:
    """Fill masks, replace, delete and insert tokens of each block in one step (LLaDA2.2), in
    place, on the device.

    Row j of sequence b is position ``start[b] + j``, for ``j < length[b]``. Positions before
    ``editable_from[b]`` stay as they are. Of the others, a row's choice is the arg-max of its
    logits, its score that id's probability. Masks that the block began with are old, those that it
    gained are new. In this order:

    1. ``updates += 1``; without an old mask ``post_steps += 1``. The step is the last one where
       ``post_steps`` reaches ``max_post_steps`` (which is 0: where no old mask is left) or
       ``updates > length + max_post_steps``.
    2. **Fill.** Unless it is the last step, an old mask whose choice is the mask takes the next
       best id, and its probability. The masks with ``score > threshold`` are filled if there are
       more of them than new masks; otherwise the best ones, one more than there are new masks (ties
       by position). Without an old mask, and in the last step, all masks are filled. With
       ``max_post_steps`` 0 the step that fills the last old mask is the last one.
    3. **Edit.** A token whose choice is another id with ``score > edit_threshold`` is replaced.
       Where nothing is filled or replaced the block is complete.
    4. In the last step a choice that is ``mask_id``, ``delete_id`` or ``split_id`` becomes the best
       of the others. In another step, if an earlier step began with the same block: of the
       choices that are about to change it, the one of lowest score (ties by position) becomes the
       best id that was never written at its position, nor, at an old mask, the mask.
    5. **Rebuild.** Where ``delete_id`` was written the position goes; where ``split_id`` was
       written a new mask goes in front of what was there. What follows moves. The block is cut to
       ``length[b]``, or new masks fill it up.

    A position whose id changes gets ``step_map = nfe[b]``, or -1 if it holds a mask; then ``nfe[b]
    += 1``. After its last step a block is complete and holds no mask. A block that is complete, or
    not inside of ``x``, is not touched. After at most ``length + max_post_steps + 1`` steps every
    block is complete, whatever the logits.

    Args:
        x: ``(B, L)`` int64 token ids, **updated in place**.
        step_map: ``(B, L)`` int32, the step at which a position was last written, **updated in
            place**.
        nfe: ``(B,)`` int32, steps in which the sequence took part, **updated in place**.
        edits: the state of the blocks, **updated in place**; ``BlockEdits.make``.
        logits: ``(B, T, V)`` fp32, fp16, bf16 or (torch backend) fp64, ``T <= L``, of the block as
            it stands. A NaN is never chosen, and the row's score is then below every threshold.
            The lowest id wins a tie. Scores are fp32 (fp64 of fp64), and thresholds are rounded to
            that.
        mask_id, delete_id, split_id: different ids below V.
        start: ``(B,)`` int32, position of row 0.
        length: ``(B,)`` int32, positions of the block, 0 to ``T``.
        editable_from: ``(B,)`` int32, the end of the prompt.
        threshold: a probability in [0, 1].
        edit_threshold: a probability in [0, 1]; 0 replaces at every disagreement, None never.
        max_post_steps: at least 0.
        backend: None (``PYDLLM_BACKEND``), ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        ``EditedBlock(remaining, changed)``, ``(B,)`` int32 each; 0 where nothing was touched. Where
        a block becomes complete with ``changed`` 0, its last forward saw the final tokens.

    Raises:
        ValueError: shapes or devices do not fit, a number is out of range, a gradient is wanted.
        TypeError: a dtype that is not supported.
        BackendError: the named backend cannot run the call.

    Determinism: a sequence does not depend on the others. Backends agree where no two scores, and
    no score and threshold, are within rounding of each other.
    CUDA graphs: safe; no host read. ``torch.compile``: one op.

    Kernels: ``kernels/edit_block.py``.

    Example:
        >>> at = lambda *n: torch.tensor(n, dtype=torch.int32)
        >>> x, steps = torch.tensor([[5, 4, 3, 0]]), at(0, 0, 0, -1)[None]
        >>> choice = torch.tensor([[5, 9, 8, 6]])  # 9 deletes, 8 splits
        >>> logits = 20 * torch.nn.functional.one_hot(choice, 10).float()
        >>> edit_block(x, steps, at(1), BlockEdits.make(1, 4, 16), logits, mask_id=0, delete_id=9,
        ...            split_id=8, start=at(0), length=at(4), editable_from=at(0), threshold=0.5,
        ...            edit_threshold=0.0, max_post_steps=16)
        EditedBlock(remaining=tensor([1], dtype=torch.int32), \
changed=tensor([2], dtype=torch.int32))
        >>> x, steps
        (tensor([[5, 0, 3, 6]]), tensor([[ 0, -1,  0,  1]], dtype=torch.int32))
    """
    check_tensor("x", x, ("B", "L"), torch.int64)
    check_tensor("step_map", step_map, x.shape, torch.int32, x, "x")
    check_tensor("logits", logits, (x.shape[0], "T", "V"), FLOATS, x, "x")
    if logits.shape[1] > x.shape[1]:
        raise ValueError(
            f"logits: expected blocks of at most {x.shape[1]} rows, the length of x, "
            f"got {logits.shape[1]}"
        )
    check_int("max_post_steps", max_post_steps, 0)
    _check_edits(edits, logits, max_post_steps)
    for name, tensor in {
        "nfe": nfe,
        "start": start,
        "length": length,
        "editable_from": editable_from,
    }.items():
        check_tensor(name, tensor, x.shape[:1], torch.int32, x, "x")
    for name, tensor in {"x": x, "step_map": step_map, "nfe": nfe}.items():
        check_written(name, tensor)
    known: dict[int, str] = {}
    for name, token in (("mask_id", mask_id), ("delete_id", delete_id), ("split_id", split_id)):
        check_int(name, token, 0, max(logits.shape[2] - 1, 0))
        if token in known:
            raise ValueError(f"{name}: expected another id than {known[token]}, got {token}")
        known[token] = name
    check_number("threshold", threshold, 0, 1)
    if edit_threshold is not None:
        check_number("edit_threshold", edit_threshold, 0, 1)
    check_no_grad("edit_block", logits=logits)
    limits = (float(threshold), float("inf") if edit_threshold is None else float(edit_threshold))
    block = (logits, mask_id, delete_id, split_id, start, length, editable_from)
    arguments = (x, step_map, nfe, *edits, *block, *limits, max_post_steps)
    return EditedBlock(*_OP(*arguments, backend=backend))


def _check_edits(edits: BlockEdits, logits: Tensor, max_post_steps: int) -> None:
    if not isinstance(edits, BlockEdits):
        raise TypeError(f"edits: expected what BlockEdits.make returns, got {type(edits).__name__}")
    batch, rows = logits.shape[:2]
    table = (batch, rows + max_post_steps, rows)
    shapes = {
        "original": ((batch, rows), torch.bool),
        "post_steps": ((batch,), torch.int32),
        "updates": ((batch,), torch.int32),
        "seen": (table, torch.int32),
        "written": (table, torch.int32),
        "complete": ((batch,), torch.bool),
    }
    for name, (shape, dtype) in shapes.items():
        tensor = getattr(edits, name)
        check_tensor(f"edits.{name}", tensor, shape, dtype, logits, "logits")
        check_written(f"edits.{name}", tensor)


def _fake(x: Tensor, step_map: Tensor, nfe: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return nfe.new_empty(nfe.shape), nfe.new_empty(nfe.shape)


_OP = Op(
    "edit_block(Tensor(a!) x, Tensor(b!) step_map, Tensor(c!) nfe, Tensor(d!) original, "
    "Tensor(e!) post_steps, Tensor(f!) updates, Tensor(g!) seen, Tensor(h!) written, "
    "Tensor(i!) complete, Tensor logits, int mask_id, int delete_id, int split_id, Tensor start, "
    "Tensor length, Tensor editable_from, float threshold, float edit_threshold, "
    "int max_post_steps, str backend) -> (Tensor, Tensor)",
    _fake,
    reference.edit_block,
)
