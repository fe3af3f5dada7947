"""The acceptance of adaptive parallel decoding: how many drafts a mixture of two models shares."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pydllm import reference
from pydllm._backend.library import Op
from pydllm._checks import (
    FLOATS,
    check_bool,
    check_choice,
    check_no_grad,
    check_number,
    check_tensor,
    describe,
    renamed,
)
from pydllm.ops.mixture_draft import EMITS, Candidates, check_shared
from pydllm.ops.vocab_stats import check_options, signed


class Accepted(NamedTuple):
    """What a round accepts."""

    accepted: Tensor  # (B,) int32, how many drafts: the leading run
    correction: Tensor  # (B,) int64, the target at the first mismatch; -1 if there is none
    target: Tensor  # (R,) int64, the target of each row; -1 where there is none
    critical: Tensor | None  # (R,) the smallest mixture weight that accepts the row, if asked for


@renamed(banned="suppress_ids", rule="temperature 0 without a threshold for 'reference'")
def mixture_accept(
    logits: Tensor,
    verifier_logits: Tensor,
    token: Tensor,
    *,
    length: Tensor,
    mixture: float | Tensor,
    threshold: Tensor | None = None,
    temperature: float | Tensor = 0.0,
    seed: int = 0,
    counter: Tensor | None = None,
    suppress_ids: Tensor | None = None,
    shared_vocab: int | None = None,
    emit: str = "draft",
    critical: bool = False,
    backend: str | None = None,
) -> Accepted:
    """Compare drafts with the targets of a mixture under the same noise; count the leading run.

    The acceptance of adaptive parallel decoding (arXiv 2506.00413, Algorithm 1; the coupling
    through shared Gumbel noise is that of Daliri, Musco and Suresh, arXiv 2408.07978). Rows come in
    sequences of M = R / B: row ``b * M + j`` is the j-th position of sequence b. Equivalent to::

        mix = verifier_logits + mixture * (logits - verifier_logits)
        mix[logits < threshold] = mix[:, suppress_ids] = -inf
        target = argmax(mix / temperature + gumbel_noise)
        same = target == token; same[:, 0] = True unless emit == "target"
        accepted = length of the leading run of same[:, :length]

    The lowest id wins a tie. At mixture 1 the target is the draft, at 0 the verifier's own token
    (of all ids: there the threshold does not count), both exactly: the other model's logits are not
    looked at. For equal logits the mixture has their bits, so that everything is accepted.

    Args:
        logits: ``(R, V)``, those ``mixture_draft`` was given (its ``rows`` of them); rows at any
            stride; fp32, fp16, bf16 or (torch backend) fp64.
        verifier_logits: ``(R, V_A)``, same dtype: those of the autoregressive model, where row
            ``b * M + j`` has seen the drafts before position j.
        token: ``(R,)`` int64, the drafts.
        length: ``(B,)`` int32, rows in use, 0 to M; the rows after them may hold anything.
        mixture: R of the paper, the weight of the draft model, in [0, 1]; or ``(B,)`` fp32. A
            sequence whose own is not in [0, 1] has no targets.
        threshold: ``(R,)`` fp32 (fp64), ``MixtureDraft.threshold``. None: all ids count.
        temperature, seed, counter, suppress_ids: as ``mixture_draft`` was given them.
        shared_vocab: as there, at most V and V_A; needed where these differ.
        emit: ``"draft"`` or ``"draft_then_target"``: the first row is accepted whatever its target;
            ``"target"``: it is compared as the others. Which of the results is emitted is up to the
            caller: the first rule emits the accepted drafts alone, the others then the correction.
        critical: also return the smallest weight at which each row's draft is its target. For a
            token that is the draft under the same options, a row is accepted at every mixture in
            (0, 1] from it on.
        backend: None (``PYDLLM_BACKEND``), ``"auto"``, ``"cuda"``, ``"triton"`` or ``"torch"``.

    Returns:
        ``Accepted``. A row has target -1, which no draft equals, if it is not in use, if all that
        counts is -inf, or if an id that counts is NaN or +inf. The first mismatch is looked for in
        the rows in use; ``correction`` is -1 where all of them were accepted. ``critical`` is fp32
        (fp64 of fp64 logits), 0 in rows that are not in use.

    Raises:
        ValueError: shapes or devices differ, a number is out of its range, a counter is missing, a
            gradient is wanted, or an unknown backend or emit.
        TypeError: a dtype that is not supported.
        BackendError: the named backend cannot run the call.

    Determinism: a sequence's results depend on that sequence alone, and are the same on every
    backend, bit for bit, given the same threshold (``critical`` agrees to rounding).
    Cost: one read of each of the logits of the rows in use: 4 bytes per element of bf16. Where no
    id is in the nucleus, of a piece of the vocabulary in Triton, of 16 bytes in CUDA, only
    ``logits`` are read: 2 bytes per element.
    CUDA graphs: safe; the seed is captured, everything else is read. ``torch.compile``: one op.

    Kernels: ``kernels/mixture_accept.py``, ``csrc/mixture_accept.cu``.

    Example:
        >>> draft, length = torch.tensor([[0.0, 2.0], [1.0, 0.0]]), torch.tensor([2]).int()
        >>> verifier, token = torch.tensor([[9.0, 0.0], [0.0, 3.0]]), draft.argmax(-1)
        >>> mixture_accept(draft, verifier, token, length=length, mixture=0.5)[:3]
        (tensor([1], dtype=torch.int32), tensor([1]), tensor([0, 1]))
    """
    check_tensor("logits", logits, ("R", "V"), FLOATS)
    shape = (logits.shape[0], "V_A")
    check_tensor("verifier_logits", verifier_logits, shape, logits.dtype, logits, "logits")
    shared = check_shared(shared_vocab, logits=logits, verifier_logits=verifier_logits)
    weight, weights = _check_round("logits", logits, token, length, mixture)
    fixed, each = check_options(
        logits, logits.shape[0], temperature, seed, counter, suppress_ids, False, None
    )
    if threshold is not None:
        wide = torch.promote_types(logits.dtype, torch.float32)
        check_tensor("threshold", threshold, logits.shape[:1], wide, logits, "logits")
    check_choice("emit", emit, EMITS)
    check_bool("critical", critical)
    check_no_grad("mixture_accept", logits=logits, verifier_logits=verifier_logits)

    options = (fixed, each, signed(seed), counter, suppress_ids, shared, emit != "target")
    rounds = (logits, verifier_logits, token, length, weight, weights, threshold)
    results = _OP(*rounds, *options, critical, backend=backend)
    accepted, correction, target, least = results
    return Accepted(accepted, correction, target, least if critical else None)


@renamed(banned="suppress_ids")
def mixture_accept_sparse(
    candidates: Candidates,
    hidden: Tensor,
    weight: Tensor,
    token: Tensor,
    *,
    length: Tensor,
    mixture: float | Tensor,
    temperature: float | Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    emit: str = "draft",
    critical: bool = False,
    backend: str | None = None,
) -> Accepted:
    """``mixture_accept`` with the verifier's head evaluated at the drafts' nuclei alone.

    Ids outside a nucleus cannot be a target, and the normaliser of the verifier does not matter, so
    this is no approximation: ``candidates`` hold the draft model's logits and the noise, and the
    verifier's logits are dot products of a row of ``hidden`` with ``size`` rows of ``weight``.

    A row with ``candidates.overflow`` has no list, hence no target (-1), and neither has a sequence
    of mixture 0, which looks at ids outside the nucleus. The run ends before such a row, without a
    correction: the round is one of a shorter lookahead, cut by the distributions and not by the
    draws. The tokens are then valid ones, but not those of ``mixture_accept``; with emit "target" a
    first row without a list leaves a round with nothing to emit, which the caller has to exclude or
    to draw by itself. A caller that wants
    those in every case takes the dense form where ``capacity`` cannot hold a nucleus (top_p None or
    1, temperature 0) and sizes it for the rest, or reads ``candidates.overflow`` when it next reads
    the counts; no op does, so that nothing waits for the device.

    Args:
        candidates: of ``mixture_draft``, R rows and a capacity of at least 1.
        hidden: ``(R, H)`` fp32, fp16, bf16 or (torch backend) fp64: the verifier's, final norm
            applied, where row ``b * M + j`` has seen the drafts before position j.
        weight: ``(V_A, H)``, the verifier's head, dtype of ``hidden``. Every candidate has to be
            one of its rows: ``mixture_draft`` with a ``shared_vocab`` of at most V_A.
        token, length, mixture, temperature, emit, critical: as in ``mixture_accept``; a mixture of
            0 for all is refused.
        bias: ``(V_A,)``, dtype of ``hidden``, or None.
        softcap: a positive number c, ``c * tanh(x / c)`` is taken for the verifier's logits x.
        backend: None (``PYDLLM_BACKEND``), ``"auto"``, ``"cuda"``, ``"triton"`` or ``"torch"``.

    Returns:
        ``Accepted``, as ``mixture_accept`` (the verifier's logits are sums in fp32, never rounded).
        ``critical`` is infinite in a row without a list.

    Raises:
        ValueError, TypeError, BackendError: as ``mixture_accept``.

    Determinism: a sequence's results depend on that sequence alone; the verifier's logits are
    summed in another order on each backend.
    Cost: ``size * H`` elements of the head and 12 bytes per candidate for each row in use, instead
    of the whole head and both logits: 0 bytes per element of the vocabulary.
    CUDA graphs: safe. ``torch.compile``: one op.

    Kernels: ``kernels/mixture_accept.py``, ``csrc/_mixture_accept_sparse.cu``.
    """
    if not isinstance(candidates, Candidates):
        raise TypeError(f"candidates: expected Candidates, got {describe(candidates)}")
    ids, logits, noise, size, overflow = candidates
    check_tensor("hidden", hidden, ("R", "H"), FLOATS)
    like, count = (hidden, "hidden"), hidden.shape[:1]
    check_tensor("candidates.ids", ids, (*count, "C"), torch.int32, *like)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    check_tensor("candidates.logits", logits, ids.shape, wide, *like)
    check_tensor("candidates.noise", noise, ids.shape, wide, *like)
    check_tensor("candidates.size", size, count, torch.int32, *like)
    check_tensor("candidates.overflow", overflow, count, torch.bool, *like)
    check_tensor("weight", weight, ("V_A", hidden.shape[1]), hidden.dtype, *like)
    if 0 in weight.shape or ids.shape[1] == 0:
        raise ValueError(
            "weight and candidates: expected V_A, H and C of at least 1, got "
            f"{tuple(weight.shape)} and C {ids.shape[1]}"
        )
    if bias is not None:
        check_tensor("bias", bias, weight.shape[:1], hidden.dtype, *like)
    weight_of, weights = _check_round("hidden", hidden, token, length, mixture)
    if weights is None and weight_of == 0:
        raise ValueError("mixture: expected a number in (0, 1] for a list of candidates, got 0")
    if not isinstance(temperature, Tensor) and temperature == 0:
        raise ValueError("temperature: expected one above 0 for a list of candidates, got 0")
    unread = ids.new_empty(ids.shape[0], 3)  # the noise is in the list
    fixed, each = check_options(
        hidden, ids.shape[0], temperature, 0, unread, None, False, softcap, name="hidden"
    )
    check_choice("emit", emit, EMITS)
    check_bool("critical", critical)
    check_no_grad("mixture_accept_sparse", hidden=hidden, weight=weight, bias=bias)

    lists = (ids, logits, noise, size, hidden, weight, bias, token, length)
    options = (weight_of, weights, fixed, each, softcap, emit != "target", critical)
    results = _SPARSE(*lists, *options, backend=backend)
    accepted, correction, target, least = results
    return Accepted(accepted, correction, target, least if critical else None)


def _check_round(
    name: str, matrix: Tensor, token: Tensor, length: Tensor, mixture: float | Tensor
) -> tuple[float, Tensor | None]:
    """Check what belongs to a round; the mixture as a number or as a tensor."""
    rows = matrix.shape[0]
    check_tensor("token", token, (rows,), torch.int64, matrix, name)
    check_tensor("length", length, ("B",), torch.int32, matrix, name)
    batch = length.shape[0]
    if rows % batch if batch else rows:
        raise ValueError(f"length: expected B that divides the {rows} rows, got {batch}")
    if isinstance(mixture, Tensor):
        check_tensor("mixture", mixture, (batch,), torch.float32, matrix, name)
        return 0.0, mixture
    check_number("mixture", mixture, 0, 1)
    return float(mixture), None


def _fake(
    logits: Tensor, verifier: Tensor, token: Tensor, length: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return _empty(token, length, dtype, arguments[-2])


def _fake_sparse(ids: Tensor, logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    token, length = arguments[5:7]
    return _empty(token, length, logits.dtype, arguments[-2])


def _empty(token: Tensor, length: Tensor, dtype: torch.dtype, critical: bool) -> tuple[Tensor, ...]:
    """What the ops return, for tracing."""
    return (
        length.new_empty(length.shape),
        token.new_empty(length.shape),
        token.new_empty(token.shape),
        token.new_empty(token.shape if critical else (0,), dtype=dtype),
    )


_RESULTS = "(Tensor, Tensor, Tensor, Tensor)"
_OP = Op(
    "mixture_accept(Tensor logits, Tensor verifier, Tensor token, Tensor length, float mixture, "
    "Tensor? mixtures, Tensor? threshold, float temperature, Tensor? temperatures, int seed, "
    "Tensor? counter, Tensor? suppress_ids, int shared, bool first_free, bool critical, "
    "str backend) "
    f"-> {_RESULTS}",
    _fake,
    reference.mixture_accept,
    opaque=True,
)
_SPARSE = Op(
    "mixture_accept_sparse(Tensor ids, Tensor logits, Tensor noise, Tensor size, Tensor hidden, "
    "Tensor head, Tensor? bias, Tensor token, Tensor length, float mixture, Tensor? mixtures, "
    "float temperature, Tensor? temperatures, float? softcap, bool first_free, bool critical, "
    f"str backend) -> {_RESULTS}",
    _fake_sparse,
    reference.mixture_accept_sparse,
    file="mixture_accept",
    supports="sparse_supports",
    opaque=True,
)
