#include "swiglu.h"

#include "common.cuh"
#include "ptx.cuh"
#include "swiglu.cuh"

namespace pydllm {
namespace {

constexpr int kThreads = 256;

// One thread per vector of a row; the rest of a row after its last whole vector is a shorter one.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    swiglu_kernel(T* __restrict__ y,              // (rows, width) contiguous
                  const T* __restrict__ gate_up,  // (rows, 2 width) contiguous
                  int64_t vectors, int64_t width, int64_t row_vectors, bool aligned) {
  ptx::wait_for_previous();
  constexpr int kVector = Vector<T>::kSize;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= vectors) return;
  const int64_t row = index / row_vectors, first = index % row_vectors * kVector;
  const T* const gate = gate_up + row * 2 * width + first;
  T* const out = y + row * width + first;
  if (aligned) {
    const Vector<T> gates = load_vector(gate), ups = load_vector(gate + width);
    Vector<T> result;
#pragma unroll
    for (int i = 0; i < kVector; ++i) result.lane[i] = silu_times(gates.lane[i], ups.lane[i]);
    store_vector(out, result);
  } else {
    for (int i = 0; i < kVector && first + i < width; ++i)
      out[i] = silu_times(gate[i], gate[width + i]);
  }
}

}  // namespace

cudaError_t swiglu(void* y, const void* gate_up, Dtype dtype, int64_t rows, int64_t width, bool pdl,
                   cudaStream_t stream) {
  if (rows < 0 || width < 0) return cudaErrorInvalidValue;
  if (rows == 0 || width == 0) return cudaSuccess;

  return with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int64_t kVector = Vector<T>::kSize;
    auto* const out = static_cast<T*>(y);
    const auto* const in = static_cast<const T*>(gate_up);
    const int64_t row_vectors = (width + kVector - 1) / kVector;
    const int64_t vectors = rows * row_vectors;
    const int64_t blocks = (vectors + kThreads - 1) / kThreads;
    if (blocks > INT_MAX) return cudaErrorInvalidValue;
    const bool aligned = rows_are_aligned(out, width) && rows_are_aligned(in, width);
    PYDLLM_LAUNCH_PDL(pdl, swiglu_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0,
                      stream, out, in, vectors, width, row_vectors, aligned);
    return cudaGetLastError();
  });
}

}  // namespace pydllm
