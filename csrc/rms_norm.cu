#include "rms_norm.h"

#include "common.cuh"
#include "ptx.cuh"

namespace pydllm {
namespace {

// One block per row, whose elements stay in the registers between the sum and the scaling: thread t
// has the vectors t, t + kThreads, ... of the row. Which thread sums what does not depend on how
// the row is aligned, so neither do the bits.
template <typename T, int kThreads, int kVectors>
__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(T* __restrict__ y,             // (rows, width) contiguous
                    T* residual,                   // (rows, width) or null, read and written
                    const T* x,                    // (rows, width)
                    const T* __restrict__ weight,  // (width,)
                    int width, float eps, int64_t stride_x_row, int64_t stride_residual_row,
                    bool aligned) {
  constexpr int kVector = Vector<T>::kSize;
  constexpr int kWarps = kThreads / kWarpSize;
  __shared__ float shared_sum[kWarps];

  ptx::wait_for_previous();
  const int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  x += row * stride_x_row;
  y += row * width;
  if (residual != nullptr) residual += row * stride_residual_row;

  const auto read = [&](const T* p, int first) {
    if (aligned) return load_vector(p + first);
    Vector<T> vector;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      vector.lane[i] = first + i < width ? p[first + i] : from_float<T>(0.f);
    }
    return vector;
  };
  const auto write = [&](T* p, int first, const Vector<T>& vector) {
    if (aligned) return store_vector(p + first, vector);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (first + i < width) p[first + i] = vector.lane[i];
    }
  };

  Vector<T> kept[kVectors];
  float sum = 0.f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int first = (v * kThreads + thread) * kVector;
    if (first >= width) break;
    kept[v] = read(x, first);
    if (residual != nullptr) {
      const Vector<T> added = read(residual, first);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        // Rounded to the stored dtype first: the norm sees the residual stream that is kept.
        kept[v].lane[i] = from_float<T>(to_float(kept[v].lane[i]) + to_float(added.lane[i]));
      }
      write(residual, first, kept[v]);
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float wide = to_float(kept[v].lane[i]);
      sum = fmaf(wide, wide, sum);
    }
  }

#pragma unroll
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
    sum += __shfl_xor_sync(kFullWarp, sum, lanes);
  }
  if (thread % kWarpSize == 0) shared_sum[thread / kWarpSize] = sum;
  __syncthreads();
  sum = 0.f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += shared_sum[warp];
  const float scale = rsqrtf(sum / static_cast<float>(width) + eps);

#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int first = (v * kThreads + thread) * kVector;
    if (first >= width) break;
    const Vector<T> by = read(weight, first);
    Vector<T> scaled;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float normed = rounded<T>(to_float(kept[v].lane[i]) * scale);
      scaled.lane[i] = from_float<T>(normed * to_float(by.lane[i]));
    }
    write(y, first, scaled);
  }
}

}  // namespace

cudaError_t rms_norm(void* y, void* residual, const void* x, const void* weight, Dtype dtype,
                     int64_t rows, int64_t width, float eps, int64_t stride_x_row,
                     int64_t stride_residual_row, bool pdl, cudaStream_t stream) {
  if (rows < 0 || rows > INT_MAX || width < 0 || width > kRmsNormWidth)
    return cudaErrorInvalidValue;
  if (rows == 0 || width == 0) return cudaSuccess;

  return with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto launch = [&](auto threads, auto vectors) {
      constexpr int kThreads = decltype(threads)::value, kVectors = decltype(vectors)::value;
      auto* const out = static_cast<T*>(y);
      auto* const sum = static_cast<T*>(residual);
      const auto* const in = static_cast<const T*>(x);
      const auto* const by = static_cast<const T*>(weight);
      const bool aligned = width % Vector<T>::kSize == 0 && rows_are_aligned(out, width) &&
                           rows_are_aligned(in, stride_x_row) && rows_are_aligned(by, width) &&
                           (sum == nullptr || rows_are_aligned(sum, stride_residual_row));
      PYDLLM_LAUNCH_PDL(pdl, (rms_norm_kernel<T, kThreads, kVectors>),
                        dim3(static_cast<unsigned>(rows)), dim3(kThreads), 0, stream, out, sum, in,
                        by, static_cast<int>(width), eps, stride_x_row, stride_residual_row,
                        aligned);
      return cudaGetLastError();
    };
    // One vector a thread where 1024 threads can hold the row so.
    constexpr int64_t kVector = Vector<T>::kSize;
    if (width <= 128 * kVector) return launch(Constant<128>{}, Constant<1>{});
    if (width <= 512 * kVector) return launch(Constant<512>{}, Constant<1>{});
    if (width <= 1024 * kVector) return launch(Constant<1024>{}, Constant<1>{});
    if (width <= 1024 * 4 * kVector) return launch(Constant<1024>{}, Constant<4>{});
    // Only fp32 has rows that are longer.
    if constexpr (kVector == 4) return launch(Constant<1024>{}, Constant<8>{});
    return cudaErrorInvalidValue;
  });
}

}  // namespace pydllm
