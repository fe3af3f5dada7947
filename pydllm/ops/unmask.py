"""The accept rule: which masks of each window become tokens in this step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pydllm import reference
from pydllm._backend.library import Op
from pydllm._checks import (
    FLOATS,
    check_choice,
    check_int,
    check_no_grad,
    check_tensor,
    check_token_id,
    check_written,
    renamed,
)

_ANY = float("inf")
# rule -> the options that it needs, and the largest value of those that are numbers.
_OPTIONS: dict[str, dict[str, float | None]] = {
    "quota": {"quota": None},
    "left_to_right": {"quota": None},
    "random": {"quota": None},
    "threshold": {"threshold": 1.0},
    "factor": {"factor": _ANY},
    "entropy": {"threshold": _ANY},
    "entropy_bound": {"bound": _ANY},
}
_COUNTED = ("quota", "left_to_right", "random")


class Unmasked(NamedTuple):
    """What ``unmask`` did, per sequence."""

    remaining: Tensor  # (B,) int32: masks left in the window, -1 if the sequence is done
    accepted: Tensor  # (B,) int32: tokens written


class Ending(NamedTuple):
    """How ``unmask`` finds out that a sequence is finished, and fills what is after its end.

    A window is complete with its last mask (those before ``ends_from`` do not count). Then its
    first id from ``eos_ids`` at a position from ``ends_from`` on and before ``end`` is the
    sequence's end: all positions after it, up to ``end``, become ``eos_ids[0]`` with -1 in
    ``step_map``, masks and tokens alike, and ``done`` becomes true. It also does where a complete
    window reaches ``end``.

    Attributes:
        done: ``(B,)`` bool, **updated in place**. A sequence that is done is not touched.
        end: ``(B,)`` int32, the first position after the sequence.
        eos_ids: ``(E,)`` int64, contiguous, E at least 1; None: no id ends a sequence.
        ends_from: ``(B,)`` int32, the end of the prompt for instance. None: the window's start.
        last: the window is complete after this step even if masks are left.
    """

    done: Tensor
    end: Tensor
    eos_ids: Tensor | None = None
    ends_from: Tensor | None = None
    last: bool = False


@renamed(semantics="the samplers of pydllm.integrations")
def unmask(
    x: Tensor,
    step_map: Tensor,
    nfe: Tensor,
    token: Tensor,
    score: Tensor,
    *,
    mask_id: int,
    start: Tensor,
    length: Tensor,
    rule: str,
    quota: Tensor | None = None,
    threshold: float | None = None,
    factor: float | None = None,
    bound: float | None = None,
    min_tokens: int | Tensor | None = None,
    seed: int = 0,
    request: Tensor | None = None,
    ending: Ending | None = None,
    backend: str | None = None,
) -> Unmasked:
    """Write the tokens of the masks that a rule accepts, per sequence, in place, on the device.

    The masks of sequence b are the rows ``j < length[b]`` with ``x[b, start[b] + j] == mask_id``.
    They are ordered, best first and ties by position, and the first n become tokens:
    ``x[b, start[b] + j] = token[b, j]``, ``step_map[b, start[b] + j] = nfe[b]``; then
    ``nfe[b] += 1`` if there was a mask. A sequence without one is not touched.

    ===============  ==================  ======================================================
    rule             order               n
    ===============  ==================  ======================================================
    quota            score, descending   ``quota[b]``
    left_to_right    position            ``quota[b]``
    random           by seed             ``quota[b]``
    threshold        score, descending   those with score >= threshold
    factor           score, descending   rank r (from 1) while score >= 1 - factor / (r + 1)
    entropy          score, ascending    those with score <= threshold
    entropy_bound    score, ascending    while the sum of the scores before <= bound
    ===============  ==================  ======================================================

    From ``threshold`` on, n is at least ``min_tokens``, one unless told otherwise.

    NaN counts as the worst score. The worst, NaN or infinite, is taken only by a quota or
    ``min_tokens``, where nothing better is there. A token that is ``mask_id`` itself is written and
    counted as accepted, and is still a mask.

    Args:
        x: ``(B, L)`` int64 token ids, **updated in place**.
        step_map: ``(B, L)`` int32, the step at which a position was written, **updated in place**.
        nfe: ``(B,)`` int32, steps in which the sequence took part, **updated in place**.
        token: ``(B, T)`` int64, ``T <= L``: the choice for each row of the window.
        score: ``(B, T)`` fp32, fp16, bf16 or (torch backend) fp64: a confidence, higher is better,
            or for the two entropy rules the entropy in nats. Rows that are no masks
            may hold anything, except where the rule looks at them. Numbers to compare with are
            rounded to this dtype, everything else is computed in fp32 (fp64).
        mask_id: the mask's token id.
        start: ``(B,)`` int32, position of window row 0.
        length: ``(B,)`` int32, window rows in use, 0 to ``T``. Rows outside of ``x`` are ignored.
        rule: see the table.
        quota: ``(B,)`` int32, how many tokens; more than there are masks takes all of them.
        threshold: a probability in [0, 1]; for ``rule="entropy"`` nats, at least 0.
        factor: at least 0; larger takes more.
        bound: nats, at least 0. The sum is exact (scores in units of 2^-40 nats, at most 128 nats
            each) and rounded once to fp32 (fp64).
        min_tokens: the least number that a rule with a limit takes, an int of at least 0 or a
            ``(B,)`` int32 tensor (a schedule). Default 1.
        seed: in [0, 2^64), for ``random``. The Philox counter is (0xFFFFFFFF, position, request,
            nfe): the order is that of its first word, largest first.
        request: ``(B,)`` int32, which stream of random numbers a sequence uses; required for
            ``random``, otherwise ignored.
        ending: an ``Ending``, to look for the end of a sequence in the same launch and to leave
            out sequences that are done. Default None: none ends, all take part.
        backend: None (``PYDLLM_BACKEND``), ``"auto"``, ``"cuda"``, ``"triton"`` or ``"torch"``.

    Returns:
        ``Unmasked(remaining, accepted)``, both ``(B,)`` int32. What an ``ending`` fills does not
        remain and does not count as accepted. With an ``ending``, ``remaining`` is -1 for each
        sequence that is done after the call, so the host need not read ``done`` as well.

    Raises:
        ValueError: shapes or devices do not fit, a rule is unknown, an option is
            missing, out of range or not the rule's own, a gradient is wanted, or the backend is
            unknown.
        TypeError: a dtype that is not supported.
        BackendError: the named backend cannot run the call.

    Determinism: the same on every backend, bit for bit; a sequence does not depend on the others.
    CUDA graphs: safe; every option that is no tensor is captured. One launch,
    no host read. ``torch.compile``: one op.

    Kernels: ``kernels/unmask.py``, ``csrc/unmask.cu``.

    Example:
        >>> at = lambda *n: torch.tensor(n, dtype=torch.int32)
        >>> x, steps, nfe = torch.tensor([[7, 0, 0, 0]]), at(-1, -1, -1, -1)[None], at(4)
        >>> score = torch.tensor([[0.2, 0.9, 0.8]])
        >>> unmask(x, steps, nfe, torch.tensor([[1, 2, 3]]), score, mask_id=0, start=at(1),
        ...        length=at(3), rule="threshold", threshold=0.75)
        Unmasked(remaining=tensor([1], dtype=torch.int32), accepted=tensor([2], dtype=torch.int32))
        >>> x, steps
        (tensor([[7, 0, 2, 3]]), tensor([[-1, -1,  4,  4]], dtype=torch.int32))
    """
    given = {
        "quota": quota,
        "threshold": threshold,
        "factor": factor,
        "bound": bound,
    }
    check_choice("rule", rule, tuple(_OPTIONS))
    limit = _check_options(rule, given)
    least = _check_extras(rule, min_tokens, request, seed)
    _check_tensors(x, step_map, nfe, token, score)
    if rule != "random":
        request = None
    if isinstance(min_tokens, Tensor):
        quota = min_tokens
    check_tensor("start", start, x.shape[:1], torch.int32, x, "x")
    check_tensor("length", length, x.shape[:1], torch.int32, x, "x")
    _check_number("quota" if quota is not min_tokens else "min_tokens", quota, x)
    _check_number("request", request, x)
    _check_ending(rule, ending, x)
    check_token_id("mask_id", mask_id)
    check_no_grad("unmask", score=score)
    seed = seed - 2**64 if seed >= 2**63 else seed  # the schema's integers are signed
    window = (x, step_map, nfe, token, score, mask_id, start, length)
    numbers = (quota, least, limit, seed)
    done, end, eos, ends_from, last = (None, None, None, None, False) if ending is None else ending
    ends = (done, end, eos, ends_from, last)
    arguments = (*window, rule, *numbers, request, *ends)

    return Unmasked(*_OP(*arguments, backend=backend))


def _check_options(rule: str, given: dict) -> float:
    """The rule's limit; 0 where it has none."""
    wanted = _OPTIONS[rule]
    names = [name for name, value in given.items() if value is not None]
    if names != list(wanted):
        plural = "s" if len(wanted) > 1 else ""
        raise ValueError(
            f"rule {rule!r}: expected the option{plural} {' and '.join(wanted)} and no other, "
            f"got {', '.join(names) or 'none'}"
        )
    limit = 0.0
    for name, largest in wanted.items():
        value = given[name]
        if largest is not None:
            if not isinstance(value, int | float) or not 0 <= value <= largest:
                raise ValueError(f"{name}: expected a number in [0, {largest:g}], got {value!r}")
            limit = float(value)
    return limit


def _check_extras(
    rule: str,
    min_tokens: int | Tensor | None,
    request: Tensor | None,
    seed: int,
) -> int:
    """The least number of tokens, where no tensor says it."""
    if rule == "random" and request is None:
        raise ValueError(f"request: expected a (B,) int32 tensor for rule {rule!r}, got None")
    check_int("seed", seed, 0, 2**64 - 1)
    if min_tokens is None or isinstance(min_tokens, Tensor):
        least = 1
    elif isinstance(min_tokens, int) and 0 <= min_tokens < 2**31:
        least = min_tokens
    else:
        raise ValueError(f"min_tokens: expected an int in [0, 2^31), got {min_tokens!r}")
    if min_tokens is not None and rule in _COUNTED:
        raise ValueError(f"min_tokens: expected None for rule {rule!r}, got {min_tokens!r}")
    return least


def _check_tensors(x: Tensor, step_map: Tensor, nfe: Tensor, token: Tensor, score: Tensor) -> None:
    check_tensor("x", x, ("B", "L"), torch.int64)
    check_tensor("step_map", step_map, x.shape, torch.int32, x, "x")
    check_tensor("nfe", nfe, x.shape[:1], torch.int32, x, "x")
    check_tensor("token", token, (x.shape[0], "T"), torch.int64, x, "x")
    check_tensor("score", score, token.shape, FLOATS, x, "x")
    for name, tensor in (("x", x), ("step_map", step_map), ("nfe", nfe)):
        check_written(name, tensor)
    if token.shape[1] > x.shape[1]:
        raise ValueError(
            f"token: expected at most the {x.shape[1]} positions of x, got {token.shape[1]}"
        )


def _check_ending(rule: str, ending: Ending | None, x: Tensor) -> None:
    if ending is None:
        return
    if not isinstance(ending, Ending):
        raise TypeError(f"ending: expected an Ending or None, got {ending!r}")
    check_tensor("ending.done", ending.done, x.shape[:1], torch.bool, x, "x")
    check_written("ending.done", ending.done)
    check_tensor("ending.end", ending.end, x.shape[:1], torch.int32, x, "x")
    _check_number("ending.ends_from", ending.ends_from, x)
    eos = ending.eos_ids
    if eos is None:
        return
    check_tensor("ending.eos_ids", eos, ("E",), torch.int64, x, "x")
    if eos.shape[0] < 1 or not eos.is_contiguous():
        raise ValueError(
            "ending.eos_ids: expected one or more contiguous ids, "
            f"got shape {tuple(eos.shape)}, strides {eos.stride()}"
        )


def _check_number(name: str, tensor: Tensor | None, x: Tensor) -> None:
    """A number a sequence, on the device."""
    if tensor is not None:
        check_tensor(name, tensor, x.shape[:1], torch.int32, x, "x")


def _fake(x: Tensor, step_map: Tensor, nfe: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return nfe.new_empty(nfe.shape), nfe.new_empty(nfe.shape)


_OP = Op(
    "unmask(Tensor(a!) x, Tensor(b!) step_map, Tensor(c!) nfe, Tensor token, Tensor score, "
    "int mask_id, Tensor start, Tensor length, str rule, Tensor? quota, int min_tokens, "
    "float limit, int seed, Tensor? request, "
    "Tensor(d!)? done, Tensor? end, Tensor? eos_ids, Tensor? ends_from, bool last, "
    "str backend) -> (Tensor, Tensor)",
    _fake,
    reference.unmask,
)
