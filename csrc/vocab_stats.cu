#include "vocab_stats.h"

#include "head_stats.h"
#include "philox.cuh"
#include "vocab_piece.cuh"

namespace pydllm {
namespace {

constexpr int kThreads = kPieceThreads;
constexpr int kWarps = kThreads / kWarpSize;
// e to this power is 0, and times 0 it is not NaN, as -inf would be.
constexpr float kNegligible = -1e4f;

// The largest logits among some of a row's ids.
struct Best {
  float best;
  float second;
  int id;  // lowest id with the largest; INT_MAX: none above -inf seen
};

// The best score among some of a row's ids: its lowest id, and the logit there.
struct Sample {
  float score;
  float chosen;
  int id;  // INT_MAX: none seen
};

// What becomes of a row's logits.
struct Rule {
  Inverse inverse;  // of the temperature
  float softcap;    // 0: none
  bool tempered;
  NoiseKey key;
};

__device__ __forceinline__ Best merge(Best a, Best b) {
  const bool take_b = b.best > a.best || (b.best == a.best && b.id < a.id);
  const float second = fmaxf(fminf(a.best, b.best), fmaxf(a.second, b.second));
  return {fmaxf(a.best, b.best), second, take_b ? b.id : a.id};
}

__device__ __forceinline__ Sample merge(Sample a, Sample b) {
  return b.score > a.score || (b.score == a.score && b.id < a.id) ? b : a;
}

__device__ __forceinline__ Best from_lane(const Best& x, int lanes) {
  return {__shfl_xor_sync(kFullWarp, x.best, lanes), __shfl_xor_sync(kFullWarp, x.second, lanes),
          __shfl_xor_sync(kFullWarp, x.id, lanes)};
}
__device__ __forceinline__ Sample from_lane(const Sample& x, int lanes) {
  return {__shfl_xor_sync(kFullWarp, x.score, lanes), __shfl_xor_sync(kFullWarp, x.chosen, lanes),
          __shfl_xor_sync(kFullWarp, x.id, lanes)};
}

// Merged over the block, for every thread.
template <typename Part>
__device__ __forceinline__ Part merge_block(Part part, Part (&shared)[kWarps]) {
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
    part = merge(part, from_lane(part, lanes));
  }
  if (thread % kWarpSize == 0) shared[thread / kWarpSize] = part;
  __syncthreads();
  part = shared[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) part = merge(part, shared[warp]);
  return part;
}

// In pairs, so that the largest term is not rounded with each of the others.
template <int kCount>
__device__ __forceinline__ float sum_of(float (&x)[kCount]) {
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  }
  return x[0];
}

__device__ __forceinline__ float add_warp(float x) {
#pragma unroll
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kFullWarp, x, lanes);
  return x;
}

// Take the logits of ids first .. first + kCount - 1, which lie after all ids taken before, for
// what the rule makes of them; the first is a multiple of 4.
template <bool kSampled, int kCount>
__device__ __forceinline__ void take(Best& best, Sample& sample, float (&x)[kCount], int first,
                                     const Rule& rule, const int32_t* suppress_ids,
                                     int suppress_count) {
  if (rule.softcap != 0.f) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = cap(x[i], rule.softcap);
  }
  suppress(x, first, suppress_ids, suppress_count);
  if constexpr (kSampled) {
#pragma unroll
    for (int quad = 0; quad < kCount / 4; ++quad) {
      Words words{};
      if (rule.inverse.noisy) words = rule.key.words(first / 4 + quad);
#pragma unroll
      for (int i = 4 * quad; i < 4 * quad + 4; ++i) {
        const float scaled = __fmul_rn(x[i], rule.inverse.value);
        const float score =
            rule.inverse.noisy ? __fadd_rn(scaled, gumbel(words.word[i % 4])) : scaled;
        if (rule.tempered) x[i] = scaled;
        sample = merge(sample, {score, x[i], first + i});
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (x[i] > best.best) {  // strictly: the lowest id keeps a tie
      best.second = best.best;
      best.best = x[i];
      best.id = first + i;
    } else if (x[i] > best.second) {
      best.second = x[i];
    }
  }
}

// One block per piece of a row. The logits stay in registers until the piece's largest is known:
// relative to it no sum overflows, and the entropy does not cancel for large logits.
template <typename T, bool kSampled>
__global__ void __launch_bounds__(kThreads, 4 - kSampled - (sizeof(T) == 4))
    vocab_stats_kernel(float* __restrict__ values,                // (6 or 4, rows, pieces)
                       int32_t* __restrict__ ids,                 // (2 or 1, rows, pieces)
                       const T* __restrict__ logits,              // (sources, vocab)
                       const void* __restrict__ row_list,         // (rows,) or null
                       const int32_t* __restrict__ counter,       // (rows, 3)
                       const float* __restrict__ temperatures,    // (rows,) or null
                       const int32_t* __restrict__ suppress_ids,  // (suppress_count,)
                       const float* __restrict__ cut,             // (rows,) or null
                       int64_t rows, int64_t sources, int vocab, int pieces, int suppress_count,
                       bool long_row_list, bool aligned, Rule rule, int64_t stride_logits_row,
                       int64_t stride_counter_row, int64_t stride_counter_word) {
  constexpr int kVector = Piece<T>::kVector, kVectors = Piece<T>::kVectors;
  __shared__ int32_t shared_suppress_ids[kMaxSuppressIds];
  __shared__ int shared_count;
  __shared__ Best shared_best[kWarps];
  __shared__ float shared_sums[kWarps][2];
  __shared__ Sample shared_sample[kSampled ? kWarps : 1];

  const int64_t row = blockIdx.x / static_cast<unsigned>(pieces);
  const int number = static_cast<int>(blockIdx.x % static_cast<unsigned>(pieces));
  const int thread = static_cast<int>(threadIdx.x);
  Piece<T> piece(number, vocab);
  auto& x = piece.x;

  // Those that lie in the piece; mostly none do.
  if (thread == 0) shared_count = 0;
  __syncthreads();
  if (thread < suppress_count && suppress_ids[thread] >= piece.begin &&
      suppress_ids[thread] < piece.end) {
    shared_suppress_ids[atomicAdd(&shared_count, 1)] = suppress_ids[thread];
  }
  __syncthreads();
  suppress_count = shared_count;

  if constexpr (kSampled) {
    const int32_t* const words = counter + row * stride_counter_row;
    rule.key.position = static_cast<uint32_t>(words[0]);
    rule.key.request = static_cast<uint32_t>(words[stride_counter_word]);
    rule.key.draw = static_cast<uint32_t>(words[2 * stride_counter_word]);
    if (temperatures != nullptr) rule.inverse = inverse_of(temperatures[row]);
  }

  Best best{-INFINITY, -INFINITY, INT_MAX};
  Sample sample{-INFINITY, -INFINITY, INT_MAX};
  const int64_t source = source_of(row_list, row, long_row_list);
  const bool exists = source >= 0 && source < sources;
  piece.load(logits + (exists ? source * stride_logits_row : 0), exists, aligned);
  const float least = cut == nullptr ? -INFINITY : cut[row];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (x[v][i] < least) x[v][i] = -INFINITY;
    }
    const int first = piece.first(v);
    if (first < piece.end) {
      take<kSampled>(best, sample, x[v], first, rule, shared_suppress_ids, suppress_count);
    }
  }
  best = merge_block(best, shared_best);
  if constexpr (kSampled) sample = merge_block(sample, shared_sample);

  const float base = best.best == -INFINITY ? 0.f : best.best;
  float sum = 0.f, weighted = 0.f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    float shifted[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      float shift = x[v][i] - base;
      shift = shift < kNegligible ? kNegligible : shift;  // a NaN comes through
      x[v][i] = __expf(shift);
      shifted[i] = shift * x[v][i];
    }
    sum += sum_of(x[v]);
    weighted += sum_of(shifted);
  }
  sum = add_warp(sum);
  weighted = add_warp(weighted);
  if (thread % kWarpSize == 0) {
    shared_sums[thread / kWarpSize][0] = sum;
    shared_sums[thread / kWarpSize][1] = weighted;
  }
  __syncthreads();
  if (thread != 0) return;
  for (int warp = 1; warp < kWarps; ++warp) {
    sum += shared_sums[warp][0];
    weighted += shared_sums[warp][1];
  }

  const int64_t stride_field = rows * pieces, at = row * pieces + number;
  values[at] = best.best;
  values[at + stride_field] = best.second;
  values[at + 2 * stride_field] = sum;
  values[at + 3 * stride_field] = weighted;
  ids[at] = best.id;
  if constexpr (kSampled) {
    values[at + 4 * stride_field] = sample.score;
    values[at + 5 * stride_field] = sample.chosen;
    ids[at + stride_field] = sample.id;
  }
}

}  // namespace

cudaError_t vocab_stats(int64_t* token, float* prob, float* entropy, float* margin,
                        float* logsumexp, float* values, int32_t* ids, const void* logits,
                        const void* row_list, const int32_t* counter, const float* temperatures,
                        const int32_t* suppress_ids, const float* cut, Dtype dtype, int64_t rows,
                        int64_t sources, int64_t vocab, int64_t suppress_count, bool long_row_list,
                        bool tempered, int64_t seed, float inverse_temperature, float softcap,
                        int64_t stride_logits_row, int64_t stride_counter_row,
                        int64_t stride_counter_word, cudaStream_t stream) {
  const int64_t pieces = (vocab + kVocabPiece - 1) / kVocabPiece;
  if (rows < 0 || vocab < 1 || pieces > kMaxPieces || rows > INT_MAX / pieces ||
      suppress_count < 0 || suppress_count > kMaxSuppressIds) {
    return cudaErrorInvalidValue;
  }
  if (rows == 0) return cudaSuccess;

  const Rule rule = {{inverse_temperature, counter != nullptr},
                     softcap,
                     tempered,
                     {0, 0, 0, static_cast<uint64_t>(seed)}};
  const dim3 grid(static_cast<unsigned>(rows * pieces)), block(kThreads);
  const cudaError_t error = with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto* const typed = static_cast<const T*>(logits);
    const bool aligned = rows_are_aligned(typed, stride_logits_row);
    const auto launch = [&](auto* kernel) {
      PYDLLM_LAUNCH(kernel, grid, block, 0, stream, values, ids, typed, row_list, counter,
                    temperatures, suppress_ids, cut, rows, sources, static_cast<int>(vocab),
                    static_cast<int>(pieces), static_cast<int>(suppress_count), long_row_list,
                    aligned, rule, stride_logits_row, stride_counter_row, stride_counter_word);
      return cudaGetLastError();
    };
    return counter == nullptr ? launch(vocab_stats_kernel<T, false>)
                              : launch(vocab_stats_kernel<T, true>);
  });
  if (error != cudaSuccess) return error;
  return merge_stats(token, prob, entropy, margin, logsumexp, values, ids, rows, pieces,
                     counter != nullptr, stream);
}

}  // namespace pydllm
