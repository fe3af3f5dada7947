// Counter-based random numbers, to the bit those of pydllm/reference/philox.py: each step rounds as
// it does there, so nothing may be fused (hence __fmul_rn and __fadd_rn, never a * b + c).
#pragma once

#include "common.cuh"

namespace pydllm {

struct Words {
  uint32_t word[4];
};

// Philox4x32-10 (Salmon et al., 2011): four words from four counter words and a 64-bit key.
__device__ __forceinline__ Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                                        uint64_t seed) {
  uint32_t key_0 = static_cast<uint32_t>(seed), key_1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t low_0 = c0 * 0xD2511F53u, high_0 = __umulhi(c0, 0xD2511F53u);
    const uint32_t low_1 = c2 * 0xCD9E8D57u, high_1 = __umulhi(c2, 0xCD9E8D57u);
    c0 = high_1 ^ c1 ^ key_0;
    c1 = low_1;
    c2 = high_0 ^ c3 ^ key_1;
    c3 = low_0;
    key_0 += 0x9E3779B9u;
    key_1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// word * 2^-32 + 2^-33, at most the largest number below 1.
__device__ __forceinline__ float uniform(uint32_t word) {
  const float u =
      __fadd_rn(__fmul_rn(__uint2float_rn(word), 2.3283064365386963e-10f), 1.1641532182693481e-10f);
  return fminf(u, 0.99999994f);
}

// x = 2^exponent * (1 + f), 1 + f in [sqrt(1/2), sqrt(2)).
__device__ __forceinline__ void split(float x, int& exponent, float& f) {
  constexpr int kSqrtHalf = 0x3F3504F3;
  const int shifted = __float_as_int(x) - kSqrtHalf;
  exponent = shifted >> 23;
  f = __fsub_rn(__int_as_float((shifted & 0x7FFFFF) + kSqrtHalf), 1.f);
}

// log(2^exponent * (1 + f)) to 2 units in the last place.
__device__ __forceinline__ float log_of(int exponent, float f) {
  constexpr float kCoefficients[] = {0.127615794539452f,  -0.131601795554161f, 0.142017573118210f,
                                     -0.166233569383621f, 0.200012266635895f,  -0.250008195638657f,
                                     0.333333313465118f};
  float polynomial = __fmul_rn(f, -0.0763450711965561f);
#pragma unroll
  for (int i = 0; i < 7; ++i) {
    polynomial = __fadd_rn(polynomial, kCoefficients[i]);
    if (i < 6) polynomial = __fmul_rn(polynomial, f);
  }
  const float tail = __fmul_rn(__fsub_rn(__fmul_rn(polynomial, f), 0.5f), __fmul_rn(f, f));
  return __fadd_rn(__fmul_rn(__int2float_rn(exponent), 0.693147182464599609375f),
                   __fadd_rn(tail, f));
}

// Standard Gumbel noise of a uniform word, -log(-log1p(-u)); finite.
__device__ __forceinline__ float gumbel(uint32_t word) {
  const float u = uniform(word);
  int exponent;
  float f;
  split(__fsub_rn(1.f, u), exponent, f);
  // -u is 1 - u less one, before it was rounded: full relative precision for small u.
  const float exponential = -log_of(exponent, exponent == 0 ? -u : f);
  split(exponential, exponent, f);
  return -log_of(exponent, f);
}

}  // namespace pydllm
