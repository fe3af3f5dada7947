// Counter-based random numbers: Philox4x32-10 (Salmon et al., 2011), and the Gumbel noise from it.
// The same operations in the same order as pydllm/reference/philox.py, so that all backends draw
// the same bits; the _rn intrinsics keep the compiler from fusing a product with a sum.
#pragma once

#include "common.cuh"

namespace pydllm {

struct Words {
  uint32_t word[4];
};

// Four words of a counter and a 64-bit key.
__device__ __forceinline__ Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                                        uint64_t seed) {
  uint32_t key_0 = static_cast<uint32_t>(seed), key_1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t product_0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t product_1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(product_1 >> 32) ^ c1 ^ key_0;
    c1 = static_cast<uint32_t>(product_1);
    c2 = static_cast<uint32_t>(product_0 >> 32) ^ c3 ^ key_1;
    c3 = static_cast<uint32_t>(product_0);
    key_0 += 0x9E3779B9u;
    key_1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// x = 2^exponent * (1 + f), 1 + f in [sqrt(1/2), sqrt(2)).
struct Split {
  int exponent;
  float f;
};

__device__ __forceinline__ Split split(float x) {
  constexpr int kSqrtHalf = 0x3F3504F3;  // the bits of sqrt(1/2)
  const int shifted = __float_as_int(x) - kSqrtHalf;
  const float mantissa = __int_as_float((shifted & 0x7FFFFF) + kSqrtHalf);
  return {shifted >> 23, __fsub_rn(mantissa, 1.f)};
}

// log(2^exponent * (1 + f)) to 2 units in the last place.
__device__ __forceinline__ float log_of(int exponent, float f) {
  constexpr float kPolynomial[] = {0.127615794539452f,  -0.131601795554161f, 0.142017573118210f,
                                   -0.166233569383621f, 0.200012266635895f,  -0.250008195638657f,
                                   0.333333313465118f};
  float polynomial = -0.0763450711965561f;
#pragma unroll
  for (const float coefficient : kPolynomial) {
    polynomial = __fadd_rn(__fmul_rn(polynomial, f), coefficient);
  }
  const float factor = __fsub_rn(__fmul_rn(polynomial, f), 0.5f);
  const float tail = __fadd_rn(__fmul_rn(factor, __fmul_rn(f, f)), f);
  return __fadd_rn(__fmul_rn(static_cast<float>(exponent), 0.693147182464599609375f), tail);
}

// Standard Gumbel noise of a uniform word, -log(-log1p(-u)); finite.
__device__ __forceinline__ float gumbel(uint32_t word) {
  const float scaled = __fmul_rn(static_cast<float>(word), 2.3283064365386963e-10f);
  const float u = fminf(__fadd_rn(scaled, 1.1641532182693481e-10f), 0.99999994f);
  const Split one_less = split(__fsub_rn(1.f, u));
  // -u is 1 - u less one, before it was rounded: full relative precision for small u.
  const float f = one_less.exponent == 0 ? -u : one_less.f;
  const Split exponential = split(-log_of(one_less.exponent, f));
  return -log_of(exponential.exponent, exponential.f);
}

// The stream of noise of a row of logits: id v takes word v % 4 of the counter's v / 4.
struct NoiseKey {
  uint32_t position, request, draw;
  uint64_t seed;

  __device__ __forceinline__ Words words(int quad) const {
    return philox(static_cast<uint32_t>(quad), position, request, draw, seed);
  }
  __device__ __forceinline__ float of(int id) const {
    const Words four = words(id >> 2);
    const int lane = id & 3;
    return gumbel(lane < 2 ? (lane == 0 ? four.word[0] : four.word[1])
                           : (lane == 2 ? four.word[2] : four.word[3]));
  }
};

// 1 / temperature, and whether noise is drawn: the arg-max is taken outside [1e-6, inf).
struct Inverse {
  float value;
  bool noisy;
};

__device__ __forceinline__ Inverse inverse_of(float temperature) {
  const bool noisy = temperature >= 1e-6f && temperature < INFINITY;
  return {__fdiv_rn(1.f, noisy ? temperature : 1.f), noisy};
}

}  // namespace pydllm
