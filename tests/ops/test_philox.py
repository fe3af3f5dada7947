import math

import pytest
import torch
import triton
import triton.language as tl

from pydllm.kernels import _primitives
from pydllm.reference import philox

# Known answers of Philox4x32-10 published with Random123: counter, key (low, high), words.
KNOWN = {
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}
# Every power of two, its neighbours, and both ends of the range.
WORDS = sorted({min(max(2**n + d, 0), 2**32 - 1) for n in range(33) for d in range(-130, 131)})


@triton.jit
def _philox_kernel(out_ptr, counters_ptr, seed_lo, seed_hi, count, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    mask = offs < count
    c0 = tl.load(counters_ptr + offs * 4, mask=mask, other=0)
    c1 = tl.load(counters_ptr + offs * 4 + 1, mask=mask, other=0)
    c2 = tl.load(counters_ptr + offs * 4 + 2, mask=mask, other=0)
    c3 = tl.load(counters_ptr + offs * 4 + 3, mask=mask, other=0)
    words = _primitives.philox(c0, c1, c2, c3, seed_lo, seed_hi)
    for i in tl.static_range(4):
        tl.store(out_ptr + offs * 4 + i, words[i].to(tl.int64), mask=mask)


@triton.jit
def _literal_kernel(out_ptr):
    words = _primitives.philox(0xFFFFFFFF, 5, tl.full((1,), 2**40 + 6, tl.int64), 0, 7, 2**31)
    for i in tl.static_range(4):
        tl.store(out_ptr + tl.arange(0, 1) + i, words[i].to(tl.int64))


@triton.jit
def _noise_kernel(uniform_ptr, gumbel_ptr, words_ptr, count, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    mask = offs < count
    words = tl.load(words_ptr + offs, mask=mask, other=0).to(tl.uint32)
    tl.store(uniform_ptr + offs, _primitives.uniform(words), mask=mask)
    tl.store(gumbel_ptr + offs, _primitives.gumbel(words), mask=mask)


def _signed(word):
    return word - 2**32 if word >= 2**31 else word


def _triton_philox(counters, low, high):
    """``counters`` (N, 4) int64; the words as (N, 4) int64."""
    out = torch.empty_like(counters)
    count = counters.shape[0]
    _philox_kernel[(1,)](
        out_ptr=out,
        counters_ptr=counters.to(torch.uint32).view(torch.int32),
        seed_lo=_signed(low),
        seed_hi=_signed(high),
        count=count,
        BLOCK=triton.next_power_of_2(count),
    )
    return out


@pytest.mark.parametrize("name", KNOWN)
def test_known_answers(name):
    counter, (low, high), expected = KNOWN[name]
    counters = torch.tensor([counter])
    seed = low | high << 32
    assert philox.philox(*counters.unbind(1), seed).tolist() == [list(expected)]
    assert philox.philox(*counters.int().unbind(1), seed - 2**64).tolist() == [list(expected)]
    assert _triton_philox(counters, low, high).tolist() == [list(expected)]


def test_the_kernel_draws_the_words_of_the_reference():
    generator = torch.Generator().manual_seed(0)
    counters = torch.randint(0, 2**32, (257, 4), generator=generator)
    for seed in (0, 1, 2**31, 2**32 - 1, 2**63 + 12345, 2**64 - 1):
        expected = philox.philox(*counters.unbind(1), seed)
        assert expected.min() >= 0
        assert expected.max() < 2**32
        assert torch.equal(_triton_philox(counters, seed & 0xFFFFFFFF, seed >> 32), expected)


def test_literals_and_wide_integers_are_words_modulo_2_to_the_32():
    out = torch.empty(4, dtype=torch.int64)
    _literal_kernel[(1,)](out_ptr=out)
    counter = (torch.tensor(word) for word in (-1, 5 + 2**33, 6, 2**32))
    assert torch.equal(out, philox.philox(*counter, 7 | 2**63))


def test_counters_broadcast_and_each_word_matters():
    ids, rows = torch.arange(5), torch.arange(3)[:, None]
    zero = torch.zeros((), dtype=torch.int64)
    words = philox.philox(ids, rows, zero, zero, 7)
    assert words.shape == (3, 5, 4)
    assert torch.equal(words[2, 4], philox.philox(ids[4], rows[2, 0], zero, zero, 7))
    draws = [philox.philox(*counter, 7) for counter in torch.eye(4, dtype=torch.int64)]
    draws += [philox.philox(zero, zero, zero, zero, seed) for seed in (0, 1, 2**32)]
    assert len({tuple(draw.tolist()) for draw in draws}) == 7


def test_uniform_is_the_word_over_two_to_the_32():
    counters = torch.arange(1000)
    u = philox.uniform(counters, counters, counters, counters, 3)
    exact = philox.philox(counters, counters, counters, counters, 3).double() * 2**-32 + 2**-33
    assert u.dtype == torch.float32
    assert ((u.double() - exact).abs() <= exact * 2**-23).all()


def _noise(words, backend):
    if backend == "torch":
        return philox._unit(words), philox.gumbel(words)
    u, gumbel = torch.empty(2, len(words)).unbind()
    block = triton.next_power_of_2(len(words))
    _noise_kernel[(1,)](
        uniform_ptr=u, gumbel_ptr=gumbel, words_ptr=words, count=len(words), BLOCK=block
    )
    return u, gumbel


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_noise_is_right_where_it_decides(backend):
    words = torch.tensor(WORDS)
    u, gumbel = _noise(words, backend)
    assert (u > 0).all()
    assert (u < 1).all()
    exact_u = [min(word * 2**-32 + 2**-33, 1 - 2**-24) for word in WORDS]
    assert (u.double() / torch.tensor(exact_u, dtype=torch.float64) - 1).abs().max() < 2**-23
    # From u as it was rounded: small u, the largest noise, must keep their relative precision.
    exact = [-math.log(-math.log1p(-x)) for x in u.tolist()]
    assert (gumbel.double() - torch.tensor(exact, dtype=torch.float64)).abs().max() < 2e-6
    assert gumbel.argmax() == 0
    assert gumbel[0] == pytest.approx(-math.log(2**-33), abs=2e-6)
    assert gumbel.isfinite().all()
    # The 16 smallest words give 16 numbers: the winners do not tie.
    assert gumbel[:16].unique().numel() == 16


def test_noise_has_the_same_bits_on_every_backend():
    generator = torch.Generator().manual_seed(1)
    words = torch.cat([torch.tensor(WORDS), torch.randint(0, 2**32, (20000,), generator=generator)])
    for one, other in zip(_noise(words, "torch"), _noise(words, "triton"), strict=True):
        assert torch.equal(one, other)


def test_noise_has_the_moments_of_the_distribution():
    counter = torch.arange(3 * 200, dtype=torch.int32).view(200, 3)
    noise = philox.vocab_gumbel(5003, counter, 11).double()
    count = noise.numel()
    variance = math.pi**2 / 6
    # Five standard errors; the fourth central moment of the distribution is 5.4 variances squared.
    assert abs(noise.mean() - 0.5772156649) < 5 * math.sqrt(variance / count)
    assert abs(noise.var() - variance) < 5 * variance * math.sqrt(4.4 / count)


def test_the_noise_of_an_id_is_one_word_of_one_counter():
    counter = torch.tensor([[5, 6, 7], [-1, 2**31 - 1, -(2**31)]], dtype=torch.int32)
    noise = philox.vocab_gumbel(11, counter, 2**40 + 3)
    assert noise.shape == (2, 11)
    for row, token in ((0, 0), (0, 6), (1, 3), (1, 10)):
        words = philox.philox(torch.tensor(token >> 2), *counter[row].unbind(), 2**40 + 3)
        assert noise[row, token] == philox.gumbel(words[token & 3])
