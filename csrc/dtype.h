// What the header of a launcher needs: element types, streams and errors; no kernel code.
#pragma once

#ifdef PYDLLM_HOST_EMULATION
#include "host_emulation.h"
#else
#include <cuda_runtime_api.h>
#endif

#include <cstdint>

namespace pydllm {

// DTYPES in pydllm/_backend/cuda/__init__.py
enum class Dtype : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

}  // namespace pydllm
