// The accept rule: which masks of each window become tokens in this step.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pydllm {

// Shared memory holds a window.
constexpr int64_t kMaxWindow = 4096;

enum class Rule : int {
  kQuota,
  kLeftToRight,
  kRandom,
  kThreshold,
  kFactor,
  kEntropy,
  kEntropyBound
};

struct Unmask {
  // Pointers; null for what the rule does not have.
  int32_t* remaining;        // (batch,), -1 where done
  int32_t* accepted;         // (batch,)
  int64_t* x;                // (batch, slots), read and written
  int32_t* step_map;         // (batch, slots), written
  int32_t* nfe;              // (batch,), read and written
  const int64_t* token;      // (batch, rows)
  const void* score;         // (batch, rows) of dtype
  const int32_t* start;      // (batch,)
  const int32_t* length;     // (batch,)
  const int32_t* quota;      // (batch,), or null: `min_tokens` for all
  const int32_t* request;    // (batch,), or null: no random numbers
  bool* done;                // (batch,), read and written, or null: no sequence ends
  const int32_t* end;        // (batch,), where done is
  const int64_t* eos_ids;    // (ends,), or null
  const int32_t* ends_from;  // (batch,), or null
  // Sizes.
  Dtype dtype;
  int64_t batch, slots, rows;
  int64_t mask_id;
  Rule rule;
  int32_t min_tokens;
  float limit;  // rounded to dtype in the kernel
  int64_t seed, ends;
  bool last;
  // Strides in elements; the last dimension is contiguous.
  int64_t stride_x_row, stride_step_map_row, stride_token_row, stride_score_row;
};

// One launch, one block per sequence. Bit for bit what pydllm/reference/unmask.py gives.
// Returns the error of the launch.
cudaError_t unmask(const Unmask& call, cudaStream_t stream);

}  // namespace pydllm
