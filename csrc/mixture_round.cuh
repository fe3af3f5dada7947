// What the kernels of the dense and the sparse form of mixture_accept share.
#pragma once

#include "block.cuh"
#include "common.cuh"
#include "mixture_accept.h"
#include "philox.cuh"

namespace pydllm {

// Sorts before every key: an id that counts is NaN or infinite.
constexpr uint64_t kPoison = 0;

// weight * x + (1 - weight) * y, such that equal numbers give that number.
__device__ __forceinline__ float mix(float x, float y, float weight) {
  if (weight == 1.f) return x;
  if (weight == 0.f) return y;
  if (x == -INFINITY || y == -INFINITY) return -INFINITY;
  return __fadd_rn(y, __fmul_rn(weight, __fsub_rn(x, y)));
}

// What a score stands for among all: of NaN and infinity nothing can be said, -inf is nobody.
__device__ __forceinline__ uint64_t entry(float score, int id) {
  if (!(score < INFINITY)) return kPoison;
  return score == -INFINITY ? kNoKey : argmax_key(score, id);
}

__device__ __forceinline__ float weight_of(const MixtureRound& round, int64_t sequence) {
  if (round.mixtures == nullptr) return round.mixture;
  const float weight = round.mixtures[sequence];
  return weight >= 0.f && weight <= 1.f ? weight : NAN;
}

// The smallest weight at which an id is not ahead of the token.
struct Critical {
  float x_token, y_token;  // scores: scaled, with noise
  bool none;               // the verifier has the token at -inf

  __device__ __forceinline__ float of(float x_score, float y_score) const {
    const float ahead = x_token - x_score, need = y_score - y_token;
    return need > 0.f ? need / (ahead + need) : 0.f;
  }
};

// A block has looked at its tile of a row.
__device__ __forceinline__ void store_tile(const MixtureRound& round, int64_t at, uint64_t best,
                                           float least) {
  best = reduce_block(best, kNoKey, Minimum());
  if (round.least != nullptr) least = reduce_block(least, 0.f, Maximum());
  if (threadIdx.x != 0) return;
  round.best[at] = static_cast<int64_t>(best);
  if (round.least != nullptr) round.least_of_tiles[at] = least;
}

}  // namespace pydllm
