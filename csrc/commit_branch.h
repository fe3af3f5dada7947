// The write of an accepted branch's keys and values into the cache.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pydllm {

// For each sequence b: slots start[b] .. start[b] + commit[b] - 1 of the cache get the first rows
// of branch branch[b], keys after the norm (if there is one) and RoPE. Rows before pad[b] or after
// the last slot are left out; a branch or a page that is none writes nothing.
//
// Without a norm a key has the bits that window_attention stores and attends to.
cudaError_t commit_branch(
    void* k_cache,  // (batch, slots, kv_heads, head_dim), or pages of it with a block table
    void* v_cache,
    const void* k,  // (batch, branches * window, kv_heads, head_dim)
    const void* v,
    const int32_t* branch,  // (batch,), as the next three
    const int32_t* start, const int32_t* commit,
    const int32_t* pad,          // or null
    const float* cos,            // (positions, half) contiguous, as the next
    const float* sin,            //
    const void* k_norm,          // (head_dim,), or null
    const int32_t* block_table,  // (batch, slots / page) contiguous, or null
    Dtype dtype, int64_t batch, int64_t window, int64_t branches, int64_t kv_heads,
    int64_t head_dim, int64_t half, int64_t slots, int64_t page,
    int64_t pages,  // of the cache, where there is a block table
    float eps,
    // Strides in elements; heads are contiguous. Of a paged cache "batch" is the page.
    int64_t stride_k_batch, int64_t stride_k_row, int64_t stride_k_head, int64_t stride_v_batch,
    int64_t stride_v_row, int64_t stride_v_head, int64_t stride_k_cache_batch,
    int64_t stride_k_cache_row, int64_t stride_k_cache_head, int64_t stride_v_cache_batch,
    int64_t stride_v_cache_row, int64_t stride_v_cache_head, cudaStream_t stream);

}  // namespace pydllm
