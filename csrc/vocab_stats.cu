#include "vocab_stats.h"

#include "common.cuh"

namespace pydllm {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
// Vectors that a thread has in flight: enough bytes to hide the latency of memory.
constexpr int kUnroll = 4;

// Statistics of some of a row's ids. The sums are taken relative to the maximum, so that neither
// overflows and the entropy, log(sum) - weighted / sum, does not cancel for large logits.
struct Stats {
  float best;      // largest logit; -inf: none above -inf seen
  float second;    // second largest
  float sum;       // sum of e^(x - best); NaN once a NaN or +inf was seen
  float weighted;  // sum of (x - best) e^(x - best)
  int id;          // lowest id with the largest logit; INT_MAX: none
};

__device__ __forceinline__ Stats empty_stats() {
  return {-INFINITY, -INFINITY, 0.f, 0.f, INT_MAX};
}

// Take the sums relative to a new maximum, which is not below the old one.
__device__ __forceinline__ void rescale(Stats& stats, float best) {
  if (stats.best == -INFINITY || stats.best == best) return;  // nothing, or a NaN, summed so far
  const float shift = stats.best - best;
  const float factor = __expf(shift);
  stats.weighted = factor == 0.f ? 0.f * stats.sum : factor * (stats.weighted + shift * stats.sum);
  stats.sum *= factor;
}

__device__ __forceinline__ Stats merge(Stats a, Stats b) {
  const bool take_b = b.best > a.best || (b.best == a.best && b.id < a.id);
  const float best = fmaxf(a.best, b.best);
  rescale(a, best);
  rescale(b, best);
  const float second = fmaxf(fminf(a.best, b.best), fmaxf(a.second, b.second));
  return {best, second, a.sum + b.sum, a.weighted + b.weighted, take_b ? b.id : a.id};
}

__device__ __forceinline__ Stats merge_warp(Stats stats) {
#pragma unroll
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
    Stats other;
    other.best = __shfl_xor_sync(kFullWarp, stats.best, lanes);
    other.second = __shfl_xor_sync(kFullWarp, stats.second, lanes);
    other.sum = __shfl_xor_sync(kFullWarp, stats.sum, lanes);
    other.weighted = __shfl_xor_sync(kFullWarp, stats.weighted, lanes);
    other.id = __shfl_xor_sync(kFullWarp, stats.id, lanes);
    stats = merge(stats, other);
  }
  return stats;
}

// Add the logits of ids first .. first + kCount - 1, which lie behind all ids added before.
template <int kCount>
__device__ __forceinline__ void add(Stats& stats, float (&x)[kCount], int first,
                                    const int32_t* banned, int banned_count) {
  for (int b = 0; b < banned_count; ++b) {
    const unsigned hit = static_cast<unsigned>(banned[b]) - static_cast<unsigned>(first);
#pragma unroll
    for (unsigned i = 0; i < kCount; ++i) {
      if (hit == i) x[i] = -INFINITY;
    }
  }
  float best = stats.best;
#pragma unroll
  for (int i = 0; i < kCount; ++i) best = fmaxf(best, x[i]);
  rescale(stats, best);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (x[i] > stats.best) {  // strictly: the lowest id keeps a tie
      stats.second = stats.best;
      stats.best = x[i];
      stats.id = first + i;
    } else if (x[i] > stats.second) {
      stats.second = x[i];
    }
    const float shift = x[i] - best;
    const float exponential = __expf(shift);
    const bool adds = x[i] != -INFINITY;  // 0 * inf would add a NaN; a NaN itself comes through
    stats.sum += adds ? exponential : 0.f;
    stats.weighted += adds ? shift * exponential : 0.f;
  }
}

// One block a row; every thread strides over the row, then warps and the block merge.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    vocab_stats_kernel(int64_t* __restrict__ token,         // (rows,)
                       float* __restrict__ logsumexp,       // (rows,)
                       float* __restrict__ prob,            // (rows,)
                       float* __restrict__ entropy,         // (rows,)
                       float* __restrict__ margin,          // (rows,)
                       const T* __restrict__ logits,        // (rows, vocab)
                       const int32_t* __restrict__ banned,  // (banned_count,)
                       int vocab, int banned_count, int64_t stride_logits_row) {
  constexpr int kVector = Vector<T>::kSize;
  __shared__ int32_t shared_banned[kMaxBanned];
  __shared__ Stats shared_stats[kWarps];

  const int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < banned_count; i += kThreads) shared_banned[i] = banned[i];
  __syncthreads();

  const T* x = logits + row * stride_logits_row;
  const int head = min(unaligned_head(x), vocab);
  const int vectors = (vocab - head) / kVector;
  const int tail = head + vectors * kVector;
  Stats stats = empty_stats();

  const auto add_one = [&](int id) {
    float one[1] = {to_float(x[id])};
    add(stats, one, id, shared_banned, banned_count);
  };
  const auto add_vector = [&](const Vector<T>& vector, int index) {
    float many[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) many[i] = to_float(vector.lane[i]);
    add(stats, many, head + index * kVector, shared_banned, banned_count);
  };

  if (thread < head) add_one(thread);
  const auto* body = reinterpret_cast<const Vector<T>*>(x + head);
  int index = thread;
  for (; index + (kUnroll - 1) * kThreads < vectors; index += kUnroll * kThreads) {
    Vector<T> loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) loaded[u] = body[index + u * kThreads];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) add_vector(loaded[u], index + u * kThreads);
  }
  for (; index < vectors; index += kThreads) add_vector(body[index], index);
  if (tail + thread < vocab) add_one(tail + thread);

  stats = merge_warp(stats);
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  if (lane == 0) shared_stats[warp] = stats;
  __syncthreads();
  if (warp != 0) return;
  stats = merge_warp(lane < kWarps ? shared_stats[lane] : empty_stats());
  if (lane != 0) return;

  const bool poisoned = stats.sum != stats.sum;
  const bool none = stats.best == -INFINITY;
  const float log_sum = logf(stats.sum);
  token[row] = poisoned || none ? 0 : stats.id;
  logsumexp[row] = poisoned ? NAN : stats.best + log_sum;
  prob[row] = poisoned ? NAN : none ? 0.f : 1.f / stats.sum;
  entropy[row] = poisoned ? NAN : none ? 0.f : log_sum - stats.weighted / stats.sum;
  margin[row] = poisoned ? NAN : none ? 0.f : -expm1f(stats.second - stats.best) / stats.sum;
}

}  // namespace

cudaError_t vocab_stats(int64_t* token, float* logsumexp, float* prob, float* entropy,
                        float* margin, const void* logits, const int32_t* banned, Dtype dtype,
                        int64_t rows, int64_t vocab, int64_t banned_count,
                        int64_t stride_logits_row, cudaStream_t stream) {
  // Ids are int in the kernel, with room for one stride of the block behind the last.
  constexpr int64_t kMaxVocab = INT_MAX - kUnroll * kThreads * 8;
  if (rows < 0 || rows > INT_MAX || vocab < 0 || vocab > kMaxVocab || banned_count < 0 ||
      banned_count > kMaxBanned) {
    return cudaErrorInvalidValue;
  }
  if (rows == 0) return cudaSuccess;

  const dim3 grid(static_cast<unsigned>(rows)), block(kThreads);
  const auto launch = [&](const auto* typed_logits) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(typed_logits)>>;
    PYDLLM_LAUNCH(vocab_stats_kernel<T>, grid, block, 0, stream, token, logsumexp, prob, entropy,
                  margin, typed_logits, banned, static_cast<int>(vocab),
                  static_cast<int>(banned_count), stride_logits_row);
    return cudaGetLastError();
  };
  switch (dtype) {
    case Dtype::kFloat32:
      return launch(static_cast<const float*>(logits));
    case Dtype::kFloat16:
      return launch(static_cast<const __half*>(logits));
    case Dtype::kBFloat16:
      return launch(static_cast<const __nv_bfloat16*>(logits));
  }
  return cudaErrorInvalidValue;
}

}  // namespace pydllm
