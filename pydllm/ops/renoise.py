"""Acceptance by entropy with renoising: no token is final before the last step."""

from __future__ import annotations

import torch
from torch import Tensor

from pydllm import reference
from pydllm._backend.library import Op
from pydllm._checks import FLOATS, check_int, check_no_grad, check_tensor, check_written


def renoise(
    x: Tensor,
    token: Tensor,
    entropy: Tensor,
    *,
    bound: float,
    vocab_size: int,
    seed: int,
    request: Tensor,
    step: Tensor,
    backend: str | None = None,
) -> Tensor:
    """Write the tokens of the most certain positions, and random ids elsewhere, in place.

    The positions of a sequence are ordered by entropy, lowest first and ties by position. A
    position is accepted while the sum of the entropies before it is at most ``bound``, so the first
    one always is. The rule is that of DiffusionGemma's entropy-bound sampler; what was accepted in
    an earlier step is not special. NaN and infinite entropies are never accepted.

    Args:
        x: ``(B, T)`` int64 token ids, **updated in place**.
        token: ``(B, T)`` int64, the choice for each position.
        entropy: ``(B, T)`` fp32, fp16, bf16 or (torch backend) fp64, nats.
        bound: nats, at least 0; rounded to the dtype of the entropies. The sum is exact (entropies
            in units of 2^-40 nats, at most 128 nats each) and rounded once to fp32 (fp64).
        vocab_size: random ids are in [0, vocab_size), at most 2^31 - 1.
        seed: in [0, 2^64). The Philox counter is (0xFFFFFFFF, position, request, step); the random
            id is ``second word * vocab_size >> 32``.
        request: ``(B,)`` int32, which stream of random numbers a sequence uses.
        step: ``(B,)`` int32, a new number for new random ids.
        backend: None (``PYDLLM_BACKEND``), ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        ``(B, T)`` bool, which positions were accepted.

    Raises:
        ValueError: shapes or devices do not fit, a number is out of range, a gradient is wanted.
        TypeError: a dtype that is not supported.
        BackendError: the named backend cannot run the call.

    Determinism: the same on every backend, bit for bit; a sequence does not depend on the others.
    CUDA graphs: safe; one launch, no host read. ``torch.compile``: one op.

    Kernels: ``kernels/renoise.py``.

    Example:
        >>> x, zero = torch.tensor([[5, 6, 7]]), torch.zeros(1, dtype=torch.int32)
        >>> renoise(x, torch.tensor([[1, 2, 3]]), torch.tensor([[0.5, 0.1, 0.3]]), bound=0.2,
        ...         vocab_size=10, seed=0, request=zero, step=zero)
        tensor([[False,  True,  True]])
    """
    check_tensor("x", x, ("B", "T"), torch.int64)
    check_written("x", x)
    check_tensor("token", token, x.shape, torch.int64, x, "x")
    check_tensor("entropy", entropy, x.shape, FLOATS, x, "x")
    check_tensor("request", request, x.shape[:1], torch.int32, x, "x")
    check_tensor("step", step, x.shape[:1], torch.int32, x, "x")
    if type(bound) not in (int, float) or not bound >= 0:
        raise ValueError(f"bound: expected a number of at least 0, got {bound!r}")
    check_int("vocab_size", vocab_size, 1, 2**31 - 1)
    check_int("seed", seed, 0, 2**64 - 1)
    check_no_grad("renoise", entropy=entropy)
    seed = seed - 2**64 if seed >= 2**63 else seed  # the schema's integers are signed
    numbers = (float(bound), vocab_size, seed)
    return _OP(x, token, entropy, *numbers, request, step, backend=backend)


def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, dtype=torch.bool, memory_format=torch.contiguous_format)


_OP = Op(
    "renoise(Tensor(a!) x, Tensor token, Tensor entropy, float bound, int vocab_size, int seed, "
    "Tensor request, Tensor step, str backend) -> Tensor",
    _fake,
    reference.renoise,
)
