#include "mixture_accept.h"

#include "mixture_round.cuh"

namespace pydllm {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

// c * tanh(x / c); infinities and NaN stay.
__device__ __forceinline__ float capped(float x, float softcap) {
  if (softcap == 0.f || fabsf(x) == INFINITY) return x;
  return softcap * tanhf(x / softcap);
}

// A verifier's logit: the dot product of two vectors, in every lane.
template <typename T>
__device__ __forceinline__ float dot_warp(const T* a, const T* b, int width, bool aligned) {
  constexpr int kVector = Vector<T>::kSize;
  const int lane = threadIdx.x % kWarpSize;
  const int vectors = aligned ? width / kVector : 0;
  float sum = 0.f;
  for (int v = lane; v < vectors; v += kWarpSize) {
    const Vector<T> left = load_vector(a + v * kVector), right = load_vector(b + v * kVector);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      sum = fmaf(to_float(left.lane[i]), to_float(right.lane[i]), sum);
    }
  }
  for (int i = vectors * kVector + lane; i < width; i += kWarpSize) {
    sum = fmaf(to_float(a[i]), to_float(b[i]), sum);
  }
  return reduce_warp(sum, Sum());
}

// One block per piece of a row's list; a warp takes one candidate at a time.
template <typename T, bool kCritical>
// Without a number of blocks the compiler spills on sm_86 and sm_89 to make room for more of them.
__global__ void __launch_bounds__(kThreads, 2)
    mixture_accept_sparse_kernel(const MixtureAcceptSparse call) {
  const MixtureRound& round = call;
  const int64_t row = blockIdx.x / round.tiles, tile = blockIdx.x % round.tiles;
  const int64_t sequence = row / round.rows;
  if (row % round.rows >= round.length[sequence]) return;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int capacity = static_cast<int>(call.capacity), width = static_cast<int>(call.width);
  const int size = max(0, min(call.size[row], capacity));
  const int32_t* ids = call.ids + row * call.capacity;
  const float* values = call.values + row * call.capacity;
  const float* noises = call.noise + row * call.capacity;
  const T* hidden = static_cast<const T*>(call.hidden) + row * call.stride_hidden_row;
  const auto* head = static_cast<const T*>(call.head);
  const auto* bias = static_cast<const T*>(call.bias);
  const float weight = weight_of(round, sequence);
  const float inverse =
      round.temperatures == nullptr ? round.inverse : inverse_of(round.temperatures[row]).value;
  const auto score_of = [&](float logit, float noise) {
    return __fadd_rn(__fmul_rn(logit, inverse), noise);
  };
  const auto verifier = [&](int64_t id) {
    // An id that is not a row of the head would be read elsewhere.
    if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(call.verifier_vocab)) id = 0;
    const T* weights = head + id * call.stride_head_row;
    const auto bits = reinterpret_cast<uintptr_t>(hidden) | reinterpret_cast<uintptr_t>(weights);
    const float y = dot_warp(hidden, weights, width, bits % 16 == 0);
    return capped(bias == nullptr ? y : y + to_float(bias[id]), call.softcap);
  };

  Critical critical = {};
  int64_t token = -1;
  if (kCritical && size > 0) {
    token = round.token[row];
    int slot = -1;  // where the token is in the list
    for (int i = lane; i < size; i += kWarpSize) slot = ids[i] == token ? i : slot;
    slot = reduce_warp(slot, Maximum());
    // As in the reference, the first candidate stands for a token that is in no list.
    if (slot < 0) {
      slot = 0;
      token = ids[0];
    }
    const float y = verifier(token), noise = noises[slot];
    critical = {score_of(values[slot], noise), score_of(y, noise), y == -INFINITY};
  }

  uint64_t best = kNoKey;
  float least = 0.f;
  const int end = min(static_cast<int>((tile + 1) * kCandidateTile), size);
  for (int i = static_cast<int>(tile * kCandidateTile) + warp; i < end; i += kWarps) {
    const int id = ids[i];
    const float x = values[i], noise = noises[i];
    const float y = verifier(id);
    // A mixture of 0 looks at ids that are in no list.
    if (weight != 0.f) {
      const uint64_t own = entry(score_of(mix(x, y, weight), noise), id);
      best = own < best ? own : best;
    }
    if (kCritical && id != token) {
      least = fmaxf(least, critical.of(score_of(x, noise), score_of(y, noise)));
    }
  }
  if (size == 0) least = INFINITY;
  store_tile(round, row * round.tiles + tile, best, critical.none ? 1.f : least);
}

}  // namespace

cudaError_t mixture_accept_sparse(const MixtureAcceptSparse& call, cudaStream_t stream) {
  const MixtureRound& round = call;
  const int64_t blocks = round.batch * round.rows * round.tiles;
  const bool fits = round.batch >= 0 && round.rows >= 0 && blocks <= INT_MAX &&
                    call.capacity >= 1 && call.capacity <= kMaxCapacity && call.width >= 1 &&
                    call.width <= INT_MAX - kThreads && call.verifier_vocab >= 1 &&
                    round.tiles == (call.capacity + kCandidateTile - 1) / kCandidateTile;
  if (!fits) return cudaErrorInvalidValue;
  if (round.batch == 0) return cudaSuccess;
  if (blocks == 0) return mixture_accept_scan(round, stream);
  const dim3 grid(static_cast<unsigned>(blocks)), block(kThreads);
  return with_type(call.dtype, [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    if (round.least != nullptr) {
      PYDLLM_LAUNCH((mixture_accept_sparse_kernel<T, true>), grid, block, 0, stream, call);
    } else {
      PYDLLM_LAUNCH((mixture_accept_sparse_kernel<T, false>), grid, block, 0, stream, call);
    }
    return mixture_accept_scan(round, stream);
  });
}

}  // namespace pydllm
