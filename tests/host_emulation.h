// Runs CUDA kernels on the CPU, to test their logic where there is no GPU: one fiber a thread, one
// block after another. A fiber runs until it reaches a barrier, a shuffle or a vote; when all that
// take part have, they go on. One that a part of the warp or block reaches, a shuffle from a lane
// that takes no part, or a launch that no GPU would accept is an error with a message.
//
// Threads and blocks run in ascending order; with PYDLLM_EMULATION_ORDER=descending in the
// environment, in descending order, which shows where a barrier between a low writer and a high
// reader is missing.
// Dynamic shared memory is poisoned before each block. It says nothing of speed, and a kernel that
// waits for another block hangs.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __shared__ static  // one block runs at a time
#define __constant__ static

struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorMisalignedAddress = 716,
};

inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess                  ? "cudaSuccess"
         : error == cudaErrorInvalidValue      ? "cudaErrorInvalidValue"
         : error == cudaErrorMisalignedAddress ? "cudaErrorMisalignedAddress"
                                               : "cudaErrorInvalidConfiguration";
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess                  ? "no error"
         : error == cudaErrorInvalidValue      ? "invalid argument"
         : error == cudaErrorMisalignedAddress ? "misaligned address"
                                               : "invalid configuration argument";
}

struct dim3 {
  unsigned x, y, z;
  explicit constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

enum class State { kReady, kAtWarp, kAtBlock, kDone };
enum class Kind { kSync, kShuffle, kVote, kMatch, kReduce };

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 256 * 1024;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kStaticLimit = 48 * 1024, kDynamicLimit = 227 * 1024;

struct Fiber {
#if defined(__x86_64__)
  void* stack_pointer;
#else
  ucontext_t context;
#endif
  State state;
  Kind kind;
  unsigned mask;
  uint64_t offered, seen;  // what a lane gives to the others of its warp, at its last exchange
};

inline Fiber fibers[kMaxThreads];
inline Fiber scheduler;
inline std::unique_ptr<char[]> stacks;
struct alignas(128) Chunk {
  unsigned char bytes[128];
};
inline std::vector<Chunk> dynamic_shared;
inline std::function<void()> body;
inline const char* kernel_name = "";
inline const char* failure = nullptr;  // of the fiber that runs
inline unsigned current, threads;
inline bool descending;
inline dim3 thread_index, block_index, block_size, grid_size;
inline cudaError_t last_error = cudaSuccess;

#if defined(__x86_64__)
extern "C" void pydllm_emulation_switch(void** from, void* to);
// Registers that a function must keep go to the old stack and come from the new one.
asm(R"(
  .text
  .type pydllm_emulation_switch, @function
pydllm_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size pydllm_emulation_switch, .-pydllm_emulation_switch
)");
inline void switch_to(Fiber& from, Fiber& to) {
  pydllm_emulation_switch(&from.stack_pointer, to.stack_pointer);
}
inline void prepare(Fiber& fiber, char* stack, void (*entry)()) {
  auto top = reinterpret_cast<uintptr_t>(stack + kStack) / 16 * 16;
  auto** slots = reinterpret_cast<void**>(top);
  slots[-1] = nullptr;  // where entry would return to
  slots[-2] = reinterpret_cast<void*>(entry);
  for (int i = 3; i <= 8; ++i) slots[-i] = nullptr;
  fiber.stack_pointer = slots - 8;
}
#else
inline void switch_to(Fiber& from, Fiber& to) {
  swapcontext(&from.context, &to.context);
}
inline void prepare(Fiber& fiber, char* stack, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}
#endif

[[noreturn]] inline void fail(const char* what) {
  failure = nullptr;
  const dim3 at = block_index;
  throw std::runtime_error(std::string("host emulation: ") + what + " (" + kernel_name +
                           ", block " + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " +
                           std::to_string(at.z) + ", thread " + std::to_string(current) + ")");
}

inline void wait(State state) {
  Fiber& me = fibers[current];
  me.state = state;
  switch_to(me, scheduler);
}

// An error in a kernel: the scheduler throws it, on the stack of the launch.
inline void fail_in_kernel(const char* what) {
  failure = what;
  wait(State::kDone);
}

inline void enter() {
  body();
  wait(State::kDone);
}

inline void run_thread(unsigned thread) {
  current = thread;
  const unsigned x = block_size.x, y = block_size.y;
  thread_index = dim3(thread % x, thread / x % y, thread / x / y);
  switch_to(scheduler, fibers[thread]);
  if (failure != nullptr) fail(failure);
}

// Let the lanes that wait for each other go on; whether there were any.
inline bool release(unsigned first, unsigned end) {
  bool any = false;
  for (unsigned i = first; i < end; ++i) {
    if (fibers[i].state != State::kAtWarp) continue;
    bool complete = true;
    for (unsigned j = first; j < end; ++j) {
      if (!(fibers[i].mask >> (j - first) & 1)) continue;
      const Fiber& other = fibers[j];
      complete &= other.state == State::kAtWarp && other.mask == fibers[i].mask;
      if (complete && other.kind != fibers[i].kind) {
        fail("lanes of a warp wait for each other at different operations");
      }
    }
    if (!complete) continue;
    any = true;
    for (unsigned j = first; j < end; ++j) {
      if (!(fibers[i].mask >> (j - first) & 1)) continue;
      fibers[j].seen = fibers[j].offered;
      if (j != i) fibers[j].state = State::kReady;
    }
    fibers[i].state = State::kReady;
  }
  return any;
}

inline void run_warp(unsigned first, unsigned end) {
  do {
    for (unsigned i = first; i < end; ++i) {
      const unsigned thread = descending ? end - 1 - (i - first) : i;
      if (fibers[thread].state == State::kReady) run_thread(thread);
    }
  } while (release(first, end));
  for (unsigned i = first; i < end; ++i) {
    if (fibers[i].state == State::kAtWarp) fail("a shuffle was reached by a part of its warp");
  }
}

inline void run_block() {
  for (unsigned i = 0; i < threads; ++i) {
    prepare(fibers[i], stacks.get() + i * kStack, enter);
    fibers[i].state = State::kReady;
  }
  if (!dynamic_shared.empty()) {
    std::memset(static_cast<void*>(dynamic_shared.data()), 0xff,
                dynamic_shared.size() * sizeof(Chunk));
  }
  const unsigned warps = (threads + kWarp - 1) / kWarp;
  for (;;) {
    unsigned at_block = 0, done = 0;
    for (unsigned i = 0; i < warps; ++i) {
      const unsigned first = (descending ? warps - 1 - i : i) * kWarp;
      run_warp(first, first + kWarp < threads ? first + kWarp : threads);
    }
    for (unsigned i = 0; i < threads; ++i) {
      at_block += fibers[i].state == State::kAtBlock;
      done += fibers[i].state == State::kDone;
    }
    if (done == threads) return;
    if (at_block != threads) fail("__syncthreads was reached by a part of the block");
    for (unsigned i = 0; i < threads; ++i) fibers[i].state = State::kReady;
  }
}

template <typename Kernel>
void launch(const char* name, dim3 grid, dim3 block, size_t shared, Kernel kernel) {
  const uint64_t size = uint64_t{block.x} * block.y * block.z;
  const bool grid_fits = grid.x >= 1 && grid.x <= 0x7fffffffu && grid.y >= 1 && grid.y <= 65535 &&
                         grid.z >= 1 && grid.z <= 65535;
  if (!grid_fits || size < 1 || size > kMaxThreads || shared > kDynamicLimit) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  if (!stacks) stacks.reset(new char[kMaxThreads * kStack]);
  const char* order = std::getenv("PYDLLM_EMULATION_ORDER");
  descending = order != nullptr && std::strcmp(order, "descending") == 0;
  kernel_name = name;
  grid_size = grid;
  block_size = block;
  threads = static_cast<unsigned>(size);
  dynamic_shared.resize((shared + sizeof(Chunk) - 1) / sizeof(Chunk));
  body = kernel;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t number = descending ? blocks - 1 - i : i;
    block_index = dim3(static_cast<unsigned>(number % grid.x),
                       static_cast<unsigned>(number / grid.x % grid.y),
                       static_cast<unsigned>(number / grid.x / grid.y));
    run_block();
  }
}

inline unsigned lane() {
  return current % kWarp;
}

// Wait for the other lanes of the mask and give them `value`.
template <typename T>
void exchange(unsigned mask, Kind kind, T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  if (!(mask >> lane() & 1)) fail_in_kernel("a lane is not in the mask that it gives");
  Fiber& me = fibers[current];
  me.offered = 0;
  std::memcpy(&me.offered, &value, sizeof(T));
  me.mask = mask;
  me.kind = kind;
  wait(State::kAtWarp);
}

template <typename T>
T value_of(unsigned source) {
  const Fiber& other = fibers[current / kWarp * kWarp + source];
  T value;
  std::memcpy(&value, &other.seen, sizeof(T));
  return value;
}

template <typename T>
T shuffle(unsigned mask, T value, unsigned source) {
  exchange(mask, Kind::kShuffle, value);
  const bool exists = current / kWarp * kWarp + source < threads;
  if (!exists || !(mask >> source & 1)) fail_in_kernel("a shuffle from a lane that takes no part");
  return value_of<T>(source);
}

inline unsigned vote(unsigned mask, bool predicate) {
  exchange(mask, Kind::kVote, predicate);
  unsigned votes = 0;
  for (unsigned i = 0; i < kWarp; ++i) {
    const bool exists = current / kWarp * kWarp + i < threads;
    if (exists && (mask >> i & 1) && value_of<bool>(i)) votes |= 1u << i;
  }
  return votes;
}

template <typename T, typename Combine>
T reduce(unsigned mask, T value, Combine combine) {
  exchange(mask, Kind::kReduce, value);
  for (unsigned i = 0; i < kWarp; ++i) {
    const bool exists = current / kWarp * kWarp + i < threads;
    if (exists && i != lane() && (mask >> i & 1)) value = combine(value, value_of<T>(i));
  }
  return value;
}

template <typename T>
T read_modify_write(T* address, T value) {
  const T old = *address;
  *address = value;
  return old;
}

inline void check_aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes) fail_in_kernel("a vector is not aligned");
}

}  // namespace emulation

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = emulation::last_error;
  emulation::last_error = cudaSuccess;
  return error;
}

#define threadIdx (emulation::thread_index)
#define blockIdx (emulation::block_index)
#define blockDim (emulation::block_size)
#define gridDim (emulation::grid_size)
#define PYDLLM_LAUNCH(kernel, grid, block, shared, stream, ...) \
  emulation::launch(#kernel, grid, block, shared, [=] { kernel(__VA_ARGS__); })
#define PYDLLM_DYNAMIC_SHARED(name) \
  auto* const name = reinterpret_cast<unsigned char*>(emulation::dynamic_shared.data())

// Barriers and exchanges

inline void __syncthreads() {
  emulation::wait(emulation::State::kAtBlock);
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulation::exchange(mask, emulation::Kind::kSync, 0);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const unsigned lane = emulation::lane(), base = lane / width * width;
  return emulation::shuffle(mask, value, base + static_cast<unsigned>(source) % width);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const unsigned lane = emulation::lane(), end = lane / width * width + width;
  const unsigned source = lane ^ static_cast<unsigned>(lanes);
  return emulation::shuffle(mask, value, source < end ? source : lane);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  const unsigned lane = emulation::lane();
  return emulation::shuffle(mask, value, lane % width >= lanes ? lane - lanes : lane);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  const unsigned lane = emulation::lane();
  return emulation::shuffle(mask, value, lane % width + lanes < width + 0u ? lane + lanes : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return emulation::vote(mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) {
  return emulation::vote(mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return emulation::vote(mask, predicate == 0) == 0;
}
inline unsigned __activemask() {
  emulation::fail_in_kernel("__activemask says nothing that a program may rely on");
  return 0;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value) {
  emulation::exchange(mask, emulation::Kind::kMatch, value);
  unsigned same = 0;
  for (unsigned i = 0; i < emulation::kWarp; ++i) {
    const bool exists = emulation::current / 32 * 32 + i < emulation::threads;
    if (exists && (mask >> i & 1) && emulation::value_of<T>(i) == value) same |= 1u << i;
  }
  return same;
}
template <typename T>
unsigned __match_all_sync(unsigned mask, T value, int* all) {
  const unsigned same = __match_any_sync(mask, value);
  *all = same == mask;
  return *all ? mask : 0;
}
template <typename T>
T __reduce_add_sync(unsigned mask, T value) {
  return emulation::reduce(mask, value, [](T a, T b) { return static_cast<T>(a + b); });
}
template <typename T>
T __reduce_max_sync(unsigned mask, T value) {
  return emulation::reduce(mask, value, [](T a, T b) { return a < b ? b : a; });
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value) {
  return emulation::reduce(mask, value, [](T a, T b) { return b < a ? b : a; });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return emulation::reduce(mask, value, [](unsigned a, unsigned b) { return a | b; });
}
inline int __syncthreads_or(int predicate) {
  static int any;
  any = 0;
  __syncthreads();
  any |= predicate != 0;
  __syncthreads();
  const int result = any;
  __syncthreads();
  return result;
}
inline int __syncthreads_count(int predicate) {
  static int count;
  count = 0;
  __syncthreads();
  count += predicate != 0;
  __syncthreads();
  const int result = count;
  __syncthreads();
  return result;
}
inline int __syncthreads_and(int predicate) {
  return !__syncthreads_or(!predicate);
}

// Atomics: nobody else runs meanwhile.

template <typename T, typename U>
T atomicAdd(T* address, U value) {
  return emulation::read_modify_write(address, static_cast<T>(*address + static_cast<T>(value)));
}
template <typename T, typename U>
T atomicSub(T* address, U value) {
  return emulation::read_modify_write(address, static_cast<T>(*address - static_cast<T>(value)));
}
template <typename T, typename U>
T atomicMax(T* address, U value) {
  const T wide = static_cast<T>(value);
  return emulation::read_modify_write(address, *address < wide ? wide : *address);
}
template <typename T, typename U>
T atomicMin(T* address, U value) {
  const T wide = static_cast<T>(value);
  return emulation::read_modify_write(address, wide < *address ? wide : *address);
}
template <typename T, typename U>
T atomicOr(T* address, U value) {
  return emulation::read_modify_write(address, static_cast<T>(*address | static_cast<T>(value)));
}
template <typename T, typename U>
T atomicAnd(T* address, U value) {
  return emulation::read_modify_write(address, static_cast<T>(*address & static_cast<T>(value)));
}
template <typename T, typename U>
T atomicExch(T* address, U value) {
  return emulation::read_modify_write(address, static_cast<T>(value));
}
template <typename T, typename U, typename V>
T atomicCAS(T* address, U compare, V value) {
  const T old = *address;
  if (old == static_cast<T>(compare)) *address = static_cast<T>(value);
  return old;
}
inline unsigned atomicInc(unsigned* address, unsigned last) {
  return emulation::read_modify_write(address, *address >= last ? 0 : *address + 1);
}

// Numbers

struct __half {
  _Float16 value;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __half2float(__half x) {
  return static_cast<float>(x.value);
}
inline __half __float2half_rn(float x) {
  return {static_cast<_Float16>(x)};
}
inline float __int_as_float(int x) {
  float y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}
inline float __uint_as_float(unsigned x) {
  return __int_as_float(static_cast<int>(x));
}
inline int __float_as_int(float x) {
  int y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}
inline unsigned __float_as_uint(float x) {
  return static_cast<unsigned>(__float_as_int(x));
}
inline float __bfloat162float(__nv_bfloat16 x) {
  return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned bits = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}

// Rounded to nearest, and never part of a fused operation: this is compiled with -ffp-contract=off.
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fsub_rn(float a, float b) {
  return a - b;
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
inline float __fmaf_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline float __fsqrt_rn(float x) {
  return std::sqrt(x);
}
inline float __frcp_rn(float x) {
  return 1.f / x;
}
inline float __uint2float_rn(unsigned x) {
  return static_cast<float>(x);
}
inline float __int2float_rn(int x) {
  return static_cast<float>(x);
}
inline float __expf(float x) {
  return std::exp(x);
}
inline float __logf(float x) {
  return std::log(x);
}
inline float __fdividef(float a, float b) {
  return a / b;
}
inline float rsqrtf(float x) {
  return 1.f / std::sqrt(x);
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __popcll(unsigned long long x) {
  return __builtin_popcountll(x);
}
inline int __clz(int x) {
  return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x));
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
template <typename T>
T __ldg(const T* address) {
  return *address;
}

inline int min(int a, int b) {
  return a < b ? a : b;
}
inline int max(int a, int b) {
  return a < b ? b : a;
}
inline unsigned min(unsigned a, unsigned b) {
  return a < b ? a : b;
}
inline unsigned max(unsigned a, unsigned b) {
  return a < b ? b : a;
}
inline long long min(long long a, long long b) {
  return a < b ? a : b;
}
inline long long max(long long a, long long b) {
  return a < b ? b : a;
}
inline long min(long a, long b) {
  return a < b ? a : b;
}
inline long max(long a, long b) {
  return a < b ? b : a;
}
