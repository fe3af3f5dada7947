// Root-mean-square normalisation of rows, with the residual addition before it.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pydllm {

// What a block keeps of its row in registers.
constexpr int64_t kRmsNormWidth = 32768;

// For each row: h = x + residual, rounded to the dtype, which residual becomes; then
// y = (h / sqrt(mean(h^2) + eps)), rounded, * weight. Without a residual (null) h is x.
//
// Rows are independent: the bits of one depend on it alone, and on no alignment.
cudaError_t rms_norm(void* y,             // (rows, width) contiguous, written
                     void* residual,      // (rows, width), read and written, or null
                     const void* x,       // (rows, width)
                     const void* weight,  // (width,)
                     Dtype dtype, int64_t rows, int64_t width, float eps,
                     int64_t stride_x_row,  // in elements, as the next
                     int64_t stride_residual_row,
                     bool pdl,  // programmatic dependent launch
                     cudaStream_t stream);

}  // namespace pydllm
