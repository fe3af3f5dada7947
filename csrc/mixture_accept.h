// The acceptance of adaptive parallel decoding: how many drafts a mixture of two models shares.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "mixture_draft.h"

namespace pydllm {

// What a block reads: bytes of a row of logits, or candidates of a list.
constexpr int64_t kTileBytes = 16384;
constexpr int64_t kCandidateTile = 32;

// What both forms share. Null pointers stand for what is not given.
struct MixtureRound {
  int32_t* accepted;          // (batch,)
  int64_t* correction;        // (batch,)
  int64_t* target;            // (batch * rows,)
  float* least;               // (batch * rows,): critical weights, or null
  int64_t* best;              // (batch * rows, tiles): room for what the blocks find
  float* least_of_tiles;      // (batch * rows, tiles), where least is
  const int64_t* token;       // (batch * rows,)
  const int32_t* length;      // (batch,)
  const float* mixtures;      // (batch,), or null: one for all
  const float* temperatures;  // (batch * rows,), or null: one for all
  int64_t batch, rows, tiles;
  float mixture;
  float inverse;  // 1 / temperature
  bool first_free;
};

struct MixtureAccept : MixtureRound {
  const void* logits;           // (batch * rows, vocab) of dtype
  const void* verifier;         // (batch * rows, verifier_vocab) of dtype
  const float* threshold;       // (batch * rows,), or null: all ids count
  const int32_t* counter;       // (batch * rows, 3), or null: no noise
  const int32_t* suppress_ids;  // (suppress_count,)
  Dtype dtype;
  int64_t vocab, verifier_vocab, shared, suppress_count, seed;
  // Strides in elements.
  int64_t stride_logits_row, stride_verifier_row, stride_counter_row, stride_counter_word;
};

struct MixtureAcceptSparse : MixtureRound {
  const int32_t* ids;   // (batch * rows, capacity), and the next two
  const float* values;  // logits of the draft model
  const float* noise;
  const int32_t* size;  // (batch * rows,)
  const void* hidden;   // (batch * rows, width) of dtype
  const void* head;     // (verifier_vocab, width) of dtype
  const void* bias;     // (verifier_vocab,) of dtype, or null
  Dtype dtype;
  int64_t capacity, width, verifier_vocab;
  float softcap;  // 0: none
  int64_t stride_hidden_row, stride_head_row;
};

// Merges what blocks have found in the tiles, then scans the rows.
cudaError_t mixture_accept_scan(const MixtureRound& round, cudaStream_t stream);

// Two launches each: blocks look at pieces of the rows in use, warps merge what they found and look
// for the first row whose draft is another. What pydllm/reference/mixture_accept.py gives, the
// dense form bit for bit. Returns the first error of a launch.
cudaError_t mixture_accept(const MixtureAccept& call, cudaStream_t stream);
cudaError_t mixture_accept_sparse(const MixtureAcceptSparse& call, cudaStream_t stream);

}  // namespace pydllm
