"""What a decoding step needs to know of its logits: a token for each row, and how sure it is."""

from __future__ import annotations

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
    check_tensor,
    renamed,
)

MAX_SUPPRESS_IDS = 16
MIN_TEMPERATURE = 1e-6  # below, logits / temperature could leave fp32
MAX_TEMPERATURE = 1e18  # its square is a number of fp32, too


class VocabStats(NamedTuple):
    """One entry per row of logits; statistics are fp32 (fp64 of fp64 logits)."""

    token: Tensor  # (R,) int64
    prob: Tensor  # (R,) probability of `token`
    entropy: Tensor  # (R,) nats
    margin: Tensor  # (R,) the largest probability less the second largest
    logsumexp: Tensor  # (R,)


@renamed(banned="suppress_ids")
def vocab_stats(
    logits: Tensor,
    *,
    temperature: float | Tensor = 0.0,
    seed: int = 0,
    counter: Tensor | None = None,
    suppress_ids: Tensor | None = None,
    tempered: bool = False,
    softcap: float | None = None,
    rows: Tensor | None = None,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    backend: str | None = None,
) -> VocabStats:
    """Arg-max or sampled token of each row, and the statistics of the row's distribution.

    Equivalent, without storing any of it::

        x = softcap * tanh(logits / softcap); x[:, suppress_ids] = -inf; p = softmax(x)
        token = argmax(x)  or, at a temperature,  argmax(x / temperature + gumbel_noise)
        prob, entropy = p[token], -sum(p * log(p));  margin = p_1st - p_2nd
        logsumexp = log(sum(exp(x)))

    The lowest id wins a tie. Sampling is exact (the Gumbel-max trick), and the noise of a row is a
    function of ``seed``, the vocabulary id and ``counter`` alone (``pydllm/reference/philox.py``).

    Args:
        logits: ``(R, V)`` fp32, fp16, bf16 or (torch backend) fp64; rows at any stride. An id with
            logit -inf is never chosen.
        temperature: 0 takes the arg-max; otherwise in [1e-6, 1e18]. Or ``(R,)`` fp32, one for each
            row; a row whose own is not in [1e-6, inf) takes the arg-max.
        seed: in [0, 2^64); used at a temperature.
        counter: ``(R, 3)`` int32, what tells one draw from another: absolute position, request id,
            draw. Required at a temperature, not read at 0. Nobody advances it but the caller.
        suppress_ids: ``(n,)`` int32, at most 16 ids that count as -inf in everything; ids
            that are not in the vocabulary suppress nothing.
        tempered: statistics of ``softmax(x / temperature)`` instead of ``softmax(x)``.
        softcap: a positive number c, ``c * tanh(logits / c)`` is taken for the logits; -inf stays.
        rows: ``(N,)`` int32 or int64 on the device, the rows of ``logits`` that count, in any
            order. What has an entry per row, results included, then has one for each of these N.
            An entry outside [0, R) is padding: the result is that of a row of -inf.
        top_k: at least 1: only the k largest logits count, the others are as if suppressed. Or
            ``(R,)`` int32, one for each row; a number outside [1, V] keeps 1 or all.
        top_p: in (0, 1]: only the largest logits count whose mass, of all that are not suppressed
            and at the row's temperature, first exceeds ``top_p``. Or ``(R,)`` fp32, one for each
            row; a number outside (0, 1) keeps all. Both filters look at the whole row, and what
            both keep is kept; logits that tie with the last one kept are kept too.
        backend: None (``PYDLLM_BACKEND``), ``"auto"``, ``"cuda"``, ``"triton"`` or ``"torch"``.

    Returns:
        ``VocabStats``, each field ``(R,)``. A row whose ids are all -inf or suppressed has token 0,
        log-sum-exp -inf and else 0; one with a NaN or +inf in an id that is not suppressed has
        token 0 and NaN in the rest.

    Raises:
        ValueError: shapes or devices differ, a number is out of its range, a counter is missing, a
            gradient is wanted, or an unknown backend.
        TypeError: a dtype that is not supported.
        BackendError: the named backend cannot run the call.

    Determinism: a row's bits depend on that row alone, not on the batch or its order (torch on CUDA
    does not promise the bits of the statistics). A seed gives the same token on every backend (with
    a softcap: except where its rounding makes or breaks a tie); the statistics agree to rounding.
    ``top_p`` sums in another order on each backend: an id whose mass decides within rounding of
    ``top_p`` may be kept by one and not by another.
    Cost: one read of the logits. ``top_k`` or ``top_p`` cost, in Triton and CUDA, 4 reads more of
    bf16, 5 of fp16 and 8 of fp32, in a launch each and one more; in torch a sort.
    CUDA graphs: safe; the seed is captured, the counter is read. ``torch.compile``: one op.

    Kernels: ``kernels/vocab_stats.py``, ``csrc/vocab_stats.cu``.

    Example:
        >>> stats = vocab_stats(torch.tensor([[0.0, 2.0, 1.0]]))
        >>> stats.token, stats.prob, stats.entropy
        (tensor([1]), tensor([0.6652]), tensor([0.8324]))
    """
    check_tensor("logits", logits, ("R", "V"), FLOATS)
    if logits.shape[1] == 0:
        raise ValueError(f"logits: expected at least one id, got shape {tuple(logits.shape)}")
    count = check_rows("logits", logits, rows)
    fixed, each = check_options(
        logits, count, temperature, seed, counter, suppress_ids, tempered, softcap
    )
    top_ks = top_ps = None
    if isinstance(top_k, Tensor):
        check_tensor("top_k", top_k, (count,), torch.int32, logits, "logits")
        top_k, top_ks = None, top_k
    elif top_k is not None:
        check_int("top_k", top_k, 1)
    if isinstance(top_p, Tensor):
        check_tensor("top_p", top_p, (count,), torch.float32, logits, "logits")
        top_p, top_ps = None, top_p
    elif top_p is not None:
        check_number("top_p", top_p, 0, 1, above=True)
        top_p = None if top_p == 1 else top_p
    check_no_grad("vocab_stats", logits=logits)
    options = (fixed, signed(seed), counter, suppress_ids, tempered, softcap, each, rows)
    return VocabStats(*_OP(logits, *options, top_k, top_p, top_ks, top_ps, backend=backend))


def check_rows(name: str, matrix: Tensor, rows: Tensor | None) -> int:
    """Check the list of rows of ``matrix``; how many rows the results have."""
    if rows is None:
        return matrix.shape[0]
    check_tensor("rows", rows, ("N",), (torch.int32, torch.int64), matrix, name)
    if matrix.shape[0] == 0 and rows.shape[0] > 0:
        raise ValueError(f"{name}: expected a row to take, got shape {tuple(matrix.shape)}")
    return rows.shape[0]


def check_options(
    like: Tensor,
    count: int,
    temperature: float | Tensor,
    seed: int,
    counter: Tensor | None,
    suppress_ids: Tensor | None,
    tempered: bool,
    softcap: float | None,
    name: str = "logits",
) -> tuple[float, Tensor | None]:
    """Check what has to do with a row's distribution; the temperature as a number or as a tensor.

    ``like``, called ``name``, has the device; ``count`` is the number of rows of the results.
    """
    fixed, each = 0.0, None
    if isinstance(temperature, Tensor):
        each = temperature
        check_tensor("temperature", each, (count,), torch.float32, like, name)
    else:
        fixed = check_temperature(temperature)
    check_int("seed", seed, 0, 2**64 - 1)
    check_bool("tempered", tempered)
    if tempered and each is None and fixed == 0:
        raise ValueError("tempered: expected False at temperature 0, got True")
    if counter is not None:
        check_tensor("counter", counter, (count, 3), torch.int32, like, name)
    elif each is not None or fixed > 0:
        raise ValueError("counter: expected (R, 3) int32 at a temperature, got None")
    if suppress_ids is not None:
        check_tensor("suppress_ids", suppress_ids, ("n",), torch.int32, like, name)
        if suppress_ids.shape[0] > MAX_SUPPRESS_IDS:
            raise ValueError(
                f"suppress_ids: expected at most {MAX_SUPPRESS_IDS} ids, "
                f"got {suppress_ids.shape[0]}"
            )
    if softcap is not None:
        check_number("softcap", softcap, 0, above=True)
    return fixed, each


def check_temperature(temperature: float) -> float:
    """Check a temperature that is one number for all rows."""
    check_number("temperature", temperature, 0, MAX_TEMPERATURE)
    if 0 < temperature < MIN_TEMPERATURE:
        raise ValueError(f"temperature: expected 0 or at least 1e-6, got {temperature}")
    return float(temperature)


def signed(seed: int) -> int:
    """The same 64 bits as a signed number, which is what the integers of a schema are."""
    return seed - 2**64 if seed >= 2**63 else seed


def _fake(logits: Tensor, *options: Any) -> tuple[Tensor, ...]:
    rows = options[7]
    return empty_stats(logits, logits.shape[0] if rows is None else rows.shape[0])


def empty_stats(like: Tensor, rows: int) -> tuple[Tensor, ...]:
    """What the op returns, for tracing."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    statistics = [like.new_empty(rows, dtype=dtype) for _ in range(4)]
    return like.new_empty(rows, dtype=torch.int64), *statistics


_OP = Op(
    "vocab_stats(Tensor logits, float temperature, int seed, Tensor? counter, "
    "Tensor? suppress_ids, bool tempered, float? softcap, Tensor? temperatures, Tensor? rows, "
    "int? top_k, float? top_p, Tensor? top_ks, Tensor? top_ps, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
    reference.vocab_stats,
)
