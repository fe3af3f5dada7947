// Rows of heads on their way to the tensor cores: rotated, swizzled into shared memory, multiplied.
#pragma once

#include "common.cuh"
#include "ptx.cuh"

namespace pydllm {

// Elements of 16 bytes: what a thread copies, and what ldmatrix reads of a row.
constexpr int kChunk = 8;

// Where a chunk of a row lies in a tile. Eight rows of one chunk lie in different banks: ldmatrix
// reads eight rows at a time.
template <int kHeadDim>
__device__ __forceinline__ unsigned swizzled(unsigned row, unsigned chunk) {
  return row * kHeadDim + (chunk ^ row % 8) * kChunk;
}

// The same for row 16 n + row and chunk 2 k + chunk, of which only n and k change in a loop that is
// unrolled: an address is one exclusive or away from `row` and `chunk`, and n is in the
// instruction.
template <int kHeadDim>
__device__ __forceinline__ unsigned swizzled(unsigned n, unsigned row, unsigned k, unsigned chunk) {
  return row * kHeadDim + ((chunk ^ row % 8) ^ 2 * k) * kChunk + 16 * n * kHeadDim;
}

// RoPE rotates chunk `first` of a head with chunk `second`; after the pairs that it rotates come
// pairs that it leaves. A unit is one pair of chunks: head_dim / 16 neighbouring threads hold a
// head.
template <int kHeadDim>
struct Unit {
  static constexpr int kCount = kHeadDim / (2 * kChunk);
  int index, first, second;
  bool rotates;
  __device__ __forceinline__ Unit(int index, int half)
      : index(index), rotates(index < half / kChunk) {
    first = rotates ? index : index + half / kChunk;
    second = rotates ? index + half / kChunk : index + kCount;
  }
};

// What rotates rows: tables and norm of a call.
template <typename T>
struct RopeParams {
  const float* cos;  // (positions, half)
  const float* sin;
  int half;
  const T* norm;  // (head_dim,), or null
  float eps;
};

// A unit of a row, after the norm and RoPE, rounded after each; zeros unless `used`. Every fma is
// spelled out, so that a committed key has the bits of the one that was attended to. All lanes of a
// warp have to be here.
template <typename T, int kHeadDim>
__device__ __forceinline__ void load_rotated(Vector<T>& a, Vector<T>& b, const T* row, bool used,
                                             int position, const Unit<kHeadDim>& unit,
                                             const RopeParams<T>& rope) {
  float wide_a[kChunk], wide_b[kChunk];
  if (used) {
    a = load_vector(row + unit.first * kChunk);
    b = load_vector(row + unit.second * kChunk);
  } else {
    a = {}, b = {};
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) wide_a[i] = to_float(a.lane[i]), wide_b[i] = to_float(b.lane[i]);
  if (rope.norm != nullptr) {
    // By chunks in their order, whichever of them RoPE rotates: commit_branch sums alike.
    const int chunks[2] = {unit.index, unit.index + Unit<kHeadDim>::kCount};
    float sums[2] = {0.f, 0.f};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!used) continue;
      const auto chunk = load_vector(row + chunks[half] * kChunk);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        sums[half] = fmaf(to_float(chunk.lane[i]), to_float(chunk.lane[i]), sums[half]);
      }
    }
    float squares = sums[0] + sums[1];
#pragma unroll
    for (int lanes = Unit<kHeadDim>::kCount / 2; lanes > 0; lanes /= 2) {
      squares += __shfl_xor_sync(kFullWarp, squares, lanes);
    }
    const float factor = rsqrtf(fmaf(squares, 1.f / kHeadDim, rope.eps));
    const auto weight_a = load_vector(rope.norm + unit.first * kChunk);
    const auto weight_b = load_vector(rope.norm + unit.second * kChunk);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float normed_a = rounded<T>(wide_a[i] * factor);
      const float normed_b = rounded<T>(wide_b[i] * factor);
      a.lane[i] = from_float<T>(normed_a * to_float(weight_a.lane[i]));
      b.lane[i] = from_float<T>(normed_b * to_float(weight_b.lane[i]));
      wide_a[i] = to_float(a.lane[i]), wide_b[i] = to_float(b.lane[i]);
    }
  }
  if (!used || !unit.rotates) return;
  const int64_t from = static_cast<int64_t>(position) * rope.half + unit.index * kChunk;
  Vector<float> cos[2], sin[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    cos[i] = load_vector(rope.cos + from + 4 * i);
    sin[i] = load_vector(rope.sin + from + 4 * i);
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const float c = cos[i / 4].lane[i % 4], s = sin[i / 4].lane[i % 4];
    a.lane[i] = from_float<T>(fmaf(wide_a[i], c, -(wide_b[i] * s)));
    b.lane[i] = from_float<T>(fmaf(wide_b[i], c, wide_a[i] * s));
  }
}

template <typename T>
__device__ __forceinline__ unsigned pack(float low, float high) {
  struct alignas(4) Pair {
    T low, high;
  } pair = {from_float<T>(low), from_float<T>(high)};
  unsigned packed;
  memcpy(&packed, &pair, sizeof(packed));
  return packed;
}

// softcap * tanh(s); a series near 0, where the quotient would cancel.
__device__ __forceinline__ float capped(float s, float softcap) {
  const float x = fminf(fabsf(s), 20.f), square = s * s;
  const float e = ptx::exp2_approx(x * -2.8853900817779268f);
  const float series =
      s * fmaf(square, fmaf(square, fmaf(square, -17.f / 315, 2.f / 15), -1.f / 3), 1.f);
  const float tanh = x < 0.2f ? series : copysignf((1.f - e) / (1.f + e), s);
  return s != s ? s : softcap * tanh;
}

// What a warp carries over its key tiles: 16 query rows, of which a lane holds rows lane / 4 and
// lane / 4 + 8, as in the accumulator of mma_m16n8k16.
template <int kHeadDim>
struct OnlineSoftmax {
  float acc[kHeadDim / 8][4] = {};
  float best[2] = {-INFINITY, -INFINITY};  // of the row, in base 2
  float sum[2] = {0.f, 0.f};               // of this lane's columns
};

// Scores of 16 query rows with 64 keys.
template <typename T, int kHeadDim, int kKeys>
__device__ __forceinline__ void multiply_keys(float (&s)[kKeys / 8][4], const T* queries,
                                              const T* keys) {
  const unsigned lane = ptx::lane();
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.f;
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; ++k) {
    unsigned a[4];
    ptx::ldmatrix_x4(a, queries + swizzled<kHeadDim>(0, lane % 16, k, lane / 16));
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      unsigned b[4];  // keys 0 - 7 and 8 - 15 of 16, dimensions 0 - 7 and 8 - 15 of 16 of each
      const unsigned key = lane / 16 * 8 + lane % 8;
      ptx::ldmatrix_x4(b, keys + swizzled<kHeadDim>(n, key, k, lane / 8 % 2));
      ptx::mma_m16n8k16<T>(s[2 * n], a, b[0], b[1]);
      ptx::mma_m16n8k16<T>(s[2 * n + 1], a, b[2], b[3]);
    }
  }
}

// One key tile of the online softmax. `s` are scores in base 2, -inf where a row does not see a
// key. A row that is not `mine` stays as it is, NaN or not.
template <typename T, int kHeadDim, int kKeys>
__device__ __forceinline__ void add_values(OnlineSoftmax<kHeadDim>& online,
                                           float (&s)[kKeys / 8][4], const T* values,
                                           const bool (&mine)[2]) {
  const unsigned lane = ptx::lane();
  float alpha[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float best = online.best[r];
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) best = fmaxf(best, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
    best = fmaxf(best, __shfl_xor_sync(kFullWarp, best, 1));
    best = fmaxf(best, __shfl_xor_sync(kFullWarp, best, 2));
    const float shift = best == -INFINITY ? 0.f : best;
    alpha[r] = ptx::exp2_approx(online.best[r] - shift);
    float sum = 0.f;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 2 * r; i < 2 * r + 2; ++i) {
        s[n][i] = ptx::exp2_approx(s[n][i] - shift);
        sum += s[n][i];
      }
    }
    online.best[r] = best;
    online.sum[r] = fmaf(online.sum[r], alpha[r], sum);
  }
  unsigned p[kKeys / 16][4];
#pragma unroll
  for (int k = 0; k < kKeys / 16; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      p[k][i] = pack<T>(s[2 * k + i / 2][i % 2 * 2], s[2 * k + i / 2][i % 2 * 2 + 1]);
    }
  }
#pragma unroll
  for (int d = 0; d < kHeadDim / 16; ++d) {
    float sums[2][4];
#pragma unroll
    for (int i = 0; i < 8; ++i)
      sums[i / 4][i % 4] = online.acc[2 * d + i / 4][i % 4] * alpha[i % 4 / 2];
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      unsigned b[4];  // keys 0 - 7 and 8 - 15 of 16, of dimensions 0 - 7, then of 8 - 15
      ptx::ldmatrix_x4_trans(b, values + swizzled<kHeadDim>(k, lane % 16, d, lane / 16));
      ptx::mma_m16n8k16<T>(sums[0], p[k], b[0], b[1]);
      ptx::mma_m16n8k16<T>(sums[1], p[k], b[2], b[3]);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& acc = online.acc[2 * d + i / 4][i % 4];
      acc = mine[i % 4 / 2] ? sums[i / 4][i % 4] : acc;
    }
  }
}

}  // namespace pydllm
