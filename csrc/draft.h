// FreeDave's candidates.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pydllm {

// Window rows that a block holds in shared memory.
constexpr int64_t kDraftRows = 1024;

// Candidate j of a sequence is x with the j first masks of its window filled with their tokens: by
// block, then score, highest first (NaN is lowest), then position. The window's rows are
// start[b] .. start[b] + length[b] - 1; those outside of x are no masks.
cudaError_t draft(int64_t* candidates,    // (batch, branches, slots) contiguous, written
                  const int64_t* x,       // (batch, slots)
                  const int64_t* token,   // (batch, rows)
                  const void* score,      // (batch, rows) of dtype
                  const int32_t* start,   // (batch,)
                  const int32_t* length,  // (batch,)
                  Dtype dtype, int64_t batch, int64_t slots, int64_t rows, int64_t branches,
                  int64_t mask_id,
                  int64_t block_size,    // positions; 0: the window is one block
                  int64_t stride_x_row,  // in elements, as the next two
                  int64_t stride_token_row, int64_t stride_score_row, cudaStream_t stream);

}  // namespace pydllm
