// FreeDave's step: follow the candidates that are states of static decoding.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pydllm {

// Candidates that a block compares, one warp each.
constexpr int64_t kVerifyBranches = 32;

// Candidate j + 1 is accepted if j is and the step from j, which fills the first of its masks in
// the order of draft, leads there. x becomes the state after the last accepted one, `branch`; what
// that writes gets step_map = nfe, and nfe counts the forward unless x had no mask. The statistics
// of `branch` give the next candidates. complete: leading window rows whose blocks `branch`
// completes.
cudaError_t verify(int64_t* following,         // (batch, drafts, slots) contiguous, written
                   int32_t* branch,            // (batch,), written, as the next three
                   int32_t* accepted,          // tokens written
                   int32_t* remaining,         // masks left in the window
                   int32_t* complete,          //
                   int64_t* x,                 // (batch, slots), read and written
                   int32_t* step_map,          // (batch, slots), written
                   int32_t* nfe,               // (batch,), read and written
                   const int64_t* candidates,  // (batch, branches, slots) contiguous
                   const int64_t* token,       // (batch, branches, rows) contiguous
                   const void* score,          // (batch, branches, rows) contiguous, of dtype
                   const int32_t* start,       // (batch,)
                   const int32_t* length,      // (batch,)
                   Dtype dtype, int64_t batch, int64_t slots, int64_t rows, int64_t branches,
                   int64_t drafts, int64_t mask_id,
                   int64_t block_size,    // positions; 0: the window is one block
                   int64_t stride_x_row,  // in elements, as the next
                   int64_t stride_step_map_row, cudaStream_t stream);

}  // namespace pydllm
