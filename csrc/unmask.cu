#include "unmask.h"

#include "block.cuh"
#include "common.cuh"
#include "philox.cuh"

namespace pydllm {
namespace {

constexpr int kMaxThreads = 1024;
// As in the reference: entropies are summed in units of 2^-40 nats and count as at most 128 nats.
constexpr float kPerNat = 1099511627776.f;
constexpr float kUnit = 1.f / kPerNat;
constexpr float kMost = 128.f;
constexpr uint32_t kRandomOrder = 0xFFFFFFFFu;  // no vocabulary id is there
constexpr int kNone = INT_MAX;                  // after every row
constexpr uint64_t kNoRow = ~uint64_t{0};       // sorts after every row

__device__ __forceinline__ float cost_of(uint64_t key) {
  return from_ordered(static_cast<uint32_t>(key >> 32));
}

// What a row's entropy adds to the sum, exact in the order of any addition.
__device__ __forceinline__ int64_t units_of(uint64_t key) {
  const float cost = fminf(fmaxf(cost_of(key), 0.f), kMost);
  return key == kNoRow ? 0 : static_cast<int64_t>(__fmul_rn(cost, kPerNat));
}

__device__ __forceinline__ int count_block(int count) {
  return reduce_block(count, 0, Sum());
}

// How many of the sorted rows lie within the bound: no row passes after one that failed.
__device__ __forceinline__ int count_within(const uint64_t* order, int size, float bound) {
  // Each thread has neighbours, so that one scan of the threads gives all sums.
  const int threads = blockDim.x, thread = threadIdx.x;
  const int each = (size + threads - 1) / threads;
  const int first = min(thread * each, size), end = min(first + each, size);
  int64_t own = 0;
  for (int i = first; i < end; ++i) own += units_of(order[i]);
  int64_t spent = exclusive_scan(own);
  int passed = 0;
  for (int i = first; i < end; ++i) {
    const uint64_t key = order[i];
    const float nats = __fmul_rn(static_cast<float>(spent), kUnit);
    spent += units_of(key);
    passed += key != kNoRow && cost_of(key) < INFINITY && nats <= bound;
  }
  return count_block(passed);
}

// One block per sequence. A row's key is what it costs and then its position, so that keys differ
// and sorting them is the order of the rule, ties included.
template <typename Score, int kRows>
__global__ void __launch_bounds__(kMaxThreads) unmask_kernel(const Unmask call) {
  __shared__ uint64_t order[kRows];
  __shared__ bool keep[kRows];

  const int64_t sequence = blockIdx.x;
  const int threads = blockDim.x, thread = threadIdx.x;
  const Rule rule = call.rule;

  const int64_t start = call.start[sequence];
  const int32_t nfe = call.nfe[sequence];
  const int floor = call.quota == nullptr ? call.min_tokens : call.quota[sequence];
  // The rows in use that lie in x; as int64, since start may be any number.
  const bool was_done = call.done != nullptr && call.done[sequence];
  const int64_t length = was_done ? 0 : call.length[sequence];
  const int64_t rows = length < call.rows ? length : call.rows;
  const int64_t first = start < 0 ? -start : 0;
  const int64_t end = rows < call.slots - start ? rows : call.slots - start;
  const auto inside = [&](int j) { return j >= first && j < end; };

  int64_t* x = call.x + sequence * call.stride_x_row + start;
  int32_t* step_map = call.step_map + sequence * call.stride_step_map_row + start;
  const int64_t* token = call.token + sequence * call.stride_token_row;
  const Score* score = static_cast<const Score*>(call.score) + sequence * call.stride_score_row;
  const float limit = rounded<Score>(call.limit);
  const auto words_of = [&](int j) {
    return philox(kRandomOrder, static_cast<uint32_t>(start + j),
                  static_cast<uint32_t>(call.request[sequence]), static_cast<uint32_t>(nfe),
                  static_cast<uint64_t>(call.seed));
  };

  const int size = power_of_two(static_cast<int>(call.rows));
  int ables = 0;
  for (int j = thread; j < size; j += threads) {
    const bool able = inside(j) && x[j] == call.mask_id;
    uint64_t key = kNoRow;
    if (able) {
      uint32_t cost = 0;
      if (rule == Rule::kRandom) {
        cost = 0xFFFFFFFFu - words_of(j).word[0];
      } else if (rule != Rule::kLeftToRight) {
        const bool ascending = rule == Rule::kEntropy || rule == Rule::kEntropyBound;
        float value = to_float(score[j]);
        value = ascending ? -value : value;
        value = value != value ? -INFINITY : value;
        cost = ordered(__fsub_rn(0.f, value));  // a negative zero becomes a zero
      }
      key = static_cast<uint64_t>(cost) << 32 | static_cast<uint32_t>(j);
    }
    order[j] = key;
    keep[j] = false;
    ables += able;
  }
  ables = count_block(ables);

  // How many the rule lets pass, where that needs no order.
  const bool by_score = rule == Rule::kThreshold || rule == Rule::kEntropy;
  const auto passes = [&](uint64_t key) {
    const float cost = cost_of(key);
    return key != kNoRow && cost < INFINITY &&
           (rule == Rule::kEntropy ? cost <= limit : -cost >= limit);
  };
  int passed = 0;
  if (by_score) {
    for (int j = thread; j < size; j += threads) passed += passes(order[j]);
    passed = count_block(passed);
  }

  if (by_score && passed >= floor) {
    for (int j = thread; j < size; j += threads) keep[j] = passes(order[j]);
  } else {
    sort_block(order, size);
    if (rule == Rule::kFactor) {
      for (int j = thread; j < ables; j += threads) {
        // Rounded like the definition: a quotient, then a difference.
        const float least = __fsub_rn(1.f, __fdiv_rn(limit, static_cast<float>(j + 2)));
        passed += cost_of(order[j]) < INFINITY && -cost_of(order[j]) >= least;
      }
      passed = count_block(passed);
    } else if (rule == Rule::kEntropyBound) {
      passed = count_within(order, size, limit);
    }
    const int n = min(max(passed, floor), ables);
    for (int i = thread; i < n; i += threads) keep[static_cast<uint32_t>(order[i])] = true;
  }
  __syncthreads();

  int part = 0, accepted = 0, remaining = 0;
  int open = 0, place = kNone;  // masks, and the first end, at positions where an end may be
  const int64_t stop = call.done == nullptr ? 0 : call.end[sequence];
  const int64_t ends_from = call.ends_from == nullptr ? start : call.ends_from[sequence];
  for (int j = thread; j < size; j += threads) {
    if (!inside(j)) continue;
    const int64_t before = x[j];
    const bool kept = keep[j];
    part += before == call.mask_id;
    int64_t after = before;
    if (kept) {
      after = token[j];
      step_map[j] = nfe;
      x[j] = after;
    }
    accepted += kept;
    remaining += after == call.mask_id;
    if (start + j < ends_from) continue;
    open += after == call.mask_id;
    for (int64_t i = 0; i < call.ends; ++i) {
      if (after == call.eos_ids[i] && start + j < stop) place = min(place, j);
    }
  }
  part = count_block(part);
  accepted = count_block(accepted);
  bool finished = false;
  if (call.done != nullptr) {
    open = count_block(open);
    place = reduce_block(place, kNone, Minimum());
    const bool complete = length > 0 && (call.last || open == 0);
    const bool ended = complete && place != kNone;
    finished = complete && (ended || start + rows >= stop);
    if (ended) {
      const int64_t filled_to = (stop < call.slots ? stop : call.slots) - start;
      for (int64_t j = place + 1 + thread; j < filled_to; j += threads) {
        x[j] = call.eos_ids[0];
        step_map[j] = -1;
      }
    }
  }
  remaining = count_block(remaining);
  if (thread != 0) return;
  call.remaining[sequence] = was_done || finished ? -1 : remaining;
  call.accepted[sequence] = accepted;
  // As in torch, the last number wraps; what wraps is unsigned.
  if (part > 0) call.nfe[sequence] = static_cast<int32_t>(static_cast<uint32_t>(nfe) + 1u);
  if (finished) call.done[sequence] = true;
}

template <typename Score>
cudaError_t launch(const Unmask& call, cudaStream_t stream) {
  const int size = power_of_two(static_cast<int>(call.rows));
  // The network compares half as many pairs as there are rows.
  const int threads = size < 2 * kWarpSize     ? kWarpSize
                      : size < 2 * kMaxThreads ? size / 2
                                               : kMaxThreads;
  const dim3 grid(static_cast<unsigned>(call.batch)), block(static_cast<unsigned>(threads));
  if (size <= 256) {
    PYDLLM_LAUNCH((unmask_kernel<Score, 256>), grid, block, 0, stream, call);
  } else {
    PYDLLM_LAUNCH((unmask_kernel<Score, kMaxWindow>), grid, block, 0, stream, call);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t unmask(const Unmask& call, cudaStream_t stream) {
  if (call.batch < 0 || call.batch > INT_MAX || call.rows < 1 || call.rows > kMaxWindow) {
    return cudaErrorInvalidValue;
  }
  if (call.batch == 0) return cudaSuccess;
  return with_type(call.dtype, [&](auto* typed) {
    return launch<std::remove_pointer_t<decltype(typed)>>(call, stream);
  });
}

}  // namespace pydllm
