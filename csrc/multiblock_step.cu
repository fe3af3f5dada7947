#include "multiblock_step.h"

#include "block.cuh"
#include "common.cuh"

namespace pydllm {
namespace {

constexpr int kThreads = 256;
constexpr int kNone = INT_MAX;  // after every position and block
enum Mode : int { kFinished, kFull, kCached, kCommit, kRefresh };

// Marks of a position, bits that are or-ed.
enum Mark : unsigned char { kCandidate = 1, kAccepted = 2 };

__device__ __forceinline__ int first_of(int value) {
  return reduce_block(value, kNone, Minimum());
}
__device__ __forceinline__ int last_of(int value) {
  return reduce_block(value, 0, Maximum());
}
__device__ __forceinline__ bool any_of(bool value) {
  return __syncthreads_or(value) != 0;
}

// As in torch: numbers of a state may be out of range.
__device__ __forceinline__ int wrapped(int64_t number) {
  return static_cast<int>(static_cast<uint32_t>(number));
}

// One block per sequence. A thread has the same positions and blocks in every pass; what it learns
// of others' comes from reductions, and from shared memory after a barrier.
template <typename Entropy>
__global__ void __launch_bounds__(kThreads) multiblock_step_kernel(const MultiblockStep call) {
  __shared__ unsigned char marks[kMaxPositions];
  __shared__ int masks[kMaxBlocks], done[kMaxBlocks];
  __shared__ bool full[kMaxBlocks], kept[kMaxBlocks];

  const int64_t sequence = blockIdx.x;
  const int thread = threadIdx.x;
  int32_t* numbers = call.numbers + sequence;
  const auto number = [&](int row) -> int32_t& { return numbers[row * call.stride_numbers_row]; };
  int mode = number(4);
  if (mode == kFinished) return;
  int nfe = number(0), decoded = number(1), created = number(2), prefix = number(3);
  const int first = number(9);

  const int count = static_cast<int>(call.count), size = call.size, generated = call.generated;
  // Any other prompt would be written elsewhere.
  const int prompt = max(0, min(call.prompt[sequence], static_cast<int>(call.slots) - generated));
  created = max(1, min(created, count));
  const bool shifted = call.shifted, cached = call.cached;
  int32_t* blocks = call.blocks + sequence * call.stride_blocks_row;
  const int64_t plane = call.stride_blocks_plane;

  const int positions = generated;
  int64_t* x = call.x + sequence * call.stride_x_row + prompt;
  int32_t* step_map = call.step_map + sequence * call.stride_step_map_row + prompt;
  bool* eligible = call.eligible + sequence * call.stride_eligible_row + prompt;
  const int64_t* token = call.token + sequence * call.stride_token_row;
  const auto* entropy =
      static_cast<const Entropy*>(call.entropy) + sequence * call.stride_entropy_row;

  // Accept.
  int focus = kNone;  // the first fully activated block with masks
  for (int k = thread; k < count; k += kThreads) {
    masks[k] = blocks[k];
    full[k] = blocks[plane + k] > 0;
    done[k] = blocks[2 * plane + k];
    kept[k] = blocks[3 * plane + k] > 0;
    if (full[k] && masks[k] > 0 && k < created) focus = min(focus, k);
  }
  focus = first_of(focus);
  const float bound = rounded<Entropy>(call.limit);
  // The least (cost, position) of all and of the focus; costs are no NaN.
  uint64_t best = kNoKey, best_in_focus = kNoKey;
  bool accepts_in_focus = false;
  for (int j = thread; j < positions; j += kThreads) {
    const int64_t column = static_cast<int64_t>(prompt) + j - first;
    const bool candidate = eligible[j] && column >= 0 && column < call.columns;
    bool accept = false;
    if (candidate) {
      float cost = to_float(entropy[column]);
      cost = cost != cost ? INFINITY : __fadd_rn(cost, 0.f);  // a negative zero becomes a zero
      accept = cost < INFINITY && (shifted ? cost < bound : cost <= bound);
      const uint64_t key = static_cast<uint64_t>(ordered(cost)) << 32 | static_cast<uint32_t>(j);
      const bool in_focus = j / size == focus;
      best = key < best ? key : best;
      if (in_focus && key < best_in_focus) best_in_focus = key;
      accepts_in_focus |= accept && in_focus;
    }
    marks[j] = (candidate ? kCandidate : 0) | (accept ? kAccepted : 0);
  }
  best = reduce_block(best, kNoKey, Minimum());
  best_in_focus = reduce_block(best_in_focus, kNoKey, Minimum());
  // That the best of all is accepted, too, makes no difference: it is then the focus's own.
  const bool forced = !any_of(accepts_in_focus);
  const int always = shifted || best == kNoKey ? kNone : static_cast<int>(best);
  const int otherwise = forced && best_in_focus != kNoKey ? static_cast<int>(best_in_focus) : kNone;

  int accepted = 0, last = kNone;
  bool any_mask = false;
  for (int j = thread; j < positions; j += kThreads) {
    const bool accept = (marks[j] & kAccepted) || j == always || j == otherwise;
    int64_t id = x[j];
    if (accept) {
      id = token[static_cast<int64_t>(prompt) + j - first];
      x[j] = id;
      step_map[j] = wrapped(int64_t{nfe} - 1);
    }
    accepted += accept;
    any_mask |= id == call.mask_id;
    for (int64_t end = 0; end < call.ends; ++end) {
      if (id == call.eos[end]) last = min(last, j);
    }
  }
  decoded = wrapped(int64_t{decoded} + reduce_block(accepted, 0, Sum()));
  any_mask = any_of(any_mask);
  last = first_of(last);

  // What follows an end of the sequence: filled at once with early_stop, otherwise at the end.
  if (!call.early_stop && any_mask) last = kNone;
  const bool ended = last != kNone;
  for (int k = thread; k < count; k += kThreads) masks[k] = 0;
  __syncthreads();
  bool any_left = false;
  for (int j = thread; j < positions; j += kThreads) {
    if (ended && j > last) {
      x[j] = call.eos[0];
      step_map[j] = -1;
    }
    const bool masked = x[j] == call.mask_id;
    any_left |= masked;
    marks[j] = masked;
    if (masked) atomicAdd(&masks[j / size], 1);
  }
  const bool over = !any_of(any_left);
  nfe = wrapped(int64_t{nfe} + !over);
  __syncthreads();

  // Blocks: at most one is created, those after a nearly decoded one are promoted.
  const int got = size - masks[max(created, 1) - 1];
  if ((got >= call.add || got == size) && created < count && !ended) ++created;
  for (int k = thread; k < count; k += kThreads) {
    const int before = k > 0 ? masks[k - 1] : 0;
    const bool exists = k < created;
    full[k] = full[k] || (exists && size - before >= call.full_at);
  }
  const int end = created * size;

  // The cache: commit a finished prefix that has waited, refresh while one waits.
  const int total = prompt + generated;
  const int64_t forwarded = static_cast<int64_t>(prompt) + int64_t{created} * size + call.tail;
  const int stop = forwarded < total ? static_cast<int>(forwarded) : total;
  int start = 0, commit = 0;
  mode = kFull;
  if (cached) {
    const auto end_of = [=](int k) { return prompt + min((k + 1) * size, generated); };
    const auto pending = [=](int k) { return k < created && end_of(k) > prefix; };
    int unfinished = kNone;
    for (int k = thread; k < count; k += kThreads) {
      if (pending(k) && masks[k] > 0) unfinished = min(unfinished, k);
    }
    unfinished = first_of(unfinished);
    const bool waiting = prompt > prefix;  // the prompt, finished before the first forward
    int upto = waiting && nfe >= call.delay ? prompt : prefix;
    bool due = call.refresh > 0 && nfe % max(call.refresh, 1) == 0;
    for (int k = thread; k < count; k += kThreads) {
      const bool reached = pending(k) && k < unfinished;
      if (reached && done[k] < 0) done[k] = nfe;
      if (reached && wrapped(int64_t{nfe} - done[k]) >= call.delay && !kept[k]) {
        kept[k] = true;
        upto = max(upto, end_of(k));
      }
      due |= k < created && masks[k] == 0 && done[k] >= 0 && !kept[k];
    }
    upto = last_of(upto);
    due = any_of(due);
    const bool grows = upto > prefix, some = prefix > 0;
    const bool fresh = some && due;
    mode = fresh ? kRefresh : grows ? kCommit : some ? kCached : kFull;
    start = fresh ? 0 : shifted ? prefix - some : prefix;
    if (mode == kCommit || fresh) commit = wrapped(int64_t{upto} - start);
    prefix = upto;
  }

  const auto is_candidate = [&](int j) { return marks[j] != 0 && j < end && prompt + j >= start; };
  int low = generated, high = 0;
  for (int j = thread; j < positions; j += kThreads) {
    const bool candidate = !over && is_candidate(j);
    eligible[j] = candidate;
    if (candidate) {
      low = min(low, j);
      high = j + 1;
    }
  }
  low = first_of(low);
  high = last_of(high);
  for (int k = thread; k < count; k += kThreads) {
    blocks[k] = masks[k];
    blocks[plane + k] = full[k];
    blocks[2 * plane + k] = done[k];
    blocks[3 * plane + k] = kept[k];
  }
  if (thread != 0) return;
  number(0) = nfe;
  number(1) = decoded;
  number(2) = created;
  number(3) = prefix;
  number(4) = over ? kFinished : mode;
  number(5) = start;
  number(6) = over ? 0 : stop - start;
  number(7) = stop;
  number(8) = over ? 0 : commit;
  number(9) = prompt + low;
  number(10) = max(high - low, 0);
}

}  // namespace

cudaError_t multiblock_step(const MultiblockStep& call, cudaStream_t stream) {
  const bool fits = call.batch >= 0 && call.batch <= INT_MAX && call.generated >= 1 &&
                    call.generated <= kMaxPositions && call.size >= 1 && call.count >= 1 &&
                    call.count <= kMaxBlocks;
  if (!fits) return cudaErrorInvalidValue;
  if (call.batch == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(call.batch)), block(kThreads);
  return with_type(call.dtype, [&](auto* typed) {
    using Entropy = std::remove_pointer_t<decltype(typed)>;
    PYDLLM_LAUNCH(multiblock_step_kernel<Entropy>, grid, block, 0, stream, call);
    return cudaGetLastError();
  });
}

}  // namespace pydllm
