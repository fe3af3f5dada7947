// The router of a mixture of experts: which experts compute each row, and their weights.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pydllm {

constexpr int64_t kRouteExperts = 1024;

// Logits of hidden and router, then the choice among experts: by sigmoid and bias, within the best
// groups or the pool of the row's block, or by softmax logits rounded to the dtype. Ties go to the
// lower expert. Rows that are not live get the number of experts, and weight 0.
struct Route {
  int32_t* ids;           // (batch, branches, rows, top_k), written
  float* weights;         // (batch, branches, rows, top_k), written
  float* logits;          // (batch, branches, rows, experts), scratch
  uint8_t* pool;          // (batch, branches, blocks, experts), scratch; null: no pools
  const void* hidden;     // (batch, branches, rows, width) contiguous, of dtype
  const void* router;     // (experts, width) contiguous; fp32 for sigmoid, otherwise of dtype
  const float* bias;      // (experts,) or null
  const int32_t* start;   // (batch,) or null
  const int32_t* length;  // (batch,) or null
  Dtype dtype;
  bool sigmoid, renormalize;
  int64_t batch, branches, rows, width, experts, top_k;
  int64_t groups, topk_groups;
  int64_t capacity, block_size, blocks;  // 0 without pools
  float scale;
};
cudaError_t route(const Route& call, cudaStream_t stream);

}  // namespace pydllm
