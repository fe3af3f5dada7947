// Statistics of rows of logits, and a sampled token, in one pass over them.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pydllm {

// Ids of a piece, which a block reads; head_stats.h says how many pieces there may be. The same for
// every number of rows, so that the bits of a row depend on it alone.
constexpr int64_t kVocabPiece = 8192;

// Shared memory holds the suppressed ids.
constexpr int64_t kMaxSuppressIds = 16;

// For each row: the arg-max id, or where counter is given that of x / temperature + Gumbel noise;
// the token's probability, the entropy, how far the best probability is above the second best, and
// the log-sum-exp, as pydllm/reference/vocab_stats.py defines them.
//
// Two kernels: a block per piece, which writes partial results, and merge_stats.
cudaError_t vocab_stats(
    int64_t* token,             // (rows,), as the next four
    float* prob,                //
    float* entropy,             // nats
    float* margin,              //
    float* logsumexp,           //
    float* values,              // (4, with a counter 6, rows, pieces), written
    int32_t* ids,               // (1, with a counter 2, rows, pieces), written
    const void* logits,         // (sources, vocab) of dtype, unit column stride
    const void* row_list,       // (rows,) which row of logits; not in [0, sources): -inf. null: all
    const int32_t* counter,     // (rows, 3): position, request, draw; null: no noise
    const float* temperatures,  // (rows,): noise only where in [1e-6, inf); null: one for all
    const int32_t* suppress_ids,  // (suppress_count,); ids outside the row suppress nothing
    const float* cut,             // (rows,): smaller logits count as -inf; null: none
    Dtype dtype, int64_t rows, int64_t sources, int64_t vocab, int64_t suppress_count,
    bool long_row_list,  // int64 rather than int32
    bool tempered,       // statistics of x / temperature
    int64_t seed, float inverse_temperature,
    float softcap,              // 0: none
    int64_t stride_logits_row,  // in elements, as the next two
    int64_t stride_counter_row, int64_t stride_counter_word, cudaStream_t stream);

// Keys that a launch of vocab_cut compares with.
constexpr int64_t kCutDigits = 16;

struct VocabCut {
  // Pointers; null for what is not there.
  float* cut;                   // (rows,), written where the row exists
  uint32_t* keys;               // (2, rows, 2), written, as the next three
  int32_t* counts;              // (2, rows, pieces, kCutDigits)
  float* masses;                // (2, rows, pieces, kCutDigits)
  float* best;                  // (rows, pieces)
  const void* logits;           // (sources, vocab) of dtype, unit column stride
  const void* row_list;         // (rows,) or null, as of vocab_stats
  const float* temperatures;    // (rows,) or null
  const int32_t* suppress_ids;  // (suppress_count,)
  const int32_t* top_ks;        // (rows,), or null: `top_k` for all
  const float* top_ps;          // (rows,), or null: `top_p` for all
  // Sizes.
  Dtype dtype;
  int64_t rows, sources, vocab, suppress_count;
  bool long_row_list;  // int64 rather than int32
  bool has_top_k, has_top_p;
  int32_t top_k;
  float top_p;
  float inverse_temperature, softcap;  // softcap 0: none
  int64_t stride_logits_row;           // in elements
};

// The smallest logit of each row that both filters keep: without a sort, by a search of four bits
// of its sort key per launch. A block counts a piece's ids and their mass at sixteen keys; the next
// launch adds up the pieces in their order.
cudaError_t vocab_cut(const VocabCut& call, cudaStream_t stream);

}  // namespace pydllm
