// How kernels read rows of logits: 128 bits at a time where a row allows.
#pragma once

#include "common.cuh"

namespace pydllm {

// A row of logits of which the first `shared` ids count; `size` can be read.
template <typename T>
struct Row {
  static constexpr int kVector = Vector<T>::kSize;
  const T* data;
  int size, shared;
  bool aligned;

  // The ids first .. first + kVector - 1, of which only those below `size` are there. `first` is a
  // multiple of kVector.
  __device__ __forceinline__ Vector<T> load(int first) const {
    if (aligned && first + kVector <= size) return load_vector(data + first);
    Vector<T> vector;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (first + i < size) vector.lane[i] = data[first + i];
    }
    return vector;
  }

  __device__ __forceinline__ bool counts(int id) const { return id < shared; }
};

template <typename T>
__device__ __forceinline__ Row<T> row_of(const T* data, int64_t size, int64_t shared) {
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  return {data, static_cast<int>(size), static_cast<int>(shared), aligned};
}

// Bit i is set where id first + i, of kCount, is below `shared` and not suppressed.
template <int kCount>
__device__ __forceinline__ unsigned ids_that_count(int first, int shared,
                                                   const int32_t* suppress_ids,
                                                   int suppress_count) {
  const int left = shared - first;
  unsigned bits = left >= kCount ? (1u << kCount) - 1 : left > 0 ? (1u << left) - 1 : 0;
  for (int b = 0; b < suppress_count; ++b) {
    const unsigned hit = static_cast<unsigned>(suppress_ids[b]) - static_cast<unsigned>(first);
    if (hit < kCount) bits &= ~(1u << hit);
  }
  return bits;
}

}  // namespace pydllm
