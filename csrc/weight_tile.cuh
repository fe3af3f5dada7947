// Tiles of weights and rows in shared memory, as the products of linear and experts read them.
#pragma once

#include "common.cuh"
#include "linear.h"
#include "ptx.cuh"

namespace pydllm {

// Four bytes of a weight as two pairs of T, exactly.
template <typename T, Stored kStored>
__device__ __forceinline__ void widen(unsigned bytes, unsigned& low, unsigned& high) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  const unsigned parts[2] = {(bytes & 0xffu) | (bytes & 0xff00u) << 8,
                             (bytes >> 16 & 0xffu) | (bytes >> 16 & 0xff00u) << 8};
  unsigned wide[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const unsigned part = parts[i];  // a byte in the low half of each 16 bits
    if constexpr (kStored == Stored::kE4m3) {
      // Sign and seven bits where T has its own: the number times 2^-8 or 2^-120.
      const unsigned moved = (part & 0x00800080u) << 8 | (part & 0x007f007fu) << (kHalf ? 7 : 4);
      wide[i] = ptx::fma_x2<T>(moved, kHalf ? 0x5c005c00u : 0x7b807b80u, 0x80008000u);
    } else if constexpr (kHalf) {
      // 1024 plus the byte as 0 to 255, less 1152.
      wide[i] = ptx::fma_x2<T>((part ^ 0x00800080u) | 0x64006400u, 0x3c003c00u, 0xe480e480u);
    } else {
      // 128 plus the low seven bits, less 128 or 256.
      const unsigned biased = part | 0x43004300u;
      wide[i] = ptx::fma_x2<T>(biased & 0xff80ff80u, 0xbf80bf80u, biased & 0xff7fff7fu);
    }
  }
  low = wide[0];
  high = wide[1];
}

// Where 16 bytes of a row of 64 elements of 16 bits lie: eight rows of one chunk in all banks.
__device__ __forceinline__ unsigned swizzle(unsigned row, unsigned chunk) {
  return row * 128 + (chunk ^ row % 8) * 16;
}

// Elements [16 q, 16 q + 16) of a row, as pairs.
__device__ __forceinline__ void load_sixteen(unsigned (&pairs)[8], const unsigned char* tile,
                                             unsigned row, unsigned q) {
#pragma unroll
  for (unsigned i = 0; i < 2; ++i) {
    const auto chunk =
        load_vector(reinterpret_cast<const unsigned*>(tile + swizzle(row, 2 * q + i)));
#pragma unroll
    for (int j = 0; j < 4; ++j) pairs[4 * i + j] = chunk.lane[j];
  }
}

}  // namespace pydllm
