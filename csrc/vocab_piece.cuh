// How vocab_stats and the search for its filters' cut read a row: a block per piece, whose logits
// stay in registers.
#pragma once

#include "common.cuh"
#include "vocab_stats.h"

namespace pydllm {

constexpr int kPieceThreads = 256;

// c tanh(x / c); infinities and NaN stay.
__device__ __forceinline__ float cap(float x, float softcap) {
  const float decay = expf(fabsf(x) * (-2.f / softcap));  // at most 1: no overflow
  const float size = softcap - softcap * (2.f * decay / (1.f + decay));
  return fabsf(x) == INFINITY ? x : x < 0.f ? -size : size;
}

// Which row of the logits counts as `row`.
__device__ __forceinline__ int64_t source_of(const void* row_list, int64_t row, bool is_long) {
  if (row_list == nullptr) return row;
  return is_long ? static_cast<const int64_t*>(row_list)[row]
                 : static_cast<const int32_t*>(row_list)[row];
}

// Suppressed ids among first .. first + kCount - 1 are -inf.
template <int kCount>
__device__ __forceinline__ void suppress(float (&x)[kCount], int first, const int32_t* suppress_ids,
                                         int suppress_count) {
  for (int b = 0; b < suppress_count; ++b) {
    const unsigned hit = static_cast<unsigned>(suppress_ids[b]) - static_cast<unsigned>(first);
#pragma unroll
    for (unsigned i = 0; i < kCount; ++i) {
      if (hit == i) x[i] = -INFINITY;
    }
  }
}

// Thread t has the vectors t, t + kPieceThreads, ... of the piece, wherever the row begins in
// memory: alignment decides how a vector is read, not which thread reads it.
template <typename T>
struct Piece {
  static constexpr int kVector = Vector<T>::kSize;
  static constexpr int kVectors = kVocabPiece / kPieceThreads / kVector;
  float x[kVectors][kVector];
  int begin, end;  // ids

  __device__ __forceinline__ Piece(int piece, int vocab) {
    begin = piece * static_cast<int>(kVocabPiece);
    end = min(begin + static_cast<int>(kVocabPiece), vocab);
  }

  // First id of a vector of this thread.
  __device__ __forceinline__ int first(int v) const {
    return begin + (v * kPieceThreads + static_cast<int>(threadIdx.x)) * kVector;
  }

  // -inf after the row's end, and everywhere if there is no such row.
  __device__ __forceinline__ void load(const T* row_logits, bool exists, bool aligned) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int first_id = first(v);
      Vector<T> loaded;
      if (exists && aligned && first_id + kVector <= end) {
        loaded = load_vector(row_logits + first_id);
      } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const bool inside = exists && first_id + i < end;
          loaded.lane[i] = inside ? row_logits[first_id + i] : from_float<T>(-INFINITY);
        }
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i) x[v][i] = to_float(loaded.lane[i]);
    }
  }
};

}  // namespace pydllm
