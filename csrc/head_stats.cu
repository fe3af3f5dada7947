#include "head_stats.h"

#include "common.cuh"

namespace pydllm {
namespace {

constexpr int kRows = 4;  // of a block, a warp each
// e to this power is 0, and times 0 it is not NaN, as -inf would be.
constexpr float kNegligible = -1e4f;

template <typename T, typename Combine>
__device__ __forceinline__ T over_warp(T value, Combine combine) {
#pragma unroll
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
    value = combine(value, __shfl_xor_sync(kFullWarp, value, lanes));
  }
  return value;
}

// Largest of a row's values, and the lowest id that has it.
__device__ __forceinline__ void best_of(const float* values, const int32_t* ids, int pieces,
                                        int lane, float& best, int& id) {
  best = -INFINITY;
  id = INT_MAX;
  for (int i = lane; i < pieces; i += kWarpSize) {
    if (values[i] > best || (values[i] == best && ids[i] < id)) {
      best = values[i];
      id = ids[i];
    }
  }
  const float own = best;
  best = over_warp(best, [](float a, float b) { return fmaxf(a, b); });
  id = over_warp(own == best ? id : INT_MAX, [](int a, int b) { return min(a, b); });
}

template <bool kSampled>
__global__ void __launch_bounds__(kRows* kWarpSize)
    merge_stats_kernel(int64_t* __restrict__ token,       // (rows,), as the next four
                       float* __restrict__ prob,          //
                       float* __restrict__ entropy,       //
                       float* __restrict__ margin,        //
                       float* __restrict__ logsumexp,     //
                       const float* __restrict__ values,  // (6 or 4, rows, pieces)
                       const int32_t* __restrict__ ids,   // (2 or 1, rows, pieces)
                       int64_t rows, int pieces) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t row = int64_t{blockIdx.x} * kRows + threadIdx.x / kWarpSize;
  if (row >= rows) return;
  const int64_t stride_field = rows * pieces;
  values += row * pieces;
  ids += row * pieces;
  const float* const second_of = values + stride_field;
  const float* const sum_of = second_of + stride_field;
  const float* const weighted_of = sum_of + stride_field;

  float best;
  int id;
  best_of(values, ids, pieces, lane, best, id);
  const bool none = best == -INFINITY;
  const float base = none ? 0.f : best;
  float second = -INFINITY, sum = 0.f, weighted = 0.f;
  for (int i = lane; i < pieces; i += kWarpSize) {
    second = fmaxf(second, ids[i] == id ? second_of[i] : values[i]);
    float shift = values[i] - base;
    shift = shift < kNegligible ? kNegligible : shift;  // a NaN comes through
    const float factor = expf(shift);
    sum += factor * sum_of[i];
    weighted += factor * (weighted_of[i] + shift * sum_of[i]);
  }
  const auto add = [](float a, float b) { return a + b; };
  second = over_warp(second, [](float a, float b) { return fmaxf(a, b); });
  sum = over_warp(sum, add);
  weighted = over_warp(weighted, add);

  float chosen = best;
  if constexpr (kSampled) {
    const float* const score_of = weighted_of + stride_field;
    const float* const chosen_of = score_of + stride_field;
    float score;
    best_of(score_of, ids + stride_field, pieces, lane, score, id);
    chosen = -INFINITY;
    for (int i = lane; i < pieces; i += kWarpSize) {
      if (ids[stride_field + i] == id) chosen = chosen_of[i];
    }
    chosen = over_warp(chosen, [](float a, float b) { return fmaxf(a, b); });
  }
  if (lane != 0) return;

  const bool poisoned = sum != sum;  // a NaN, or +inf less itself, went through every sum
  if (none && sum == 0.f) sum = 1.f;
  const float log_sum = logf(sum);
  token[row] = poisoned || none ? 0 : id;
  prob[row] = poisoned ? NAN : expf(chosen - base) / sum;
  entropy[row] = poisoned ? NAN : log_sum - weighted / sum;
  margin[row] = poisoned ? NAN : none ? 0.f : -expm1f(second - base) / sum;
  logsumexp[row] = poisoned ? NAN : best + log_sum;
}

}  // namespace

cudaError_t merge_stats(int64_t* token, float* prob, float* entropy, float* margin,
                        float* logsumexp, const float* values, const int32_t* ids, int64_t rows,
                        int64_t pieces, bool sampled, cudaStream_t stream) {
  if (rows < 0 || rows > INT_MAX || pieces < 1 || pieces > kMaxPieces) {
    return cudaErrorInvalidValue;
  }
  if (rows == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>((rows + kRows - 1) / kRows)), block(kRows * kWarpSize);
  const auto launch = [&](auto* kernel) {
    PYDLLM_LAUNCH(kernel, grid, block, 0, stream, token, prob, entropy, margin, logsumexp, values,
                  ids, rows, static_cast<int>(pieces));
    return cudaGetLastError();
  };
  return sampled ? launch(merge_stats_kernel<true>) : launch(merge_stats_kernel<false>);
}

}  // namespace pydllm
