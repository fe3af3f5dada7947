#include "mixture_draft.h"

#include "block.cuh"
#include "common.cuh"
#include "philox.cuh"
#include "rows.cuh"

namespace pydllm {
namespace {

constexpr int kThreads = 512;
// Vectors that a thread has in flight between two looks at what the block has found.
constexpr int kUnroll = 4;
// Terms are at most 1; in these units their sums are exact, whatever the order.
constexpr float kPerTerm = 1099511627776.f;  // 2^40
// The bound on what may be in a nucleus is loosened by this many nats: no rounding can matter.
constexpr float kSlack = 1.f;

// The highest bits of an fp32 number that a number of the type can have set, sign included.
template <typename T>
constexpr int kKeyBits = sizeof(T) == 4              ? 32
                         : std::is_same_v<T, __half> ? 20
                                                     : 16;

// What a thread, or a block, has seen of a row.
struct Mass {
  float best;  // largest logit, -inf: none
  float sum;   // of e^((x - best) * inverse); NaN once a NaN or +inf was seen
};

__device__ __forceinline__ float term_of(float x, float best, float inverse) {
  // A row that is all -inf so far has no largest logit to be relative to.
  return __expf((x - (best == -INFINITY ? 0.f : best)) * inverse);
}

struct Merge {
  float inverse;
  __device__ __forceinline__ Mass operator()(Mass a, Mass b) const {
    const float best = fmaxf(a.best, b.best);
    // Two infinities have no difference; a sum that is NaN stays one.
    const float of_a = a.best == best ? a.sum : a.sum * term_of(a.best, best, inverse);
    const float of_b = b.best == best ? b.sum : b.sum * term_of(b.best, best, inverse);
    return {best, of_a + of_b};
  }
};

__device__ __forceinline__ Mass merge_block(Mass mass, float inverse) {
  __shared__ Mass of_warps[kThreads / kWarpSize];
  const Merge merge{inverse};
  const auto merge_warp = [&](Mass own) {
#pragma unroll
    for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
      const float best = __shfl_xor_sync(kFullWarp, own.best, lanes);
      const float sum = __shfl_xor_sync(kFullWarp, own.sum, lanes);
      own = merge(own, {best, sum});
    }
    return own;
  };
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  mass = merge_warp(mass);
  if (lane == 0) of_warps[warp] = mass;
  __syncthreads();
  constexpr int kWarps = kThreads / kWarpSize;
  mass = merge_warp(lane < kWarps ? of_warps[lane] : Mass{-INFINITY, 0.f});
  __syncthreads();
  return mass;
}

// All that is the same for a row.
template <typename T>
struct Draft {
  Row<T> row;
  NoiseKey key;
  const int32_t* suppress_ids;  // in shared memory
  int suppress_count;
  float inverse;
  bool noisy;

  // Calls visit(id, x) for every id of the row that counts, of this thread.
  template <typename Visit>
  __device__ __forceinline__ void each_of_row(Visit visit) const {
    constexpr int kVector = Row<T>::kVector;
    for (int first = threadIdx.x * kVector; first < row.shared; first += kThreads * kVector) {
      const Vector<T> vector = row.load(first);
      const unsigned bits =
          ids_that_count<kVector>(first, row.shared, suppress_ids, suppress_count);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (bits >> i & 1) visit(first + i, to_float(vector.lane[i]));
      }
    }
  }
};

// Calls visit(id, x) for every note of this thread.
struct Notes {
  const int32_t* ids;
  const float* values;
  int count;

  template <typename Visit>
  __device__ __forceinline__ void each(Visit visit) const {
    for (int i = threadIdx.x; i < count; i += kThreads) visit(ids[i], values[i]);
  }
};

// The key of the largest number at or above which the mass exceeds `limit`; 0 if there is none.
// `each` calls what it is given for all of the thread's ids.
template <int kBits, typename Each>
__device__ __forceinline__ uint32_t nucleus_cut(Each each, float best, float inverse,
                                                uint64_t limit) {
  uint32_t cut = 0;
  for (int radix_pass = 0; radix_pass < (kBits + 1) / 2; ++radix_pass) {  // two bits per pass
    const uint32_t unit = 0x40000000u >> (2 * radix_pass);
    uint64_t mass_1 = 0, mass_2 = 0, mass_3 = 0;
    each([&](int, float x) {
      const uint32_t key = ordered(__fadd_rn(x, 0.f));
      const auto mass = static_cast<uint64_t>(__fmul_rn(term_of(x, best, inverse), kPerTerm));
      mass_1 += key >= cut + unit ? mass : 0;
      mass_2 += key >= cut + 2 * unit ? mass : 0;
      mass_3 += key >= cut + 3 * unit ? mass : 0;
    });
    mass_1 = reduce_block(mass_1, uint64_t{0}, Sum());
    mass_2 = reduce_block(mass_2, uint64_t{0}, Sum());
    mass_3 = reduce_block(mass_3, uint64_t{0}, Sum());
    cut += unit * ((mass_1 > limit) + (mass_2 > limit) + (mass_3 > limit));
  }
  return cut;
}

// A key of which the bits that a type cannot have set were not looked for, as a number of it.
template <int kBits>
__device__ __forceinline__ float number_of(uint32_t key) {
  if (key == 0) return -INFINITY;
  // A negative number's key ends in ones where the number has zeros.
  constexpr uint32_t kLow = kBits == 32 ? 0u : (1u << (32 - kBits)) - 1;
  return from_ordered(key < 0x80000000u ? key | kLow : key);
}

// One block per row, and as a rule one read of it. While the row is summed up, the ids that may be
// in the nucleus are noted: those within a factor (1 - top_p) / shared of the mass so far, since
// what is below that of the whole mass cannot make up 1 - top_p together. Cut, noise and list are
// then those few ids' business. Where there is no room for the notes they are made again, with the
// whole mass; where there still is none, or no nucleus, all ids of the row take their place. Which
// way it was does not show: masses are integers, and scores are compared, not added.
template <typename T>
__global__ void __launch_bounds__(kThreads) mixture_draft_kernel(const MixtureDraft call) {
  constexpr int kVector = Row<T>::kVector;
  constexpr int kBits = kKeyBits<T>;
  __shared__ int32_t suppress_ids[kMaxSuppressIds];
  __shared__ uint32_t list[kMaxCapacity];
  __shared__ int noted, listed;

  const int64_t row = blockIdx.x;
  const int thread = threadIdx.x;
  int64_t source = row;
  if (call.rows != nullptr) {
    source = call.wide_rows ? static_cast<const int64_t*>(call.rows)[row]
                            : static_cast<const int32_t*>(call.rows)[row];
  }
  const bool exists = source >= 0 && source < call.sources;
  const T* data =
      static_cast<const T*>(call.logits) + (exists ? source : 0) * call.stride_logits_row;
  const int suppress_count = static_cast<int>(call.suppress_count);
  for (int i = thread; i < suppress_count; i += kThreads) suppress_ids[i] = call.suppress_ids[i];
  if (thread == 0) noted = listed = 0;
  __syncthreads();

  Draft<T> draft;
  draft.row = row_of(data, call.vocab, exists ? call.shared : 0);  // padding has no ids
  const int32_t* counter = call.counter + row * call.stride_counter_row;
  draft.key = {static_cast<uint32_t>(counter[0]),
               static_cast<uint32_t>(counter[call.stride_counter_word]),
               static_cast<uint32_t>(counter[2 * call.stride_counter_word]),
               static_cast<uint64_t>(call.seed)};
  draft.suppress_ids = suppress_ids;
  draft.suppress_count = suppress_count;
  draft.inverse = call.inverse;
  draft.noisy = true;
  if (call.temperatures != nullptr) {
    const Inverse own = inverse_of(call.temperatures[row]);
    draft.inverse = own.value;
    draft.noisy = own.noisy;
  }
  const float inverse = draft.inverse;
  const float top_p = call.top_ps == nullptr ? call.top_p : call.top_ps[row];
  bool filtered = draft.noisy && top_p > 0.f && top_p < 1.f;
  const float bound =
      filtered ? logf((1.f - top_p) / static_cast<float>(max(draft.row.shared, 1))) - kSlack : 0.f;
  int32_t* noted_ids = call.noted_ids + row * call.notes;
  float* noted_values = call.noted + row * call.notes;
  const int notes = static_cast<int>(call.notes);
  const auto note = [&](int id, float x) {
    const int slot = atomicAdd(&noted, 1);
    if (slot < notes) {
      noted_ids[slot] = id;
      noted_values[slot] = x;
    }
  };

  Mass own = {-INFINITY, 0.f}, whole = own;
  const auto& ids = draft.row;
  for (int base = 0; base < ids.shared; base += kUnroll * kThreads * kVector) {
    Vector<T> loaded[kUnroll];
    unsigned bits[kUnroll];
    float piece = -INFINITY;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int first = base + (u * kThreads + thread) * kVector;
      bits[u] = ids_that_count<kVector>(first, ids.shared, suppress_ids, suppress_count);
      if (bits[u]) loaded[u] = ids.load(first);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (bits[u] >> i & 1) piece = fmaxf(piece, to_float(loaded[u].lane[i]));
      }
    }
    own = Merge{inverse}(own, {piece, 0.f});
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (bits[u] >> i & 1) own.sum += term_of(to_float(loaded[u].lane[i]), own.best, inverse);
      }
    }
    whole = merge_block(own, inverse);
    if (!filtered || whole.best == -INFINITY) continue;
    const float least = bound + logf(whole.sum);
    if (!((piece - whole.best) * inverse >= least)) continue;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float x = to_float(loaded[u].lane[i]);
        const bool near = (x - whole.best) * inverse >= least && x > -INFINITY;
        if ((bits[u] >> i & 1) && near) note(base + (u * kThreads + thread) * kVector + i, x);
      }
    }
  }
  const float best = whole.best, total = whole.sum;
  const bool poisoned = total != total;
  const bool usable = !poisoned && best > -INFINITY;
  filtered = filtered && usable;
  __syncthreads();

  if (filtered && noted > notes) {  // the same for all threads
    __syncthreads();
    if (thread == 0) noted = 0;
    __syncthreads();
    const float least = bound + logf(total);
    draft.each_of_row([&](int id, float x) {
      if ((x - best) * inverse >= least && x > -INFINITY) note(id, x);
    });
    __syncthreads();
  }
  const Notes found = {noted_ids, noted_values, noted};
  bool from_notes = filtered && noted <= notes;

  float threshold = -INFINITY;
  if (filtered) {
    const auto limit = static_cast<uint64_t>(__fmul_rn(__fmul_rn(total, top_p), kPerTerm));
    uint32_t cut = 0;
    if (from_notes) {
      cut = nucleus_cut<kBits>([&](auto visit) { found.each(visit); }, best, inverse, limit);
      from_notes = cut != 0;  // else top_p is so near to 1 that rounding leaves out nothing
    }
    if (!from_notes) {
      cut = nucleus_cut<kBits>([&](auto visit) { draft.each_of_row(visit); }, best, inverse, limit);
    }
    threshold = number_of<kBits>(cut);
  }

  uint64_t chosen = kNoKey;
  const auto consider = [&](int id, float x, float noise) {
    const float score = __fadd_rn(__fmul_rn(x, draft.inverse), noise);
    const uint64_t own_best = argmax_key(score, id);
    chosen = own_best < chosen ? own_best : chosen;
    if (!filtered) return;
    const int slot = atomicAdd(&listed, 1);
    if (slot < call.capacity) list[slot] = static_cast<uint32_t>(id);
  };
  if (from_notes) {
    found.each([&](int id, float x) {
      if (x >= threshold) consider(id, x, draft.key.of(id));
    });
  } else if (usable) {
    // Four neighbours share a call of the generator.
    for (int quad = thread; quad < (ids.shared + 3) / 4; quad += kThreads) {
      const unsigned bits = ids_that_count<4>(4 * quad, ids.shared, suppress_ids, suppress_count);
      const Words words = draft.noisy ? draft.key.words(quad) : Words{};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!(bits >> i & 1)) continue;
        const float x = to_float(ids.data[4 * quad + i]);
        if (x < threshold || x == -INFINITY) continue;
        consider(4 * quad + i, x, draft.noisy ? gumbel(words.word[i]) : 0.f);
      }
    }
  }
  chosen = reduce_block(chosen, kNoKey, Minimum());

  const int capacity = static_cast<int>(call.capacity);
  const bool overflow = !filtered || listed > capacity;
  const int size = overflow ? 0 : listed;
  if (size > 0) {  // in ascending order, whoever came first
    const int room = power_of_two(size);
    for (int i = size + thread; i < room; i += kThreads) list[i] = 0xFFFFFFFFu;
    sort_block(list, room);
  }
  for (int slot = thread; slot < capacity; slot += kThreads) {
    const bool used = slot < size;
    const int id = used ? static_cast<int>(list[slot]) : 0;
    const int64_t at = row * capacity + slot;
    call.ids[at] = id;
    call.values[at] = used ? to_float(ids.data[id]) : -INFINITY;
    call.noise[at] = used ? draft.key.of(id) : 0.f;
  }
  if (thread != 0) return;
  call.token[row] = usable && chosen != kNoKey ? static_cast<uint32_t>(chosen) : 0;
  call.logsumexp[row] = poisoned ? NAN
                        : usable ? __fmul_rn(best, inverse) + logf(total)
                                 : -INFINITY;
  call.threshold[row] = poisoned ? NAN : threshold;
  call.size[row] = size;
  call.overflow[row] = overflow;
}

}  // namespace

cudaError_t mixture_draft(const MixtureDraft& call, cudaStream_t stream) {
  const bool fits = call.count >= 0 && call.count <= INT_MAX && call.shared >= 1 &&
                    call.shared <= kMaxSharedVocab && call.vocab <= INT_MAX &&
                    call.suppress_count <= kMaxSuppressIds && call.capacity <= kMaxCapacity &&
                    call.notes >= 1 && call.notes <= INT_MAX;
  if (!fits) return cudaErrorInvalidValue;
  if (call.count == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(call.count)), block(kThreads);
  return with_type(call.dtype, [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    PYDLLM_LAUNCH(mixture_draft_kernel<T>, grid, block, 0, stream, call);
    return cudaGetLastError();
  });
}

}  // namespace pydllm
