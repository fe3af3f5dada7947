"""Attention of a window of positions over the cache and its own fresh keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pydllm import reference
from pydllm._backend.context import call_in_op_context
from pydllm._backend.dispatch import choose, launcher
from pydllm._backend.library import register
from pydllm._checks import (
    FLOATS,
    check_bool,
    check_int,
    check_no_grad,
    check_number,
    check_tensor,
    check_written,
)

FP32_MAX = torch.finfo(torch.float32).max


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
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
    batch_invariant: bool = False,
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

    Args:
        q: ``(B, T, Hq, D)`` fp32, fp16, bf16 or (torch backend) fp64, not rotated. Any strides with
            contiguous heads: a view of a fused projection is not copied.
        k, v: ``(B, T, Hkv, D)`` like ``q``; ``Hq`` is a multiple of ``Hkv``, query head ``h`` uses
            KV head ``h // (Hq / Hkv)``.
        k_cache, v_cache: ``(B, L, Hkv, D)``, keys after RoPE; **updated in place**. ``T <= L``.
            With a ``block_table`` ``(pages, page, Hkv, D)``.
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
        batch_invariant: the torch backend promises what the kernels do, see Determinism; about 6
            times slower than its default. Nothing to the others.
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
    bits depend on its query and its visible keys alone, not on the batch, other branches, padding,
    pages, or on which of the keys are cached; nor on ``T / branches`` and ``L``: with the Triton
    kernel among windows of up to 128 rows, and among longer ones (``attention_plan`` in
    ``kernels/_tiles.py``), with the others never.
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
    check_tensors(q, k, v, k_cache, v_cache, cos, sin, branches, block_table)
    numbers = {"start": start, "length": length, "kv_len": kv_len, "commit": commit}
    maybe = {"pad": pad, "block_offset": block_offset}
    for name, tensor in (numbers | {n: t for n, t in maybe.items() if t is not None}).items():
        check_tensor(name, tensor, q.shape[:1], torch.int32, q, "q")
    if block_offset is not None and block_size is None:
        raise ValueError("block_offset: expected None without block_size, got a tensor")
    _check_options(q, block_size, window, softcap, q_norm, k_norm)
    check_bool("causal", causal)
    check_number("eps", eps, 0)
    if scale is not None:
        check_number("scale", scale, -FP32_MAX, FP32_MAX)
    check_no_grad("window_attention", q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    tensors = (q, k, v, k_cache, v_cache, start, length, kv_len, commit, cos, sin, pad)
    extra = (q_norm, k_norm, block_table, block_offset)
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)

    def cuda() -> str | None:
        from pydllm._backend.cuda import window_attention as kernel

        return kernel.supports(*tensors, *extra)

    def triton() -> str | None:
        from pydllm.kernels import window_attention as kernel

        return kernel.supports(*tensors, *extra)

    chosen = choose("window_attention", backend, q.device, triton=triton, cuda=cuda)
    options = (factor, branches, causal, block_size, window, softcap, eps, chosen)
    run: Callable[..., Tensor] = torch.ops.pydllm.window_attention
    if chosen == "torch":
        run = partial(_run, batch_invariant=batch_invariant)
    return call_in_op_context(q.device, run, *tensors, *extra, *options)


def check_tensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    branches: int,
    block_table: Tensor | None,
) -> None:
    """Shapes, dtypes and devices; ``commit_branch`` has no ``q`` and gives ``k`` for it."""
    check_tensor("q", q, ("B", "T", "Hq", "D"), FLOATS)
    batch, count, heads, head_dim = q.shape
    dtype = q.dtype
    check_tensor("k", k, (batch, count, "Hkv", head_dim), dtype, q, "q")
    check_tensor("v", v, k.shape, dtype, q, "q")
    if block_table is None:
        check_tensor("k_cache", k_cache, (batch, "L", *k.shape[2:]), dtype, q, "q")
        slots = k_cache.shape[1]
    else:
        check_tensor("k_cache", k_cache, ("pages", "page", *k.shape[2:]), dtype, q, "q")
        check_tensor("block_table", block_table, (batch, "n"), torch.int32, q, "q")
        slots = k_cache.shape[1] * block_table.shape[1]
        if slots == 0 or k_cache.shape[0] == 0:
            raise ValueError(
                "block_table: expected at least one slot, got "
                f"{block_table.shape[1]} of {k_cache.shape[0]} pages of {k_cache.shape[1]} slots"
            )
    check_tensor("v_cache", v_cache, k_cache.shape, dtype, q, "q")
    check_written("k_cache", k_cache)
    check_written("v_cache", v_cache)
    kv_heads = k.shape[2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q: expected a multiple of the {kv_heads} KV heads, got {heads} heads")
    check_int("branches", branches, 1)
    if count % branches:
        raise ValueError(f"branches: expected a divisor of the {count} rows, got {branches}")
    rows = count // branches
    if rows > slots:
        raise ValueError(f"q: expected at most the {slots} rows of the cache, got {rows}")
    table = (torch.float32, torch.float64) if dtype == torch.float64 else torch.float32
    check_tensor("cos", cos, ("positions", "rotary / 2"), table, q, "q")
    check_tensor("sin", sin, cos.shape, table, q, "q")
    if cos.shape[0] < slots:
        raise ValueError(f"cos: expected at least {slots} positions, got {cos.shape[0]}")
    if 2 * cos.shape[1] > head_dim:
        raise ValueError(f"cos: expected at most {head_dim // 2} columns, got {cos.shape[1]}")


def _check_options(
    q: Tensor,
    block_size: int | None,
    window: int | None,
    softcap: float | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
) -> None:
    for name, value in (("block_size", block_size), ("window", window)):
        if value is not None:
            check_int(name, value, 1)
    if softcap is not None:
        check_number("softcap", softcap, 0, above=True)
    if (q_norm is None) != (k_norm is None):
        missing = "q_norm" if q_norm is None else "k_norm"
        raise ValueError(f"{missing}: expected weights for both norms or none, got None")
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        check_weight(name, weight, q)


def check_weight(name: str, weight: Tensor | None, heads: Tensor) -> None:
    """Weights of a norm of ``heads`` (..., D), if any."""
    if weight is not None:
        check_tensor(name, weight, heads.shape[-1:], heads.dtype, heads, "the heads")
        check_no_grad(name, **{name: weight})


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: Tensor,
    length: Tensor,
    kv_len: Tensor,
    commit: Tensor,
    cos: Tensor,
    sin: Tensor,
    pad: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    block_table: Tensor | None,
    block_offset: Tensor | None,
    scale: float,
    branches: int,
    causal: bool,
    block_size: int | None,
    window: int | None,
    softcap: float | None,
    eps: float,
    backend: str,
    batch_invariant: bool = False,
) -> Tensor:
    tensors = (q, k, v, k_cache, v_cache, start, length, kv_len, commit, cos, sin, pad)
    run: Callable[..., Tensor]
    if backend == "torch":
        run = partial(reference.window_attention, batch_invariant=batch_invariant)
    else:
        run = launcher("window_attention", backend)
    return run(
        *tensors,
        q_norm,
        k_norm,
        block_table,
        block_offset,
        scale=scale,
        branches=branches,
        causal=causal,
        block_size=block_size,
        window=window,
        softcap=softcap,
        eps=eps,
    )


def _fake(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


register(
    "window_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor start, Tensor length, Tensor kv_len, Tensor commit, Tensor cos, Tensor sin, "
    "Tensor? pad, Tensor? q_norm, Tensor? k_norm, Tensor? block_table, Tensor? block_offset, "
    "float scale, int branches, bool causal, int? block_size, int? window, float? softcap, "
    "float eps, str backend) -> Tensor",
    _run,
    _fake,
)
