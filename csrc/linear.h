// A matrix product of few rows whose bits do not depend on how many there are.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pydllm {

// How a weight is stored: in the dtype of x, or in one byte, of which NaN (e4m3) is not read right.
// STORED in pydllm/_backend/cuda/linear.py
enum class Stored : int { kPlain = 0, kE4m3 = 1, kInt8 = 2 };

struct Linear {
  void* y;             // (rows, width), or (rows, width / 2) with swiglu, written; or null
  float* partial;      // (splits, rows, width); null for one split that needs no second kernel
  const void* x;       // (rows, depth), rows at multiples of 16 bytes
  const void* weight;  // (width, depth), rows at multiples of 16 bytes
  const float* scale;  // (width,), (width / 128, depth / 128) if per_block, or null
  const void* bias;    // (width,), or null
  Dtype dtype;         // fp16 or bf16
  Stored stored;
  bool per_block;              // e4m3 alone
  bool swiglu;                 // of the halves of a row of results; width is even
  int64_t rows, width, depth;  // depth is a multiple of 16
  int64_t splits;              // of the depth; by its shape, never by the rows
  int64_t stride_x_row, stride_weight_row, stride_scale_row;  // elements
  bool pdl;                                                   // programmatic dependent launch
};

// y = x (scale * weight)^T + bias, accumulated in fp32 and rounded once.
//
// A sum runs over steps of 64 in ascending order, each four instructions of 16; splits are added in
// ascending order by a second kernel. None of it depends on the number of rows.
//
// Without y the splits stay in partial, for rms_norm to add.
//
// With swiglu, y = silu(gate) up of the halves of that row, each rounded first. One split and
// per_block need a partial where width / 2 is not a multiple of 8.
cudaError_t linear(const Linear& call, cudaStream_t stream);

}  // namespace pydllm
