// Root-mean-square normalisation of rows, with the residual addition before it.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pydllm {

// What a block keeps of its row in registers.
constexpr int64_t kRmsNormWidth = 32768, kRmsNormMergedWidth = 8192;  // the second with partial

struct RmsNorm {
  void* y;               // (rows, width) contiguous, written
  void* residual;        // (rows, width), read and written, or null
  const void* x;         // (rows, width), or null with partial
  const float* partial;  // (splits, rows, width), or null; of fp16 or bf16 alone
  const float* scale;    // (width,) or null: of partial
  const void* bias;      // (width,) or null: of partial
  const void* weight;    // (width,)
  Dtype dtype;
  int64_t rows, width, splits;
  float eps;
  int64_t stride_x_row, stride_residual_row;  // elements
  bool pdl;                                   // programmatic dependent launch
};

// For each row: h = x + residual, rounded to the dtype, which residual becomes; then
// y = (h / sqrt(mean(h^2) + eps)), rounded, * weight. Without a residual (null) h is x.
//
// With partial, x is what linear makes of it: the sum of the splits in ascending order, scaled,
// with the bias, rounded.
//
// Rows are independent: the bits of one depend on it alone, and on no alignment.
cudaError_t rms_norm(const RmsNorm& call, cudaStream_t stream);

}  // namespace pydllm
