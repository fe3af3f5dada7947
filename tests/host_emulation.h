// Runs CUDA kernels on the CPU, to test their logic where there is no GPU: one fiber a thread, one
// block after another. A fiber runs until it reaches a barrier or a shuffle; when all that take
// part have, they go on. Reaching one with a part of the warp or block ends the process with a
// message. It shows no races between barriers and says nothing of speed.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct __half {
  _Float16 value;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __half2float(__half x) {
  return static_cast<float>(x.value);
}
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}
inline float __expf(float x) {
  return std::exp(x);
}
inline int min(int a, int b) {
  return a < b ? a : b;
}

namespace emulation {

enum class State { kReady, kAtWarp, kAtBlock, kDone };

struct Fiber {
  ucontext_t context;
  State state;
};

constexpr size_t kStack = 64 * 1024;
constexpr unsigned kWarp = 32;

inline std::vector<Fiber> fibers;
inline std::vector<char> stacks;
inline std::vector<uint64_t> mailbox;  // one slot a thread, for shuffles
inline std::function<void()> body;
inline ucontext_t scheduler;
inline unsigned current;
inline dim3 thread_index, block_index, block_size, grid_size;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "host emulation: %s (block %u)\n", what, block_index.x);
  std::_Exit(70);
}

inline void wait(State state) {
  fibers[current].state = state;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void enter() {
  body();
  wait(State::kDone);
}

// Let every lane of a warp run to its next barrier, as often as the warp's own barriers let it.
inline bool run_warp(unsigned first, unsigned end) {
  bool ran_any = false;
  for (;;) {
    bool ran = false;
    unsigned at_warp = 0, live = 0;
    for (current = first; current < end; ++current) {
      if (fibers[current].state == State::kReady) {
        ran = ran_any = true;
        thread_index = dim3(current);
        swapcontext(&scheduler, &fibers[current].context);
      }
    }
    for (unsigned i = first; i < end; ++i) {
      at_warp += fibers[i].state == State::kAtWarp;
      live += fibers[i].state != State::kDone;
    }
    if (at_warp == 0) return ran_any;
    if (at_warp != live || live != end - first) fail("a shuffle was reached by a part of its warp");
    for (unsigned i = first; i < end; ++i) fibers[i].state = State::kReady;
    if (!ran) fail("deadlock");
  }
}

inline void run_block() {
  const unsigned threads = block_size.x;
  fibers.resize(threads);
  mailbox.resize(threads);
  stacks.resize(threads * kStack);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.state = State::kReady;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks.data() + i * kStack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (;;) {
    unsigned at_block = 0, done = 0;
    for (unsigned first = 0; first < threads; first += kWarp) {
      run_warp(first, first + kWarp < threads ? first + kWarp : threads);
    }
    for (const Fiber& fiber : fibers) {
      at_block += fiber.state == State::kAtBlock;
      done += fiber.state == State::kDone;
    }
    if (done == threads) return;
    if (at_block != threads) fail("__syncthreads was reached by a part of the block");
    for (Fiber& fiber : fibers) fiber.state = State::kReady;
  }
}

template <typename Kernel>
void launch(dim3 grid, dim3 block, Kernel kernel) {
  grid_size = grid;
  block_size = block;
  body = kernel;
  for (unsigned x = 0; x < grid.x; ++x) {
    block_index = dim3(x);
    run_block();
  }
}

}  // namespace emulation

#define threadIdx (emulation::thread_index)
#define blockIdx (emulation::block_index)
#define blockDim (emulation::block_size)
#define gridDim (emulation::grid_size)
#define PYDLLM_LAUNCH(kernel, grid, block, stream, ...) \
  emulation::launch(grid, block, [=] { kernel(__VA_ARGS__); })

inline void __syncthreads() {
  emulation::wait(emulation::State::kAtBlock);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const unsigned me = emulation::current;
  std::memcpy(&emulation::mailbox[me], &value, sizeof(T));
  emulation::wait(emulation::State::kAtWarp);
  T other;
  std::memcpy(&other, &emulation::mailbox[me ^ static_cast<unsigned>(lanes)], sizeof(T));
  emulation::wait(emulation::State::kAtWarp);
  return other;
}
