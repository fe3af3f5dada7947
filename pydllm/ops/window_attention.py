"""Attention of a window of positions over the cache and its own fresh keys."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from pydllm import reference
from pydllm._backend.context import call_in_op_context
from pydllm._backend.library import Op
from pydllm._checks import (
    FLOATS,
    check_bool,
    check_int,
    check_no_grad,
    check_number,
    check_tensor,
    check_written,
    describe,
)

FP32_MAX = torch.finfo(torch.float32).max


class SharedWindow:
    """What calls have in common that differ in ``q``, ``k``, ``v``, caches and ``window`` alone.

    The layers of a forward do: make one per forward. The other arguments are checked at the first
    of these calls, where the torch backend also computes positions and masks for all of them. It
    holds while the tensors keep their values. The kernels compute these in registers.

    Args:
        whole: a promise of the caller: ``length`` is ``T / branches`` and all rows fit, ``kv_len``
            is ``L`` (with a cache) and ``pad`` 0, in every sequence. The torch backend then leaves
            out what would mask nothing.
        read_only: a promise that ``commit`` is 0 everywhere.
    """

    def __init__(self, *, whole: bool = False, read_only: bool = False) -> None:
        self.whole, self.read_only = whole, read_only
        self._tensors: tuple[Tensor | None, ...] = ()
        self._values: tuple[Any, ...] = ()
        self.layouts: dict = {}

    def has(self, tensors: tuple[Tensor | None, ...], values: tuple[Any, ...]) -> bool:
        """Whether a call had these arguments before."""
        return self._values == values and all(map(operator.is_, self._tensors, tensors))

    def hold(self, tensors: tuple[Tensor | None, ...], values: tuple[Any, ...]) -> None:
        """Start anew with arguments that were checked."""
        self._tensors, self._values, self.layouts = tensors, values, {}


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    *,
    start: Tensor,
    length: Tensor,
    kv_len: Tensor,
    commit: Tensor,
    cos: Tensor,
    sin: Tensor,
    pad: Tensor | None = None,
    scale: float | None = None,
    branches: int = 1,
    causal: bool = False,
    block_size: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    block_table: Tensor | None = None,
    block_offset: Tensor | None = None,
    leaves: int = 0,
    leaf_rows: int = 1,
    batch_invariant: bool = False,
    shared: SharedWindow | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of a window over cached and fresh keys, with RoPE and cache write.

    ``softmax(rope(q) [K_cache[pad:start], rope(k)[:length], K_cache[start+length:kv_len]]^T scale)
    [V_cache[pad:start], v[:length], V_cache[start+length:kv_len]]``, and then
    ``K_cache[start:start+commit], V_cache[start:start+commit] = rope(k)[:commit], v[:commit]``,
    per sequence, in one launch and without building any of these lists.

    With 8 slots, ``pad`` 1, ``start`` 3, ``length`` 2 and ``kv_len`` 7, both window rows see

        slot     0  1  2  3  4  5  6  7
        cached   0  1  1  0  0  1  1  0
        fresh    0  0  0  1  1  0  0  0

    The window's own slots of the cache are never read, what they hold does not matter; neither does
    what lies before ``pad`` or from ``kv_len`` on, NaN included. ``kv_len = start + length`` is a
    prefix cache, ``kv_len = L`` a dual cache, ``start = 0, length = kv_len`` a full refresh.

    Masks narrow this, by position; one position a row, 6 of them:

        causal         block_size=2   window=2       branches=2, of 2 rows each; the rows
        1 0 0 0 0 0    1 1 0 0 0 0    1 1 0 0 0 0    cached  fresh
        1 1 0 0 0 0    1 1 0 0 0 0    1 1 1 0 0 0    1 1     1 1 0 0    cached
        1 1 1 0 0 0    1 1 1 1 0 0    0 1 1 1 0 0    1 1     1 1 0 0    1 1
        1 1 1 1 0 0    1 1 1 1 0 0    0 0 1 1 1 0    1 1     0 0 1 1    1 1
        1 1 1 1 1 0    1 1 1 1 1 1    0 0 0 1 1 1    1 1     0 0 1 1    1 1
        1 1 1 1 1 1    1 1 1 1 1 1    0 0 0 0 1 1

    With ``leaves`` (causal windows only) the window is a trunk, and each leaf is a group of rows
    that continues the sequence after one of its last rows: the trunk as far as that row, then the
    leaf. With a trunk of 3 rows in use and 2 leaves of 2 rows, the rows see

        rows     cached  trunk   leaf 0  leaf 1
        trunk    1 1     1 0 0   0 0     0 0
                 1 1     1 1 0   0 0     0 0
                 1 1     1 1 1   0 0     0 0
        leaf 0   1 1     1 1 0   1 1     0 0
                 1 1     1 1 0   1 1     0 0
        leaf 1   1 1     1 1 1   0 0     1 1
                 1 1     1 1 1   0 0     1 1

    Args:
        q: ``(B, T, Hq, D)`` fp32, fp16, bf16 or (torch backend) fp64, not rotated. Any strides with
            contiguous heads: a view of a fused projection is not copied.
        k, v: ``(B, T, Hkv, D)`` like ``q``; ``Hq`` is a multiple of ``Hkv``, query head ``h`` uses
            KV head ``h // (Hq / Hkv)``.
        k_cache, v_cache: ``(B, L, Hkv, D)``, keys after RoPE; **updated in place**. ``T <= L``.
            With a ``block_table`` ``(pages, page, Hkv, D)``. Both None: nothing is cached, rows
            see the window alone; ``start`` has to be 0, ``kv_len`` and ``commit`` mean nothing.
        start: ``(B,)`` int32, slot of window row 0.
        length: ``(B,)`` int32, window rows in use, 0 to ``T``; ``start + length <= L``.
        kv_len: ``(B,)`` int32, end of the visible slots, at most ``L``.
        commit: ``(B,)`` int32, window rows written to the cache, 0 to ``length``.
        cos, sin: ``(positions, rotary / 2)`` fp32 (fp64 with fp64 ``q``), ``positions >= L``,
            ``rotary <= D``: the first ``rotary`` dimensions are rotated, half-split. The position
            of a slot is ``slot - pad``. Rotated keys are rounded to their dtype, then used, stored.
        pad: ``(B,)`` int32, slots of left padding, or None for none. Window rows before it are
            invisible, give zeros and are not written.
        scale: of the scores; ``D**-0.5`` by default.
        branches: candidates of ``T / branches`` rows, one after the other in ``q``, ``k``, ``v``,
            at the same positions: ``start`` and ``length`` (at most ``T / branches``) are those of
            each. A branch sees the cache and itself; ``commit`` is of branch 0, see
            ``commit_branch`` for another.
        causal: keys at later positions are invisible.
        block_size: positions of a block; keys of later blocks are invisible. A position is in
            block ``(position + block_offset) // block_size``.
        window: keys ``window`` or more positions away are invisible, on both sides.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        q_norm, k_norm: ``(D,)`` in the dtype of ``q``, both or none: weights of an RMS norm of each
            head before RoPE, as ``rms_norm`` does it.
        eps: of that norm.
        block_table: ``(B, n)`` int32, pages of each sequence: slot ``s`` is row ``s % page`` of
            page ``block_table[b, s // page]``, and ``L = n * page``. Entries of pages without
            visible or committed slots are not used. No two sequences may commit to the same page.
        block_offset: ``(B,)`` int32, or None for 0. With ``-P % block_size`` blocks are
            counted from position ``P``, the end of the prompt, on.
        leaves: groups of rows after the trunk's in ``q``, ``k``, ``v``: ``T`` is the trunk's rows
            plus ``leaves * leaf_rows``, and ``start``, ``length``, ``commit`` are of the trunk.
            Leaf ``t`` comes after row ``j = length - leaves + t`` of the trunk, at the slots
            after it; where ``j`` is negative it is not in use. Its rows see the cached slots
            ``[pad, start)``, rows 0 to ``j`` of the trunk and each other. They are never written;
            their slots may be past the end of the cache. ``kv_len`` means nothing. Only with
            ``causal``, without ``branches`` and ``block_size``.
        leaf_rows: rows of a leaf; ``positions >= L + leaf_rows``.
        batch_invariant: the torch backend promises what the kernels do, see Determinism; about 6
            times slower than its default. Nothing to the others.
        shared: None, or the ``SharedWindow`` of the layers that this call belongs to.
        backend: None (``PYDLLM_BACKEND``), ``"auto"``, ``"cuda"`` (fp16 and bf16, heads of 64 and
            128), ``"triton"`` or ``"torch"``.

    Returns:
        ``(B, T, Hq, D)`` contiguous, dtype of ``q``; zeros in rows from ``length`` on and before
        ``pad``. Softmax and sums in fp32 (fp64 for fp64).

    Raises:
        ValueError: shapes or devices do not fit, a gradient is wanted, or an unknown backend.
        TypeError: a dtype that is not supported, or dtypes that differ.
        BackendError: the named backend cannot run the call.

    The values of ``start``, ``length``, ``kv_len``, ``commit``, ``pad`` and ``block_offset`` stay
    on the device and are not checked; window rows that do not fit into the cache give zeros and
    are not written.

    A NaN stays in its sequence and its branch. After the masks by position it may show in a row
    that does not see it, as a NaN times a weight of 0.

    Determinism: with the kernels, and in torch with ``batch_invariant`` but for ``pad``, a row's
    bits depend on its query and its visible keys alone, not on the batch, other branches and
    leaves, padding, pages, or on which of the keys are cached; nor on ``L`` and ``T / branches``
    (the trunk's rows): with the Triton kernel among windows of up to 128 rows, and among longer
    ones (``attention_plan`` in ``kernels/_tiles.py``), with the others never.
    CUDA graphs: safe. ``torch.compile``: one op.

    Kernels: ``kernels/window_attention.py``, ``csrc/window_attention.cu``.

    Example:
        >>> q = k = torch.zeros(1, 1, 1, 2)
        >>> v, cache = torch.ones(1, 1, 1, 2), torch.zeros(2, 1, 3, 1, 2)
        >>> at = lambda n: torch.tensor([n], dtype=torch.int32)
        >>> window_attention(q, k, v, *cache, start=at(1), length=at(1), kv_len=at(2), commit=at(1),
        ...                  cos=torch.ones(3, 1), sin=torch.zeros(3, 1))
        tensor([[[[0.5000, 0.5000]]]])
        >>> cache[1, 0, :, 0, 0]
        tensor([0., 1., 0.])
    """
    numbers = (start, length, kv_len, commit, cos, sin, pad, block_offset, block_table)
    values: tuple[Any, ...] = ()
    if shared is not None:
        masks = (branches, causal, block_size, batch_invariant, softcap, scale, eps)
        values = (*map(_kind, (q, k, v, k_cache, v_cache)), *masks, leaves, leaf_rows)
    if shared is None or not shared.has(numbers, values):
        _check_leaves(q, leaves, leaf_rows, branches, causal, block_size)
        attached = leaves * leaf_rows
        check_heads(q, k, v, k_cache, v_cache, branches, block_table, attached)
        _check_numbers(q, start, length, kv_len, commit, pad, block_offset)
        beyond = leaf_rows if leaves else 0
        check_tables(cos, sin, k, k_cache, branches, block_table, attached, beyond)
        _check_masks(causal, block_size, block_offset)
        if softcap is not None:
            check_number("softcap", softcap, 0, above=True)
        if scale is not None:
            check_number("scale", scale, -FP32_MAX, FP32_MAX)
        check_number("eps", eps, 0)
        if shared is not None:
            shared.hold(numbers, values)
    if window is not None:
        check_int("window", window, 1)
    if q_norm is not None or k_norm is not None:
        _check_norms(q, q_norm, k_norm)
    check_no_grad("window_attention", q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    caches = (k, v) if k_cache is None else (k_cache, v_cache)  # supports() asks of their strides
    rest = (*numbers[:7], q_norm, k_norm, block_table, block_offset)
    options = (factor, branches, causal, block_size, window, softcap, eps, leaves, leaf_rows)
    chosen = _OP.choose(q, k, v, *caches, *rest, *options, backend=backend)
    if chosen == "torch":
        known = () if shared is None else (shared.layouts, shared.whole, shared.read_only)
        tensors = (q, k, v, k_cache, v_cache, *rest)
        return call_in_op_context(
            q.device, reference.window_attention, *tensors, *options, batch_invariant, *known
        )
    if k_cache is None:
        rows = (k.shape[1] - leaves * leaf_rows) // branches
        caches = _scratch(k, rows), _scratch(v, rows)
        # No slot but the window's own is visible, and these are never read.
        rest = (start, length, length, *rest[3:])
    return _OP.run(chosen, q, k, v, *caches, *rest, *options)


def _kind(tensor: Any) -> Any:
    """What ``check_heads`` asks of an argument."""
    if not isinstance(tensor, Tensor):
        return type(tensor)
    return tensor.shape, tensor.dtype, tensor.device, tensor.stride()


def _scratch(fresh: Tensor, rows: int) -> Tensor:
    return fresh.new_empty(fresh.shape[0], rows, *fresh.shape[2:])


def _check_leaves(
    q: Tensor, leaves: int, leaf_rows: int, branches: int, causal: bool, block_size: int | None
) -> None:
    check_int("leaves", leaves, 0)
    check_int("leaf_rows", leaf_rows, 1)
    if leaves == 0:
        return
    if causal is not True or block_size is not None or branches != 1:
        raise ValueError(
            "leaves: expected causal=True, block_size=None and branches=1 with leaves, got "
            f"causal={causal!r}, block_size={block_size!r} and branches={branches!r}"
        )
    if isinstance(q, Tensor) and q.ndim == 4 and q.shape[1] <= leaves * leaf_rows:
        raise ValueError(
            f"leaves: expected fewer than the {q.shape[1]} rows of q, got {leaves} of {leaf_rows}"
        )


def check_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    branches: int,
    block_table: Tensor | None,
    attached: int = 0,
) -> None:
    """Shapes, dtypes and devices; ``commit_branch`` has no ``q`` and gives ``k`` for it.

    ``attached``: rows of all leaves.
    """
    check_tensor("q", q, ("B", "T", "Hq", "D"), FLOATS)
    batch, count, heads, head_dim = q.shape
    dtype = q.dtype
    check_tensor("k", k, (batch, count, "Hkv", head_dim), dtype, q, "q")
    check_tensor("v", v, k.shape, dtype, q, "q")
    kv_heads = k.shape[2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q: expected a multiple of the {kv_heads} KV heads, got {heads} heads")
    check_int("branches", branches, 1)
    if count % branches:
        raise ValueError(f"branches: expected a divisor of the {count} rows, got {branches}")
    if k_cache is None or v_cache is None:
        for name, other in (
            ("k_cache", k_cache),
            ("v_cache", v_cache),
            ("block_table", block_table),
        ):
            if other is not None:
                raise ValueError(f"{name}: expected None without a cache, got {describe(other)}")
        return
    if block_table is None:
        check_tensor("k_cache", k_cache, (batch, "L", *k.shape[2:]), dtype, q, "q")
    else:
        check_tensor("k_cache", k_cache, ("pages", "page", *k.shape[2:]), dtype, q, "q")
        check_tensor("block_table", block_table, (batch, "n"), torch.int32, q, "q")
        if k_cache.shape[0] * k_cache.shape[1] * block_table.shape[1] == 0:
            raise ValueError(
                "block_table: expected at least one slot, got "
                f"{block_table.shape[1]} of {k_cache.shape[0]} pages of {k_cache.shape[1]} slots"
            )
    check_tensor("v_cache", v_cache, k_cache.shape, dtype, q, "q")
    check_written("k_cache", k_cache)
    check_written("v_cache", v_cache)
    slots = _slots(k, k_cache, branches, block_table, attached)
    rows = (count - attached) // branches
    if rows > slots:
        raise ValueError(f"q: expected at most the {slots} rows of the cache, got {rows}")


def check_tables(
    cos: Tensor,
    sin: Tensor,
    k: Tensor,
    k_cache: Tensor | None,
    branches: int,
    block_table: Tensor | None,
    attached: int = 0,
    beyond: int = 0,
) -> None:
    """The rotary tables of checked heads, which reach ``beyond`` the last slot."""
    table = (torch.float32, torch.float64) if k.dtype == torch.float64 else torch.float32
    check_tensor("cos", cos, ("positions", "rotary / 2"), table, k, "q")
    check_tensor("sin", sin, cos.shape, table, k, "q")
    positions = _slots(k, k_cache, branches, block_table, attached) + beyond
    if cos.shape[0] < positions:
        raise ValueError(f"cos: expected at least {positions} positions, got {cos.shape[0]}")
    if 2 * cos.shape[1] > k.shape[3]:
        raise ValueError(f"cos: expected at most {k.shape[3] // 2} columns, got {cos.shape[1]}")


def _slots(
    k: Tensor, k_cache: Tensor | None, branches: int, block_table: Tensor | None, attached: int
) -> int:
    """Slots of a sequence."""
    if k_cache is None:
        return (k.shape[1] - attached) // branches
    return k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])


def _check_numbers(
    q: Tensor,
    start: Tensor,
    length: Tensor,
    kv_len: Tensor,
    commit: Tensor,
    pad: Tensor | None,
    block_offset: Tensor | None,
) -> None:
    numbers = {"start": start, "length": length, "kv_len": kv_len, "commit": commit}
    for name, tensor in numbers.items():
        check_tensor(name, tensor, q.shape[:1], torch.int32, q, "q")
    for name, maybe in (("pad", pad), ("block_offset", block_offset)):
        if maybe is not None:
            check_tensor(name, maybe, q.shape[:1], torch.int32, q, "q")


def _check_masks(causal: bool, block_size: int | None, block_offset: Tensor | None) -> None:
    check_bool("causal", causal)
    if block_size is not None:
        check_int("block_size", block_size, 1)
    elif block_offset is not None:
        raise ValueError("block_offset: expected None without block_size, got a tensor")


def _check_norms(q: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> None:
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is None:
            raise ValueError(f"{name}: expected weights for both norms or none, got None")
        check_weight(name, weight, q)


def check_weight(name: str, weight: Tensor | None, heads: Tensor) -> None:
    """Weights of a norm of ``heads`` (..., D), if any."""
    if weight is not None:
        check_tensor(name, weight, heads.shape[-1:], heads.dtype, heads, "the heads")
        check_no_grad(name, **{name: weight})


def _fake(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


_OP = Op(
    "window_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor start, Tensor length, Tensor kv_len, Tensor commit, Tensor cos, Tensor sin, "
    "Tensor? pad, Tensor? q_norm, Tensor? k_norm, Tensor? block_table, Tensor? block_offset, "
    "float scale, int branches, bool causal, int? block_size, int? window, float? softcap, "
    "float eps, int leaves, int leaf_rows, str backend) -> Tensor",
    _fake,
    reference.window_attention,
    pdl=("triton", "cuda"),
)
