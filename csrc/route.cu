#include "route.h"

#include "block.cuh"

namespace pydllm {
namespace {

constexpr int kLogitThreads = 256;
constexpr int kLogitRows = 8;  // rows that a warp computes one expert's logits of
constexpr int kPoolThreads = 256;

// Elements of one row and of the other that a lane reads at a time: of neither more than 16 bytes.
template <typename T, typename Weight>
constexpr int kLogitVector =
    Vector<T>::kSize < Vector<Weight>::kSize ? Vector<T>::kSize : Vector<Weight>::kSize;

// kSize elements of a row from `first` on, zeros past its end. The size of an aligned row is a
// multiple of kSize.
template <int kSize, bool kAligned, typename T>
__device__ __forceinline__ Chunk<T, kSize> load_part(const T* row, int64_t first, int64_t size) {
  if constexpr (kAligned) {
    return load_chunk<T, kSize>(row + first);
  } else {
    Chunk<T, kSize> part;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      part.lane[i] = first + i < size ? row[first + i] : from_float<T>(0.f);
    }
    return part;
  }
}

// One warp computes the logits of an expert for kLogitRows rows. A lane adds up every 32nd vector,
// then the lanes are added: the order of a sum depends on the width alone, not on alignment.
template <typename T, typename Weight, bool kAligned>
__global__ void __launch_bounds__(kLogitThreads)
    route_logits_kernel(float* __restrict__ logits,         // (rows, experts)
                        const T* __restrict__ hidden,       // (rows, width)
                        const Weight* __restrict__ router,  // (experts, width)
                        int64_t rows, int64_t width, int experts) {
  constexpr int kVector = kLogitVector<T, Weight>;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int expert = static_cast<int>(blockIdx.x) * (kLogitThreads / kWarpSize) +
                     static_cast<int>(threadIdx.x) / kWarpSize;
  if (expert >= experts) return;
  const int64_t first = int64_t{blockIdx.y} * kLogitRows;
  router += expert * width;
  float sum[kLogitRows] = {};
  for (int64_t h = int64_t{lane} * kVector; h < width; h += int64_t{kWarpSize} * kVector) {
    const auto weight = load_part<kVector, kAligned>(router, h, width);
#pragma unroll
    for (int r = 0; r < kLogitRows; ++r) {
      if (first + r >= rows) continue;
      const auto part = load_part<kVector, kAligned>(hidden + (first + r) * width, h, width);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        sum[r] += to_float(weight.lane[i]) * to_float(part.lane[i]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kLogitRows; ++r) {
    const float logit = reduce_warp(sum[r], Sum{});
    if (lane == 0 && first + r < rows) logits[(first + r) * experts + expert] = logit;
  }
}

__device__ __forceinline__ float sigmoid(float x) {
  return 1.f / (1.f + expf(-x));
}

// What an expert is compared by: a NaN is no better than -inf.
__device__ __forceinline__ float choice_of(float score, const float* bias, int expert) {
  const float choice = bias == nullptr ? score : score + bias[expert];
  return choice == choice ? choice : -INFINITY;
}

// One block per block of positions of a window: an expert is admitted if fewer than `capacity` are
// before it.
__global__ void __launch_bounds__(kPoolThreads, 4)
    route_pool_kernel(uint8_t* __restrict__ pool,           // (windows, blocks, experts)
                      const float* __restrict__ logits,     // (windows, rows, experts)
                      const float* __restrict__ bias,       // (experts,) or null
                      const int32_t* __restrict__ starts,   // (batch,)
                      const int32_t* __restrict__ lengths,  // (batch,) or null
                      int64_t branches, int rows, int experts, int block_size, int capacity) {
  __shared__ uint64_t keys[kRouteExperts];
  const int64_t window = blockIdx.x, sequence = window / branches;
  // A start may be out of range, and 32 bits too few for its negative.
  const int64_t start = starts[sequence];
  const int64_t live = lengths == nullptr ? rows : min(rows, lengths[sequence]);
  const int64_t number = max(start, int64_t{0}) / block_size + blockIdx.y;
  const int64_t first = max(max(number * block_size - start, -start), int64_t{0});
  const int64_t last = min((number + 1) * block_size - start, live);
  for (int e = static_cast<int>(threadIdx.x); e < experts; e += kPoolThreads) {
    float best = -INFINITY;
    for (int64_t row = first; row < last; ++row) {
      const float logit = logits[(window * rows + row) * experts + e];
      best = fmaxf(best, choice_of(sigmoid(logit), bias, e));
    }
    keys[e] = argmax_key(best, e);
  }
  __syncthreads();
  for (int e = static_cast<int>(threadIdx.x); e < experts; e += kPoolThreads) {
    int before = 0;
    for (int other = 0; other < experts; ++other) before += keys[other] < keys[e];
    pool[(window * gridDim.y + blockIdx.y) * experts + e] = before < capacity;
  }
}

// The least key of a warp.
__device__ __forceinline__ uint64_t least_key(const uint64_t* keys, int count, int lane) {
  uint64_t least = kNoKey;
  for (int i = lane; i < count; i += kWarpSize) least = keys[i] < least ? keys[i] : least;
  return reduce_warp(least, Minimum{});
}

__device__ __forceinline__ float value_of(uint64_t key) {
  return from_ordered(~static_cast<uint32_t>(key >> 32));
}

// One warp per row.
template <typename T>
__global__ void __launch_bounds__(kWarpSize) route_select_kernel(Route call, int64_t window_rows) {
  __shared__ uint64_t keys[kRouteExperts];
  __shared__ float scores[kRouteExperts];
  __shared__ uint64_t group_keys[kRouteExperts / 2];
  const int lane = static_cast<int>(threadIdx.x), experts = static_cast<int>(call.experts);
  const int64_t row = blockIdx.x, window = row / window_rows, sequence = window / call.branches;
  const int at = static_cast<int>(row % window_rows);
  const int64_t start = call.start == nullptr ? 0 : call.start[sequence];
  const int top_k = static_cast<int>(call.top_k);
  int32_t* const ids = call.ids + row * top_k;
  float* const weights = call.weights + row * top_k;
  if (start + at < 0 || (call.length != nullptr && at >= call.length[sequence])) {
    for (int k = lane; k < top_k; k += kWarpSize) {
      ids[k] = experts;
      weights[k] = 0.f;
    }
    return;
  }

  const float* const logits = call.logits + row * experts;
  const uint8_t* pool = nullptr;
  if (call.pool != nullptr) {
    const int64_t block = (start + at) / call.block_size - max(start, int64_t{0}) / call.block_size;
    pool = call.pool + (window * call.blocks + block) * experts;
  }
  float largest = -INFINITY;
  for (int e = lane; e < experts; e += kWarpSize) {
    float choice;
    if (call.sigmoid) {
      scores[e] = sigmoid(logits[e]);
      choice = choice_of(scores[e], call.bias, e);
    } else {
      scores[e] = rounded<T>(logits[e]);
      choice = choice_of(scores[e], nullptr, e);
      largest = fmaxf(largest, choice);
    }
    if (pool != nullptr && pool[e] == 0) choice = -INFINITY;
    keys[e] = argmax_key(choice, e);
  }
  if (!call.sigmoid) {
    largest = reduce_warp(largest, Maximum{});
    float sum = 0.f;
    for (int e = lane; e < experts; e += kWarpSize) {
      scores[e] = expf(scores[e] - largest);
      sum += scores[e];
    }
    sum = reduce_warp(sum, Sum{});
    for (int e = lane; e < experts; e += kWarpSize) scores[e] /= sum;
  }
  __syncwarp();

  if (call.groups > 1 && pool == nullptr) {
    const int groups = static_cast<int>(call.groups), size = experts / groups;
    for (int group = lane; group < groups; group += kWarpSize) {
      uint64_t best = kNoKey, second = kNoKey;
      for (int e = group * size; e < (group + 1) * size; ++e) {
        const uint64_t key = keys[e];
        second = key < best ? best : key < second ? key : second;
        best = key < best ? key : best;
      }
      group_keys[group] = argmax_key(value_of(best) + value_of(second), group);
    }
    __syncwarp();
    for (int i = 0; i < static_cast<int>(call.topk_groups); ++i) {
      const uint64_t best = least_key(group_keys, groups, lane);
      __syncwarp();
      if (lane == 0) group_keys[static_cast<uint32_t>(best)] = kNoKey;  // kept
      __syncwarp();
    }
    for (int e = lane; e < experts; e += kWarpSize) {
      if (group_keys[e / size] != kNoKey) keys[e] = argmax_key(-INFINITY, e);
    }
    __syncwarp();
  }

  float total = 0.f;
  for (int k = 0; k < top_k; ++k) {
    const uint64_t best = least_key(keys, experts, lane);
    const int expert = static_cast<int>(static_cast<uint32_t>(best));
    total += scores[expert];
    __syncwarp();
    if (lane == 0) {
      keys[expert] = kNoKey;
      ids[k] = expert;
    }
    __syncwarp();
  }
  if (!call.renormalize) {
    total = 1.f;
  } else if (call.sigmoid) {
    total += 1e-20f;
  }
  __syncwarp();
  for (int k = lane; k < top_k; k += kWarpSize) weights[k] = scores[ids[k]] / total * call.scale;
}

template <typename T, typename Weight>
cudaError_t launch_logits(const Route& call, int64_t rows, cudaStream_t stream) {
  constexpr int kWarps = kLogitThreads / kWarpSize;
  const int64_t blocks = (rows + kLogitRows - 1) / kLogitRows;
  if (blocks > 65535) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>((call.experts + kWarps - 1) / kWarps),
                  static_cast<unsigned>(blocks));
  constexpr int kVector = kLogitVector<T, Weight>;
  const bool aligned = call.width % kVector == 0 &&
                       reinterpret_cast<uintptr_t>(call.hidden) % (sizeof(T) * kVector) == 0 &&
                       reinterpret_cast<uintptr_t>(call.router) % (sizeof(Weight) * kVector) == 0;
  const auto launch = [&](auto* kernel) {
    PYDLLM_LAUNCH(kernel, grid, dim3(kLogitThreads), 0, stream, call.logits,
                  static_cast<const T*>(call.hidden), static_cast<const Weight*>(call.router), rows,
                  call.width, static_cast<int>(call.experts));
    return cudaGetLastError();
  };
  return aligned ? launch(route_logits_kernel<T, Weight, true>)
                 : launch(route_logits_kernel<T, Weight, false>);
}

}  // namespace

cudaError_t route(const Route& call, cudaStream_t stream) {
  const int64_t windows = call.batch * call.branches, rows = windows * call.rows;
  if (rows < 0 || rows > INT_MAX || call.experts < 1 || call.experts > kRouteExperts ||
      call.top_k < 1 || call.top_k > call.experts || call.groups < 1 ||
      call.experts % call.groups != 0 || (call.pool != nullptr && call.block_size < 1)) {
    return cudaErrorInvalidValue;
  }
  if (rows == 0) return cudaSuccess;

  return with_type(call.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const cudaError_t error = call.sigmoid ? launch_logits<T, float>(call, rows, stream)
                                           : launch_logits<T, T>(call, rows, stream);
    if (error != cudaSuccess) return error;
    if (call.pool != nullptr) {
      if (call.blocks > 65535) return cudaErrorInvalidValue;
      const dim3 grid(static_cast<unsigned>(windows), static_cast<unsigned>(call.blocks));
      PYDLLM_LAUNCH(route_pool_kernel, grid, dim3(kPoolThreads), 0, stream, call.pool, call.logits,
                    call.bias, call.start, call.length, call.branches, static_cast<int>(call.rows),
                    static_cast<int>(call.experts), static_cast<int>(call.block_size),
                    static_cast<int>(call.capacity));
      const cudaError_t of_pool = cudaGetLastError();
      if (of_pool != cudaSuccess) return of_pool;
    }
    PYDLLM_LAUNCH(route_select_kernel<T>, dim3(static_cast<unsigned>(rows)), dim3(kWarpSize), 0,
                  stream, call, call.rows);
    return cudaGetLastError();
  });
}

}  // namespace pydllm
