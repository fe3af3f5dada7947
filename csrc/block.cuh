// What blocks do together: reductions, a scan, a sort. Each is a function of the values alone: the
// operations are exact, or done in an order that the number of threads gives.
#pragma once

#include "common.cuh"

namespace pydllm {

constexpr int kMaxWarps = 32;

struct Sum {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Minimum {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};
struct Maximum {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return b > a ? b : a;
  }
};

template <typename T, typename Operation>
__device__ __forceinline__ T reduce_warp(T value, Operation operation) {
#pragma unroll
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
    value = operation(value, __shfl_xor_sync(kFullWarp, value, lanes));
  }
  return value;
}

// The result in every thread. A barrier as well: what was written to shared memory before can be
// read after it.
template <typename T, typename Operation>
__device__ __forceinline__ T reduce_block(T value, T identity, Operation operation) {
  __shared__ T of_warps[kMaxWarps];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int warps = blockDim.x / kWarpSize;
  value = reduce_warp(value, operation);
  if (lane == 0) of_warps[warp] = value;
  __syncthreads();
  value = reduce_warp(lane < warps ? of_warps[lane] : identity, operation);
  __syncthreads();  // the room is free for the next one
  return value;
}

// The sum of the values of the threads before.
template <typename T>
__device__ __forceinline__ T exclusive_scan(T value) {
  __shared__ T of_warps[kMaxWarps];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  T upto = value;
#pragma unroll
  for (int lanes = 1; lanes < kWarpSize; lanes *= 2) {
    const T other = __shfl_up_sync(kFullWarp, upto, lanes);
    if (lane >= lanes) upto += other;
  }
  if (lane == kWarpSize - 1) of_warps[warp] = upto;
  __syncthreads();
  T before = upto - value;
  for (int i = 0; i < warp; ++i) before += of_warps[i];
  __syncthreads();
  return before;
}

// Sorts `size`, a power of two, numbers in shared memory in ascending order: a bitonic network.
// Starts and ends with a barrier.
template <typename T>
__device__ __forceinline__ void sort_block(T* numbers, int size) {
  __syncthreads();
  for (int run = 2; run <= size; run *= 2) {
    for (int apart = run / 2; apart > 0; apart /= 2) {
      for (int i = threadIdx.x; i < size / 2; i += blockDim.x) {
        const int low = 2 * i - (i & (apart - 1)), high = low + apart;
        const T a = numbers[low], b = numbers[high];
        const bool descending = (low & run) != 0;
        if ((b < a) != descending) {
          numbers[low] = b;
          numbers[high] = a;
        }
      }
      __syncthreads();
    }
  }
}

// Unsigned integers that sort like the numbers, which are not NaN; a negative zero is below zero.
__device__ __forceinline__ uint32_t ordered(float x) {
  const int bits = __float_as_int(x);
  // The sign is flipped, and with it all other bits of a negative number.
  return static_cast<uint32_t>(bits ^ ((bits >> 31) & 0x7FFFFFFF)) ^ 0x80000000u;
}

__device__ __forceinline__ float from_ordered(uint32_t key) {
  const int bits = static_cast<int>(key ^ 0x80000000u);
  return __int_as_float(bits ^ ((bits >> 31) & 0x7FFFFFFF));
}

// The smallest of these has the largest score and, of a tie, the lowest id. Any is below kNoKey,
// and above 0 if the score is neither NaN nor infinite.
constexpr uint64_t kNoKey = ~uint64_t{0};

__device__ __forceinline__ uint64_t argmax_key(float score, int id) {
  // Adding 0 makes a zero of a negative zero.
  return static_cast<uint64_t>(~ordered(__fadd_rn(score, 0.f))) << 32 | static_cast<uint32_t>(id);
}

// Least power of two that is not below `x`, of [1, 2^30].
__host__ __device__ __forceinline__ int power_of_two(int x) {
  int power = 1;
  while (power < x) power *= 2;
  return power;
}

}  // namespace pydllm
