// Merges the partial results that vocab_stats and head_stats write per piece of a vocabulary.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pydllm {

// Pieces of a row that one warp merges.
constexpr int64_t kMaxPieces = 2048;

// Statistics of rows from those of their pieces. The fields of `values` are, for each piece: the
// largest logit, the second, sum of exp(x - largest), sum of exp(x - largest) (x - largest); if
// sampled the best score and the logit there. `ids`: id of the largest; if sampled of the best
// score. The lowest id wins a tie.
//
// A row whose largest logit is -inf gives 0, 0, 0, 0, -inf; one with a NaN among its sums token 0
// and else NaN. The bits of a row depend on its pieces and their order alone.
cudaError_t merge_stats(int64_t* token,       // (rows,), as the next four
                        float* prob,          // probability of the token
                        float* entropy,       // nats
                        float* margin,        // largest probability less the second
                        float* logsumexp,     //
                        const float* values,  // (4, or 6 if sampled, rows, pieces) contiguous
                        const int32_t* ids,   // (1, or 2 if sampled, rows, pieces) contiguous
                        int64_t rows, int64_t pieces, bool sampled, cudaStream_t stream);

}  // namespace pydllm
