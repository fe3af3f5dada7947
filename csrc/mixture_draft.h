// The draft of adaptive parallel decoding: a token for each row of logits, and its nucleus.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "vocab_stats.h"  // kMaxSuppressIds

namespace pydllm {

constexpr int64_t kMaxCapacity = 1024;        // MAX_CAPACITY in pydllm/ops/mixture_draft.py
constexpr int64_t kMaxSharedVocab = 1 << 23;  // this number of terms of at most 1 fits in 64 bits

struct MixtureDraft {
  // Pointers; written unless const, null for what is not given.
  int64_t* token;               // (count,)
  float* logsumexp;             // (count,)
  float* threshold;             // (count,)
  int32_t* ids;                 // (count, capacity)
  float* values;                // (count, capacity)
  float* noise;                 // (count, capacity)
  int32_t* size;                // (count,)
  bool* overflow;               // (count,)
  int32_t* noted_ids;           // (count, notes): room for what may be in a nucleus
  float* noted;                 // (count, notes)
  const void* logits;           // (sources, vocab) of dtype
  const void* rows;             // (count,) int32 or int64: which rows of logits; null: all
  const int32_t* counter;       // (count, 3)
  const float* temperatures;    // (count,), or null: one for all
  const float* top_ps;          // (count,), or null: one for all
  const int32_t* suppress_ids;  // (suppress_count,)
  // Sizes.
  Dtype dtype;
  bool wide_rows;  // rows is int64
  int64_t count, sources, vocab, shared, suppress_count, capacity, notes;
  float inverse;  // 1 / temperature
  float top_p;
  int64_t seed;
  // Strides in elements.
  int64_t stride_logits_row, stride_counter_row, stride_counter_word;
};

// One launch, a block per row. What pydllm/reference/mixture_draft.py gives; the mass of a nucleus
// is summed in units of 2^-40 of the largest term. Returns the error of the launch.
cudaError_t mixture_draft(const MixtureDraft& call, cudaStream_t stream);

}  // namespace pydllm
