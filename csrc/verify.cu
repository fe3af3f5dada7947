#include "verify.h"

#include "draft.cuh"

namespace pydllm {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

__device__ __forceinline__ FillOrder first_of_warp(FillOrder order) {
#pragma unroll
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
    const FillOrder other = {__shfl_xor_sync(kFullWarp, order.block, lanes),
                             __shfl_xor_sync(kFullWarp, order.cost, lanes),
                             __shfl_xor_sync(kFullWarp, order.row, lanes)};
    if (comes_before(other, order)) order = other;
  }
  return order;
}

// One block per following candidate. The decision is made in each of a sequence's blocks, from what
// none of them writes; block 0 alone writes it down.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    verify_kernel(int64_t* __restrict__ following,         // (batch, drafts, slots)
                  int32_t* __restrict__ branch_of,         // (batch,), as the next three
                  int32_t* __restrict__ accepted_of,       //
                  int32_t* __restrict__ remaining_of,      //
                  int32_t* __restrict__ complete_of,       //
                  int64_t* x,                              // (batch, slots), read and written
                  int32_t* __restrict__ step_map,          // (batch, slots), written
                  int32_t* __restrict__ nfe,               // (batch,), read and written
                  const int64_t* __restrict__ candidates,  // (batch, branches, slots)
                  const int64_t* __restrict__ token,       // (batch, branches, rows)
                  const T* __restrict__ score,             // (batch, branches, rows)
                  const int32_t* __restrict__ start,       // (batch,)
                  const int32_t* __restrict__ length,      // (batch,)
                  int slots, int rows, int branches, int drafts, int64_t mask_id, int block_size,
                  int64_t stride_x_row, int64_t stride_step_map_row) {
  __shared__ Window window;
  __shared__ int place_of[kVerifyBranches];   // row that the step from a candidate fills, or -1
  __shared__ bool leads_on[kVerifyBranches];  // that step leads to the next candidate
  __shared__ int masks_before, changed, masks_left, first_mask;

  const int64_t batch = blockIdx.x / static_cast<unsigned>(drafts);
  const int number = static_cast<int>(blockIdx.x % static_cast<unsigned>(drafts));
  const Span span = span_of(start[batch], length[batch], rows, slots);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  x += batch * stride_x_row;
  step_map += batch * stride_step_map_row;
  candidates += batch * branches * slots;
  token += batch * branches * rows;
  score += batch * branches * rows;
  if (thread == 0) {
    masks_before = changed = masks_left = 0;
    first_mask = max(min(length[batch], rows), 0);
  }

  // Where the step from each candidate goes, and whether it ends at the next one.
  for (int j = warp; j < branches; j += kWarps) {
    const int64_t* const ids = candidates + int64_t{j} * slots + span.start;
    const T* const scores = score + j * rows;
    FillOrder order = {kNoBlock, 0, INT_MAX};
    for (int row = span.first + lane; row < span.end; row += kWarpSize) {
      if (ids[row] != mask_id) continue;
      const FillOrder other = {block_of(span.start + row, block_size),
                               cost_of(to_float(scores[row])), row};
      if (comes_before(other, order)) order = other;
    }
    order = first_of_warp(order);
    const bool any = order.block != kNoBlock;
    const int64_t pick = any ? token[j * rows + order.row] : mask_id;
    bool same = pick != mask_id && j + 1 < branches;
    if (same) {
      for (int row = span.first + lane; row < span.end; row += kWarpSize) {
        same &= ids[slots + row] == (row == order.row ? pick : ids[row]);
      }
    }
    same = __all_sync(kFullWarp, same);
    if (lane == 0) {
      place_of[j] = any ? order.row : -1;
      leads_on[j] = same;
    }
  }
  __syncthreads();
  int branch = 0;
  while (leads_on[branch]) ++branch;  // the last candidate leads nowhere

  // The state after it, its masks, and their order by its own statistics.
  token += branch * rows;
  score += branch * rows;
  const int place = place_of[branch];
  const int64_t* const ids = candidates + int64_t{branch} * slots + span.start;
  int before = 0, left = 0, first = INT_MAX;
  for (int row = span.first + thread; row < span.end; row += kThreads) {
    const int64_t id = ids[row], next = row == place ? token[row] : id;
    const bool masked = next == mask_id;
    window.id[row] = next;
    window.block[row] = masked ? block_of(span.start + row, block_size) : kNoBlock;
    window.cost[row] = masked ? cost_of(to_float(score[row])) : 0;
    left += masked;
    if (id == mask_id) first = min(first, row);
    if (number == 0) before += x[span.start + row] == mask_id;
  }
  if (left > 0) atomicAdd(&masks_left, left);
  if (before > 0) atomicAdd(&masks_before, before);
  if (first != INT_MAX) atomicMin(&first_mask, first);
  __syncthreads();

  if (number == 0 && masks_before > 0) {
    int written = 0;
    for (int row = span.first + thread; row < span.end; row += kThreads) {
      const int64_t position = span.start + row;
      if (window.id[row] != x[position]) {
        x[position] = window.id[row];
        step_map[position] = nfe[batch];
        ++written;
      }
    }
    if (written > 0) atomicAdd(&changed, written);
  }
  __syncthreads();
  if (number == 0 && thread == 0) {
    int64_t whole = span.start + first_mask;
    if (block_size > 0) {
      const int64_t past = whole % block_size;
      whole -= past < 0 ? past + block_size : past;
    }
    branch_of[batch] = branch;
    accepted_of[batch] = changed;
    remaining_of[batch] = masks_left;
    complete_of[batch] = static_cast<int>(max(whole - span.start, int64_t{0}));
    const uint32_t counted = masks_before > 0 ? 1u : 0u;
    nfe[batch] = static_cast<int32_t>(static_cast<uint32_t>(nfe[batch]) + counted);  // may wrap
  }
  write_candidate(following + int64_t{blockIdx.x} * slots, x, window, token, span, slots, number);
}

}  // namespace

cudaError_t verify(int64_t* following, int32_t* branch, int32_t* accepted, int32_t* remaining,
                   int32_t* complete, int64_t* x, int32_t* step_map, int32_t* nfe,
                   const int64_t* candidates, const int64_t* token, const void* score,
                   const int32_t* start, const int32_t* length, Dtype dtype, int64_t batch,
                   int64_t slots, int64_t rows, int64_t branches, int64_t drafts, int64_t mask_id,
                   int64_t block_size, int64_t stride_x_row, int64_t stride_step_map_row,
                   cudaStream_t stream) {
  if (batch < 0 || slots < 0 || slots > INT_MAX || rows < 0 || rows > kDraftRows || branches < 1 ||
      branches > kVerifyBranches || drafts < 1 || batch > INT_MAX / drafts || block_size < 0) {
    return cudaErrorInvalidValue;
  }
  if (batch == 0 || slots == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(batch * drafts));
  const int size = static_cast<int>(block_size < INT_MAX ? block_size : INT_MAX);
  return with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    PYDLLM_LAUNCH(verify_kernel<T>, grid, dim3(kThreads), 0, stream, following, branch, accepted,
                  remaining, complete, x, step_map, nfe, candidates, token,
                  static_cast<const T*>(score), start, length, static_cast<int>(slots),
                  static_cast<int>(rows), static_cast<int>(branches), static_cast<int>(drafts),
                  mask_id, size, stride_x_row, stride_step_map_row);
    return cudaGetLastError();
  });
}

}  // namespace pydllm
