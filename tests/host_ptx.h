// csrc/ptx.cuh on the CPU: the same functions, with fragments where the PTX ISA has them. What a
// warp does together, its lanes do behind a barrier, and what they hand over lies in one of two
// boxes: whoever is at the next instruction knows that all have read the box before the last.
//
// An asynchronous copy lands as late as it may, in the wait for it, where threads run in ascending
// order, and as early as it may, at once, where they run in descending order. A kernel that is
// right in both waits for what it reads, and overwrites nothing that is still read.
#pragma once

#include "common.cuh"

namespace pydllm::ptx {

struct Copy {
  void* shared;
  const void* global;
};

struct Warp {
  const unsigned char* rows[32];  // ldmatrix
  float a[16][16], b[8][16];      // mma; b by columns
};

inline Warp boxes[2][emulation::kMaxThreads / 32];
inline unsigned box_of[emulation::kMaxThreads];
inline std::vector<std::vector<Copy>> groups[emulation::kMaxThreads];  // committed, oldest first
inline std::vector<Copy> open_group[emulation::kMaxThreads];

// The box of a thread's warp for this instruction.
inline Warp& box() {
  const unsigned me = emulation::current;
  box_of[me] ^= 1;
  return boxes[box_of[me]][me / 32];
}

// One kernel runs at a time.
inline void wait_for_previous() {}

inline unsigned lane() {
  return emulation::lane();
}

inline void ldmatrix(unsigned (&matrix)[4], const void* row, bool trans) {
  const unsigned lane = emulation::lane();
  emulation::check_aligned(row, 16);
  Warp& warp = box();
  warp.rows[lane] = static_cast<const unsigned char*>(row);
  __syncwarp();
  for (unsigned i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (unsigned j = 0; j < 2; ++j) {
      const unsigned r = trans ? 2 * (lane % 4) + j : lane / 4;
      const unsigned column = trans ? lane / 4 : 2 * (lane % 4) + j;
      std::memcpy(&pair[j], warp.rows[8 * i + r] + 2 * column, 2);
    }
    std::memcpy(&matrix[i], pair, 4);
  }
}

inline void ldmatrix_x4(unsigned (&matrix)[4], const void* row) {
  ldmatrix(matrix, row, false);
}
inline void ldmatrix_x4_trans(unsigned (&matrix)[4], const void* row) {
  ldmatrix(matrix, row, true);
}

template <typename T>
void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const unsigned lane = emulation::lane(), g = lane / 4, t = 2 * (lane % 4);
  const unsigned b[2] = {b0, b1};
  Warp& warp = box();
  for (unsigned i = 0; i < 4; ++i) {
    T pair[2];
    std::memcpy(pair, &a[i], 4);
    for (unsigned j = 0; j < 2; ++j) {
      warp.a[g + 8 * (i % 2)][t + 8 * (i / 2) + j] = to_float(pair[j]);
    }
  }
  for (unsigned i = 0; i < 2; ++i) {
    T pair[2];
    std::memcpy(pair, &b[i], 4);
    for (unsigned j = 0; j < 2; ++j) warp.b[g][t + 8 * i + j] = to_float(pair[j]);
  }
  __syncwarp();
  for (unsigned i = 0; i < 4; ++i) {
    const float* row = warp.a[g + 8 * (i / 2)];
    const float* column = warp.b[t + i % 2];
    float sum = 0;
    for (unsigned k = 0; k < 16; ++k) sum += row[k] * column[k];
    c[i] += sum;
  }
}

template <typename T>
unsigned fma_x2(unsigned a, unsigned b, unsigned c) {
  T x[2], y[2], z[2];
  std::memcpy(x, &a, 4);
  std::memcpy(y, &b, 4);
  std::memcpy(z, &c, 4);
  for (int i = 0; i < 2; ++i)
    x[i] = from_float<T>(fmaf(to_float(x[i]), to_float(y[i]), to_float(z[i])));
  unsigned d;
  std::memcpy(&d, x, 4);
  return d;
}

inline void land(const Copy& copy) {
  if (copy.global == nullptr) {
    std::memset(copy.shared, 0, 16);
  } else {
    std::memcpy(copy.shared, copy.global, 16);
  }
}

inline void cp_async_16(void* shared, const void* global, bool read) {
  emulation::check_aligned(shared, 16);
  emulation::check_aligned(global, 16);
  const Copy copy = {shared, read ? global : nullptr};
  if (emulation::descending) {
    land(copy);
  } else {
    open_group[emulation::current].push_back(copy);
  }
}

inline void cp_async_commit() {
  const unsigned me = emulation::current;
  groups[me].push_back(std::move(open_group[me]));
  open_group[me].clear();
}

template <int kGroups>
void cp_async_wait() {
  auto& mine = groups[emulation::current];
  while (mine.size() > kGroups) {
    for (const Copy& copy : mine.front()) land(copy);
    mine.erase(mine.begin());
  }
}

inline float exp2_approx(float x) {
  return std::exp2(x);
}

}  // namespace pydllm::ptx
