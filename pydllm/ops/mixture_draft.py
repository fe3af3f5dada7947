"""The draft of adaptive parallel decoding: a token for each masked position, and its nucleus."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pydllm import reference
from pydllm._backend.library import Op
from pydllm._checks import (
    FLOATS,
    check_choice,
    check_int,
    check_no_grad,
    check_number,
    check_tensor,
    renamed,
)
from pydllm.ops.vocab_stats import check_options, check_rows, signed, vocab_stats

EMITS = ("draft", "draft_then_target", "target")
MAX_CAPACITY = 1024


class Candidates(NamedTuple):
    """The nucleus of each row, as a list in ascending order of ids; C is the capacity."""

    ids: Tensor  # (R, C) int32; 0 past the list
    logits: Tensor  # (R, C) fp32 (fp64 of fp64 logits); -inf past the list
    noise: Tensor  # (R, C) the Gumbel noise of the ids, same dtype; 0 past the list
    size: Tensor  # (R,) int32, length of the list; 0 for a row that overflowed
    overflow: Tensor  # (R,) bool: the row has no nucleus, or one of more than C ids


class MixtureDraft(NamedTuple):
    """One entry per row of logits; floats are fp32 (fp64 of fp64 logits)."""

    token: Tensor  # (R,) int64
    logsumexp: Tensor  # (R,) of logits / temperature, or of logits at temperature 0
    threshold: Tensor  # (R,) the smallest logit in the nucleus; -inf: all are in it
    candidates: Candidates | None  # None at capacity 0


@renamed(banned="suppress_ids", rule="the square of the temperature for 'reference'")
def mixture_draft(
    logits: Tensor,
    *,
    temperature: float | Tensor = 0.0,
    seed: int = 0,
    counter: Tensor | None = None,
    top_p: float | Tensor | None = None,
    suppress_ids: Tensor | None = None,
    shared_vocab: int | None = None,
    rows: Tensor | None = None,
    capacity: int = 0,
    backend: str | None = None,
) -> MixtureDraft:
    """Draft a token in each row, and keep what ``mixture_accept`` has to know of it.

    The draft of adaptive parallel decoding (arXiv 2506.00413, Algorithm 1), as an arg-max under
    Gumbel noise that the acceptance shares. Equivalent to::

        x = logits[:, :shared_vocab] / temperature; x[:, suppress_ids] = -inf
        nucleus = smallest set of the largest x whose mass of softmax(x) exceeds top_p
        token = argmax(x + gumbel_noise over the nucleus)

    The lowest id wins a tie. The noise of a row is a function of ``seed``, the vocabulary id and
    ``counter`` alone, as in ``vocab_stats``, whose token this is where there is no nucleus; without
    one and without logits, ``head_stats(hidden, head[:shared_vocab], ...)`` is the same draft.

    Args:
        logits: ``(R, V)`` fp32, fp16, bf16 or (torch backend) fp64; rows at any stride. An id with
            logit -inf is never drafted.
        temperature: 0 takes the arg-max; otherwise in [1e-6, 1e18]. Or ``(R,)`` fp32, one for each
            row; a row whose own is not in [1e-6, inf) takes the arg-max.
        seed: in [0, 2^64); used at a temperature.
        counter: ``(R, 3)`` int32: absolute position, request id, draw, as ``round_counter`` makes
            them. Required at a temperature. ``mixture_accept`` has to be given the same.
        top_p: probability in (0, 1], the nucleus; or ``(R,)`` fp32, where a number that is not in
            (0, 1) is no limit. None or 1: no nucleus. There is none at temperature 0.
        suppress_ids: ``(n,)`` int32, at most 16 ids that are never drafted: the mask id always.
        shared_vocab: in [1, V], the number of leading ids that mean the same token to the verifier;
            those from it on are never drafted. None: V.
        rows: ``(N,)`` int32 or int64 on the device, the rows of ``logits`` that count. What has an
            entry per row then has N. An entry outside [0, R) is padding: token 0, log-sum-exp -inf.
        capacity: in [0, 1024], room for the nucleus's ids; 0 makes no list.
        backend: None (``PYDLLM_BACKEND``), ``"auto"``, ``"cuda"``, ``"triton"`` or ``"torch"``.

    Returns:
        ``MixtureDraft``. Logits that tie with the smallest in the nucleus are in it. A row that has
        no nucleus (temperature 0, no top_p) has threshold -inf and, like one whose nucleus has more
        than ``capacity`` ids, no list: ``overflow``. A row whose ids are all -inf or suppressed has
        token 0 and log-sum-exp -inf; one with a NaN or +inf in an id that counts has token 0 and
        NaN for log-sum-exp and threshold; neither has a list.

    Raises:
        ValueError: shapes or devices differ, a number is out of its range, a counter is missing, a
            gradient is wanted, or an unknown backend.
        TypeError: a dtype that is not supported.
        BackendError: the named backend cannot run the call.

    Determinism: a row's bits depend on that row alone. A seed gives the same token on every
    backend, except that the nucleus's mass is summed in another order on each: an id whose mass
    decides within rounding of ``top_p`` may be kept by one and not by another.
    Cost: without a nucleus that of ``vocab_stats`` (one read of the logits: 2 bytes per element of
    bf16). With one, one read as well, each row by one program or block; a row in which more than
    8192 ids have to be looked at (a flat distribution), or one among others that has no nucleus, is
    read up to 9 times more (11 of fp16, 17 of fp32; once more in CUDA). Neither noise,
    probabilities nor sorted logits are stored. In torch a sort.
    CUDA graphs: safe; the seed is captured, the counter is read. ``torch.compile``: one op.

    Kernels: ``kernels/mixture_draft.py``, ``csrc/mixture_draft.cu``, and those of ``vocab_stats``.

    Example:
        >>> logits, never = torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([1]).int()
        >>> draft = mixture_draft(logits, suppress_ids=never)
        >>> draft.token, draft.logsumexp
        (tensor([2]), tensor([1.3133]))
    """
    check_tensor("logits", logits, ("R", "V"), FLOATS)
    shared = check_shared(shared_vocab, logits=logits)
    count = check_rows("logits", logits, rows)
    fixed, each = check_options(
        logits, count, temperature, seed, counter, suppress_ids, False, None
    )
    limit, limits = _check_top_p(top_p, count, logits)
    check_int("capacity", capacity, 0, MAX_CAPACITY)
    check_no_grad("mixture_draft", logits=logits)
    if (limit == 1 and limits is None) or (each is None and fixed == 0):
        return _draft_from_all(
            logits[:, :shared], temperature, seed, counter, suppress_ids, rows, capacity, backend
        )

    where = (counter, suppress_ids, each, rows, shared)
    arguments = (fixed, signed(seed), *where, limit, limits, capacity)
    results = _OP(logits, *arguments, backend=backend)
    token, logsumexp, threshold, *found = results
    return MixtureDraft(token, logsumexp, threshold, Candidates(*found) if capacity else None)


def round_counter(start: Tensor, request: Tensor, rows: int, *, emit: str = "draft") -> Tensor:
    """Counter words of the noise of a round, for ``mixture_draft`` and ``mixture_accept``.

    Row j of sequence b draws at position ``start[b] + j``. Where a round emits nothing but drafts,
    the position after its last token is drawn again, as the first of the next round; it must not
    meet the noise that has just rejected it, so that the first row of a round has a draw of its
    own, 1. All other draws are 0: the noise does not depend on the batch, the number of the round
    or its length.

    Args:
        start: ``(B,)`` int32, absolute position of each sequence's first row.
        request: ``(B,)`` int32, which stream of noise a sequence uses.
        rows: M, rows per sequence.
        emit: as in ``mixture_accept``; the draw of the first row is 1 for ``"draft"`` alone.

    Returns:
        ``(B * M, 3)`` int32.

    Example:
        >>> round_counter(torch.tensor([7]).int(), torch.tensor([3]).int(), 2)
        tensor([[7, 3, 1],
                [8, 3, 0]], dtype=torch.int32)
    """
    check_tensor("start", start, ("B",), torch.int32)
    check_tensor("request", request, start.shape, torch.int32, start, "start")
    check_int("rows", rows, 1)
    check_choice("emit", emit, EMITS)
    index = torch.arange(rows, dtype=torch.int32, device=start.device)
    position = start[:, None] + index
    draw = ((index == 0) & (emit == "draft")).int()
    words = (position, request[:, None].expand_as(position), draw.expand_as(position))
    return torch.stack(words, -1).view(-1, 3)


def check_shared(shared_vocab: int | None, **matrices: Tensor) -> int:
    """How many leading columns of the matrices, or rows of a head, count."""
    sizes = {name: matrix.shape[1] for name, matrix in matrices.items()}
    least = min(sizes.values())
    if least == 0:
        raise ValueError(f"{' and '.join(sizes)}: expected at least one id, got none")
    if shared_vocab is None:
        if least != max(sizes.values()):
            raise ValueError(f"shared_vocab: expected a number for vocabularies {sizes}, got None")
        return least
    check_int("shared_vocab", shared_vocab, 1, least)
    return shared_vocab


def _check_top_p(
    top_p: float | Tensor | None, count: int, like: Tensor
) -> tuple[float, Tensor | None]:
    """One limit for all rows, or one for each."""
    if isinstance(top_p, Tensor):
        check_tensor("top_p", top_p, (count,), torch.float32, like, "logits")
        return 1.0, top_p
    if top_p is None:
        return 1.0, None
    check_number("top_p", top_p, 0, 1, above=True)
    return float(top_p), None


def _draft_from_all(
    logits: Tensor,
    temperature: float | Tensor,
    seed: int,
    counter: Tensor | None,
    suppress_ids: Tensor | None,
    rows: Tensor | None,
    capacity: int,
    backend: str | None,
) -> MixtureDraft:
    """The draft where every id is in the nucleus."""
    tempered = isinstance(temperature, Tensor) or temperature > 0
    stats = vocab_stats(
        logits,
        temperature=temperature,
        tempered=tempered,
        seed=seed,
        counter=counter,
        suppress_ids=suppress_ids,
        rows=rows,
        backend=backend,
    )
    token, lse = stats.token, stats.logsumexp
    threshold = lse.masked_fill(~lse.isnan(), -math.inf)
    if capacity == 0:
        return MixtureDraft(token, lse, threshold, None)
    shape = (len(lse), capacity)
    candidates = Candidates(
        token.new_zeros(shape, dtype=torch.int32),
        lse.new_full(shape, -math.inf),
        lse.new_zeros(shape),
        token.new_zeros(len(lse), dtype=torch.int32),
        token.new_ones(len(lse), dtype=torch.bool),
    )
    return MixtureDraft(token, lse, threshold, candidates)


def _fake(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    rows, capacity = arguments[5], arguments[9]
    count = logits.shape[0] if rows is None else rows.shape[0]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return (
        logits.new_empty(count, dtype=torch.int64),
        logits.new_empty(count, dtype=dtype),
        logits.new_empty(count, dtype=dtype),
        logits.new_empty(count, capacity, dtype=torch.int32),
        logits.new_empty(count, capacity, dtype=dtype),
        logits.new_empty(count, capacity, dtype=dtype),
        logits.new_empty(count, dtype=torch.int32),
        logits.new_empty(count, dtype=torch.bool),
    )


_OP = Op(
    "mixture_draft(Tensor logits, float temperature, int seed, Tensor counter, "
    "Tensor? suppress_ids, Tensor? temperatures, Tensor? rows, int shared, float top_p, "
    "Tensor? top_ps, int capacity, str backend) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
    reference.mixture_draft,
    opaque=True,
)
