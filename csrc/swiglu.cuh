// The gated activation, as swiglu and linear apply it.
#pragma once

#include "common.cuh"

namespace pydllm {

// silu(gate) * up; the first factor is rounded to T.
template <typename T>
__device__ __forceinline__ T silu_times(T gate, T up) {
  const float x = to_float(gate);
  return from_float<T>(rounded<T>(x / (1.f + expf(-x))) * to_float(up));
}

}  // namespace pydllm
