// The only file that knows Python. Pointers and the stream come as integers, so that the module is
// tied to no torch; pydllm/_backend/cuda.py is its only caller and has checked the tensors.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "vocab_stats.h"

namespace {

template <typename T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

void check(cudaError_t error, const char* kernel) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error) + " (" +
                           cudaGetErrorName(error) + ")");
}

void vocab_stats(int64_t token, int64_t logsumexp, int64_t prob, int64_t entropy, int64_t margin,
                 int64_t logits, int64_t banned, int dtype, int64_t rows, int64_t vocab,
                 int64_t banned_count, int64_t stride_logits_row, int64_t stream) {
  check(pydllm::vocab_stats(pointer<int64_t>(token), pointer<float>(logsumexp),
                            pointer<float>(prob), pointer<float>(entropy), pointer<float>(margin),
                            pointer<const void>(logits), pointer<const int32_t>(banned),
                            static_cast<pydllm::Dtype>(dtype), rows, vocab, banned_count,
                            stride_logits_row, pointer<CUstream_st>(stream)),
        "vocab_stats");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  namespace py = pybind11;
  m.doc() = "CUDA kernels of pydllm.";
  m.def("version", [] { return PYDLLM_VERSION; }, "Version of pydllm these kernels belong to.");
  m.def("archs", [] { return PYDLLM_ARCHS; }, "Architectures compiled for, as PYDLLM_CUDA_ARCHS.");
  m.attr("MAX_BANNED") = pydllm::kMaxBanned;
  m.def("vocab_stats", &vocab_stats, py::kw_only(), py::arg("token"), py::arg("logsumexp"),
        py::arg("prob"), py::arg("entropy"), py::arg("margin"), py::arg("logits"),
        py::arg("banned"), py::arg("dtype"), py::arg("rows"), py::arg("vocab"),
        py::arg("banned_count"), py::arg("stride_logits_row"), py::arg("stream"));
}
