#include "linear.h"

#include "common.cuh"
#include "linear_merge.cuh"
#include "ptx.cuh"
#include "swiglu.cuh"
#include "weight_tile.cuh"

namespace pydllm {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarpSize;
constexpr int kColumns = 64, kStep = 64, kStages = 4, kScaleBlock = 128;
constexpr int kTiles = 2;  // of 8 columns, each warp
static_assert(kColumns == kWarps * kTiles * 8);
constexpr int kMergeThreads = 256;

template <typename T, Stored kStored, int kFragments>
struct Stage {
  static constexpr int kRows = 16 * kFragments;
  static constexpr int kWeightBytes = kStored == Stored::kPlain ? 2 : 1;
  static constexpr int kX = kRows * kStep * 2, kBytes = kX + kColumns * kStep * kWeightBytes;
};

// A block has 16 kFragments rows, 64 columns and one split. A warp has 16 columns of all rows, so
// that a weight is converted once. Of a step of 64, lane q of four holds elements 16 q to 16 q +
// 15, four for each of four instructions, of x and weight alike: a sum does not mind which are
// together.
//
// Of the 16 columns of a warp, the second eight follow the first; with swiglu the first are the
// gate's and the second the up-projection's, so that a thread has both factors of an output.
template <typename T, Stored kStored, bool kPerBlock, int kFragments>
__global__ void __launch_bounds__(kThreads) linear_kernel(const Linear call, int row_blocks) {
  using Tile = Stage<T, kStored, kFragments>;
  PYDLLM_DYNAMIC_SHARED(shared);
  ptx::wait_for_previous();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize;
  const unsigned lane = thread % kWarpSize, g = lane / 4, q = lane % 4;
  const int64_t block = blockIdx.x;
  const int64_t first_row = block % row_blocks * Tile::kRows;
  const int64_t split = block / row_blocks % call.splits;
  const int64_t tile = block / row_blocks / call.splits;
  const bool fused = call.swiglu && call.partial == nullptr;
  const int64_t half = fused ? call.width / 2 : 8;  // from a warp's first columns to its second
  const auto column_of = [&](int i) {               // row of the weight of a tile's column
    return (tile * kWarps + i / 16) * (fused ? 8 : 16) + i % 8 + (i / 8 % 2) * half;
  };
  const int64_t all = (call.depth + kStep - 1) / kStep;
  const int64_t span = (all + call.splits - 1) / call.splits;
  const int64_t first_step = split * span;
  const int64_t rest = all - first_step;
  const int steps = static_cast<int>(rest < 0 ? 0 : rest < span ? rest : span);

  const auto* const x = static_cast<const unsigned char*>(call.x);
  const auto* const weight = static_cast<const unsigned char*>(call.weight);
  const auto load = [&](int step) {
    unsigned char* const stage = shared + step % kStages * Tile::kBytes;
    const int64_t k = (first_step + step) * kStep;
    if (step < steps) {
#pragma unroll
      for (int i = thread; i < Tile::kRows * 8; i += kThreads) {
        const int64_t row = first_row + i / 8, at = k + i % 8 * 8;
        const bool read = row < call.rows && at < call.depth;
        ptx::cp_async_16(stage + swizzle(i / 8, i % 8),
                         read ? x + (row * call.stride_x_row + at) * 2 : x, read);
      }
      constexpr int kChunks = 4 * Tile::kWeightBytes, kElements = kStep / kChunks;
#pragma unroll
      for (int i = thread; i < kColumns * kChunks; i += kThreads) {
        const int64_t row = column_of(i / kChunks), at = k + i % kChunks * kElements;
        const bool read = row < call.width && at < call.depth;
        const unsigned place = kStored == Stored::kPlain ? swizzle(i / 8, i % 8) : i * 16;
        const int64_t from = (row * call.stride_weight_row + at) * Tile::kWeightBytes;
        ptx::cp_async_16(stage + Tile::kX + place, read ? weight + from : weight, read);
      }
    }
    ptx::cp_async_commit();
  };

  float acc[kFragments][kTiles][4] = {};
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();
    load(step + kStages - 1);
    const unsigned char* const stage = shared + step % kStages * Tile::kBytes;
    const unsigned char* const weights = stage + Tile::kX;
    unsigned b[kTiles][8];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const unsigned column = (warp * kTiles + n) * 8 + g;
      if constexpr (kStored == Stored::kPlain) {
        load_sixteen(b[n], weights, column, q);
      } else {
        const auto bytes =
            load_vector(reinterpret_cast<const unsigned*>(weights + column * kStep + q * 16));
#pragma unroll
        for (int i = 0; i < 4; ++i) widen<T, kStored>(bytes.lane[i], b[n][2 * i], b[n][2 * i + 1]);
      }
    }
    float scale[kTiles];
    if constexpr (kPerBlock) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const int64_t row = column_of((warp * kTiles + n) * 8) / kScaleBlock;
        scale[n] =
            call.scale[row * call.stride_scale_row + (first_step + step) * kStep / kScaleBlock];
      }
    }
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      unsigned upper[8], lower[8];
      load_sixteen(upper, stage, 16 * f + g, q);
      load_sixteen(lower, stage, 16 * f + g + 8, q);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        float part[4] = {};
        float (&sum)[4] = kPerBlock ? part : acc[f][n];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const unsigned a[4] = {upper[2 * i], lower[2 * i], upper[2 * i + 1], lower[2 * i + 1]};
          ptx::mma_m16n8k16<T>(sum, a, b[n][2 * i], b[n][2 * i + 1]);
        }
        if constexpr (kPerBlock) {
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[f][n][i] = fmaf(scale[n], part[i], acc[f][n][i]);
        }
      }
    }
  }

  const auto output = [&](float sum, int64_t column) {
    return finished(sum, kPerBlock ? nullptr : call.scale, static_cast<const T*>(call.bias),
                    column);
  };
  auto* const y = static_cast<T*>(call.y);
#pragma unroll
  for (int f = 0; f < kFragments; ++f) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = first_row + 16 * f + g + i / 2 * 8;
      if (row >= call.rows) continue;
      const int64_t first = column_of(warp * 16) + 2 * q + i % 2;
      if (fused) {
        if (first >= half) continue;
        const T gate = output(acc[f][0][i], first), up = output(acc[f][1][i], half + first);
        y[row * half + first] = silu_times(gate, up);
        continue;
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const int64_t column = first + n * 8;
        if (column >= call.width) continue;
        if (call.partial != nullptr) {
          call.partial[(split * call.rows + row) * call.width + column] = acc[f][n][i];
        } else {
          y[row * call.width + column] = output(acc[f][n][i], column);
        }
      }
    }
  }
}

// Adds the splits in ascending order; a thread has one element.
template <typename T>
__global__ void __launch_bounds__(kMergeThreads) linear_merge_kernel(const Linear call) {
  ptx::wait_for_previous();
  const int64_t index = int64_t{blockIdx.x} * kMergeThreads + threadIdx.x;
  const int64_t inner = call.swiglu ? call.width / 2 : call.width;
  if (index >= call.rows * inner) return;
  const Partial<T> partial{call.partial,
                           call.per_block ? nullptr : call.scale,
                           static_cast<const T*>(call.bias),
                           call.splits,
                           call.rows,
                           call.width};
  const auto merged = [&](int64_t column) {
    T value[1];
    partial.load(index / inner, column, false, value);
    return value[0];
  };
  const T value = merged(index % inner);
  static_cast<T*>(call.y)[index] =
      call.swiglu ? silu_times(value, merged(inner + index % inner)) : value;
}

template <typename T, Stored kStored, bool kPerBlock, int kFragments>
cudaError_t launch(const Linear& call, cudaStream_t stream) {
  using Tile = Stage<T, kStored, kFragments>;
  auto* const kernel = linear_kernel<T, kStored, kPerBlock, kFragments>;
  const int64_t row_blocks = (call.rows + Tile::kRows - 1) / Tile::kRows;
  const int64_t tiles = (call.width + kColumns - 1) / kColumns;
  const int64_t blocks = row_blocks * tiles * call.splits;
  const int64_t outputs = call.rows * call.width / (call.swiglu ? 2 : 1);
  const int64_t merges = (outputs + kMergeThreads - 1) / kMergeThreads;
  if (blocks > INT_MAX || merges > INT_MAX) return cudaErrorInvalidValue;
  constexpr int kShared = kStages * Tile::kBytes;
  const cudaError_t allowed = allow_shared(kernel, kShared);
  if (allowed != cudaSuccess) return allowed;
  PYDLLM_LAUNCH_PDL(call.pdl, kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), kShared,
                    stream, call, static_cast<int>(row_blocks));
  const cudaError_t launched = cudaGetLastError();
  if (launched != cudaSuccess || call.partial == nullptr || call.y == nullptr) return launched;
  PYDLLM_LAUNCH_PDL(call.pdl, linear_merge_kernel<T>, dim3(static_cast<unsigned>(merges)),
                    dim3(kMergeThreads), 0, stream, call);
  return cudaGetLastError();
}

template <typename T, Stored kStored, bool kPerBlock = false>
cudaError_t with_rows(const Linear& call, cudaStream_t stream) {
  // One fragment reads a quarter of the shared memory; the bits are the same.
  return call.rows <= 16 ? launch<T, kStored, kPerBlock, 1>(call, stream)
                         : launch<T, kStored, kPerBlock, 4>(call, stream);
}

template <typename T>
cudaError_t with_weight(const Linear& call, cudaStream_t stream) {
  switch (call.stored) {
    case Stored::kPlain:
      return with_rows<T, Stored::kPlain>(call, stream);
    case Stored::kE4m3:
      return call.per_block ? with_rows<T, Stored::kE4m3, true>(call, stream)
                            : with_rows<T, Stored::kE4m3>(call, stream);
    case Stored::kInt8:
      return with_rows<T, Stored::kInt8>(call, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t linear(const Linear& call, cudaStream_t stream) {
  const bool small = call.stored != Stored::kPlain;
  if (call.rows < 0 || call.width < 1 || call.depth < 1 || call.depth % 16 != 0 ||
      call.splits < 1 || (call.splits > 1 && call.partial == nullptr) ||
      small != (call.scale != nullptr) || (call.per_block && call.stored != Stored::kE4m3) ||
      (call.swiglu && call.width % 2 != 0) || (call.y == nullptr && call.partial == nullptr)) {
    return cudaErrorInvalidValue;
  }
  if (call.swiglu && call.per_block && call.width % 16 != 0 && call.partial == nullptr) {
    return cudaErrorInvalidValue;
  }
  if (call.rows == 0) return cudaSuccess;
  switch (call.dtype) {
    case Dtype::kFloat16:
      return with_weight<__half>(call, stream);
    case Dtype::kBFloat16:
      return with_weight<__nv_bfloat16>(call, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace pydllm
