"""Counter-based random numbers: Philox4x32-10 in integer arithmetic, and the Gumbel noise from it.

A number is a function of the seed and of four counter words, so it does not depend on the batch,
the order of its rows or the device. Every step below is one correctly rounded operation, and the
kernels take the same steps in the same order (``kernels/_primitives.py``): all backends get the
same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
# Less 2^32, so that the product with a 32-bit word fits in a signed 64-bit number.
_MULTIPLIERS = (0xD2511F53 - 2**32, 0xCD9E8D57 - 2**32)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

# log(1 + f) = f - f^2 / 2 + f^3 * polynomial(f), 1 + f in [sqrt(1/2), sqrt(2)), to 6e-9 of itself.
_LOG_POLYNOMIAL = (
    -0.0763450711965561,
    0.127615794539452,
    -0.131601795554161,
    0.142017573118210,
    -0.166233569383621,
    0.200012266635895,
    -0.250008195638657,
    0.333333313465118,
)
# Words that a CPU makes at a time: what lies between stays in its caches, and is not worth threads.
_CPU_WORDS = 2**15
_LOG_2 = 0.693147182464599609375
_SQRT_HALF = 0x3F3504F3  # the bits of sqrt(1/2) in fp32


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: int) -> Tensor:
    """Philox4x32-10 (Salmon et al., 2011).

    Args:
        c0, c1, c2, c3: counter words, integers of any dtype taken modulo 2^32; they broadcast.
        seed: the 64-bit key, low word first, as signed or unsigned number.

    Returns:
        ``(..., 4)`` int64 in [0, 2^32).
    """
    return torch.stack(torch.broadcast_tensors(*_words(c0, c1, c2, c3, seed)), -1)


def uniform(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: int) -> Tensor:
    """``k * 2^-32 + 2^-33`` of the four words k of ``philox``, in fp32: ``(..., 4)`` in (0, 1)."""
    return _unit(philox(c0, c1, c2, c3, seed))


def gumbel(word: Tensor) -> Tensor:
    """Standard Gumbel noise, fp32 and finite, of words in [0, 2^32): ``-log(-log1p(-u))``.

    The largest noise, which decides, comes from the smallest u, where fp32 is finest: it reaches
    22.87, where ``-log(-log(u))`` of a 24-bit u ends at 16.6 and ties.
    """
    u = _unit(word)
    exponent, f = _split(1 - u)
    # -u is 1 - u less one, before it was rounded: full relative precision for small u.
    exponential = _log(exponent, torch.where(exponent == 0, -u, f)).neg_()
    return _log(*_split(exponential)).neg_()


def vocab_gumbel(
    vocab: int, counter: Tensor, seed: int, *, first: int = 0, noisy: Tensor | None = None
) -> Tensor:
    """``gumbel`` of word ``id & 3`` of counter ``(id >> 2, *counter)`` for every vocabulary id.

    Args:
        vocab: number of ids.
        counter: ``(R, 3)`` int32.
        seed: the 64-bit key.
        first: the lowest id, a multiple of 4.
        noisy: ``(R, 1)`` bool, False in the rows whose noise is 0; None for no such row.

    Returns:
        ``(R, vocab)`` fp32.
    """
    begin, end = first // 4, (first + vocab + 3) // 4
    position, request, draw = counter.unsqueeze(-1).unbind(1)
    step = end - begin
    if counter.device.type == "cpu" and not torch.compiler.is_compiling():
        step = max(_CPU_WORDS // (4 * max(counter.shape[0], 1)), 1)
    parts = []
    for quad in range(begin, end, max(step, 1)):
        quads = torch.arange(quad, min(quad + step, end), device=counter.device)
        words = torch.stack(_words(quads, position, request, draw, seed), -1).flatten(1)
        parts.append(gumbel(words))
    noise = torch.cat(parts, 1)[:, :vocab] if parts else counter.new_zeros(len(counter), 0).float()
    return noise if noisy is None else noise.masked_fill_(~noisy, 0)


def _words(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: int) -> tuple[Tensor, ...]:
    c0, c1, c2, c3 = (word.to(torch.int64) & _WORD for word in (c0, c1, c2, c3))
    key_0, key_1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        low_0, low_1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        # The upper half of the true product has the word itself that the multiplier lacks.
        high_0, high_1 = (low_0 >> 32) + c0, (low_1 >> 32) + c2
        c0, c1 = (high_1 ^ c1 ^ key_0) & _WORD, low_1
        c2, c3 = (high_0 ^ c3 ^ key_1) & _WORD, low_0
        key_0, key_1 = key_0 + _KEY_STEPS[0] & _WORD, key_1 + _KEY_STEPS[1] & _WORD
    return c0, c1 & _WORD, c2, c3 & _WORD


def _unit(word: Tensor) -> Tensor:
    # The largest words would round to 1, and their noise be infinite: the largest number below 1.
    return (word.to(torch.float32) * 2**-32 + 2**-33).clamp_(max=1 - 2**-24)


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """``exponent, f`` with ``x = 2^exponent * (1 + f)`` and ``1 + f`` in [sqrt(1/2), sqrt(2))."""
    shifted = x.view(torch.int32) - _SQRT_HALF
    f = ((shifted & 0x7FFFFF) + _SQRT_HALF).view(torch.float32) - 1
    return shifted >> 23, f


def _log(exponent: Tensor, f: Tensor) -> Tensor:
    """``log(2^exponent * (1 + f))`` in fp32, to 2 units in the last place."""
    polynomial = f * _LOG_POLYNOMIAL[0]
    for coefficient in _LOG_POLYNOMIAL[1:-1]:
        polynomial.add_(coefficient).mul_(f)
    polynomial.add_(_LOG_POLYNOMIAL[-1])
    tail = polynomial.mul_(f).sub_(0.5).mul_(f * f).add_(f)
    return exponent.to(torch.float32).mul_(_LOG_2).add_(tail)
