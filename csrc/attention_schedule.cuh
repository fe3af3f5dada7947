// Which keys a block of window_attention walks over, and which of them a query row may see.
#pragma once

#include <climits>

#include "common.cuh"
#include "window_attention.h"

namespace pydllm {

constexpr int kQueries = 64;  // query rows of a block
constexpr int kKeys = kAttentionKeys;
constexpr int kAttentionThreads = kQueries / 16 * kWarpSize;  // a warp has 16 rows, as an mma tile

// What a block knows of its sequence and KV head; in shared memory, since registers are for the
// multiplications. Numbers are clamped, so that none overflows.
template <typename T, bool kLeaves>
struct Sequence {
  int batch, head, group;  // the KV head, and how many query heads it has
  int start, length, commit, pad;
  int block_offset;  // in [0, block_size)
  int visible_end;   // positions: cached ones are [0, visible_end) without the window's
  int window_begin;  // positions of the window, [window_begin, window_end)
  int window_end;
  int window;  // rows of a branch, or of the trunk
  const T* k;  // row 0 of the head
  const T* v;
  T* k_cache;  // row 0 of page or sequence 0 of the head
  T* v_cache;
  const int32_t* table;  // of the sequence, or null

  __device__ __forceinline__ void read(const WindowAttention& call, int of_batch, int of_head) {
    batch = of_batch;
    head = of_head;
    group = call.heads / call.kv_heads;
    if constexpr (kLeaves) {
      window = call.rows - (call.branches - 1) * call.leaf_rows;
    } else {
      window = call.rows / call.branches;
    }
    pad = call.pad == nullptr ? 0 : max(0, min(call.pad[batch], call.slots));
    const bool shifted = call.block_size > 0 && call.block_offset != nullptr;
    block_offset = shifted ? call.block_offset[batch] % call.block_size : 0;
    if (block_offset < 0) block_offset += call.block_size;
    start = max(-window, min(call.start[batch], call.slots));
    length = max(0, min(min(call.length[batch], window), call.slots - start));
    commit = min(call.commit[batch], length);
    visible_end = min(call.kv_len[batch], call.slots) - pad;
    window_end = start + length - pad;
    if constexpr (kLeaves) {
      visible_end = start - pad;
      window_end += call.leaf_rows;
    }
    window_begin = max(start - pad, 0);
    k = static_cast<const T*>(call.k) + batch * call.stride_k_batch + head * call.stride_k_head;
    v = static_cast<const T*>(call.v) + batch * call.stride_v_batch + head * call.stride_v_head;
    k_cache = static_cast<T*>(call.k_cache) + head * call.stride_k_cache_head;
    v_cache = static_cast<T*>(call.v_cache) + head * call.stride_v_cache_head;
    const int64_t pages = call.table == nullptr ? 0 : call.slots / call.page;
    table = call.table == nullptr ? nullptr : call.table + batch * pages;
  }

  // The branch that a row belongs to: 0 is the trunk where there are leaves.
  __device__ __forceinline__ int branch_of(const WindowAttention& call, int row) const {
    if constexpr (kLeaves) {
      return row < window ? 0 : (row - window) / call.leaf_rows + 1;
    } else {
      return row / window;
    }
  }

  // The row of the trunk that a leaf follows; below 0 where it is not in use.
  __device__ __forceinline__ int root_of(const WindowAttention& call, int branch) const {
    return length - call.branches + branch;
  }
};

// The fresh keys of a branch where there are leaves, by their slots from `start` on: those of a
// leaf are the trunk's as far as its root, then its own. Branch -1 has none.
struct LeafKeys {
  int length;
  int trunk;               // keys of the trunk
  int64_t first_leaf_row;  // row of key `trunk`, less `trunk`

  template <typename T>
  __device__ __forceinline__ LeafKeys(const WindowAttention& call,
                                      const Sequence<T, true>& sequence, int branch) {
    trunk = length = branch < 0 ? 0 : sequence.length;
    first_leaf_row = 0;
    if (branch <= 0) return;
    trunk = sequence.root_of(call, branch) + 1;
    length = trunk > 0 ? trunk + call.leaf_rows : 0;
    first_leaf_row = int64_t{sequence.window} + (branch - 1) * call.leaf_rows - trunk;
  }

  __device__ __forceinline__ int64_t row_of(int key) const {
    return key < trunk ? key : first_leaf_row + key;
  }
};

// In its place without leaves.
struct NoLeaves {
  static constexpr int length = 0;
  template <typename... Arguments>
  __device__ __forceinline__ explicit NoLeaves(const Arguments&...) {}
  __device__ __forceinline__ int64_t row_of(int) const { return 0; }
};

struct Place {
  int64_t page;  // or sequence
  int64_t row;
  bool exists = true;
};

template <typename T, bool kLeaves>
__device__ __forceinline__ Place place(const Sequence<T, kLeaves>& sequence,
                                       const WindowAttention& call, int slot) {
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

  template <typename T, bool kLeaves>
  __device__ __forceinline__ Query(const WindowAttention& call,
                                   const Sequence<T, kLeaves>& sequence, int m) {
    row = m / sequence.group;
    head = sequence.head * sequence.group + m - row * sequence.group;
    branch = sequence.branch_of(call, row);
    begin = 0;
    if constexpr (kLeaves) {
      const int root = sequence.root_of(call, branch);
      const int first = sequence.window + (branch - 1) * call.leaf_rows;  // row of the leaf
      const int own = branch == 0 ? row : root + 1 + row - first;
      position = sequence.start + own - sequence.pad;
      const bool has_place = branch == 0 ? own < sequence.length : root >= 0;
      used = row < call.rows && has_place && position >= 0;
      const int last = branch == 0 ? own : root + call.leaf_rows;
      end = used ? sequence.start - sequence.pad + last + 1 : 0;
    } else {
      const int own = row - branch * sequence.window;
      position = sequence.start + own - sequence.pad;
      used = row < call.rows && own < sequence.length && position >= 0;
      end = used ? max(sequence.visible_end, sequence.window_end) : 0;
    }
    limit(call, sequence.block_offset);
  }

  // The row in (batch, rows, heads).
  template <typename T, bool kLeaves>
  __device__ __forceinline__ int64_t index(const WindowAttention& call,
                                           const Sequence<T, kLeaves>& sequence) const {
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
    if (call.sliding_window > 0) {
      end = call.sliding_window < end - position ? position + call.sliding_window : end;
      begin = max(position - call.sliding_window + 1, 0);
    }
  }
};

// What a thread keeps of a query row while it multiplies.
struct Limits {
  int branch, begin, end;
};

// The key tiles of a block, in order: [first, before) cached, [before, after) each once for every
// one of its branches, [after, last) cached.
struct KeyTileSchedule {
  int first_m, split;  // the block's first query row, and its split of the keys
  int first, before, after, last;
  int first_branch, branches;
  int all_begin, all_end;  // positions that every used row may see, by the masks

  template <typename T, bool kLeaves>
  __device__ __forceinline__ void plan(const WindowAttention& call,
                                       const Sequence<T, kLeaves>& sequence, int of_first_m,
                                       int of_split) {
    first_m = of_first_m;
    split = of_split;
    const int group = sequence.group, window = sequence.window;
    const int last_m = min(first_m + kQueries, call.rows * group) - 1;
    const int low_row = first_m / group, high_row = last_m / group;
    first_branch = sequence.branch_of(call, low_row);
    branches = sequence.branch_of(call, high_row) - first_branch + 1;
    if constexpr (kLeaves) {
      plan_leaves(call, sequence, low_row, high_row);
      return;
    }
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
    cut(call, sequence);
  }

  // Between the lowest and the highest row in use, by position.
  template <typename T>
  __device__ __forceinline__ void plan_leaves(const WindowAttention& call,
                                              const Sequence<T, true>& sequence, int low_row,
                                              int high_row) {
    const int last_branch = first_branch + branches - 1;
    int low = INT_MAX, high = -1;
    if (first_branch == 0) {
      low = low_row;
      high = min(high_row, sequence.length - 1);
    }
    if (last_branch > 0) {
      const int last_root = sequence.root_of(call, last_branch);
      low = min(low, max(sequence.root_of(call, max(first_branch, 1)), 0) + 1);
      if (last_root >= 0) high = max(high, last_root + call.leaf_rows);
    }
    first = before = after = last = 0;
    low = max(low, sequence.pad - sequence.start);
    if (low > high) return;
    const int origin = sequence.start - sequence.pad;
    const int span = call.sliding_window > 0 ? call.sliding_window : INT_MAX / 2;
    all_begin = max(origin + high - span + 1, 0);
    all_end = sequence.visible_end;
    first = max(origin + low - span + 1, 0) / kKeys;
    last = (origin + high + kKeys) / kKeys;
    cut(call, sequence);
  }

  // The tiles of the block's split, and those on the window.
  template <typename T, bool kLeaves>
  __device__ __forceinline__ void cut(const WindowAttention& call,
                                      const Sequence<T, kLeaves>& sequence) {
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
