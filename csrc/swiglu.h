// The gated activation of a feed-forward layer.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pydllm {

// y = silu(gate), rounded to the dtype, * up, of rows that hold gate and then up.
//
// Elements are independent: the bits of one depend on its gate and up alone.
cudaError_t swiglu(void* y,              // (rows, width) contiguous, written
                   const void* gate_up,  // (rows, 2 width) contiguous
                   Dtype dtype, int64_t rows, int64_t width,
                   bool pdl,  // programmatic dependent launch
                   cudaStream_t stream);

}  // namespace pydllm
