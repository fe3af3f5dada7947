// A block owns 64 query rows of one KV head: window rows with the heads of the group packed beside
// them, branch after branch. With leaves the trunk is branch 0, and leaf t branch t + 1: its keys
// on the window are the trunk's as far as its root, then its own. It walks the keys in order of
// position, in tiles of 64 positions counted from `pad`: tiles before the window, on it (once for
// every branch that it has rows of), after it. Tiles come by cp.async while the one before is
// multiplied; fresh keys come through registers, where they are rotated. Window slots of the cache
// are never read, so the commit needs no order between blocks. Where a key sits in its tile depends
// on its position alone, and a tile that a row does not see leaves it as it was: a row's bits do
// not depend on the batch, on other branches, on padding, or on which keys are cached.
//
// Keys are summed in splits, always the same positions, and splits are merged in order of position:
// by the block that walks over all of them, or, where there would be too few blocks for the device,
// by a second kernel after a block for each split. Both do the same operations, so that the bits
// do not depend on which it is.
#include "window_attention.h"

#include <climits>
#include <type_traits>

#include "attention_schedule.cuh"
#include "attention_split.cuh"
#include "attention_tile.cuh"

namespace pydllm {
namespace {

constexpr int kThreads = kAttentionThreads;
constexpr float kLog2E = 1.4426950408889634f;

template <int kHeadDim>
struct Shape {
  static constexpr int kChunks = kHeadDim / kChunk;  // of a row
  static constexpr int kTile = kKeys * kHeadDim;     // elements of a tile of keys or values
  // Of a multiprocessor, at once: without the number, ptxas spills to fit one more than that.
  static constexpr int kBlocks = kHeadDim == 64 ? 3 : 2;
  static constexpr int bytes(int stages) { return (stages * 2 * kTile + kQueries * kHeadDim) * 2; }
};

// Start the copy of a tile into a stage; fresh keys are there when this returns.
template <typename T, int kHeadDim, bool kLeaves>
__device__ __forceinline__ void fetch(T* keys, T* values, const WindowAttention& call,
                                      const Sequence<T, kLeaves>& sequence, int tile, int branch) {
  constexpr int kChunks = Shape<kHeadDim>::kChunks;
  const int thread = static_cast<int>(threadIdx.x);
  const std::conditional_t<kLeaves, LeafKeys, NoLeaves> leaf(call, sequence, branch);
  const int length = kLeaves ? leaf.length : branch < 0 ? 0 : sequence.length;
  const int64_t first_row = int64_t{branch} * sequence.window;
  const int first_slot = tile * kKeys + sequence.pad;
  const int chunk = thread % kChunks;
#pragma unroll 1
  for (int i = 0; i < kKeys * kChunks / kThreads; ++i) {
    const int key = thread / kChunks + i * (kThreads / kChunks);
    const int slot = first_slot + key, row = slot - sequence.start;
    const bool fresh = row >= 0 && row < length;
    const bool cached = !fresh && tile * kKeys + key < sequence.visible_end;
    const Place from = cached ? place(sequence, call, slot) : Place{0, 0};
    const T* cached_k = sequence.k_cache + from.page * call.stride_k_cache_batch +
                        from.row * call.stride_k_cache_row + chunk * kChunk;
    const T* cached_v = sequence.v_cache + from.page * call.stride_v_cache_batch +
                        from.row * call.stride_v_cache_row + chunk * kChunk;
    const T* fresh_v = sequence.v +
                       (kLeaves ? leaf.row_of(row) : first_row + row) * call.stride_v_row +
                       chunk * kChunk;
    const unsigned to = swizzled<kHeadDim>(key, chunk);
    if (!fresh) ptx::cp_async_16(keys + to, cached_k, cached);
    ptx::cp_async_16(values + to, fresh ? fresh_v : cached_v, fresh || cached);
  }
  if (branch < 0) return;
  constexpr int kUnits = Unit<kHeadDim>::kCount;
  const Unit<kHeadDim> unit(thread % kUnits, call.half);
  const RopeParams<T> rope = {call.cos, call.sin, call.half, static_cast<const T*>(call.k_norm),
                              call.eps};
#pragma unroll 1
  for (int i = 0; i < kKeys * kUnits / kThreads; ++i) {
    const int key = thread / kUnits + i * (kThreads / kUnits);
    const int row = first_slot + key - sequence.start;
    const bool fresh = row >= 0 && row < length;
    Vector<T> a, b;
    load_rotated<T, kHeadDim>(
        a, b, sequence.k + (kLeaves ? leaf.row_of(row) : first_row + row) * call.stride_k_row,
        fresh, tile * kKeys + key, unit, rope);
    if (!fresh) continue;
    store_vector(keys + swizzled<kHeadDim>(key, unit.first), a);
    store_vector(keys + swizzled<kHeadDim>(key, unit.second), b);
  }
}

// Rows of branch 0 whose first query row lies in the block's tile go to the cache.
template <typename T, int kHeadDim, bool kLeaves>
__device__ __forceinline__ void commit_rows(const WindowAttention& call,
                                            const Sequence<T, kLeaves>& sequence, int first_m) {
  constexpr int kUnits = Unit<kHeadDim>::kCount;
  const int group = sequence.group;
  const int thread = static_cast<int>(threadIdx.x);
  const Unit<kHeadDim> unit(thread % kUnits, call.half);
  const RopeParams<T> rope = {call.cos, call.sin, call.half, static_cast<const T*>(call.k_norm),
                              call.eps};
  const int end = min((first_m + kQueries + group - 1) / group, sequence.commit);
#pragma unroll 1
  for (int first = (first_m + group - 1) / group; first < end; first += kThreads / kUnits) {
    const int row = first + thread / kUnits;
    const int slot = sequence.start + row, position = slot - sequence.pad;
    const bool kept = row < end && position >= 0;
    Vector<T> a, b;
    load_rotated<T, kHeadDim>(a, b, sequence.k + row * call.stride_k_row, kept, position, unit,
                              rope);
    if (!kept) continue;
    const Place to = place(sequence, call, slot);
    if (!to.exists) continue;
    T* k =
        sequence.k_cache + to.page * call.stride_k_cache_batch + to.row * call.stride_k_cache_row;
    T* v =
        sequence.v_cache + to.page * call.stride_v_cache_batch + to.row * call.stride_v_cache_row;
    const T* fresh_v = sequence.v + row * call.stride_v_row;
    store_vector(k + unit.first * kChunk, a);
    store_vector(k + unit.second * kChunk, b);
    for (const int chunk : {unit.first, unit.second}) {
      store_vector(v + chunk * kChunk, load_vector(fresh_v + chunk * kChunk));
    }
  }
}

// The block's query rows, rotated; rows that are not used are 0.
template <typename T, int kHeadDim, bool kLeaves>
__device__ __forceinline__ void fetch_queries(T* tile, const WindowAttention& call,
                                              const Sequence<T, kLeaves>& sequence, int first_m) {
  constexpr int kUnits = Unit<kHeadDim>::kCount;
  const int thread = static_cast<int>(threadIdx.x);
  const Unit<kHeadDim> unit(thread % kUnits, call.half);
  const RopeParams<T> rope = {call.cos, call.sin, call.half, static_cast<const T*>(call.q_norm),
                              call.eps};
#pragma unroll 1
  for (int i = 0; i < kQueries * kUnits / kThreads; ++i) {
    const int m = thread / kUnits + i * (kThreads / kUnits);
    const Query query(call, sequence, first_m + m);
    const T* row = static_cast<const T*>(call.q) + sequence.batch * call.stride_q_batch +
                   query.row * call.stride_q_row + query.head * call.stride_q_head;
    Vector<T> a, b;
    load_rotated<T, kHeadDim>(a, b, row, query.used, query.position, unit, rope);
    store_vector(tile + swizzled<kHeadDim>(m, unit.first), a);
    store_vector(tile + swizzled<kHeadDim>(m, unit.second), b);
  }
}

// Scores to base 2, capped, and -inf where a row does not see a key.
template <typename T, bool kLeaves>
__device__ __forceinline__ void mask(float (&s)[kKeys / 8][4], const Sequence<T, kLeaves>& sequence,
                                     const Limits (&limits)[2], const bool (&mine)[2], int tile,
                                     bool all_seen, float factor, float softcap) {
  const int column = 2 * (static_cast<int>(threadIdx.x) % 4);
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[n][i] *= factor;
      if (softcap != 0.f) s[n][i] = capped(s[n][i], softcap);
    }
  }
  if (all_seen) return;
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int position = tile * kKeys + 8 * n + column + i % 2;
      const bool visible = position < sequence.visible_end ||
                           (position >= sequence.window_begin && position < sequence.window_end);
      const bool seen =
          visible && mine[i / 2] && position >= limits[i / 2].begin && position < limits[i / 2].end;
      if (!seen) s[n][i] = -INFINITY;
    }
  }
}

// Of two or three stages, the tile that was asked for first has landed.
__device__ __forceinline__ void wait_for_oldest(int stages) {
  if (stages == 2) {
    ptx::cp_async_wait<0>();
  } else {
    ptx::cp_async_wait<1>();
  }
}

template <typename T, int kHeadDim, bool kLeaves>
__global__ void __launch_bounds__(kThreads, Shape<kHeadDim>::kBlocks)
    window_attention_kernel(const WindowAttention call) {
  using Tile = Shape<kHeadDim>;
  PYDLLM_DYNAMIC_SHARED(dynamic);
  ptx::wait_for_previous();
  T* queries = reinterpret_cast<T*>(dynamic);
  T* shared = queries + kQueries * kHeadDim;  // stages: a tile of keys, then one of values

  __shared__ Sequence<T, kLeaves> sequence;
  __shared__ KeyTileSchedule schedule;
  if (threadIdx.x == 0) {
    const int tiles = (call.rows * (call.heads / call.kv_heads) + kQueries - 1) / kQueries;
    const int tile = static_cast<int>(blockIdx.x) % tiles;
    const int split = static_cast<int>(blockIdx.x) / tiles % call.splits;
    const int of_batch = static_cast<int>(blockIdx.x) / tiles / call.splits;
    sequence.read(call, of_batch / call.kv_heads, of_batch % call.kv_heads);
    schedule.plan(call, sequence, tile * kQueries, split);
  }
  __syncthreads();
  const int steps = schedule.steps();
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp_m = schedule.first_m + static_cast<int>(threadIdx.x) / kWarpSize * 16;
  Limits limits[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const Query query(call, sequence, warp_m + lane / 4 + 8 * r);
    limits[r] = {query.branch, query.begin, query.end};
  }
  const int low_branch = sequence.branch_of(call, warp_m / sequence.group);
  const int high_branch = sequence.branch_of(call, (warp_m + 15) / sequence.group);
  const float softcap = call.softcap * kLog2E;
  const float factor = call.softcap == 0.f ? call.scale * kLog2E : call.scale / call.softcap;
  OnlineSoftmax<kHeadDim> online;
  Total total;
  int split = schedule.split;  // that is being computed
  bool merged = false;         // splits before it are in memory

  // Of the ring of stages, the one that a step reads, and the one that it fills: that of the step
  // before. Steps before the first fill the others.
  int reads = 0, fills = 0;
#pragma unroll 1
  for (int step = 1 - call.stages; step < steps; ++step) {
    if (step >= 0) {
      wait_for_oldest(call.stages);
      __syncthreads();  // the step's tile is there, and all are done with the one before
    }
    int tile, branch;
    if (step + call.stages - 1 < steps) {
      schedule.find(step + call.stages - 1, tile, branch);
      T* stage = shared + fills * 2 * Tile::kTile;
      fetch<T, kHeadDim>(stage, stage + Tile::kTile, call, sequence, tile, branch);
    }
    ptx::cp_async_commit();
    fills = fills + 1 == call.stages ? 0 : fills + 1;
    if (step < 0) {
      if (step < -1) continue;
      if (steps > 0) fetch_queries<T, kHeadDim>(queries, call, sequence, schedule.first_m);
      if (schedule.split == 0) commit_rows<T, kHeadDim>(call, sequence, schedule.first_m);
      continue;
    }
    const T* keys = shared + reads * 2 * Tile::kTile;
    reads = reads + 1 == call.stages ? 0 : reads + 1;
    schedule.find(step, tile, branch);
    if (warp_m >= call.rows * sequence.group) continue;
    if (branch >= 0 && (branch < low_branch || branch > high_branch)) continue;
    if (call.splits == 1 && tile / call.split_tiles != split) {
      float* rows[2] = {part_row<kHeadDim>(call, sequence, schedule, warp_m, 0),
                        part_row<kHeadDim>(call, sequence, schedule, warp_m, 1)};
      merge_split(online, total, {merged ? rows[0] : nullptr, merged ? rows[1] : nullptr});
      store_part(rows, online);
      online = {};
      merged = true;
      split = tile / call.split_tiles;
    }
    const bool mine[2] = {branch < 0 || branch == limits[0].branch,
                          branch < 0 || branch == limits[1].branch};
    float s[kKeys / 8][4];
    multiply_keys<T, kHeadDim, kKeys>(s, queries + (warp_m - schedule.first_m) * kHeadDim, keys);
    const bool all_seen =
        (branch < 0 || low_branch == high_branch) && tile * kKeys >= schedule.all_begin &&
        (tile + 1) * kKeys <= schedule.all_end && (tile + 1) * kKeys <= sequence.visible_end;
    mask(s, sequence, limits, mine, tile, all_seen, factor, softcap);
    add_values<T, kHeadDim, kKeys>(online, s, keys + Tile::kTile, mine);
  }

  float* rows[2] = {part_row<kHeadDim>(call, sequence, schedule, warp_m, 0),
                    part_row<kHeadDim>(call, sequence, schedule, warp_m, 1)};
  if (call.splits > 1) {
    store_state(call, sequence, schedule, warp_m, online);
    if (steps > 0) store_part(rows, online);  // nobody reads what has sum 0
    return;
  }
  merge_split(online, total, {merged ? rows[0] : nullptr, merged ? rows[1] : nullptr});
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const Query query(call, sequence, warp_m + lane / 4 + 8 * r);
    if (query.row >= call.rows) continue;
    const float factor = total.sum[r] == 0.f ? 1.f : 1.f / total.sum[r];
    T* out = static_cast<T*>(call.out) + query.index(call, sequence) * kHeadDim + 2 * (lane % 4);
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      const unsigned pair =
          pack<T>(online.acc[n][2 * r] * factor, online.acc[n][2 * r + 1] * factor);
      *reinterpret_cast<unsigned*>(out + 8 * n) = query.used ? pair : 0u;
    }
  }
}

template <typename T, int kHeadDim, bool kLeaves>
cudaError_t launch(const WindowAttention& call, cudaStream_t stream) {
  const int64_t tiles =
      (int64_t{call.rows} * (call.heads / call.kv_heads) + kQueries - 1) / kQueries;
  const int64_t blocks = tiles * call.splits * call.kv_heads * call.batch;
  if (blocks > INT_MAX) return cudaErrorInvalidValue;
  WindowAttention staged = call;
  if (call.stages == 0) {
    // Room for two blocks on a multiprocessor, with what the driver takes of each.
    const int available = shared_of_multiprocessor() / 2 - 1536;
    staged.stages = Shape<kHeadDim>::bytes(3) <= available ? 3 : 2;
  }
  const int bytes = Shape<kHeadDim>::bytes(staged.stages);
  const cudaError_t error = allow_shared(window_attention_kernel<T, kHeadDim, kLeaves>, bytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(blocks)), block(kThreads);
  PYDLLM_LAUNCH_PDL(call.pdl, (window_attention_kernel<T, kHeadDim, kLeaves>), grid, block, bytes,
                    stream, staged);
  const cudaError_t launched = cudaGetLastError();
  if (launched != cudaSuccess || call.splits == 1) return launched;

  constexpr int kRows = kThreads / (kHeadDim / 4);
  const int64_t rows = int64_t{call.batch} * call.rows * call.heads;
  if ((rows + kRows - 1) / kRows > INT_MAX) return cudaErrorInvalidValue;
  const dim3 merge_grid(static_cast<unsigned>((rows + kRows - 1) / kRows));
  PYDLLM_LAUNCH_PDL(call.pdl, (window_attention_merge_kernel<T, kHeadDim>), merge_grid, block, 0,
                    stream, static_cast<T*>(call.out), call.part, call.state, rows, call.splits);
  return cudaGetLastError();
}

template <typename T, int kHeadDim>
cudaError_t launch_of(const WindowAttention& call, bool leaves, cudaStream_t stream) {
  return leaves ? launch<T, kHeadDim, true>(call, stream)
                : launch<T, kHeadDim, false>(call, stream);
}

// Whether every head and table begins at 16 bytes.
bool aligned(const WindowAttention& call) {
  const void* const pointers[] = {call.out,     call.q,       call.k,     call.v,
                                  call.k_cache, call.v_cache, call.cos,   call.sin,
                                  call.part,    call.q_norm,  call.k_norm};
  for (const void* pointer : pointers) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return false;
  }
  const int64_t strides[] = {
      call.stride_q_batch,       call.stride_q_row,       call.stride_q_head,
      call.stride_k_batch,       call.stride_k_row,       call.stride_k_head,
      call.stride_v_batch,       call.stride_v_row,       call.stride_v_head,
      call.stride_k_cache_batch, call.stride_k_cache_row, call.stride_k_cache_head,
      call.stride_v_cache_batch, call.stride_v_cache_row, call.stride_v_cache_head};
  for (const int64_t stride : strides) {
    if (stride % kChunk != 0) return false;
  }
  return true;
}

bool fits(const WindowAttention& call) {
  const bool leaves = call.leaf_rows > 0;
  const bool apart_rows =
      call.branches > 0 &&
      (leaves ? (call.branches - 1) * int64_t{call.leaf_rows} < call.rows && call.block_size == 0
              : call.rows % call.branches == 0);
  const bool whole = call.kv_heads > 0 && call.heads % call.kv_heads == 0 && apart_rows &&
                     call.leaf_rows >= 0 && call.half >= 0 && call.half % kChunk == 0 &&
                     2 * call.half <= call.head_dim;
  const bool paged = call.table == nullptr || (call.page > 0 && call.slots % call.page == 0);
  const int64_t split = int64_t{call.split_tiles} * kKeys;
  const int64_t splits = split > 0 ? (int64_t{call.slots} + call.leaf_rows + split - 1) / split : 0;
  const bool alone = call.splits == 1 && (splits <= 1 || call.part != nullptr);
  const bool apart = call.splits == splits && call.part != nullptr && call.state != nullptr;
  // Room for the tiles and the group after the last row and slot.
  const bool small = call.rows >= 0 && call.heads >= 0 &&
                     int64_t{call.rows} * call.heads <= INT_MAX - kQueries && call.slots >= 0 &&
                     call.slots <= INT_MAX / 4;
  const bool staged = call.stages == 0 || call.stages == 2 || call.stages == 3;
  return split > 0 && (alone || apart) && staged && whole && paged && small;
}

}  // namespace

cudaError_t window_attention(const WindowAttention& call, cudaStream_t stream) {
  if (!fits(call)) return cudaErrorInvalidValue;
  if (!aligned(call)) return cudaErrorMisalignedAddress;
  if (call.batch == 0 || call.rows == 0 || call.heads == 0) return cudaSuccess;
  const bool bf16 = call.dtype == Dtype::kBFloat16;
  if (!bf16 && call.dtype != Dtype::kFloat16) return cudaErrorInvalidValue;
  const bool leaves = call.leaf_rows > 0;
  switch (call.head_dim) {
    case 64:
      return bf16 ? launch_of<__nv_bfloat16, 64>(call, leaves, stream)
                  : launch_of<__half, 64>(call, leaves, stream);
    case 128:
      return bf16 ? launch_of<__nv_bfloat16, 128>(call, leaves, stream)
                  : launch_of<__half, 128>(call, leaves, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace pydllm
