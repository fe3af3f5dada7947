#include "block.cuh"
#include "philox.cuh"
#include "vocab_piece.cuh"
#include "vocab_stats.h"

namespace pydllm {
namespace {

constexpr int kWarps = kPieceThreads / kWarpSize;
constexpr int kDigits = static_cast<int>(kCutDigits);

// The highest bits of an fp32 number that a number of the type can have set, sign included, as
// digits of four.
template <typename T>
__host__ __device__ constexpr int digits_of() {
  return std::is_same_v<T, float> ? 8 : std::is_same_v<T, __half> ? 5 : 4;
}

// The keys found so far: of the smallest logit that is kept by its number and by its mass.
struct Found {
  uint32_t by_count, by_mass;
};

// The digit that the launch before looked for, by one warp. Its lanes below 16 have the counts of
// the sixteen keys, the others the masses; both fall from key to key.
__device__ __forceinline__ Found next_digit(const VocabCut& call, int64_t row, int pieces,
                                            float inverse, int radix_pass) {
  const int lane = static_cast<int>(threadIdx.x), digit = lane % kDigits;
  const bool of_mass = lane >= kDigits;
  const int64_t before = (radix_pass - 1) % 2 * call.rows + row;
  const float* const best_of = call.best + row * pieces;
  float best = -INFINITY;
  for (int piece = lane; piece < pieces; piece += kWarpSize) best = fmaxf(best, best_of[piece]);
  best = reduce_warp(best, Maximum{});
  best = best == -INFINITY ? 0.f : best;
  int count = 0;
  float mass = 0.f;
  for (int piece = 0; piece < pieces; ++piece) {
    const int64_t at = (before * pieces + piece) * kDigits + digit;
    if (of_mass) {
      mass += call.masses[at] * expf((best_of[piece] - best) * inverse);
    } else {
      count += call.counts[at];
    }
  }
  const int top_k = call.top_ks == nullptr ? call.top_k : call.top_ks[row];
  const float top_p = call.top_ps == nullptr ? call.top_p : call.top_ps[row];
  const float total = __shfl_sync(kFullWarp, mass, kDigits);
  const int least = call.has_top_k ? min(max(top_k, 1), static_cast<int>(call.vocab)) : INT_MAX;
  const float limit =
      call.has_top_p && top_p > 0.f && top_p < 1.f ? __fmul_rn(total, top_p) : INFINITY;
  const bool taken = digit > 0 && (of_mass ? mass > limit : count >= least);
  const unsigned taken_of = __ballot_sync(kFullWarp, taken);
  const uint32_t unit = 0x10000000u >> (4 * (radix_pass - 1));
  const uint32_t* const known = call.keys + before * 2;
  return {known[0] + unit * static_cast<uint32_t>(__popc(taken_of & 0xFFFFu)),
          known[1] + unit * static_cast<uint32_t>(__popc(taken_of >> kDigits))};
}

// One block per piece of a row; in the last pass one per row.
template <typename T>
__global__ void __launch_bounds__(kPieceThreads, 2)
    vocab_cut_kernel(const VocabCut call, int pieces, int radix_pass, bool aligned) {
  __shared__ Found shared_found;
  __shared__ float shared_best[kWarps];
  __shared__ int shared_counts[kWarps][kDigits];
  __shared__ float shared_masses[kWarps][kDigits];

  const bool last = radix_pass == digits_of<T>();
  const auto blocks = static_cast<unsigned>(last ? 1 : pieces);
  const int64_t row = blockIdx.x / blocks;
  const int number = static_cast<int>(blockIdx.x % blocks);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
  const int warp = thread / kWarpSize;
  const int64_t source = source_of(call.row_list, row, call.long_row_list);
  if (source < 0 || source >= call.sources) return;
  const float inverse = call.temperatures == nullptr ? call.inverse_temperature
                                                     : inverse_of(call.temperatures[row]).value;
  if (warp == 0) {
    Found found{0, 0};
    if (radix_pass > 0) found = next_digit(call, row, pieces, inverse, radix_pass);
    if (lane == 0) shared_found = found;
  }
  __syncthreads();
  const Found found = shared_found;
  const int64_t now = radix_pass % 2 * call.rows + row;
  if (last) {
    const uint32_t key = max(found.by_count, found.by_mass);
    // Key 0, of no filter, is not that of a number.
    if (thread == 0) call.cut[row] = key == 0 ? -INFINITY : from_ordered(key);
    return;
  }
  if (number == 0 && thread == 0) {
    call.keys[now * 2] = found.by_count;
    call.keys[now * 2 + 1] = found.by_mass;
  }

  Piece<T> piece(number, static_cast<int>(call.vocab));
  const T* const logits = static_cast<const T*>(call.logits) + source * call.stride_logits_row;
  piece.load(logits, true, aligned);
  float best = -INFINITY;
#pragma unroll
  for (int v = 0; v < Piece<T>::kVectors; ++v) {
    suppress(piece.x[v], piece.first(v), call.suppress_ids, static_cast<int>(call.suppress_count));
#pragma unroll
    for (int i = 0; i < Piece<T>::kVector; ++i) best = fmaxf(best, piece.x[v][i]);
  }
  best = reduce_warp(best, Maximum{});
  if (lane == 0) shared_best[warp] = best;
  __syncthreads();
  best = shared_best[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) best = fmaxf(best, shared_best[w]);
  if (call.softcap != 0.f) best = cap(best, call.softcap);
  const float base = best == -INFINITY ? 0.f : best;

  // What lies after the row's end counts as -inf, which no filter leaves out.
  const uint32_t unit = 0x10000000u >> (4 * radix_pass);
  int counts[kDigits] = {};
  float masses[kDigits] = {};
#pragma unroll
  for (int v = 0; v < Piece<T>::kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < Piece<T>::kVector; ++i) {
      const float x = __fadd_rn(piece.x[v][i], 0.f);  // a negative zero becomes a zero
      const uint32_t key = ordered(x);
      const float capped = call.softcap != 0.f ? cap(x, call.softcap) : x;
      const float term = expf((capped - base) * inverse);
      masses[0] += term;
#pragma unroll
      for (int digit = 1; digit < kDigits; ++digit) {
        counts[digit] += key >= found.by_count + digit * unit;
        masses[digit] += key >= found.by_mass + digit * unit ? term : 0.f;
      }
    }
  }
#pragma unroll
  for (int digit = 0; digit < kDigits; ++digit) {
    counts[digit] = reduce_warp(counts[digit], Sum{});
    masses[digit] = reduce_warp(masses[digit], Sum{});
    if (lane == 0) {
      shared_counts[warp][digit] = counts[digit];
      shared_masses[warp][digit] = masses[digit];
    }
  }
  __syncthreads();
  if (thread >= kDigits) return;
  int count = 0;
  float mass = 0.f;
  for (int w = 0; w < kWarps; ++w) {
    count += shared_counts[w][thread];
    mass += shared_masses[w][thread];
  }
  const int64_t at = (now * pieces + number) * kDigits + thread;
  call.counts[at] = count;
  call.masses[at] = mass;
  if (thread == 0) call.best[row * pieces + number] = best;
}

}  // namespace

cudaError_t vocab_cut(const VocabCut& call, cudaStream_t stream) {
  const int64_t pieces = (call.vocab + kVocabPiece - 1) / kVocabPiece;
  if (call.rows < 0 || call.vocab < 1 || call.rows > INT_MAX / pieces || call.suppress_count < 0 ||
      call.suppress_count > kMaxSuppressIds) {
    return cudaErrorInvalidValue;
  }
  if (call.rows == 0) return cudaSuccess;
  return with_type(call.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool aligned =
        rows_are_aligned(static_cast<const T*>(call.logits), call.stride_logits_row);
    for (int radix_pass = 0; radix_pass <= digits_of<T>(); ++radix_pass) {
      const int64_t blocks = radix_pass < digits_of<T>() ? call.rows * pieces : call.rows;
      PYDLLM_LAUNCH(vocab_cut_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kPieceThreads),
                    0, stream, call, static_cast<int>(pieces), radix_pass, aligned);
      const cudaError_t error = cudaGetLastError();
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  });
}

}  // namespace pydllm
