// The expert layer of a mixture of experts.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "linear.h"

namespace pydllm {

struct Experts {
  // Pointers; null for what is not there.
  void* out;                   // (rows, width), written
  void* act;                   // (pairs, inner), written; with a shared expert rows more, as y
  void* y;                     // (pairs, width), written
  void* shared_act;            // (rows, shared_inner), or null: the shared expert's follow act's
  int32_t* order;              // (pairs,), written
  int32_t* starts;             // (experts + 1,), written
  const void* hidden;          // (rows, width)
  const void* gate_up;         // (experts, 2 inner, width)
  const void* down;            // (experts, width, inner)
  const float* gate_up_scale;  // (experts, 2 inner), or per block of 128 x 128
  const float* down_scale;     // (experts, width), or per block
  const int32_t* ids;          // (rows, top_k); outside [0, experts): none
  const float* weights;        // (rows, top_k)
  const void* shared_gate_up;  // (2 shared_inner, width), in dtype
  const void* shared_down;     // (width, shared_inner)
  // Sizes.
  Dtype dtype;  // fp16 or bf16
  Stored stored;
  bool per_block;                              // e4m3 alone
  bool gelu;                                   // tanh; otherwise SiLU
  int64_t rows, width, inner, experts, top_k;  // width and inner are multiples of 16
  int64_t shared_inner;
};

// Five launches: pairs of row and slot by expert, expand, contract, weigh and add; two more where
// the shared expert cannot be in the same. No atomics; a pair is a row of a tile of 16 whatever the
// others are, and sums run over steps of 64 in ascending order.
cudaError_t experts(const Experts& call, cudaStream_t stream);

}  // namespace pydllm
