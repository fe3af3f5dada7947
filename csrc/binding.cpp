// The only file that knows Python. Pointers and the stream come as integers, so that the module is
// tied to no torch; pydllm/_backend/cuda is its only caller and has checked the tensors.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "commit_branch.h"
#include "draft.h"
#include "head_stats.h"
#include "rms_norm.h"
#include "swiglu.h"
#include "verify.h"
#include "vocab_stats.h"
#include "window_attention.h"

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

void check(const char* kernel, cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error) + " (" +
                           cudaGetErrorName(error) + ")");
}

// Define `kernel` as a call with keywords, one name for each argument of its launcher.
template <typename... Arguments, typename... Names>
void define(py::module_& m, const char* kernel, cudaError_t (*launcher)(Arguments...),
            Names... names) {
  static_assert(sizeof...(Arguments) == sizeof...(Names), "a name for each argument");
  m.def(
      kernel,
      [kernel, launcher](Passed<Arguments>... arguments) {
        check(kernel, launcher(received<Arguments>(arguments)...));
      },
      py::kw_only(), py::arg(names)...);
}

// Keyword arguments that become the fields of a struct, each of them once.
struct Keywords {
  const py::kwargs& arguments;
  size_t taken = 0;

  template <typename T>
  void take(const char* name, T& field) {
    if (!arguments.contains(name)) throw py::type_error(std::string("missing argument ") + name);
    field = received<T>(arguments[name].cast<Passed<T>>());
    ++taken;
  }
};

void window_attention(const py::kwargs& arguments) {
  pydllm::WindowAttention call;
  pydllm::Dtype dtype;
  cudaStream_t stream;
  Keywords keywords = {arguments};
  keywords.take("dtype", dtype);
  keywords.take("stream", stream);
#define TAKE(field) keywords.take(#field, call.field)
  TAKE(out), TAKE(k_cache), TAKE(v_cache), TAKE(q), TAKE(k), TAKE(v), TAKE(start), TAKE(length),
      TAKE(kv_len), TAKE(commit), TAKE(pad), TAKE(cos), TAKE(sin), TAKE(q_norm), TAKE(k_norm),
      TAKE(table), TAKE(part), TAKE(state), TAKE(stride_q_batch), TAKE(stride_q_row),
      TAKE(stride_q_head), TAKE(stride_k_batch), TAKE(stride_k_row), TAKE(stride_k_head),
      TAKE(stride_v_batch), TAKE(stride_v_row), TAKE(stride_v_head), TAKE(stride_k_cache_batch),
      TAKE(stride_k_cache_row), TAKE(stride_k_cache_head), TAKE(stride_v_cache_batch),
      TAKE(stride_v_cache_row), TAKE(stride_v_cache_head), TAKE(batch), TAKE(rows), TAKE(heads),
      TAKE(kv_heads), TAKE(head_dim), TAKE(half), TAKE(branches), TAKE(slots), TAKE(page),
      TAKE(splits), TAKE(split_tiles), TAKE(stages), TAKE(block_size), TAKE(span), TAKE(causal),
      TAKE(eps), TAKE(scale), TAKE(softcap);
#undef TAKE
  if (keywords.taken != arguments.size()) throw py::type_error("an argument too many");
  check("window_attention", pydllm::window_attention(call, dtype, stream));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA kernels of pydllm.";
  m.def("version", [] { return PYDLLM_VERSION; }, "Version of pydllm these kernels belong to.");
  m.def("archs", [] { return PYDLLM_ARCHS; }, "Architectures compiled for, as PYDLLM_CUDA_ARCHS.");
  // Limits that pydllm/_backend/cuda has to know; a test compares both sides.
  m.attr("DRAFT_ROWS") = pydllm::kDraftRows;
  m.attr("MAX_BANNED") = pydllm::kMaxBanned;
  m.attr("MAX_PIECES") = pydllm::kMaxPieces;
  m.attr("RMS_NORM_WIDTH") = pydllm::kRmsNormWidth;
  m.attr("VERIFY_BRANCHES") = pydllm::kVerifyBranches;
  m.attr("VOCAB_PIECE") = pydllm::kVocabPiece;
  define(m, "commit_branch", pydllm::commit_branch, "k_cache", "v_cache", "k", "v", "branch",
         "start", "commit", "pad", "cos", "sin", "k_norm", "block_table", "dtype", "batch",
         "window", "branches", "kv_heads", "head_dim", "half", "slots", "page", "eps",
         "stride_k_batch", "stride_k_row", "stride_k_head", "stride_v_batch", "stride_v_row",
         "stride_v_head", "stride_k_cache_batch", "stride_k_cache_row", "stride_k_cache_head",
         "stride_v_cache_batch", "stride_v_cache_row", "stride_v_cache_head", "stream");
  define(m, "draft", pydllm::draft, "candidates", "x", "token", "score", "start", "length", "dtype",
         "batch", "slots", "rows", "branches", "mask_id", "block_size", "stride_x_row",
         "stride_token_row", "stride_score_row", "stream");
  define(m, "merge_stats", pydllm::merge_stats, "token", "prob", "entropy", "margin", "logsumexp",
         "values", "ids", "rows", "pieces", "sampled", "stream");
  define(m, "rms_norm", pydllm::rms_norm, "y", "residual", "x", "weight", "dtype", "rows", "width",
         "eps", "stride_x_row", "stride_residual_row", "stream");
  define(m, "swiglu", pydllm::swiglu, "y", "gate_up", "dtype", "rows", "width", "stream");
  define(m, "verify", pydllm::verify, "following", "branch", "accepted", "remaining", "complete",
         "x", "step_map", "nfe", "candidates", "token", "score", "start", "length", "dtype",
         "batch", "slots", "rows", "branches", "drafts", "mask_id", "block_size", "stride_x_row",
         "stride_step_map_row", "stream");
  define(m, "vocab_stats", pydllm::vocab_stats, "token", "prob", "entropy", "margin", "logsumexp",
         "values", "ids", "logits", "row_list", "counter", "temperatures", "banned", "dtype",
         "rows", "sources", "vocab", "banned_count", "long_row_list", "tempered", "seed",
         "inverse_temperature", "softcap", "stride_logits_row", "stride_counter_row",
         "stride_counter_word", "stream");
  m.def("window_attention", &window_attention);
}
