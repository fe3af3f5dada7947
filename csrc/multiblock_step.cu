#include "multiblock_step.h"

#include "block.cuh"
#include "common.cuh"

namespace pydllm {
namespace {

constexpr int kThreads = 256;
constexpr int kLimit = 10001;   // forwards after which the published decoder gives up
constexpr int kNone = INT_MAX;  // behind every position and block
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

// One block a sequence. A thread has the same positions and blocks in every pass; what it learns of
// others' comes from reductions, and from shared memory behind a barrier.
template <typename Entropy>
__global__ void __launch_bounds__(kThreads) multiblock_step_kernel(const MultiblockStep call) {
  __shared__ unsigned char marks[kMaxPositions];
  __shared__ int masks[kMaxBlocks], done[kMaxBlocks];
  __shared__ bool full[kMaxBlocks], kept[kMaxBlocks];

  const int64_t sequence = blockIdx.x;
  const int thread = threadIdx.x;
  int32_t* numbers = call.numbers + sequence;
  const auto number = [&](int row) -> int32_t& { return numbers[row * call.stride_numbers_row]; };
  int mode = number(5);
  if (mode == kFinished) return;
  int nfe = number(0), decoded = number(1), created = number(2), prefix = number(3);
  int stale = number(4);
  const int first = number(10);

  const int count = static_cast<int>(call.count), size = call.size, generated = call.generated;
  // Any other prompt would be written elsewhere.
  const int prompt = max(0, min(call.prompt[sequence], static_cast<int>(call.slots) - generated));
  created = max(1, min(created, count));
  const bool compat = call.compat, shifted = call.shifted, cached = call.cached;
  const int usable = compat && !(shifted && cached) ? generated / size : count;
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
  uint64_t best = kNobody, best_in_focus = kNobody;
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
  best = reduce_block(best, kNobody, Minimum());
  best_in_focus = reduce_block(best_in_focus, kNobody, Minimum());
  // That the best of all is accepted, too, makes no difference: it is then the focus's own.
  const bool forced = !any_of(accepts_in_focus);
  const int always = shifted || best == kNobody ? kNone : static_cast<int>(best);
  const int otherwise =
      forced && best_in_focus != kNobody ? static_cast<int>(best_in_focus) : kNone;

  int accepted = 0, last = kNone;
  bool any_mask = false;
  for (int j = thread; j < positions; j += kThreads) {
    const bool accept = (marks[j] & kAccepted) || j == always || j == otherwise;
    int64_t id = x[j];
    if (accept) {
      id = token[static_cast<int64_t>(prompt) + j - first];
      x[j] = id;
      step_map[j] = nfe - 1;
      atomicSub(&masks[j / size], 1);
    }
    accepted += accept;
    const bool snapshot = id == call.mask_id;
    any_mask |= snapshot;
    marks[j] = snapshot;
    for (int64_t end = 0; end < call.ends; ++end) {
      if (id == call.eos[end]) last = min(last, j);
    }
  }
  decoded += reduce_block(accepted, 0, Sum());
  any_mask = any_of(any_mask);
  last = first_of(last);

  // Is there another forward?
  bool over = !any_mask;
  if (compat) {
    bool left = any_mask;
    if (cached) {
      bool own = false;
      for (int k = thread; k < count; k += kThreads) {
        masks[k] = max(masks[k], 0);
        own |= masks[k] > 0 && k < usable;
      }
      own = any_of(own);
      if (!shifted) left = own;
    }
    over = nfe >= kLimit || (!left && created >= usable);
    nfe += !over;
  }

  // What is behind an end of sequence.
  const bool fills = compat ? call.early_stop && !over : call.early_stop || over;
  if (!fills) last = kNone;
  const bool ended = last != kNone;
  bool any_left = false;
  if (!compat || ended) {
    // The masks of each block are counted again.
    const int at_eos = ended ? last / size : count;
    const auto recounted = [&](int k) {
      return !compat || (k < created && (shifted || k >= at_eos));
    };
    for (int k = thread; k < count; k += kThreads) {
      if (recounted(k)) masks[k] = 0;
    }
    __syncthreads();
    for (int j = thread; j < positions; j += kThreads) {
      if (ended && j > last) {
        x[j] = call.eos[0];
        step_map[j] = -1;
      }
      const bool masked = x[j] == call.mask_id;
      any_left |= masked;
      if (!compat) marks[j] = masked;
      if (masked && recounted(j / size)) atomicAdd(&masks[j / size], 1);
    }
    any_left = any_of(any_left);
    if (compat) {
      for (int k = thread; k < count; k += kThreads) {
        const bool missing = k >= created && k < usable;
        full[k] = full[k] || (recounted(k) && masks[k] == 0) || missing;
        if (missing) {
          masks[k] = 0;
          done[k] = nfe;
        }
        kept[k] = kept[k] || missing || (shifted && k > at_eos);
      }
      created = usable;
    }
    over = compat ? over || !any_left : !any_left;
  }
  if (!compat) nfe += !over;
  __syncthreads();

  // Blocks: at most one is created, those behind a nearly decoded one are promoted.
  const int got = size - masks[max(created, 1) - 1];
  if ((got >= call.add || got == size) && created < usable && !ended) ++created;
  int end = 0;
  for (int k = thread; k < count; k += kThreads) {
    const int before = k > 0 ? masks[k - 1] : 0;
    const bool exists = k < created;
    full[k] = full[k] || (exists && size - before >= call.full_at);
    if (exists && (full[k] || masks[k] > 0)) end = max(end, (k + 1) * size);
  }
  end = compat ? last_of(end) : created * size;

  // The cache: commit a finished prefix that has waited, refresh while one waits.
  const int total = prompt + generated;
  const int64_t forwarded = static_cast<int64_t>(prompt) + int64_t{created} * size + call.tail;
  const int stop = forwarded < total ? static_cast<int>(forwarded) : total;
  int start = 0, commit = 0, kv_len = stop;
  mode = kFull;
  if (cached) {
    const auto end_of = [&](int k) { return prompt + min((k + 1) * size, generated); };
    const auto pending = [&](int k) { return k < created && end_of(k) > prefix; };
    int unfinished = kNone;
    for (int k = thread; k < count; k += kThreads) {
      if (pending(k) && masks[k] > 0) unfinished = min(unfinished, k);
    }
    unfinished = first_of(unfinished);
    const bool waiting = prompt > prefix;  // the prompt, finished before the first forward
    int young = kNone;
    if (compat && !shifted) {  // one at a time
      for (int k = thread; k < count; k += kThreads) {
        const bool is_young = nfe - (done[k] < 0 ? nfe : done[k]) < call.delay;
        if (pending(k) && k < unfinished && is_young) young = min(young, k);
      }
      young = first_of(young);
      if (waiting && nfe < call.delay) young = -1;
    }
    int upto = waiting && nfe >= call.delay ? prompt : prefix;
    int latest = prefix;
    bool due = call.refresh > 0 && nfe % max(call.refresh, 1) == 0;
    for (int k = thread; k < count; k += kThreads) {
      const bool reached = pending(k) && k < unfinished && k <= young;
      if (reached && done[k] < 0) done[k] = nfe;
      if (reached && nfe - done[k] >= call.delay && !kept[k]) {
        kept[k] = true;
        upto = max(upto, end_of(k));
      }
      if (k < created && masks[k] == 0 && done[k] >= 0 && !kept[k]) {
        due = true;
        latest = max(latest, prompt + k * size);
      }
    }
    upto = last_of(upto);
    latest = last_of(latest);
    due = any_of(due);
    const bool grows = upto > prefix, some = prefix > 0;
    const bool fresh = some && due && !(grows && compat);
    mode = fresh ? kRefresh : grows ? kCommit : some ? kCached : kFull;
    start = fresh ? 0 : shifted && !compat ? prefix - some : prefix;
    if (mode == kCommit || fresh) commit = upto - start;
    if (compat && shifted) {  // keys of a block that waits are seen twice
      if (fresh) {
        commit = latest;
        stale = latest - prefix;
      }
      if (mode == kCached || mode == kCommit) kv_len = stop + stale;
    }
    prefix = upto;
  }

  const auto is_candidate = [&](int j) { return marks[j] != 0 && j < end && prompt + j >= start; };
  if (compat) {  // nothing will ever change: the published loop runs on to its limit
    bool own = false;
    for (int j = thread; j < positions; j += kThreads) own |= is_candidate(j);
    own = any_of(own);
    if (!over && !own && created >= usable) {
      nfe = kLimit;
      over = true;
    }
  }
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
  number(4) = stale;
  number(5) = over ? kFinished : mode;
  number(6) = start;
  number(7) = over ? 0 : stop - start;
  number(8) = over ? stop : kv_len;
  number(9) = over ? 0 : commit;
  number(10) = prompt + low;
  number(11) = max(high - low, 0);
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
