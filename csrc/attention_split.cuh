// The splits of window_attention's keys: what is kept of one, and how it is merged with the others.
#pragma once

#include "attention_schedule.cuh"
#include "attention_tile.cuh"

namespace pydllm {

// What a lane has of the splits of its rows that are done. Their weighted values are in memory.
struct Total {
  float best[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.f, 0.f};  // of all columns
};

struct alignas(8) Two {
  float low, high;
};

// Of the four lanes that have the columns of a row.
__device__ __forceinline__ float row_sum(float sum) {
  sum += __shfl_xor_sync(kFullWarp, sum, 1);
  return sum + __shfl_xor_sync(kFullWarp, sum, 2);
}

// Merge a split into those before it, whose values begin at `before`, or null for none: after this
// `online.acc` has the values of all and `total` their sums. A split without keys has sum 0 and
// changes nothing; a NaN is not 0. window_attention_merge_kernel does the same, to the bit.
template <int kHeadDim>
__device__ __forceinline__ void merge_split(OnlineSoftmax<kHeadDim>& online, Total& total,
                                            const float* const (&before)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = row_sum(online.sum[r]);
    const bool adds = sum != 0.f;
    const float best = fmaxf(total.best[r], online.best[r]);
    const float shift = best == -INFINITY ? 0.f : best;
    const float alpha = ptx::exp2_approx(total.best[r] - shift);
    const float beta = ptx::exp2_approx(online.best[r] - shift);
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      Two old = {0.f, 0.f};
      if (before[r] != nullptr) old = *reinterpret_cast<const Two*>(before[r] + 8 * n);
      float& low = online.acc[n][2 * r];
      float& high = online.acc[n][2 * r + 1];
      low = adds ? fmaf(old.low, alpha, low * beta) : old.low;
      high = adds ? fmaf(old.high, alpha, high * beta) : old.high;
    }
    if (!adds) continue;
    total.sum[r] = fmaf(total.sum[r], alpha, sum * beta);
    total.best[r] = best;
  }
}

// Where in call.part the values of a split of a lane's row are: lane / 4 of the warp's, or with r =
// 1 that 8 after it. Null: there is no such row, or nothing is split.
template <int kHeadDim, typename T, bool kLeaves>
__device__ __forceinline__ float* part_row(const WindowAttention& call,
                                           const Sequence<T, kLeaves>& sequence,
                                           const KeyTileSchedule& schedule, int warp_m, int r) {
  const int lane = static_cast<int>(ptx::lane());
  const Query query(call, sequence, warp_m + lane / 4 + 8 * r);
  if (call.part == nullptr || query.row >= call.rows) return nullptr;
  const int64_t rows = int64_t{call.batch} * call.rows * call.heads;
  return call.part + (schedule.split * rows + query.index(call, sequence)) * kHeadDim +
         2 * (lane % 4);
}

template <int kHeadDim>
__device__ __forceinline__ void store_part(float* const (&rows)[2],
                                           const OnlineSoftmax<kHeadDim>& online) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (rows[r] == nullptr) continue;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      *reinterpret_cast<Two*>(rows[r] + 8 * n) = {online.acc[n][2 * r], online.acc[n][2 * r + 1]};
    }
  }
}

// Maximum and sum of a block's split of its rows; rows that are not used have sum 0.
template <int kHeadDim, typename T, bool kLeaves>
__device__ __forceinline__ void store_state(const WindowAttention& call,
                                            const Sequence<T, kLeaves>& sequence,
                                            const KeyTileSchedule& schedule, int warp_m,
                                            const OnlineSoftmax<kHeadDim>& online) {
  const int lane = static_cast<int>(ptx::lane());
  const int64_t rows = int64_t{call.batch} * call.rows * call.heads;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = row_sum(online.sum[r]);
    const Query query(call, sequence, warp_m + lane / 4 + 8 * r);
    if (query.row >= call.rows || lane % 4 != 0) continue;
    const int64_t row = schedule.split * rows + query.index(call, sequence);
    call.state[row] = online.best[r];
    call.state[call.splits * rows + row] = query.used ? sum : 0.f;
  }
}

// Splits merged in order of position, as merge_split does it. A thread has four dimensions of a
// row.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kAttentionThreads)
    window_attention_merge_kernel(T* __restrict__ out,              // (rows, head_dim)
                                  const float* __restrict__ part,   // (splits, rows, head_dim)
                                  const float* __restrict__ state,  // (2, splits, rows)
                                  int64_t rows, int splits) {
  ptx::wait_for_previous();
  constexpr int kThreadsRow = kHeadDim / 4;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row =
      int64_t{blockIdx.x} * (kAttentionThreads / kThreadsRow) + thread / kThreadsRow;
  if (row >= rows) return;
  const int column = thread % kThreadsRow * 4;
  float acc[4] = {}, best = -INFINITY, sum = 0.f;
  for (int split = 0; split < splits; ++split) {
    const int64_t from = split * rows + row;
    const float part_sum = state[splits * rows + from];
    if (part_sum == 0.f) continue;  // a NaN is not 0
    const float part_best = state[from];
    const auto add = load_vector(part + from * kHeadDim + column);
    const float both = fmaxf(best, part_best);
    const float shift = both == -INFINITY ? 0.f : both;
    const float alpha = ptx::exp2_approx(best - shift), beta = ptx::exp2_approx(part_best - shift);
    sum = fmaf(sum, alpha, part_sum * beta);
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[i] = fmaf(acc[i], alpha, add.lane[i] * beta);
    best = both;
  }
  const float factor = sum == 0.f ? 1.f : 1.f / sum;
  auto* pairs = reinterpret_cast<unsigned*>(out + row * kHeadDim + column);
  pairs[0] = pack<T>(acc[0] * factor, acc[1] * factor);
  pairs[1] = pack<T>(acc[2] * factor, acc[3] * factor);
}

}  // namespace pydllm
