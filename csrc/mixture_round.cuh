// What the dense and the sparse form of mixture_accept share: the mixture, and how the pieces of
// the rows are joined.
#pragma once

#include "block.cuh"
#include "common.cuh"
#include "mixture_accept.h"
#include "philox.cuh"

namespace pydllm {

// Sorts before every contender: an id that counts is NaN or infinite.
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
  return score == -INFINITY ? kNobody : contender(score, id);
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
  best = reduce_block(best, kNobody, Minimum());
  if (round.least != nullptr) least = reduce_block(least, 0.f, Maximum());
  if (threadIdx.x != 0) return;
  round.best[at] = static_cast<int64_t>(best);
  if (round.least != nullptr) round.least_of_tiles[at] = least;
}

constexpr int kJoinThreads = 128;

// One warp a sequence, a lane a row.
inline __global__ void __launch_bounds__(kJoinThreads)
    mixture_round_join_kernel(const MixtureRound round) {
  const int64_t sequence =
      int64_t{blockIdx.x} * (kJoinThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (sequence >= round.batch) return;
  const int lane = threadIdx.x % kWarpSize;
  const int rows = static_cast<int>(round.rows);
  const int length = max(0, min(round.length[sequence], rows));
  int run = length;
  int64_t correction = -1;
  for (int base = 0; base < rows; base += kWarpSize) {
    const int index = base + lane;
    const int64_t row = sequence * rows + index;
    const bool used = index < length;
    int64_t target = -1;
    float least = 0.f;
    if (used) {
      uint64_t best = kNobody;
      for (int64_t tile = 0; tile < round.tiles; ++tile) {
        const auto found = static_cast<uint64_t>(round.best[row * round.tiles + tile]);
        best = found < best ? found : best;
        if (round.least != nullptr) {
          least = fmaxf(least, round.least_of_tiles[row * round.tiles + tile]);
        }
      }
      if (best != kNobody && best != kPoison) target = static_cast<uint32_t>(best);
    }
    if (index < rows) {
      round.target[row] = target;
      if (round.least != nullptr) round.least[row] = least;
    }
    bool same = target >= 0 && target == round.token[used ? row : sequence * rows];
    same = same || (round.first_free && index == 0);
    const unsigned others = __ballot_sync(kFullWarp, used && !same);
    const int first = __ffs(static_cast<int>(others)) - 1;
    const int64_t there = __shfl_sync(kFullWarp, target, max(first, 0));
    if (first >= 0 && base + first < run) {
      run = base + first;
      correction = there;
    }
  }
  if (lane != 0) return;
  round.accepted[sequence] = run;
  round.correction[sequence] = correction;
}

inline cudaError_t join(const MixtureRound& round, cudaStream_t stream) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  constexpr int64_t kSequences = kJoinThreads / kWarpSize;
  const dim3 grid(static_cast<unsigned>((round.batch + kSequences - 1) / kSequences));
  PYDLLM_LAUNCH(mixture_round_join_kernel, grid, dim3(kJoinThreads), 0, stream, round);
  return cudaGetLastError();
}

}  // namespace pydllm
