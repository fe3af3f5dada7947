// What kernels share: launches, element types, vector loads. Here alone the compiler for the host
// stands in for nvcc (tests/host_emulation.h runs the kernels' logic on the CPU).
#pragma once

#ifdef PYDLLM_HOST_EMULATION
#include "host_emulation.h"
#define PYDLLM_CHECK_ALIGNED(address, bytes) emulation::check_aligned(address, bytes)
#define PYDLLM_LAUNCH_PDL(pdl, kernel, grid, block, shared, stream, ...) \
  PYDLLM_LAUNCH(kernel, grid, block, shared, stream, __VA_ARGS__)
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
// `shared`: bytes of dynamic shared memory; above 48 KiB the kernel has to be allowed to first.
#define PYDLLM_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
// With `pdl` the kernel may begin before the one before it has ended (programmatic dependent
// launch; compute capability 9.0): it starts with ptx::wait_for_previous().
#define PYDLLM_LAUNCH_PDL(pdl, kernel, grid, block, shared, stream, ...) \
  ::pydllm::launch_pdl(pdl, kernel, grid, block, shared, stream, __VA_ARGS__)
// Names the dynamic shared memory of a kernel, unsigned char*, aligned to 16 bytes.
#define PYDLLM_DYNAMIC_SHARED(name)                              \
  extern __shared__ __align__(16) unsigned char pydllm_shared[]; \
  unsigned char* const name = pydllm_shared
#define PYDLLM_CHECK_ALIGNED(address, bytes)
#endif

#include <climits>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "dtype.h"

namespace pydllm {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// A number that a launcher's switch hands to a kernel as a template argument.
template <int kNumber>
using Constant = std::integral_constant<int, kNumber>;

#ifndef PYDLLM_HOST_EMULATION
// The error of the launch is cudaGetLastError()'s, as after <<<>>>.
template <typename... Parameters, typename... Arguments>
void launch_pdl(bool pdl, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
                cudaStream_t stream, Arguments... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = pdl ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}
#endif

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(__half x) {
  return __half2float(x);
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

// Rounded to nearest even.
template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

template <typename T>
__device__ __forceinline__ float rounded(float x) {
  return to_float(from_float<T>(x));
}

// The widest load a thread can make: 16 bytes, which must be aligned to 16 bytes.
template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T lane[kSize];
};

template <typename T>
__device__ __forceinline__ Vector<T> load_vector(const T* p) {
  PYDLLM_CHECK_ALIGNED(p, 16);
  return *reinterpret_cast<const Vector<T>*>(p);
}

template <typename T>
__device__ __forceinline__ void store_vector(T* p, const Vector<T>& vector) {
  PYDLLM_CHECK_ALIGNED(p, 16);
  *reinterpret_cast<Vector<T>*>(p) = vector;
}

// Elements of one access, aligned to their size together.
template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Chunk {
  T lane[kSize];
};

template <typename T, int kSize>
__device__ __forceinline__ Chunk<T, kSize> load_chunk(const T* p) {
  PYDLLM_CHECK_ALIGNED(p, sizeof(T) * kSize);
  return *reinterpret_cast<const Chunk<T, kSize>*>(p);
}

template <typename T, int kSize>
__device__ __forceinline__ void store_chunk(T* p, const Chunk<T, kSize>& chunk) {
  PYDLLM_CHECK_ALIGNED(p, sizeof(T) * kSize);
  *reinterpret_cast<Chunk<T, kSize>*>(p) = chunk;
}

// How many elements lie before the first 16-byte boundary at or after `p`.
template <typename T>
__device__ __forceinline__ int unaligned_head(const T* p) {
  const auto past = reinterpret_cast<uintptr_t>(p) % 16;
  return past == 0 ? 0 : static_cast<int>((16 - past) / sizeof(T));
}

// Whether `p` and every row after it, `stride` elements apart, lie at 16-byte boundaries.
template <typename T>
inline bool rows_are_aligned(const T* p, int64_t stride) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride % Vector<T>::kSize == 0;
}

// Call `launch` with a null pointer of the element type: the one switch over types a launcher has.
template <typename Launch>
cudaError_t with_type(Dtype dtype, Launch launch) {
  switch (dtype) {
    case Dtype::kFloat32:
      return launch(static_cast<float*>(nullptr));
    case Dtype::kFloat16:
      return launch(static_cast<__half*>(nullptr));
    case Dtype::kBFloat16:
      return launch(static_cast<__nv_bfloat16*>(nullptr));
  }
  return cudaErrorInvalidValue;
}

// Bytes of shared memory that the blocks on one multiprocessor of the current device have together.
inline int shared_of_multiprocessor() {
#ifdef PYDLLM_HOST_EMULATION
  return emulation::kDynamicLimit;
#else
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  return bytes;
#endif
}

// Let a kernel use more dynamic shared memory than the 48 KiB that every kernel may.
template <typename Kernel>
cudaError_t allow_shared(Kernel* kernel, int bytes) {
#ifdef PYDLLM_HOST_EMULATION
  return static_cast<size_t>(bytes) <= emulation::kDynamicLimit ? cudaSuccess
                                                                : cudaErrorInvalidValue;
#else
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
#endif
}

}  // namespace pydllm
