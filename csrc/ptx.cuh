// PTX instructions, one function each; sm_80 and newer. Nothing else in csrc/ is written in
// assembly. tests/host_ptx.h has the same functions for the CPU.
#pragma once

#ifdef PYDLLM_HOST_EMULATION
#include "host_ptx.h"
#else

#include "common.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "csrc/ptx.cuh: expected compute capability 8.0 or newer"
#endif

namespace pydllm::ptx {

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Let the next kernel start, and wait until the kernels before this one have ended, if this one was
// launched so (PYDLLM_LAUNCH_PDL); otherwise it waits for nothing. Stands before the first access
// to global memory, in every thread.
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The thread's number in its warp. Read anew each time: what a loop makes of it is made in the
// loop, where a register may be free, not kept in one of its own.
__device__ __forceinline__ unsigned lane() {
  unsigned lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// Four matrices of 8 x 8 elements of 16 bits. Lane 8 i + r points to row r of matrix i, 16 bytes in
// shared memory; matrix[i] of a lane becomes elements 2 (lane % 4) and the next of row lane / 4.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&matrix)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same of transposed matrices: a lane gets column lane / 4 of rows 2 (lane % 4) and the next.
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&matrix)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(shared_address(row))
               : "memory");
}

// c (16 x 8, fp32) += a (16 x 16) b (16 x 8). With g = lane / 4 and t = 2 (lane % 4) a lane holds,
// in pairs from the low half on,
//   a[0], a[1]  rows g, g + 8 at columns t, t + 1; a[2], a[3]  the same at columns t + 8, t + 9
//   b[0], b[1]  rows t, t + 1 and t + 8, t + 9 of column g
//   c[0 .. 1]   row g at columns t, t + 1; c[2 .. 3]  row g + 8
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                             unsigned b1);

template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&c)[4], const unsigned (&a)[4],
                                                     unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&c)[4], const unsigned (&a)[4],
                                                            unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// a * b + c of two pairs, each rounded once; subnormal numbers count.
template <typename T>
__device__ __forceinline__ unsigned fma_x2(unsigned a, unsigned b, unsigned c);

template <>
__device__ __forceinline__ unsigned fma_x2<__half>(unsigned a, unsigned b, unsigned c) {
  unsigned d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

template <>
__device__ __forceinline__ unsigned fma_x2<__nv_bfloat16>(unsigned a, unsigned b, unsigned c) {
  unsigned d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Copy 16 bytes to shared memory in the background, past the L1; zeros unless `read`, and then
// nothing is read. Both addresses are multiples of 16.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool read) {
  asm volatile(
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
      "l"(global), "r"(read ? 16 : 0)
      : "memory");
}

// The thread's copies since the last call become one group, which may be empty.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Wait until at most the last `kGroups` groups of the thread are still in flight.
template <int kGroups>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// 2^x, within 2 units in the last place; 0 below the normal numbers.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace pydllm::ptx

#endif
