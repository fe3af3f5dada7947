#include "mixture_round.cuh"

namespace pydllm {
namespace {

constexpr int kScanThreads = 128;

// One warp per sequence, one lane per row.
__global__ void __launch_bounds__(kScanThreads)
    mixture_accept_scan_kernel(const MixtureRound round) {
  const int64_t sequence =
      int64_t{blockIdx.x} * (kScanThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (sequence >= round.batch) return;
  const int lane = threadIdx.x % kWarpSize;
  const int rows = static_cast<int>(round.rows);
  const int length = max(0, min(round.length[sequence], rows));
  int run = length;
  int64_t correction = -1;
  for (int base = 0; base < rows; base += kWarpSize) {
    const int index = base + lane;
    const int64_t row = sequence * rows + index;
    const bool used = index < length;
    int64_t target = -1;
    float least = 0.f;
    if (used) {
      uint64_t best = kNoKey;
      for (int64_t tile = 0; tile < round.tiles; ++tile) {
        const auto found = static_cast<uint64_t>(round.best[row * round.tiles + tile]);
        best = found < best ? found : best;
        if (round.least != nullptr) {
          least = fmaxf(least, round.least_of_tiles[row * round.tiles + tile]);
        }
      }
      if (best != kNoKey && best != kPoison) target = static_cast<uint32_t>(best);
    }
    if (index < rows) {
      round.target[row] = target;
      if (round.least != nullptr) round.least[row] = least;
    }
    bool same = target >= 0 && target == round.token[used ? row : sequence * rows];
    same = same || (round.first_free && index == 0);
    const unsigned others = __ballot_sync(kFullWarp, used && !same);
    const int first = __ffs(static_cast<int>(others)) - 1;
    const int64_t there = __shfl_sync(kFullWarp, target, max(first, 0));
    if (first >= 0 && base + first < run) {
      run = base + first;
      correction = there;
    }
  }
  if (lane != 0) return;
  round.accepted[sequence] = run;
  round.correction[sequence] = correction;
}

}  // namespace

cudaError_t mixture_accept_scan(const MixtureRound& round, cudaStream_t stream) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  constexpr int64_t kSequences = kScanThreads / kWarpSize;
  const dim3 grid(static_cast<unsigned>((round.batch + kSequences - 1) / kSequences));
  PYDLLM_LAUNCH(mixture_accept_scan_kernel, grid, dim3(kScanThreads), 0, stream, round);
  return cudaGetLastError();
}

}  // namespace pydllm
