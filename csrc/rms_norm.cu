#include "rms_norm.h"

#include "common.cuh"
#include "linear_merge.cuh"
#include "ptx.cuh"

namespace pydllm {
namespace {

// One block per row, whose elements stay in the registers between the sum and the scaling: thread t
// has the vectors t, t + kThreads, ... of the row. Which thread sums what does not depend on how
// the row is aligned, so neither do the bits.
template <typename T, bool kMerges, int kThreads, int kVectors>
__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(T* __restrict__ y,             // (rows, width) contiguous
                    T* residual,                   // (rows, width) or null, read and written
                    const T* x,                    // (rows, width), not with kMerges
                    const Partial<T> partial,      // with kMerges
                    const T* __restrict__ weight,  // (width,)
                    int width, float eps, int64_t stride_x_row, int64_t stride_residual_row,
                    bool aligned) {
  constexpr int kVector = Vector<T>::kSize;
  constexpr int kWarps = kThreads / kWarpSize;
  __shared__ float shared_sum[kWarps];

  ptx::wait_for_previous();
  const int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  if constexpr (!kMerges) x += row * stride_x_row;
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
    if constexpr (kMerges) {
      partial.load(row, first, aligned, kept[v].lane);
    } else {
      kept[v] = read(x, first);
    }
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

template <typename T, bool kMerges>
cudaError_t launch(const RmsNorm& call, cudaStream_t stream) {
  const auto with_threads = [&](auto threads, auto vectors) {
    constexpr int kThreads = decltype(threads)::value, kVectors = decltype(vectors)::value;
    auto* const y = static_cast<T*>(call.y);
    auto* const residual = static_cast<T*>(call.residual);
    const auto* const x = static_cast<const T*>(call.x);
    const auto* const weight = static_cast<const T*>(call.weight);
    const Partial<T> partial{call.partial, call.scale, static_cast<const T*>(call.bias),
                             call.splits,  call.rows,  call.width};
    const bool aligned =
        call.width % Vector<T>::kSize == 0 && rows_are_aligned(y, call.width) &&
        rows_are_aligned(weight, call.width) &&
        (kMerges ? rows_are_aligned(call.partial, call.width)
                 : rows_are_aligned(x, call.stride_x_row)) &&
        (residual == nullptr || rows_are_aligned(residual, call.stride_residual_row));
    PYDLLM_LAUNCH_PDL(call.pdl, (rms_norm_kernel<T, kMerges, kThreads, kVectors>),
                      dim3(static_cast<unsigned>(call.rows)), dim3(kThreads), 0, stream, y,
                      residual, x, partial, weight, static_cast<int>(call.width), call.eps,
                      call.stride_x_row, call.stride_residual_row, aligned);
    return cudaGetLastError();
  };
  // One vector a thread where 1024 threads can hold the row so.
  constexpr int64_t kVector = Vector<T>::kSize;
  const int64_t width = call.width;
  if (width <= 128 * kVector) return with_threads(Constant<128>{}, Constant<1>{});
  if (width <= 512 * kVector) return with_threads(Constant<512>{}, Constant<1>{});
  if (width <= 1024 * kVector) return with_threads(Constant<1024>{}, Constant<1>{});
  // A thread has no registers for the splits of more.
  if constexpr (!kMerges) {
    if (width <= 1024 * 4 * kVector) return with_threads(Constant<1024>{}, Constant<4>{});
    // Only fp32 has rows that are longer.
    if constexpr (kVector == 4) return with_threads(Constant<1024>{}, Constant<8>{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t rms_norm(const RmsNorm& call, cudaStream_t stream) {
  const bool merges = call.partial != nullptr;
  if (call.rows < 0 || call.rows > INT_MAX || call.width < 0 || call.width > kRmsNormWidth ||
      (merges &&
       (call.splits < 1 || call.width > kRmsNormMergedWidth || call.dtype == Dtype::kFloat32))) {
    return cudaErrorInvalidValue;
  }
  if (call.rows == 0 || call.width == 0) return cudaSuccess;

  return with_type(call.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (!std::is_same_v<T, float>) {
      if (merges) return launch<T, true>(call, stream);
    }
    return launch<T, false>(call, stream);
  });
}

}  // namespace pydllm
