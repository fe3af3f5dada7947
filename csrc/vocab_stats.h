// Statistics of rows of logits in one pass over them.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pydllm {

// Shared memory holds the banned ids.
constexpr int64_t kMaxBanned = 128;

// For each row: the arg-max id (the lowest wins a tie), the natural log of the sum of exponentials,
// the probability of the arg-max, the entropy in nats, and how far the best probability is above
// the second best. A banned id counts as -inf in all of them.
//
// A row in which every id is -inf or banned gives 0, -inf, 0, 0, 0. A row with a NaN or +inf in an
// id that is not banned gives token 0 and NaN.
//
// Returns the error of the launch. Rows are independent: the bits of one depend on it alone.
cudaError_t vocab_stats(int64_t* token,         // (rows,)
                        float* logsumexp,       // (rows,)
                        float* prob,            // (rows,)
                        float* entropy,         // (rows,)
                        float* margin,          // (rows,)
                        const void* logits,     // (rows, vocab) of dtype, unit column stride
                        const int32_t* banned,  // (banned_count,); ids outside the row ban nothing
                        Dtype dtype, int64_t rows, int64_t vocab, int64_t banned_count,
                        int64_t stride_logits_row,  // in elements
                        cudaStream_t stream);

}  // namespace pydllm
