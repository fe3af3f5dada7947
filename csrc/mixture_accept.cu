#include "mixture_accept.h"

#include "mixture_round.cuh"
#include "rows.cuh"

namespace pydllm {
namespace {

constexpr int kThreads = 256;
// Vectors of each row that a thread has in flight.
constexpr int kUnroll = kTileBytes / (kThreads * 16);

// One block per tile of a row in use. The verifier's logits are read only around ids that count.
template <typename T, bool kCritical>
__global__ void __launch_bounds__(kThreads, 2) mixture_accept_kernel(const MixtureAccept call) {
  constexpr int kVector = Row<T>::kVector;
  __shared__ int32_t suppress_ids[kMaxSuppressIds];

  const MixtureRound& round = call;
  const int64_t row = blockIdx.x / round.tiles, tile = blockIdx.x % round.tiles;
  const int64_t sequence = row / round.rows;
  if (row % round.rows >= round.length[sequence]) return;
  const int thread = threadIdx.x;
  const int suppress_count = static_cast<int>(call.suppress_count);
  if (thread < suppress_count) suppress_ids[thread] = call.suppress_ids[thread];
  __syncthreads();

  const float weight = weight_of(round, sequence);
  const T* logits = static_cast<const T*>(call.logits) + row * call.stride_logits_row;
  const T* verifier = static_cast<const T*>(call.verifier) + row * call.stride_verifier_row;
  const Row<T> ids_x = row_of(logits, call.vocab, call.shared);
  const Row<T> ids_y = row_of(verifier, call.verifier_vocab, call.shared);
  // The other model's logits are not looked at where only one counts.
  const bool needs_x = kCritical || weight != 0.f, needs_y = kCritical || weight != 1.f;
  const bool has_threshold = call.threshold != nullptr;
  const float threshold = has_threshold ? call.threshold[row] : -INFINITY;

  float inverse = round.inverse;
  bool noisy = call.counter != nullptr;
  NoiseKey key = {};
  if (noisy) {
    const int32_t* counter = call.counter + row * call.stride_counter_row;
    key = {static_cast<uint32_t>(counter[0]),
           static_cast<uint32_t>(counter[call.stride_counter_word]),
           static_cast<uint32_t>(counter[2 * call.stride_counter_word]),
           static_cast<uint64_t>(call.seed)};
    if (round.temperatures != nullptr) {
      const Inverse own = inverse_of(round.temperatures[row]);
      inverse = own.value;
      noisy = own.noisy;
    }
  }
  const auto score_of = [&](float logit, float noise) {
    return __fadd_rn(__fmul_rn(logit, inverse), noise);
  };

  Critical critical = {};
  int token = 0;
  if (kCritical) {
    const int64_t given = round.token[row];
    token = given >= 0 && given < call.shared ? static_cast<int>(given) : 0;
    const float noise = noisy ? key.of(token) : 0.f;
    const float y_token = to_float(verifier[token]);
    critical = {score_of(to_float(logits[token]), noise), score_of(y_token, noise),
                y_token == -INFINITY};
  }

  const int base = static_cast<int>(tile) * kThreads * kUnroll * kVector + thread * kVector;
  Vector<T> x[kUnroll], y[kUnroll];
  unsigned inside[kUnroll], nucleus[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int first = base + u * kThreads * kVector;
    inside[u] = ids_that_count<kVector>(first, ids_x.shared, suppress_ids, suppress_count);
    if (needs_x && inside[u]) x[u] = ids_x.load(first);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int first = base + u * kThreads * kVector;
    nucleus[u] = inside[u];
    if (has_threshold && needs_x) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (to_float(x[u].lane[i]) < threshold) nucleus[u] &= ~(1u << i);
      }
    }
    // Where the draft model does not count, its nucleus does not.
    if (weight != 0.f) inside[u] = nucleus[u];
    if (needs_y && inside[u]) y[u] = ids_y.load(first);
  }

  uint64_t best = kNoKey;
  float least = 0.f;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int first = base + u * kThreads * kVector;
#pragma unroll
    for (int quad = 0; quad < kVector; quad += 4) {
      if (!(inside[u] >> quad & 0xF)) continue;
      const Words words = noisy ? key.words((first + quad) / 4) : Words{};
#pragma unroll
      for (int i = quad; i < quad + 4; ++i) {
        if (!(inside[u] >> i & 1)) continue;
        const float x_i = needs_x ? to_float(x[u].lane[i]) : -INFINITY;
        const float y_i = needs_y ? to_float(y[u].lane[i]) : -INFINITY;
        const float noise = noisy ? gumbel(words.word[i - quad]) : 0.f;
        const uint64_t own = entry(score_of(mix(x_i, y_i, weight), noise), first + i);
        best = own < best ? own : best;
        if (kCritical && (nucleus[u] >> i & 1) && x_i > -INFINITY && first + i != token) {
          least = fmaxf(least, critical.of(score_of(x_i, noise), score_of(y_i, noise)));
        }
      }
    }
  }
  store_tile(round, row * round.tiles + tile, best, critical.none ? 1.f : least);
}

}  // namespace

cudaError_t mixture_accept(const MixtureAccept& call, cudaStream_t stream) {
  const MixtureRound& round = call;
  const int64_t tile = kTileBytes / (call.dtype == Dtype::kFloat32 ? 4 : 2);
  const int64_t blocks = round.batch * round.rows * round.tiles;
  const bool fits = round.batch >= 0 && round.rows >= 0 && blocks <= INT_MAX && call.shared >= 1 &&
                    call.shared <= INT_MAX - tile && call.vocab <= INT_MAX - tile &&
                    call.verifier_vocab <= INT_MAX - tile &&
                    round.tiles == (call.shared + tile - 1) / tile && call.suppress_count >= 0 &&
                    call.suppress_count <= kMaxSuppressIds;
  if (!fits) return cudaErrorInvalidValue;
  if (round.batch == 0) return cudaSuccess;
  if (blocks == 0) return mixture_accept_scan(round, stream);
  const dim3 grid(static_cast<unsigned>(blocks)), block(kThreads);
  return with_type(call.dtype, [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    if (round.least != nullptr) {
      PYDLLM_LAUNCH((mixture_accept_kernel<T, true>), grid, block, 0, stream, call);
    } else {
      PYDLLM_LAUNCH((mixture_accept_kernel<T, false>), grid, block, 0, stream, call);
    }
    return mixture_accept_scan(round, stream);
  });
}

}  // namespace pydllm
