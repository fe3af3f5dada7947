"""d3LLM's multi-block decoding between two forwards: accept, then plan."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

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
    check_shape,
    check_tensor,
    check_token_id,
    check_written,
    describe,
)

FP32_MAX = torch.finfo(torch.float32).max
MODES = ("finished", "full", "cached", "commit", "refresh")
# The rows of ``MultiBlockState.numbers``.
ROWS = (
    "nfe",
    "decoded",
    "created",
    "prefix",
    "mode",
    "start",
    "length",
    "kv_len",
    "commit",
    "first",
    "rows",
)


class MultiBlockState(NamedTuple):
    """What ``multiblock_step`` carries from forward to forward, all on the device.

    Attributes:
        numbers: ``(11, B)`` int32; each row is a ``(B,)`` tensor to be used as it is, by the names
            below.
        blocks: ``(4, B, K)`` int32, of each block of the generation region: masks left, fully
            activated, the forward since which it waits to be cached (-1: it does not), cached.
        eligible: ``(B, L)`` bool, the positions that the next forward may decide.

    The rows of ``numbers``:

    =========  =====================================================================================
    nfe        forwards counted, the planned one included
    decoded    tokens accepted so far
    created    blocks that are open for decoding
    prefix     slots of the cache that are in use once the planned forward has run
    mode       of the planned forward, index of ``MODES``: 0 finished, 1 full, 2 cached, 3 commit,
               4 refresh
    start      first position of its window
    length     positions of its window, 0 when finished
    kv_len     end of the slots that it sees
    commit     positions of its window whose keys and values are kept
    first      first eligible position
    rows       positions from the first eligible to the last
    =========  =====================================================================================
    """

    numbers: Tensor
    blocks: Tensor
    eligible: Tensor

    @classmethod
    def make(cls, x: Tensor, max_new_tokens: int, block_length: int) -> MultiBlockState:
        """The state before the first step of sequences ``x (B, L)``: one block, nothing decoded."""
        batch, count = x.shape[0], -(-max_new_tokens // block_length)
        numbers = torch.zeros(len(ROWS), batch, dtype=torch.int32, device=x.device)
        numbers[ROWS.index("created")] = numbers[ROWS.index("mode")] = 1
        blocks = torch.zeros(4, batch, count, dtype=torch.int32, device=x.device)
        blocks[0] = block_length
        blocks[0, :, -1] = max_new_tokens - (count - 1) * block_length
        blocks[2] = -1
        return cls(numbers, blocks, torch.zeros_like(x, dtype=torch.bool))

    def __getattr__(self, name: str) -> Tensor:
        """A row of ``numbers``: ``(B,)`` int32, a view."""
        if name not in ROWS:
            raise AttributeError(f"MultiBlockState has no attribute {name!r}")
        return self.numbers[ROWS.index(name)]


def decoded_at_least(fraction: float, block_length: int) -> int:
    """The least n with ``1 - (block_length - n) / block_length >= fraction`` in doubles."""
    tokens = range(block_length + 1)
    return next(n for n in tokens if 1 - (block_length - n) / block_length >= fraction)


def multiblock_step(
    x: Tensor,
    step_map: Tensor,
    state: MultiBlockState,
    token: Tensor,
    entropy: Tensor,
    *,
    mask_id: int,
    prompt_length: Tensor,
    max_new_tokens: int,
    block_length: int,
    threshold: float,
    add_at: float = 0.1,
    full_at: float = 0.95,
    eos_ids: Tensor | None = None,
    early_stop: bool = True,
    cached: bool = False,
    delay: int = 2,
    refresh: int | None = None,
    tail: int | None = None,
    shifted: bool = False,
    backend: str | None = None,
) -> None:
    """Accept tokens of the forward that ``state`` planned, and plan the next (d3LLM, arXiv
    2601.07568), per sequence, in place, on the device.

    Called once before the first forward, with statistics of no rows ``(B, 0)``, and once after
    each forward. A sequence that is finished is not touched. In this order:

    1. **Accept.** Of the eligible positions all with entropy <= threshold (shifted: < threshold);
       not shifted: the one with the least entropy, whatever it is; and where no token falls into
       the first fully activated block with masks, the one with the least entropy there. NaN counts
       as +inf, which no threshold admits. ``x`` gets the token, ``step_map`` the forward.
    2. **EOS**, with ``early_stop``, or else when no mask is left: everything after the
       first in the generation region becomes ``eos_ids[0]``, with ``step_map`` -1.
    3. **Finish** where no mask is left; otherwise one more forward is counted.
    4. **Blocks.** The next block is created once ``add_at`` of the newest is decoded, at most one a
       forward, none after an EOS. A block is fully activated once ``full_at`` of
       its predecessor is decoded. The masks of all created blocks are eligible.
    5. **Mode.** ``cached``: the prompt, then each block that is finished and whose predecessors
       are, waits for ``delay`` forwards in which full ones renew the cache (refresh), and is then
       kept (commit). Otherwise the window starts after the kept prefix (cached), and a shifted
       model's one position before that. Every ``refresh`` forwards one is full. A commit that
       coincides with a refresh is done by it.

    Args:
        x: ``(B, L)`` int64 tokens, mutated; ``prompt_length[b] + max_new_tokens <= L``.
        step_map: ``(B, L)`` int32, mutated; -1 where nothing was written.
        state: as ``MultiBlockState.make`` returns it, mutated.
        token: ``(B, S)`` int64, chosen tokens of positions ``state.first + j``; eligible positions
            without a column are not decided.
        entropy: ``(B, S)``, float of any width, nats, of the distribution at temperature 1.
        mask_id: the mask token.
        prompt_length: ``(B,)`` int32, where the generation regions start; taken into
            [0, L - max_new_tokens].
        max_new_tokens: their length; the last block may be short.
        block_length: positions of a block.
        threshold: nats.
        add_at, full_at: decoded parts of a block, in [0, 1]. Compared in doubles as
            ``1 - masks / block_length >= add_at``, which decides for lengths as 10.
        eos_ids: ``(E,)`` int64, tokens that end a sequence, or None.
        cached: whether the windows are to be those of a cached decoder.
        delay, refresh: forwards; ``refresh`` None is never.
        tail: masks after the newest block that are forwarded, None for all of them.
        shifted: whether row i of the model predicts position i + 1.
        backend: None (``PYDLLM_BACKEND``), ``"auto"``, ``"cuda"``, ``"triton"`` or ``"torch"``.

    Raises:
        ValueError: shapes or devices do not fit, a number is out of range, a gradient is wanted, or
            the backend is unknown.
        TypeError: a dtype that is not supported.
        BackendError: the named backend cannot run the call.

    Determinism: the same on every backend; ties go to the lowest position; a sequence does not
    depend on the others. CUDA graphs: safe. One launch, no host read. ``torch.compile``: one op.

    Kernels: ``kernels/multiblock_step.py``, ``csrc/multiblock_step.cu``.

    Example:
        >>> x = torch.tensor([[7, 0, 0, 0, 0]])
        >>> steps = torch.full_like(x, -1, dtype=torch.int32)
        >>> state = MultiBlockState.make(x, 4, 2)
        >>> options = {"mask_id": 0, "prompt_length": torch.tensor([1], dtype=torch.int32),
        ...            "max_new_tokens": 4, "block_length": 2, "threshold": 0.5}
        >>> multiblock_step(x, steps, state, x[:, :0], torch.empty(1, 0), **options)
        >>> state.first.item(), state.rows.item()
        (1, 2)
        >>> multiblock_step(x, steps, state, torch.tensor([[5, 6]]), torch.tensor([[0.1, 0.9]]),
        ...                 **options)
        >>> x, state.created.item(), state.first.item(), state.rows.item()
        (tensor([[7, 5, 0, 0, 0]]), 2, 2, 3)
    """
    _check_tensors(x, step_map, state, token, entropy, prompt_length, eos_ids)
    check_int("max_new_tokens", max_new_tokens, 1, x.shape[1])
    check_int("block_length", block_length, 1)
    check_int("delay", delay, 0)
    if refresh is not None:
        check_int("refresh", refresh, 1)
    if tail is not None:
        check_int("tail", tail, 0)
    for name, flag in (("early_stop", early_stop), ("cached", cached), ("shifted", shifted)):
        check_bool(name, flag)
    blocks = -(-max_new_tokens // block_length)
    check_shape("state.blocks", state.blocks, 4, x.shape[0], blocks)
    check_number("add_at", add_at, 0, 1)
    check_number("full_at", full_at, 0, 1)
    if threshold not in (math.inf, -math.inf):
        check_number("threshold", threshold, -FP32_MAX, FP32_MAX)
    check_token_id("mask_id", mask_id)
    check_no_grad("multiblock_step", entropy=entropy)
    add, full = (decoded_at_least(part, block_length) for part in (add_at, full_at))
    rule = (max_new_tokens, block_length, float(threshold), add, full, delay, refresh or 0)
    tail = max_new_tokens if tail is None else min(tail, max_new_tokens)
    flags = (early_stop, cached, tail, shifted)
    inputs = (x, step_map, *state, token, entropy, mask_id, prompt_length, eos_ids)
    arguments: tuple[Any, ...] = (*inputs, *rule, *flags)

    _OP(*arguments, backend=backend)


def _check_tensors(
    x: Tensor,
    step_map: Tensor,
    state: MultiBlockState,
    token: Tensor,
    entropy: Tensor,
    prompt_length: Tensor,
    eos_ids: Tensor | None,
) -> None:
    if not isinstance(state, MultiBlockState):
        raise TypeError(f"state: expected a MultiBlockState, got {describe(state)}")
    check_tensor("x", x, ("B", "L"), torch.int64)
    like, batch = (x, "x"), x.shape[0]
    check_tensor("step_map", step_map, x.shape, torch.int32, *like)
    check_tensor("state.numbers", state.numbers, (len(ROWS), batch), torch.int32, *like)
    check_tensor("state.blocks", state.blocks, (4, batch, "K"), torch.int32, *like)
    check_tensor("state.eligible", state.eligible, x.shape, torch.bool, *like)
    check_tensor("token", token, (batch, "S"), torch.int64, *like)
    check_tensor("entropy", entropy, token.shape, FLOATS, *like)
    check_tensor("prompt_length", prompt_length, (batch,), torch.int32, *like)
    for name, tensor in (("x", x), ("step_map", step_map), *state._asdict().items()):
        check_written(name, tensor)
    if eos_ids is not None:
        check_tensor("eos_ids", eos_ids, ("E",), torch.int64, *like)
        if eos_ids.numel() == 0:
            raise ValueError("eos_ids: expected None or at least one id, got none")


def _fake(*_: object) -> None:
    return None


_OP = Op(
    "multiblock_step(Tensor(a!) x, Tensor(b!) step_map, Tensor(c!) numbers, Tensor(d!) blocks, "
    "Tensor(e!) eligible, Tensor token, Tensor entropy, int mask_id, Tensor prompt, Tensor? eos, "
    "int new, int size, float limit, int add, int full_at, int delay, int refresh, "
    "bool early_stop, bool cached, int tail, bool shifted, str backend) -> ()",
    _fake,
    reference.multiblock_step,
    opaque=True,
)
