"""Device functions that several kernels share: sort keys, and random numbers.

Counter-based random numbers: the same operations in the same order as
``pydllm/reference/philox.py``, so that every backend draws the same bits. Kernels that call
``uniform`` or ``gumbel`` are launched with ``enable_fp_fusion=False``: a fused multiply-add rounds
once where the definition rounds twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Under programmatic dependent launch: until the kernels before this one have ended.

    It stands before the first read and the first write of a kernel, so that what a kernel sees and
    overwrites is what it would without. The next kernel may start, and wait likewise: every kernel
    launched so waits in each of its programs, and so for all kernels before it.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def fetch_to_l2(pointers):
    """Ask for the cache lines of pointers; all multiprocessors share that cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64, bitcast=True)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def philox(c0, c1, c2, c3, seed_lo, seed_hi):
    """Philox4x32-10: four uint32 words from four counter words and a 64-bit key.

    Every argument is an integer, tensor or literal, taken modulo 2^32; counter words broadcast.
    """
    c0 = tl.cast(c0, tl.uint32)
    c1 = tl.cast(c1, tl.uint32)
    c2 = tl.cast(c2, tl.uint32)
    c3 = tl.cast(c3, tl.uint32)
    key_0 = tl.cast(seed_lo, tl.uint32)
    key_1 = tl.cast(seed_hi, tl.uint32)
    multiplier_0 = tl.full((), 0xD2511F53, tl.uint32)
    multiplier_1 = tl.full((), 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        low_0, high_0 = c0 * multiplier_0, tl.umulhi(c0, multiplier_0)
        low_1, high_1 = c2 * multiplier_1, tl.umulhi(c2, multiplier_1)
        c0, c1 = high_1 ^ c1 ^ key_0, low_1
        c2, c3 = high_0 ^ c3 ^ key_1, low_0
        key_0 += tl.full((), 0x9E3779B9, tl.uint32)
        key_1 += tl.full((), 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def uniform(word):
    """``word * 2^-32 + 2^-33`` in fp32, at most the largest number below 1."""
    return tl.minimum(
        word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, 0.99999994
    )


@triton.jit
def gumbel(word):
    """Standard Gumbel noise of a uniform uint32 word: ``-log(-log1p(-u))``, finite."""
    u = uniform(word)
    exponent, f = _split(1.0 - u)
    # -u is 1 - u less one, before it was rounded: full relative precision for small u.
    exponential = -_log(exponent, tl.where(exponent == 0, -u, f))
    exponent, f = _split(exponential)
    return -_log(exponent, f)


@triton.jit
def quad_gumbel(quads, position, request, draw, seed_lo, seed_hi):
    """``gumbel`` of the ids ``4 * quads + [0, 4)``: four times as many along the last dimension.

    One call of the generator serves four neighbouring ids; the other words broadcast.
    """
    word_0, word_1, word_2, word_3 = philox(quads, position, request, draw, seed_lo, seed_hi)
    return gumbel(tl.interleave(tl.interleave(word_0, word_2), tl.interleave(word_1, word_3)))


@triton.jit
def id_gumbel(ids, position, request, draw, seed_lo, seed_hi):
    """``gumbel`` of single vocabulary ids; the other words broadcast."""
    word_0, word_1, word_2, word_3 = philox(ids >> 2, position, request, draw, seed_lo, seed_hi)
    lane = ids & 3
    return gumbel(
        tl.where(lane < 2, tl.where(lane == 0, word_0, word_1), tl.where(lane == 2, word_2, word_3))
    )


@triton.jit
def _split(x):
    """``exponent, f`` with ``x = 2^exponent * (1 + f)`` and ``1 + f`` in [sqrt(1/2), sqrt(2))."""
    SQRT_HALF: tl.constexpr = 0x3F3504F3
    shifted = x.to(tl.int32, bitcast=True) - SQRT_HALF
    f = ((shifted & 0x7FFFFF) + SQRT_HALF).to(tl.float32, bitcast=True) - 1.0
    return shifted >> 23, f


@triton.jit
def _log(exponent, f):
    """``log(2^exponent * (1 + f))`` to 2 units in the last place; division-free, libdevice-free."""
    polynomial = f * -0.0763450711965561 + 0.127615794539452
    polynomial = polynomial * f + -0.131601795554161
    polynomial = polynomial * f + 0.142017573118210
    polynomial = polynomial * f + -0.166233569383621
    polynomial = polynomial * f + 0.200012266635895
    polynomial = polynomial * f + -0.250008195638657
    polynomial = polynomial * f + 0.333333313465118
    square = f * f
    tail = (polynomial * f - 0.5) * square + f
    return exponent.to(tl.float32) * 0.693147182464599609375 + tail


@triton.jit
def sort_key(x):
    """Unsigned integers that sort like fp32 numbers, which hold no NaN and no negative zero."""
    bits = x.to(tl.int32, bitcast=True)
    # The sign is flipped, and with it all other bits of a negative number.
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def sort_value(key):
    """The fp32 number of a sort key."""
    bits = (key ^ 0x80000000).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


def are_rows(tensor: torch.Tensor) -> bool:
    """Whether the tensor is a list of dense rows at one row stride."""
    if tensor.numel() == 0 or tensor.ndim == 1:
        return tensor.stride(-1) == 1 or tensor.shape[-1] <= 1
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        return False
    strides = tensor.stride()
    return all(
        strides[i] == strides[i + 1] * tensor.shape[i + 1] or tensor.shape[i] == 1
        for i in range(tensor.ndim - 2)
    )
