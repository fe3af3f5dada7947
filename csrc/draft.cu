#include "draft.h"

#include "draft.cuh"

namespace pydllm {
namespace {

constexpr int kThreads = 128;

// One block per candidate.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    draft_kernel(int64_t* __restrict__ candidates,    // (batch, branches, slots)
                 const int64_t* __restrict__ x,       // (batch, slots)
                 const int64_t* __restrict__ token,   // (batch, rows)
                 const T* __restrict__ score,         // (batch, rows)
                 const int32_t* __restrict__ start,   // (batch,)
                 const int32_t* __restrict__ length,  // (batch,)
                 int slots, int rows, int branches, int64_t mask_id, int block_size,
                 int64_t stride_x_row, int64_t stride_token_row, int64_t stride_score_row) {
  __shared__ Window window;
  const int64_t batch = blockIdx.x / static_cast<unsigned>(branches);
  const int number = static_cast<int>(blockIdx.x % static_cast<unsigned>(branches));
  const Span span = span_of(start[batch], length[batch], rows, slots);
  x += batch * stride_x_row;
  score += batch * stride_score_row;
  const int thread = static_cast<int>(threadIdx.x);
  for (int row = span.first + thread; row < span.end; row += kThreads) {
    const int64_t position = span.start + row;
    window.id[row] = x[position];
    const bool masked = window.id[row] == mask_id;
    window.block[row] = masked ? block_of(position, block_size) : kNoBlock;
    window.cost[row] = masked ? cost_of(to_float(score[row])) : 0;
  }
  __syncthreads();
  write_candidate(candidates + int64_t{blockIdx.x} * slots, x, window,
                  token + batch * stride_token_row, span, slots, number);
}

}  // namespace

cudaError_t draft(int64_t* candidates, const int64_t* x, const int64_t* token, const void* score,
                  const int32_t* start, const int32_t* length, Dtype dtype, int64_t batch,
                  int64_t slots, int64_t rows, int64_t branches, int64_t mask_id,
                  int64_t block_size, int64_t stride_x_row, int64_t stride_token_row,
                  int64_t stride_score_row, cudaStream_t stream) {
  if (batch < 0 || slots < 0 || slots > INT_MAX || rows < 0 || rows > kDraftRows || branches < 1 ||
      batch > INT_MAX / branches || block_size < 0) {
    return cudaErrorInvalidValue;
  }
  if (batch == 0 || slots == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(batch * branches));
  const int size = static_cast<int>(block_size < INT_MAX ? block_size : INT_MAX);
  return with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    PYDLLM_LAUNCH(draft_kernel<T>, grid, dim3(kThreads), 0, stream, candidates, x, token,
                  static_cast<const T*>(score), start, length, static_cast<int>(slots),
                  static_cast<int>(rows), static_cast<int>(branches), mask_id, size, stride_x_row,
                  stride_token_row, stride_score_row);
    return cudaGetLastError();
  });
}

}  // namespace pydllm
