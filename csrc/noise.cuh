// The Gumbel noise of rows of logits, keyed by what a row is and not by where it is in a batch.
#pragma once

#include "philox.cuh"

namespace pydllm {

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
