// Attention of a window of positions over cached and fresh keys, with RoPE and the cache write.
#pragma once

#include "dtype.h"

namespace pydllm {

// Keys that a block takes at a time, by position from `pad` on: a split is a number of such tiles.
constexpr int kAttentionKeys = 64;

// One call. Strides are in elements; every head is contiguous and begins at 16 bytes.
struct WindowAttention {
  void* out;      // (batch, rows, heads, head_dim) contiguous
  void* k_cache;  // (batch, slots, kv_heads, head_dim); with a block table (pages, page, ...)
  void* v_cache;
  const void* q;                // (batch, rows, heads, head_dim), not rotated
  const void* k;                // (batch, rows, kv_heads, head_dim), not rotated
  const void* v;                // as k
  const int32_t* start;         // (batch,), slot of row 0
  const int32_t* length;        // (batch,), rows of a branch in use
  const int32_t* kv_len;        // (batch,), end of the visible slots
  const int32_t* commit;        // (batch,), rows of branch 0 that are written to the cache
  const int32_t* pad;           // (batch,), slots of left padding, or null
  const float* cos;             // (positions, half)
  const float* sin;             // (positions, half)
  const void* q_norm;           // (head_dim,) weights of the RMS norm of each head, or null
  const void* k_norm;           // (head_dim,), or null
  const int32_t* table;         // (batch, slots / page) pages of each sequence, or null
  const int32_t* block_offset;  // (batch,), a block is (position + offset) / block_size, or null
  float* part;                  // (splits, batch, rows, heads, head_dim): values of splits, or null
  float* state;                 // (2, splits, batch, rows, heads): their maxima and sums, or null
  int64_t stride_q_batch, stride_q_row, stride_q_head;
  int64_t stride_k_batch, stride_k_row, stride_k_head;
  int64_t stride_v_batch, stride_v_row, stride_v_head;
  int64_t stride_k_cache_batch, stride_k_cache_row, stride_k_cache_head;  // batch or page
  int64_t stride_v_cache_batch, stride_v_cache_row, stride_v_cache_head;
  Dtype dtype;  // of out, heads, caches and norms: fp16 or bf16
  int batch;
  int rows;   // of all branches, one branch after the other
  int heads;  // a multiple of kv_heads
  int kv_heads;
  int head_dim;     // 64 or 128
  int half;         // pairs of dimensions that RoPE rotates: a multiple of 8, at most head_dim / 2
  int branches;     // a divisor of rows; with leaves 1 more than there are, the trunk being one
  int slots;        // of a sequence
  int page;         // slots of a page, where there is a table
  int pages;        // of the cache, where there is a table
  int splits;       // blocks for each one's keys, or 1: a block walks over all of them. With part
                    // unless the slots are one split, with state unless 1
  int split_tiles;  // key tiles that are summed before they are merged with the others
  int stages;       // key tiles in shared memory: 2, 3, or 0: as many as leave room for two blocks
  int block_size;   // of the block-causal mask, 0: none
  int sliding_window;  // positions on either side, 0: all
  bool causal;
  bool pdl;  // programmatic dependent launch
  float eps;
  float scale;
  float softcap;  // 0: none
  int leaf_rows;  // rows of a leaf, after the trunk's; 0: there are no leaves
};

// The definition is pydllm/reference/window_attention.py.
//
// Returns the error of the launch; cudaErrorInvalidValue for a call that the kernel does not take,
// cudaErrorMisalignedAddress where a head does not begin at 16 bytes.
// A row's bits depend on its query and the keys that it sees, by position, alone.
cudaError_t window_attention(const WindowAttention& call, cudaStream_t stream);

}  // namespace pydllm
