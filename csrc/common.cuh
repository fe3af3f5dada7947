// What every kernel shares: element types, vector loads, and the one place where the compiler for
// the host stands in for nvcc (tests/test_csrc.py runs the kernels' logic on the CPU).
#pragma once

#ifdef PYDLLM_HOST_EMULATION
#include "host_emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define PYDLLM_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif

#include <cmath>
#include <cstdint>

namespace pydllm {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(__half x) {
  return __half2float(x);
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

// The widest load a thread can make: 16 bytes, which must be aligned to 16 bytes.
template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T lane[kSize];
};

// How many elements lie before the first 16-byte boundary at or behind `p`.
template <typename T>
__device__ __forceinline__ int unaligned_head(const T* p) {
  const auto past = reinterpret_cast<uintptr_t>(p) % 16;
  return past == 0 ? 0 : static_cast<int>((16 - past) / sizeof(T));
}

}  // namespace pydllm
