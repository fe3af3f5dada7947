// A step of a window that fills masks and replaces tokens.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pydllm {

// Shared memory holds a window.
constexpr int64_t kMaxEditedWindow = 4096;

struct EditTokens {
  // Pointers.
  int32_t* remaining;            // (batch,)
  int32_t* filled;               // (batch,)
  int32_t* edited;               // (batch,)
  int64_t* x;                    // (batch, slots), read and written
  int32_t* step_map;             // (batch, slots), written
  int32_t* nfe;                  // (batch,), read and written
  int32_t* post_steps;           // (batch,), read and written
  bool* complete;                // (batch,), read and written
  const int64_t* token;          // (batch, rows)
  const void* score;             // (batch, rows) of dtype
  const int32_t* start;          // (batch,)
  const int32_t* length;         // (batch,)
  const int32_t* editable_from;  // (batch,)
  // Sizes.
  Dtype dtype;
  int64_t batch, slots, rows;
  int64_t mask_id;
  float threshold, edit_threshold;  // rounded to dtype in the kernel
  int32_t min_tokens, max_post_steps;
  bool confirm;
  // Strides in elements; the last dimension is contiguous.
  int64_t stride_x_row, stride_step_map_row, stride_token_row, stride_score_row;
};

// One launch, one block per sequence. Bit for bit what pydllm/reference/edit_tokens.py gives.
// Returns the error of the launch.
cudaError_t edit_tokens(const EditTokens& call, cudaStream_t stream);

}  // namespace pydllm
