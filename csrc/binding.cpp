// The only file that knows Python. Pointers and the stream come as integers, so that the module is
// tied to no torch; pydllm/_backend/cuda is its only caller and has checked the tensors.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "rms_norm.h"
#include "vocab_stats.h"

namespace {

namespace py = pybind11;

// How Python passes an argument of a launcher: an address as an integer, a Dtype as its number.
template <typename T>
using Passed = std::conditional_t<std::is_pointer_v<T>, int64_t,
                                  std::conditional_t<std::is_same_v<T, pydllm::Dtype>, int, T>>;

template <typename T>
T received(Passed<T> value) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(value);
  } else {
    return static_cast<T>(value);
  }
}

// Define `kernel` as a call with keywords, one name for each argument of its launcher.
template <typename... Arguments, typename... Names>
void define(py::module_& m, const char* kernel, cudaError_t (*launcher)(Arguments...),
            Names... names) {
  static_assert(sizeof...(Arguments) == sizeof...(Names), "a name for each argument");
  m.def(
      kernel,
      [kernel, launcher](Passed<Arguments>... arguments) {
        const cudaError_t error = launcher(received<Arguments>(arguments)...);
        if (error == cudaSuccess) return;
        throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error) + " (" +
                                 cudaGetErrorName(error) + ")");
      },
      py::kw_only(), py::arg(names)...);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA kernels of pydllm.";
  m.def("version", [] { return PYDLLM_VERSION; }, "Version of pydllm these kernels belong to.");
  m.def("archs", [] { return PYDLLM_ARCHS; }, "Architectures compiled for, as PYDLLM_CUDA_ARCHS.");
  m.attr("MAX_BANNED") = pydllm::kMaxBanned;
  define(m, "rms_norm", pydllm::rms_norm, "y", "residual", "x", "weight", "dtype", "rows", "width",
         "eps", "stride_x_row", "stride_residual_row", "stream");
  define(m, "vocab_stats", pydllm::vocab_stats, "token", "logsumexp", "prob", "entropy", "margin",
         "logits", "banned", "dtype", "rows", "vocab", "banned_count", "stride_logits_row",
         "stream");
}
