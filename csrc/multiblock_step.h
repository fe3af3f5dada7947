// d3LLM's multi-block decoding between two forwards: accept, then plan.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pydllm {

// Shared memory holds a byte for each position and four numbers for each block.
constexpr int64_t kMaxPositions = 8192;
constexpr int64_t kMaxBlocks = 1024;

struct MultiblockStep {
  // Pointers; written unless const.
  int64_t* x;             // (batch, slots)
  int32_t* step_map;      // (batch, slots)
  int32_t* numbers;       // (11, batch), rows as in pydllm/ops/multiblock_step.py
  int32_t* blocks;        // (4, batch, count): masks left, full, waiting since, kept
  bool* eligible;         // (batch, slots)
  const int64_t* token;   // (batch, columns)
  const void* entropy;    // (batch, columns) of dtype
  const int32_t* prompt;  // (batch,)
  const int64_t* eos;     // (ends,), or null
  // Sizes.
  Dtype dtype;
  int64_t batch, slots, columns, count, ends;
  int64_t mask_id;
  int32_t generated, size;  // positions of a generation region, and of a block
  float limit;              // nats, rounded to dtype in the kernel
  int32_t add, full_at;     // decoded tokens
  int32_t delay, refresh;   // forwards; a refresh of 0 is never
  int32_t tail;
  bool early_stop, cached, shifted;
  // Strides in elements; the last dimension is contiguous.
  int64_t stride_x_row, stride_step_map_row, stride_numbers_row, stride_blocks_plane,
      stride_blocks_row, stride_eligible_row, stride_token_row, stride_entropy_row;
};

// One launch, a block per sequence. What pydllm/reference/multiblock_step.py does.
// Returns the error of the launch.
cudaError_t multiblock_step(const MultiblockStep& call, cudaStream_t stream);

}  // namespace pydllm
