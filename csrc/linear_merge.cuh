// How a product's sums become its outputs: in linear, which adds the splits itself, and in
// rms_norm.
#pragma once

#include "common.cuh"

namespace pydllm {

// A sum of the whole depth, scaled, with the bias, rounded; either may be null. Multiplied and
// added at once, so that the compiler decides nothing; one times a number, plus -0, is that number.
template <typename T>
__device__ __forceinline__ T finished(float sum, const float* scale, const T* bias,
                                      int64_t column) {
  const float factor = scale == nullptr ? 1.f : scale[column];
  return from_float<T>(fmaf(sum, factor, bias == nullptr ? -0.f : to_float(bias[column])));
}

// The sums of the splits of a product, and what is left to do with them.
template <typename T>
struct Partial {
  const float* sums;   // (splits, rows, width)
  const float* scale;  // (width,) or null
  const T* bias;       // (width,) or null
  int64_t splits, rows, width;

  // kCount elements of a row, the splits added in ascending order. Those from width on are 0.
  template <int kCount>
  __device__ __forceinline__ void load(int64_t row, int64_t column, bool aligned,
                                       T (&out)[kCount]) const {
    float total[kCount] = {};
    for (int64_t split = 0; split < splits; ++split) {
      const float* const from = sums + (split * rows + row) * width + column;
      float term[kCount];
      if (aligned && kCount % 4 == 0) {
#pragma unroll
        for (int i = 0; i < kCount / 4; ++i) {
          const Vector<float> part = load_vector(from + 4 * i);
#pragma unroll
          for (int j = 0; j < 4; ++j) term[4 * i + j] = part.lane[j];
        }
      } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) term[i] = column + i < width ? from[i] : 0.f;
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i) total[i] = split == 0 ? term[i] : total[i] + term[i];
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      out[i] =
          column + i < width ? finished(total[i], scale, bias, column + i) : from_float<T>(0.f);
    }
  }
};

}  // namespace pydllm
