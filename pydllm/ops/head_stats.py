"""``vocab_stats`` of the LM head's logits, which are never stored."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pydllm import reference
from pydllm._backend.library import Op
from pydllm._checks import (
    FLOATS,
    check_device,
    check_int,
    check_no_grad,
    check_tensor,
    describe,
    renamed,
)
from pydllm.ops.vocab_stats import VocabStats, check_options, check_rows, empty_stats, signed

_TILE_ROWS = 32  # of torch with batch_invariant


class StatsPartial(NamedTuple):
    """What ``merge_stats`` needs to know of S pieces of a vocabulary; n is 4, or 6 if sampled.

    Send it between devices, concatenated along S in any order. ``values`` are, for each piece:
    largest logit, second, sum of ``exp(x - largest)``, sum of ``exp(x - largest) (x - largest)``;
    best score and the logit there. ``ids``: of the largest logit; of the best score.
    """

    values: Tensor  # (n, R, S) fp32 (fp64 of fp64 hidden states)
    ids: Tensor  # (n // 2 - 1, R, S) int32


@renamed(banned="suppress_ids")
def head_stats(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 0.0,
    seed: int = 0,
    counter: Tensor | None = None,
    suppress_ids: Tensor | None = None,
    tempered: bool = False,
    softcap: float | None = None,
    rows: Tensor | None = None,
    batch_invariant: bool = False,
    backend: str | None = None,
) -> VocabStats:
    """Token and statistics of rows of hidden states, without storing their logits.

    Equivalent to ``vocab_stats(hidden[rows].float() @ weight.float().T + bias, ...)``: logits are
    sums in fp32 that are never rounded to the dtype of the operands, so the token is that of
    ``vocab_stats(F.linear(hidden, weight))`` except where that rounding makes ties.

    Args:
        hidden: ``(R, D)`` fp32, fp16, bf16 or (torch backend) fp64; rows at any stride.
        weight: ``(V, D)``, dtype of ``hidden``; rows at any stride.
        bias: ``(V,)``, dtype of ``hidden``, or None.
        temperature, seed, counter, suppress_ids, tempered, softcap: as in ``vocab_stats``.
        rows: ``(N,)`` int32 or int64 on the device, the rows of ``hidden`` that count, in any
            order; a shifted model's are one less than the positions. What has an entry per row then
            has N.
            An entry outside [0, R) is padding: the result is that of a row of -inf.
        batch_invariant: the torch backend, too, promises what Determinism says; 32 rows at a time.
        backend: None (``PYDLLM_BACKEND``), ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        ``VocabStats``, each field ``(R,)`` or ``(N,)``; rows without a distribution as there.

    Raises:
        ValueError, TypeError, BackendError: as ``vocab_stats``.

    Determinism: in Triton, and in torch with ``batch_invariant``, a row's bits depend on that row
    alone; in torch they may otherwise depend on the number of rows. Memory: in Triton 12 MB, in
    torch a few MB, whatever R and V.
    CUDA graphs: safe; the seed is captured, counter and rows are read. ``torch.compile``: one op.

    Kernels: ``kernels/head_stats.py``; ``merge_stats``: ``csrc/head_stats.cu``.

    Example:
        >>> stats = head_stats(torch.eye(2), torch.tensor([[0.0, 3.0], [2.0, 1.0]]))
        >>> stats.token, stats.prob
        (tensor([1, 0]), tensor([0.8808, 0.8808]))
    """
    count = _check_operands(hidden, weight, bias, rows)
    options = (temperature, seed, counter, suppress_ids, tempered, softcap)
    fixed, each = check_options(hidden, count, *options, name="hidden")
    check_no_grad("head_stats", hidden=hidden, weight=weight, bias=bias)
    checked = (fixed, signed(seed), counter, suppress_ids, tempered, softcap, each, rows)
    arguments = (hidden, weight, bias, *checked)
    chosen = _HEAD_STATS.choose(*arguments, backend=backend)
    if chosen == "torch" and batch_invariant:
        return VocabStats(*_in_tiles(_HEAD_STATS, count, arguments, 0))
    return VocabStats(*_HEAD_STATS.run(chosen, *arguments))


@renamed(banned="suppress_ids")
def head_stats_partial(
    hidden: Tensor,
    weight: Tensor,
    *,
    vocab_offset: int = 0,
    bias: Tensor | None = None,
    temperature: float | Tensor = 0.0,
    seed: int = 0,
    counter: Tensor | None = None,
    suppress_ids: Tensor | None = None,
    tempered: bool = False,
    softcap: float | None = None,
    rows: Tensor | None = None,
    batch_invariant: bool = False,
    backend: str | None = None,
) -> StatsPartial:
    """The part of ``head_stats`` that one shard of the vocabulary contributes.

    For heads whose rows are spread over devices: each calls this with its shard, all gather the
    results, and ``merge_stats`` of them is ``head_stats`` of the whole head, tokens included.

    Args:
        weight, bias: the rows of the head from id ``vocab_offset`` on.
        vocab_offset: a multiple of 4, from 0. ``suppress_ids`` are ids of the whole vocabulary.
        The others: as in ``head_stats``.

    Returns:
        ``StatsPartial``; S is 1 in torch and the number of tiles in Triton.
    """
    count = _check_operands(hidden, weight, bias, rows)
    check_int("vocab_offset", vocab_offset, 0, 2**31 - 1 - weight.shape[0])
    if vocab_offset % 4:
        raise ValueError(f"vocab_offset: expected a multiple of 4, got {vocab_offset}")
    options = (temperature, seed, counter, suppress_ids, tempered, softcap)
    fixed, each = check_options(hidden, count, *options, name="hidden")
    check_no_grad("head_stats_partial", hidden=hidden, weight=weight, bias=bias)
    checked = (fixed, signed(seed), counter, suppress_ids, tempered, softcap, each, rows)
    arguments = (hidden, weight, bias, *checked, vocab_offset)
    chosen = _PARTIAL.choose(*arguments, backend=backend)
    if chosen == "torch" and batch_invariant:
        return StatsPartial(*_in_tiles(_PARTIAL, count, arguments, 1))
    return StatsPartial(*_PARTIAL.run(chosen, *arguments))


def _in_tiles(op: Op, count: int, arguments: tuple, dim: int) -> list[Tensor]:
    """An op in torch, 32 rows at a time: what it chooses from shapes is then always the same.

    Args:
        op: ``_HEAD_STATS`` or ``_PARTIAL``.
        count: how many rows are asked for.
        arguments: of the op.
        dim: where its results have their rows.
    """
    if count == 0:
        return list(op.run("torch", *arguments))
    hidden, weight, bias, temperature, seed, counter, *middle, each, rows = arguments[:11]
    if rows is None:
        rows = torch.arange(count, device=hidden.device)
    pad = -count % _TILE_ROWS
    # A row of -1 is none.
    rows = F.pad(rows, (0, pad), value=-1).split(_TILE_ROWS)
    counters = [None] * len(rows)
    if counter is not None:
        counters = F.pad(counter, (0, 0, 0, pad)).split(_TILE_ROWS)
    temperatures = [None] * len(rows)
    if each is not None:
        temperatures = F.pad(each, (0, pad), value=1.0).split(_TILE_ROWS)
    results = [
        op.run(
            "torch",
            *(hidden, weight, bias, temperature, seed, own_counter, *middle, own, part),
            *arguments[11:],
        )
        for part, own_counter, own in zip(rows, counters, temperatures, strict=True)
    ]
    return [torch.cat(fields, dim).narrow(dim, 0, count) for fields in zip(*results, strict=True)]


def fold_stats(partial: StatsPartial) -> StatsPartial:
    """One piece of all that a shard's partial has: what is worth sending to other devices.

    ``merge_stats`` of folded partials is that of the partials, up to the rounding of the sums.

    Returns:
        ``StatsPartial`` with S = 1: 20 bytes per row in fp32, 32 if sampled.

    CUDA graphs: safe. A dozen small launches in plain torch; none where S is 1 already.
    """
    return StatsPartial(*reference.fold_stats(*partial)) if partial.ids.shape[2] > 1 else partial


def merge_stats(*partials: StatsPartial, backend: str | None = None) -> VocabStats:
    """Statistics of a vocabulary from those of its parts, in any order, none twice.

    Args:
        partials: what ``head_stats_partial`` returned for the same rows and options, on one device.
        backend: None (``PYDLLM_BACKEND``), ``"auto"``, ``"cuda"``, ``"triton"`` or ``"torch"``.

    Returns:
        ``VocabStats``, each field ``(R,)``.
    """
    if not partials:
        raise ValueError("partials: expected at least one, got none")
    for partial in partials:
        if not isinstance(partial, StatsPartial):
            raise TypeError(f"partials: expected a StatsPartial, got {describe(partial)}")
    first = partials[0]
    check_tensor("values", first.values, ("n", "R", "S"), (torch.float32, torch.float64))
    check_tensor("ids", first.ids, ("n", "R", "S"), torch.int32)
    for values, ids in partials:
        check_tensor("ids", ids, (first.ids.shape[0], "R", "S"), torch.int32)
        shape = (2 * (first.ids.shape[0] + 1), first.ids.shape[1], ids.shape[2])
        check_tensor("values", values, shape, first.values.dtype, first.values, "the first")
        check_device("ids", ids, "values", values)
    values, ids = first
    if len(partials) > 1:
        values = torch.cat([partial.values for partial in partials], -1)
        ids = torch.cat([partial.ids for partial in partials], -1)
    return VocabStats(*_MERGE(values, ids, backend=backend))


def _check_operands(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None
) -> int:
    check_tensor("hidden", hidden, ("R", "D"), FLOATS)
    check_tensor("weight", weight, ("V", hidden.shape[1]), hidden.dtype, hidden, "hidden")
    if 0 in weight.shape:
        raise ValueError(f"weight: expected V and D of at least 1, got {tuple(weight.shape)}")
    if bias is not None:
        check_tensor("bias", bias, weight.shape[:1], hidden.dtype, hidden, "hidden")
    return check_rows("hidden", hidden, rows)


def _fake(hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return empty_stats(hidden, _count(hidden, arguments[8]))


def _fake_partial(hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    temperature, counter, temperatures, rows = (arguments[i] for i in (1, 3, 7, 8))
    sampled = counter is not None and (temperatures is not None or temperature > 0)
    pieces = 1
    if arguments[-1] == "triton":
        from pydllm.kernels import head_stats as kernel

        pieces = kernel.tile_count(hidden, weight)
    shape = (_count(hidden, rows), pieces)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    values = hidden.new_empty(6 if sampled else 4, *shape, dtype=dtype)
    return values, hidden.new_empty(2 if sampled else 1, *shape, dtype=torch.int32)


def _fake_merge(values: Tensor, ids: Tensor, backend: str) -> tuple[Tensor, ...]:
    return empty_stats(values, values.shape[1])


def _count(hidden: Tensor, rows: Tensor | None) -> int:
    return hidden.shape[0] if rows is None else rows.shape[0]


_OPTIONS = (
    "Tensor hidden, Tensor weight, Tensor? bias, float temperature, int seed, Tensor? counter, "
    "Tensor? suppress_ids, bool tempered, float? softcap, Tensor? temperatures, Tensor? rows"
)
_STATS = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
_HEAD_STATS = Op(
    f"head_stats({_OPTIONS}, str backend) -> {_STATS}",
    _fake,
    reference.head_stats,
    opaque=True,
    pdl=("triton",),
)
_PARTIAL = Op(
    f"head_stats_partial({_OPTIONS}, int vocab_offset, str backend) -> (Tensor, Tensor)",
    _fake_partial,
    reference.head_stats_partial,
    file="head_stats",
    opaque=True,
    pdl=("triton",),
)
_MERGE = Op(
    f"merge_stats(Tensor values, Tensor ids, str backend) -> {_STATS}",
    _fake_merge,
    reference.merge_stats,
    file="head_stats",
    supports="merge_supports",
    opaque=True,
    pdl=("triton",),
)
