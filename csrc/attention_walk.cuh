// Which keys a block of window_attention walks over, and which of them a query row may see.
#pragma once

#include "common.cuh"
#include "window_attention.h"

namespace pydllm {

constexpr int kQueries = 64;  // query rows of a block
constexpr int kKeys = kAttentionKeys;
constexpr int kAttentionThreads = kQueries / 16 * kWarpSize;  // a warp has 16 rows, as an mma tile

// What a block knows of its sequence and KV head; in shared memory, since registers are for the
// multiplications. Numbers are clamped, so that none overflows.
template <typename T>
struct Sequence {
  int batch, head, group;  // the KV head, and how many query heads it has
  int start, length, commit, pad;
  int block_offset;  // in [0, block_size)
  int visible_end;   // positions: cached ones are [0, visible_end) without the window's
  int window_begin;  // positions of the window, [window_begin, window_end)
  int window_end;
  int window;  // rows of a branch
  const T* k;  // row 0 of the head
  const T* v;
  T* k_cache;  // row 0 of page or sequence 0 of the head
  T* v_cache;
  const int32_t* table;  // of the sequence, or null

  __device__ __forceinline__ void read(const WindowAttention& call, int of_batch, int of_head) {
    batch = of_batch;
    head = of_head;
    group = call.heads / call.kv_heads;
    window = call.rows / call.branches;
    pad = call.pad == nullptr ? 0 : max(0, min(call.pad[batch], call.slots));
    const bool shifted = call.block_size > 0 && call.block_offset != nullptr;
    block_offset = shifted ? call.block_offset[batch] % call.block_size : 0;
    if (block_offset < 0) block_offset += call.block_size;
    start = max(-window, min(call.start[batch], call.slots));
    length = max(0, min(min(call.length[batch], window), call.slots - start));
    commit = min(call.commit[batch], length);
    visible_end = min(call.kv_len[batch], call.slots) - pad;
    window_end = start + length - pad;
    window_begin = max(start - pad, 0);
    k = static_cast<const T*>(call.k) + batch * call.stride_k_batch + head * call.stride_k_head;
    v = static_cast<const T*>(call.v) + batch * call.stride_v_batch + head * call.stride_v_head;
    k_cache = static_cast<T*>(call.k_cache) + head * call.stride_k_cache_head;
    v_cache = static_cast<T*>(call.v_cache) + head * call.stride_v_cache_head;
    const int64_t pages = call.table == nullptr ? 0 : call.slots / call.page;
    table = call.table == nullptr ? nullptr : call.table + batch * pages;
  }
};

struct Place {
  int64_t page;  // or sequence
  int64_t row;
  bool exists = true;
};

template <typename T>
__device__ __forceinline__ Place place(const Sequence<T>& sequence, const WindowAttention& call,
                                       int slot) {
  if (sequence.table == nullptr) return {sequence.batch, slot};
  // An entry that is no page is taken for the nearest one, and not written to.
  const int page = sequence.table[slot / call.page];
  const int nearest = max(0, min(page, call.pages - 1));
  return {nearest, slot % call.page, nearest == page};
}

// Query row m of the block's KV head.
struct Query {
  int row, head, branch;  // of all of them
  int position;
  bool used;
  int begin, end;  // positions that it may see

  template <typename T>
  __device__ __forceinline__ Query(const WindowAttention& call, const Sequence<T>& sequence,
                                   int m) {
    row = m / sequence.group;
    head = sequence.head * sequence.group + m - row * sequence.group;
    branch = row / sequence.window;
    const int own = row - branch * sequence.window;
    position = sequence.start + own - sequence.pad;
    used = row < call.rows && own < sequence.length && position >= 0;
    begin = 0;
    end = used ? max(sequence.visible_end, sequence.window_end) : 0;
    limit(call, sequence.block_offset);
  }

  // The row in (batch, rows, heads).
  template <typename T>
  __device__ __forceinline__ int64_t index(const WindowAttention& call,
                                           const Sequence<T>& sequence) const {
    return (int64_t{sequence.batch} * call.rows + row) * call.heads + head;
  }

  // The masks by position; both ends grow with the position.
  __device__ __forceinline__ void limit(const WindowAttention& call, int block_offset) {
    if (!used) return;
    if (call.causal) end = min(end, position + 1);
    if (call.block_size > 0) {
      const int64_t shifted = int64_t{position} + block_offset;
      const int64_t block_end = (shifted / call.block_size + 1) * call.block_size - block_offset;
      end = block_end < end ? static_cast<int>(block_end) : end;
    }
    if (call.span > 0) {
      end = call.span < end - position ? position + call.span : end;
      begin = max(position - call.span + 1, 0);
    }
  }
};

// What a thread keeps of a query row while it multiplies.
struct Limits {
  int branch, begin, end;
};

// The key tiles of a block, in order: [first, before) cached, [before, after) each once for every
// one of its branches, [after, last) cached.
struct Walk {
  int first_m, split;  // the block's first query row, and its split of the keys
  int first, before, after, last;
  int first_branch, branches;
  int all_begin, all_end;  // positions that every used row may see, by the masks

  template <typename T>
  __device__ __forceinline__ void plan(const WindowAttention& call, const Sequence<T>& sequence,
                                       int of_first_m, int of_split) {
    first_m = of_first_m;
    split = of_split;
    const int group = sequence.group, window = sequence.window;
    const int last_m = min(first_m + kQueries, call.rows * group) - 1;
    const int low_row = first_m / group, high_row = last_m / group;
    first_branch = low_row / window;
    branches = high_row / window - first_branch + 1;
    // Of several branches any row of the window may be here.
    int low = branches > 1 ? 0 : low_row - first_branch * window;
    int high = branches > 1 ? window - 1 : high_row - first_branch * window;
    low = max(low, sequence.pad - sequence.start);
    high = min(high, sequence.length - 1);
    first = before = after = last = 0;
    if (low > high) return;
    const Query lowest(call, sequence, (first_branch * window + low) * group);
    const Query highest(call, sequence, (first_branch * window + high) * group);
    all_begin = highest.begin;
    all_end = lowest.end;
    first = lowest.begin / kKeys;
    last = (max(highest.end, 0) + kKeys - 1) / kKeys;
    if (call.splits > 1) {
      first = max(first, split * call.split_tiles);
      last = min(last, (split + 1) * call.split_tiles);
    }
    last = max(last, first);
    before = max(min(sequence.window_begin / kKeys, last), first);
    after = max(min((max(sequence.window_end, 0) + kKeys - 1) / kKeys, last), before);
  }

  __device__ __forceinline__ int steps() const {
    return last - first + (after - before) * (branches - 1);
  }

  // The tile of a step, and its branch: -1 where all is cached.
  __device__ __forceinline__ void find(int step, int& tile, int& branch) const {
    branch = -1;
    tile = first + step;
    if (tile < before) return;
    const int inside = tile - before;
    if (inside < (after - before) * branches) {
      const int on_window = inside / branches;
      branch = first_branch + inside - on_window * branches;
      tile = before + on_window;
    } else {
      tile -= (after - before) * (branches - 1);
    }
  }
};

}  // namespace pydllm
