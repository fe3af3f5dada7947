#include "edit_tokens.h"

#include "block.cuh"
#include "common.cuh"

namespace pydllm {
namespace {

constexpr int kMaxThreads = 1024;
constexpr uint64_t kNoRow = ~uint64_t{0};  // sorts after every row

__device__ __forceinline__ int count_block(int count) {
  return reduce_block(count, 0, Sum());
}

// One block per sequence. A mask's key is what it costs and then its position, so that keys differ
// and sorting them is the order of the definition, ties included.
template <typename Score, int kRows>
__global__ void __launch_bounds__(kMaxThreads, 1) edit_tokens_kernel(const EditTokens call) {
  __shared__ uint64_t order[kRows];
  __shared__ bool fill[kRows];

  const int64_t sequence = blockIdx.x;
  const int threads = blockDim.x, thread = threadIdx.x;

  const int64_t start = call.start[sequence];
  const int64_t editable_from = call.editable_from[sequence];
  const int32_t nfe = call.nfe[sequence];
  // The rows in use that lie in x; as int64, since start may be any number.
  const int64_t length = call.complete[sequence] ? 0 : call.length[sequence];
  const int64_t rows = length < call.rows ? length : call.rows;
  const int64_t first = start < 0 ? -start : 0;
  const int64_t end = rows < call.slots - start ? rows : call.slots - start;
  const bool takes_part = first < end;
  const auto own = [&](int j) { return j >= first && j < end && start + j >= editable_from; };

  int64_t* x = call.x + sequence * call.stride_x_row + start;
  int32_t* step_map = call.step_map + sequence * call.stride_step_map_row + start;
  const int64_t* token = call.token + sequence * call.stride_token_row;
  const Score* score = static_cast<const Score*>(call.score) + sequence * call.stride_score_row;
  const float limit = rounded<Score>(call.threshold);
  const float edit_limit = rounded<Score>(call.edit_threshold);
  const auto value_of = [&](int j) {
    const float value = to_float(score[j]);
    return value != value ? -INFINITY : value;
  };

  const int size = power_of_two(static_cast<int>(call.rows));
  int masks = 0, passed = 0;
  for (int j = thread; j < size; j += threads) {
    const bool masked = own(j) && x[j] == call.mask_id;
    uint64_t key = kNoRow;
    bool passes = false;
    if (masked) {
      const float value = value_of(j);
      passes = value > limit;
      // A negative zero becomes a zero.
      const uint32_t cost = ordered(__fsub_rn(0.f, value));
      key = static_cast<uint64_t>(cost) << 32 | static_cast<uint32_t>(j);
    }
    order[j] = key;
    fill[j] = passes;
    masks += masked;
    passed += passes;
  }
  masks = count_block(masks);
  passed = count_block(passed);
  if (passed < call.min_tokens) {
    // Those that pass are the first of the order.
    sort_block(order, size);
    const int n = min(call.min_tokens, masks);
    for (int i = thread; i < n; i += threads) fill[static_cast<uint32_t>(order[i])] = true;
    __syncthreads();
  }

  int32_t post_steps = call.post_steps[sequence];
  if (takes_part && masks == 0) {
    post_steps = static_cast<int32_t>(static_cast<uint32_t>(post_steps) + 1u);  // may wrap
  }
  const bool closing = call.confirm && masks == 0 && post_steps > call.max_post_steps;
  int remaining = 0, filled = 0, edited = 0;
  for (int j = thread; j < size; j += threads) {
    if (!own(j)) continue;
    const int64_t before = x[j];
    int64_t after = before;
    const bool fills = fill[j];
    bool edits = false;
    if (fills) {
      after = token[j];
    } else if (before != call.mask_id && !closing) {
      edits = token[j] != before && token[j] != call.mask_id && value_of(j) > edit_limit;
      if (edits) after = token[j];
    }
    if (fills || edits) {
      x[j] = after;
      step_map[j] = nfe;
    }
    remaining += after == call.mask_id;
    filled += fills;
    edited += edits;
  }
  remaining = count_block(remaining);
  filled = count_block(filled);
  edited = count_block(edited);
  if (thread != 0) return;
  call.remaining[sequence] = remaining;
  call.filled[sequence] = filled;
  call.edited[sequence] = edited;
  if (!takes_part) return;
  call.nfe[sequence] = static_cast<int32_t>(static_cast<uint32_t>(nfe) + 1u);  // may wrap
  call.post_steps[sequence] = post_steps;
  const bool spent = !call.confirm && remaining == 0 && post_steps >= call.max_post_steps;
  if (spent || (masks == 0 && edited == 0)) call.complete[sequence] = true;
}

template <typename Score>
cudaError_t launch(const EditTokens& call, cudaStream_t stream) {
  const int size = power_of_two(static_cast<int>(call.rows));
  // The network compares half as many pairs as there are rows.
  const int threads = size < 2 * kWarpSize     ? kWarpSize
                      : size < 2 * kMaxThreads ? size / 2
                                               : kMaxThreads;
  const dim3 grid(static_cast<unsigned>(call.batch)), block(static_cast<unsigned>(threads));
  if (size <= 256) {
    PYDLLM_LAUNCH((edit_tokens_kernel<Score, 256>), grid, block, 0, stream, call);
  } else {
    PYDLLM_LAUNCH((edit_tokens_kernel<Score, kMaxEditedWindow>), grid, block, 0, stream, call);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t edit_tokens(const EditTokens& call, cudaStream_t stream) {
  if (call.batch < 0 || call.batch > INT_MAX || call.rows < 1 || call.rows > kMaxEditedWindow) {
    return cudaErrorInvalidValue;
  }
  if (call.batch == 0) return cudaSuccess;
  return with_type(call.dtype, [&](auto* typed) {
    return launch<std::remove_pointer_t<decltype(typed)>>(call, stream);
  });
}

}  // namespace pydllm
