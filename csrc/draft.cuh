// What draft and verify share: the order in which masks are filled, and a candidate's positions.
#pragma once

#include "common.cuh"
#include "draft.h"

namespace pydllm {

// Not the block of a mask: after all blocks.
constexpr int kNoBlock = INT_MAX;

// When a mask is filled: the smallest is first.
struct FillOrder {
  int block;
  uint32_t cost;
  int row;
};

__device__ __forceinline__ bool comes_before(const FillOrder& a, const FillOrder& b) {
  if (a.block != b.block) return a.block < b.block;
  if (a.cost != b.cost) return a.cost < b.cost;
  return a.row < b.row;
}

// An unsigned integer: the better the score, the smaller; NaN is worst.
__device__ __forceinline__ uint32_t cost_of(float score) {
  if (score != score) score = -INFINITY;
  const int bits = __float_as_int(__fsub_rn(0.f, score));  // a negative zero becomes a zero
  // The sign is flipped, and with it all other bits of a negative number.
  return static_cast<uint32_t>(bits ^ ((bits >> 31) & 0x7FFFFFFF)) ^ 0x80000000u;
}

// The rows of a window that lie in x are first .. end - 1.
struct Span {
  int64_t start;  // position of row 0
  int first, end;
};

__device__ __forceinline__ Span span_of(int start, int length, int rows, int slots) {
  const int64_t room = int64_t{slots} - start;
  const int64_t before = -int64_t{start};
  const int end = static_cast<int>(min(int64_t{min(length, rows)}, room));
  return {start, static_cast<int>(max(min(before, int64_t{rows}), int64_t{0})), end};
}

__device__ __forceinline__ int block_of(int64_t position, int block_size) {
  return block_size == 0 ? 0 : static_cast<int>(position / block_size);
}

// A window in shared memory; rows that are no masks have kNoBlock.
struct Window {
  int64_t id[kDraftRows];
  uint32_t cost[kDraftRows];
  int block[kDraftRows];

  __device__ __forceinline__ FillOrder order(int row) const { return {block[row], cost[row], row}; }
};

// Write candidate `number`: the window with its first masks filled, and x beside it. Every thread
// of the block takes part, and the window has been written.
__device__ __forceinline__ void write_candidate(int64_t* candidate,    // (slots,)
                                                const int64_t* x,      // (slots,)
                                                const Window& window,  //
                                                const int64_t* token,  // (rows,)
                                                const Span& span, int slots, int number) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  for (int row = span.first + thread; row < span.end; row += threads) {
    bool fills = false;
    if (window.block[row] != kNoBlock) {
      const FillOrder own = window.order(row);
      int rank = 0;
      for (int other = span.first; other < span.end; ++other) {
        rank += comes_before(window.order(other), own);
      }
      fills = rank < number;
    }
    candidate[span.start + row] = fills ? token[row] : window.id[row];
  }
  // What lies outside of the window, or inside of it but not in use, is as it is.
  for (int position = thread; position < slots; position += threads) {
    const int64_t row = position - span.start;
    if (row < span.first || row >= span.end) candidate[position] = x[position];
  }
}

}  // namespace pydllm
