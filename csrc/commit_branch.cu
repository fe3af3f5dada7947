#include "commit_branch.h"

#include "common.cuh"

namespace pydllm {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;

struct Strides {
  int64_t batch, row, head;
};

struct Sizes {
  int batch, window, branches, kv_heads, head_dim, half, slots, page, pages;
};

// One warp per row of a head: its key and its value. kSize elements are one access of a lane: 16
// bytes where everything is aligned to them, or one element.
template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads)
    commit_branch_kernel(T* __restrict__ k_cache,  // (batch, slots, kv_heads, head_dim), or
                         T* __restrict__ v_cache,  // (pages, page, kv_heads, head_dim)
                         const T* __restrict__ k,  // (batch, branches window, kv_heads, ...)
                         const T* __restrict__ v,  //
                         const int32_t* __restrict__ branch_of,    // (batch,), as the next three
                         const int32_t* __restrict__ start_of,     //
                         const int32_t* __restrict__ commit_of,    //
                         const int32_t* __restrict__ pad_of,       // or null
                         const float* __restrict__ cos,            // (positions, half)
                         const float* __restrict__ sin,            //
                         const T* __restrict__ k_norm,             // (head_dim,) or null
                         const int32_t* __restrict__ block_table,  // (batch, slots / page) or null
                         Sizes sizes, float eps, Strides stride_k, Strides stride_v,
                         Strides stride_k_cache, Strides stride_v_cache) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t index = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  const int head = static_cast<int>(index % sizes.kv_heads);
  const int row = static_cast<int>(index / sizes.kv_heads % sizes.window);
  const int64_t batch = index / sizes.kv_heads / sizes.window;
  if (batch >= sizes.batch) return;
  const int branch = branch_of[batch];
  const int64_t slot = int64_t{start_of[batch]} + row;
  const int64_t position = slot - (pad_of == nullptr ? 0 : max(pad_of[batch], 0));
  if (branch < 0 || branch >= sizes.branches || row >= commit_of[batch] || position < 0 ||
      slot >= sizes.slots) {
    return;
  }

  int64_t part = batch, place = slot;
  if (block_table != nullptr) {
    part = block_table[batch * (sizes.slots / sizes.page) + slot / sizes.page];
    place = slot % sizes.page;
    if (part < 0 || part >= sizes.pages) return;
  }
  const int64_t fresh = int64_t{branch} * sizes.window + row;
  k += batch * stride_k.batch + fresh * stride_k.row + head * stride_k.head;
  v += batch * stride_v.batch + fresh * stride_v.row + head * stride_v.head;
  k_cache += part * stride_k_cache.batch + place * stride_k_cache.row + head * stride_k_cache.head;
  v_cache += part * stride_v_cache.batch + place * stride_v_cache.row + head * stride_v_cache.head;
  cos += position * sizes.half;
  sin += position * sizes.half;

  // A head is one or two iterations of these loops: unrolled further they only take registers.
  float factor = 1.f;
  if (k_norm != nullptr) {
    float squares = 0.f;
#pragma unroll 1
    for (int i = lane * kSize; i < sizes.head_dim; i += kWarpSize * kSize) {
      const auto chunk = load_chunk<T, kSize>(k + i);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        squares = fmaf(to_float(chunk.lane[j]), to_float(chunk.lane[j]), squares);
      }
    }
#pragma unroll
    for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
      squares += __shfl_xor_sync(kFullWarp, squares, lanes);
    }
    factor = rsqrtf(squares / static_cast<float>(sizes.head_dim) + eps);
  }
  const auto load_normed = [&](int first) {
    auto chunk = load_chunk<T, kSize>(k + first);
    if (k_norm != nullptr) {
      const auto weight = load_chunk<T, kSize>(k_norm + first);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const float normed = rounded<T>(to_float(chunk.lane[j]) * factor);
        chunk.lane[j] = from_float<T>(normed * to_float(weight.lane[j]));
      }
    }
    return chunk;
  };
#pragma unroll 1
  for (int i = lane * kSize; i < sizes.half; i += kWarpSize * kSize) {
    auto a = load_normed(i), b = load_normed(i + sizes.half);
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const float wide_a = to_float(a.lane[j]), wide_b = to_float(b.lane[j]);
      const float c = cos[i + j], s = sin[i + j];
      // The operations of window_attention: the same bits.
      a.lane[j] = from_float<T>(fmaf(wide_a, c, -__fmul_rn(wide_b, s)));
      b.lane[j] = from_float<T>(fmaf(wide_b, c, __fmul_rn(wide_a, s)));
    }
    store_chunk(k_cache + i, a);
    store_chunk(k_cache + i + sizes.half, b);
  }
#pragma unroll 1
  for (int i = 2 * sizes.half + lane * kSize; i < sizes.head_dim; i += kWarpSize * kSize) {
    store_chunk(k_cache + i, load_normed(i));
  }
#pragma unroll 1
  for (int i = lane * kSize; i < sizes.head_dim; i += kWarpSize * kSize) {
    store_chunk(v_cache + i, load_chunk<T, kSize>(v + i));
  }
}

}  // namespace

cudaError_t commit_branch(void* k_cache, void* v_cache, const void* k, const void* v,
                          const int32_t* branch, const int32_t* start, const int32_t* commit,
                          const int32_t* pad, const float* cos, const float* sin,
                          const void* k_norm, const int32_t* block_table, Dtype dtype,
                          int64_t batch, int64_t window, int64_t branches, int64_t kv_heads,
                          int64_t head_dim, int64_t half, int64_t slots, int64_t page,
                          int64_t pages, float eps, int64_t stride_k_batch, int64_t stride_k_row,
                          int64_t stride_k_head, int64_t stride_v_batch, int64_t stride_v_row,
                          int64_t stride_v_head, int64_t stride_k_cache_batch,
                          int64_t stride_k_cache_row, int64_t stride_k_cache_head,
                          int64_t stride_v_cache_batch, int64_t stride_v_cache_row,
                          int64_t stride_v_cache_head, cudaStream_t stream) {
  for (const int64_t size :
       {batch, window, branches, kv_heads, head_dim, half, slots, page, pages}) {
    if (size < 0 || size > INT_MAX) return cudaErrorInvalidValue;
  }
  const int64_t warps = batch * window * kv_heads, blocks = (warps + kWarps - 1) / kWarps;
  if (blocks > INT_MAX || 2 * half > head_dim) return cudaErrorInvalidValue;
  if (warps == 0 || head_dim == 0) return cudaSuccess;

  const Sizes sizes = {
      static_cast<int>(batch),    static_cast<int>(window),   static_cast<int>(branches),
      static_cast<int>(kv_heads), static_cast<int>(head_dim), static_cast<int>(half),
      static_cast<int>(slots),    static_cast<int>(page),     static_cast<int>(pages)};
  const Strides of_k = {stride_k_batch, stride_k_row, stride_k_head};
  const Strides of_v = {stride_v_batch, stride_v_row, stride_v_head};
  const Strides of_k_cache = {stride_k_cache_batch, stride_k_cache_row, stride_k_cache_head};
  const Strides of_v_cache = {stride_v_cache_batch, stride_v_cache_row, stride_v_cache_head};
  return with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kVector = Vector<T>::kSize;
    const auto aligned = [](const void* p, const Strides& strides) {
      const auto* const typed = static_cast<const T*>(p);
      return rows_are_aligned(typed, strides.batch) && rows_are_aligned(typed, strides.row) &&
             rows_are_aligned(typed, strides.head);
    };
    const bool all_aligned = aligned(k, of_k) && aligned(v, of_v) && aligned(k_cache, of_k_cache) &&
                             aligned(v_cache, of_v_cache) && aligned(k_norm, {}) &&
                             half % kVector == 0 && head_dim % kVector == 0;
    const auto launch = [&](auto size) {
      constexpr int kSize = decltype(size)::value;
      PYDLLM_LAUNCH((commit_branch_kernel<T, kSize>), dim3(static_cast<unsigned>(blocks)),
                    dim3(kThreads), 0, stream, static_cast<T*>(k_cache), static_cast<T*>(v_cache),
                    static_cast<const T*>(k), static_cast<const T*>(v), branch, start, commit, pad,
                    cos, sin, static_cast<const T*>(k_norm), block_table, sizes, eps, of_k, of_v,
                    of_k_cache, of_v_cache);
      return cudaGetLastError();
    };
    return all_aligned ? launch(Constant<kVector>{}) : launch(Constant<1>{});
  });
}

}  // namespace pydllm
