#include "experts.h"

#include "block.cuh"
#include "common.cuh"
#include "ptx.cuh"
#include "weight_tile.cuh"

namespace pydllm {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 16, kColumns = 64, kStep = 64, kStages = 4, kScaleBlock = 128;
constexpr int kOrderThreads = 256, kCombineThreads = 256;

// One block per expert: where its pairs begin, and which they are, in ascending order.
__global__ void __launch_bounds__(kOrderThreads)
    experts_order_kernel(int32_t* __restrict__ order,      // (pairs,)
                         int32_t* __restrict__ starts,     // (experts + 1,)
                         const int32_t* __restrict__ ids,  // (pairs,)
                         int pairs) {
  const int expert = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  int before = 0;
  for (int i = thread; i < pairs; i += kOrderThreads) before += ids[i] >= 0 && ids[i] < expert;
  int begin = reduce_block(before, 0, Sum{});
  if (thread == 0) starts[expert] = begin;
  for (int first = 0; first < pairs; first += kOrderThreads) {
    const int i = first + thread;
    const int hit = i < pairs && ids[i] == expert;
    const int place = begin + exclusive_scan(hit);
    if (hit != 0) order[place] = i;
    begin += reduce_block(hit, 0, Sum{});
  }
  if (thread == 0 && blockIdx.x == gridDim.x - 1) starts[expert + 1] = begin;
}

// A product of one half of the layer.
struct Product {
  void* out;           // (pairs, columns)
  const void* x;       // (rows, depth); to contract (pairs, depth)
  const void* weight;  // (experts, columns, depth); gate and up: (experts, 2 columns, depth)
  const float* scale;  // of the weight, or null
  const void* shared;  // a further expert of all rows, whose pairs follow; or null
  const int32_t* order;
  const int32_t* starts;
  int64_t rows, top_k, experts, columns, depth;
  bool gelu;
};

__device__ __forceinline__ float activated(float gate, bool gelu) {
  if (!gelu) return gate / (1.f + expf(-gate));
  // tanh(u) = 1 - 2 / (1 + exp(2 u)), u = sqrt(2 / pi) (g + 0.044715 g^3)
  const float twice = 1.5957691216057308f * gate * (1.f + 0.044715f * gate * gate);
  return gate * (1.f - 1.f / (1.f + expf(twice)));
}

// A block has 64 rows of one expert's weight and walks the expert's pairs 16 at a time. To expand,
// of the two tiles of a warp one is of the gate and one of the same columns of up.
template <typename T, Stored kStored, bool kPerBlock, bool kExpand>
__global__ void __launch_bounds__(kThreads, 4) experts_product_kernel(const Product call) {
  constexpr int kWeightBytes = kStored == Stored::kPlain ? 2 : 1;
  constexpr int kX = kRows * kStep * 2, kStageBytes = kX + kColumns * kStep * kWeightBytes;
  constexpr int kTileColumns = kExpand ? kColumns / 2 : kColumns;
  PYDLLM_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize;
  const unsigned lane = thread % kWarpSize, g = lane / 4, q = lane % 4;
  const int64_t expert = blockIdx.x, first_column = int64_t{blockIdx.y} * kTileColumns;
  const int64_t height = kExpand ? 2 * call.columns : call.columns;
  const int64_t routed = call.rows * call.top_k;
  const bool is_shared = expert >= call.experts;

  int64_t first, last;
  const unsigned char* weight;
  if (is_shared) {
    first = routed + (expert - call.experts) * kRows;
    last = min(first + kRows, routed + call.rows);
    weight = static_cast<const unsigned char*>(call.shared);
  } else {
    first = call.starts[expert];
    last = call.starts[expert + 1];
    weight = static_cast<const unsigned char*>(call.weight);
    weight += expert * height * call.depth * kWeightBytes;
  }
  // Row of the weight for one of the block's 64, or -1.
  const auto weight_row = [&](int i) -> int64_t {
    if (!kExpand) return first_column + i < call.columns ? first_column + i : -1;
    const int64_t column = first_column + i / 16 * 8 + i % 8;
    if (column >= call.columns) return -1;
    return i / 8 % 2 == 0 ? column : call.columns + column;
  };
  const auto pair_of = [&](int64_t at) -> int64_t {
    return is_shared ? at : static_cast<int64_t>(call.order[at]);
  };
  const auto* const x = static_cast<const unsigned char*>(call.x);
  const int steps = static_cast<int>((call.depth + kStep - 1) / kStep);

  for (int64_t tile = first; tile < last; tile += kRows) {
    // A thread copies one chunk of one row in each step.
    const int64_t own = tile + thread / 8;
    const bool used = own < last;
    int64_t row = used ? pair_of(own) : 0;
    if (kExpand && used) row = is_shared ? row - routed : row / call.top_k;
    const auto load = [&](int step) {
      unsigned char* const stage = shared + step % kStages * kStageBytes;
      const int64_t k = int64_t{step} * kStep;
      if (step < steps) {
        const int64_t at = k + thread % 8 * 8;
        const bool read = used && at < call.depth;
        ptx::cp_async_16(stage + swizzle(thread / 8, thread % 8),
                         read ? x + (row * call.depth + at) * 2 : x, read);
        constexpr int kChunks = 4 * kWeightBytes, kElements = kStep / kChunks;
#pragma unroll
        for (int i = thread; i < kColumns * kChunks; i += kThreads) {
          const int64_t from_row = weight_row(i / kChunks), from = k + i % kChunks * kElements;
          const bool there = from_row >= 0 && from < call.depth;
          const unsigned place = kStored == Stored::kPlain ? swizzle(i / 8, i % 8) : i * 16;
          const int64_t bytes = (from_row * call.depth + from) * kWeightBytes;
          ptx::cp_async_16(stage + kX + place, there ? weight + bytes : weight, there);
        }
      }
      ptx::cp_async_commit();
    };

    float acc[2][4] = {};
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) load(step);
    for (int step = 0; step < steps; ++step) {
      ptx::cp_async_wait<kStages - 2>();
      __syncthreads();
      load(step + kStages - 1);
      const unsigned char* const stage = shared + step % kStages * kStageBytes;
      unsigned upper[8], lower[8];
      load_sixteen(upper, stage, g, q);
      load_sixteen(lower, stage, g + 8, q);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const unsigned column = (warp * 2 + n) * 8 + g;
        unsigned b[8];
        if constexpr (kStored == Stored::kPlain) {
          load_sixteen(b, stage + kX, column, q);
        } else {
          const auto bytes =
              load_vector(reinterpret_cast<const unsigned*>(stage + kX + column * kStep + q * 16));
#pragma unroll
          for (int i = 0; i < 4; ++i) widen<T, kStored>(bytes.lane[i], b[2 * i], b[2 * i + 1]);
        }
        float part[4] = {};
        float (&sum)[4] = kPerBlock ? part : acc[n];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const unsigned a[4] = {upper[2 * i], lower[2 * i], upper[2 * i + 1], lower[2 * i + 1]};
          ptx::mma_m16n8k16<T>(sum, a, b[2 * i], b[2 * i + 1]);
        }
        if constexpr (kPerBlock) {
          // All columns of a tile have the scale of the first.
          const int64_t at = first_column + (kExpand && n == 1 ? call.columns : 0);
          const int64_t blocks = (height + kScaleBlock - 1) / kScaleBlock;
          const int64_t of_row = expert * blocks + at / kScaleBlock;
          const int64_t wide = (call.depth + kScaleBlock - 1) / kScaleBlock;
          const float scale = call.scale[of_row * wide + int64_t{step} * kStep / kScaleBlock];
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[n][i] = fmaf(scale, part[i], acc[n][i]);
        }
      }
    }
    ptx::cp_async_wait<0>();
    __syncthreads();  // the next tile may fill the stages

#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t at = tile + g + i / 2 * 8;
      if (at >= last) continue;
      T* const out = static_cast<T*>(call.out) + pair_of(at) * call.columns;
      if constexpr (kExpand) {
        const int64_t column = first_column + warp * 8 + 2 * q + i % 2;
        if (column >= call.columns) continue;
        float gate = acc[0][i], up = acc[1][i];
        if (kStored != Stored::kPlain && !kPerBlock) {
          gate *= call.scale[expert * height + column];
          up *= call.scale[expert * height + call.columns + column];
        }
        const float act = rounded<T>(activated(rounded<T>(gate), call.gelu));
        out[column] = from_float<T>(act * rounded<T>(up));
      } else {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int64_t column = first_column + (warp * 2 + n) * 8 + 2 * q + i % 2;
          if (column >= call.columns) continue;
          float value = acc[n][i];
          if (kStored != Stored::kPlain && !kPerBlock) {
            value *= call.scale[expert * height + column];
          }
          out[column] = from_float<T>(value);
        }
      }
    }
  }
}

// A thread per element: the slots in their order, rounded once, and the shared expert.
template <typename T>
__global__ void __launch_bounds__(kCombineThreads)
    experts_combine_kernel(const Experts call, const void* shared) {
  const int64_t index = int64_t{blockIdx.x} * kCombineThreads + threadIdx.x;
  if (index >= call.rows * call.width) return;
  const int64_t row = index / call.width, column = index % call.width;
  const auto* const y = static_cast<const T*>(call.y);
  float total = 0.f;
  bool live = false;
  for (int64_t slot = 0; slot < call.top_k; ++slot) {
    const int64_t pair = row * call.top_k + slot;
    const int expert = call.ids[pair];
    if (expert < 0 || expert >= call.experts) continue;
    live = true;
    // Each rounded, as in the definition.
    total =
        __fadd_rn(total, __fmul_rn(to_float(y[pair * call.width + column]), call.weights[pair]));
  }
  float out = rounded<T>(total);
  if (shared != nullptr) out += to_float(static_cast<const T*>(shared)[index]);
  static_cast<T*>(call.out)[index] = from_float<T>(live ? out : 0.f);
}

template <typename T, Stored kStored, bool kPerBlock, bool kExpand>
cudaError_t launch_product(const Product& call, cudaStream_t stream) {
  constexpr int kShared =
      kStages * (kRows * kStep * 2 + kColumns * kStep * (kStored == Stored::kPlain ? 2 : 1));
  auto* const kernel = experts_product_kernel<T, kStored, kPerBlock, kExpand>;
  const int64_t tiles = (call.rows + kRows - 1) / kRows;
  const int64_t blocks = call.experts + (call.shared == nullptr ? 0 : tiles);
  const int64_t width = kExpand ? kColumns / 2 : kColumns;
  const int64_t columns = (call.columns + width - 1) / width;
  if (blocks > INT_MAX || columns > 65535) return cudaErrorInvalidValue;
  const cudaError_t allowed = allow_shared(kernel, kShared);
  if (allowed != cudaSuccess) return allowed;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(columns));
  PYDLLM_LAUNCH(kernel, grid, dim3(kThreads), kShared, stream, call);
  return cudaGetLastError();
}

// Both products; `shared_halves` gate_up and down of the shared expert, or null.
template <typename T, Stored kStored, bool kPerBlock = false>
cudaError_t products(const Experts& call, const void* shared_gate_up, const void* shared_down,
                     cudaStream_t stream) {
  Product product = {call.act,   call.hidden, call.gate_up, call.gate_up_scale, shared_gate_up,
                     call.order, call.starts, call.rows,    call.top_k,         call.experts,
                     call.inner, call.width,  call.gelu};
  const cudaError_t error = launch_product<T, kStored, kPerBlock, true>(product, stream);
  if (error != cudaSuccess) return error;
  product.out = call.y;
  product.x = call.act;
  product.weight = call.down;
  product.scale = call.down_scale;
  product.shared = shared_down;
  product.columns = call.width;
  product.depth = call.inner;
  return launch_product<T, kStored, kPerBlock, false>(product, stream);
}

template <typename T>
cudaError_t run(const Experts& call, cudaStream_t stream) {
  const int64_t pairs = call.rows * call.top_k;
  PYDLLM_LAUNCH(experts_order_kernel, dim3(static_cast<unsigned>(call.experts)),
                dim3(kOrderThreads), 0, stream, call.order, call.starts, call.ids,
                static_cast<int>(pairs));
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  const bool apart = call.shared_act != nullptr;
  switch (call.stored) {
    case Stored::kPlain:
      error = products<T, Stored::kPlain>(call, apart ? nullptr : call.shared_gate_up,
                                          apart ? nullptr : call.shared_down, stream);
      break;
    case Stored::kE4m3:
      error = call.per_block ? products<T, Stored::kE4m3, true>(call, nullptr, nullptr, stream)
                             : products<T, Stored::kE4m3>(call, nullptr, nullptr, stream);
      break;
    case Stored::kInt8:
      error = products<T, Stored::kInt8>(call, nullptr, nullptr, stream);
      break;
  }
  if (error != cudaSuccess) return error;
  T* const shared_y = static_cast<T*>(call.y) + pairs * call.width;
  if (apart) {
    Experts alone = call;
    alone.experts = alone.top_k = 0;
    alone.inner = call.shared_inner;
    alone.act = call.shared_act;
    alone.y = shared_y;
    error = products<T, Stored::kPlain>(alone, call.shared_gate_up, call.shared_down, stream);
    if (error != cudaSuccess) return error;
  }
  const int64_t blocks = (call.rows * call.width + kCombineThreads - 1) / kCombineThreads;
  if (blocks > INT_MAX) return cudaErrorInvalidValue;
  PYDLLM_LAUNCH(experts_combine_kernel<T>, dim3(static_cast<unsigned>(blocks)),
                dim3(kCombineThreads), 0, stream, call,
                call.shared_down == nullptr ? nullptr : shared_y);
  return cudaGetLastError();
}

}  // namespace

cudaError_t experts(const Experts& call, cudaStream_t stream) {
  const bool small = call.stored != Stored::kPlain;
  const bool has_shared = call.shared_down != nullptr;
  if (call.rows < 0 || call.rows * (call.top_k + 1) > INT_MAX || call.width < 1 ||
      call.width % 16 != 0 || call.inner < 1 || call.inner % 16 != 0 || call.experts < 1 ||
      call.experts > INT_MAX || call.top_k < 1 || small != (call.gate_up_scale != nullptr) ||
      small != (call.down_scale != nullptr) ||
      (call.per_block && (call.stored != Stored::kE4m3 || call.inner % 32 != 0)) ||
      has_shared != (call.shared_gate_up != nullptr) ||
      (has_shared && (call.shared_inner < 1 || call.shared_inner % 16 != 0)) ||
      (has_shared && call.shared_act == nullptr && (small || call.shared_inner != call.inner))) {
    return cudaErrorInvalidValue;
  }
  if (call.rows == 0) return cudaSuccess;
  switch (call.dtype) {
    case Dtype::kFloat16:
      return run<__half>(call, stream);
    case Dtype::kBFloat16:
      return run<__nv_bfloat16>(call, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace pydllm
