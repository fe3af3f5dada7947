// The only file that knows Python. Pointers and the stream come as integers, so that the module is
// tied to no torch; pydllm/_backend/cuda is its only caller and has checked the tensors.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "commit_branch.h"
#include "draft.h"
#include "edit_tokens.h"
#include "experts.h"
#include "head_stats.h"
#include "linear.h"
#include "mixture_accept.h"
#include "mixture_draft.h"
#include "multiblock_step.h"
#include "rms_norm.h"
#include "route.h"
#include "swiglu.h"
#include "unmask.h"
#include "verify.h"
#include "vocab_stats.h"
#include "window_attention.h"

namespace {

namespace py = pybind11;

// How Python passes an argument of a launcher: an address as an integer, an enum as its number.
template <typename T>
using Passed = std::conditional_t<std::is_pointer_v<T>, int64_t,
                                  std::conditional_t<std::is_enum_v<T>, int, T>>;

template <typename T>
T received(Passed<T> value) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(value);
  } else {
    return static_cast<T>(value);
  }
}

void check(cudaError_t error, const char* kernel) {
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
        check(launcher(received<Arguments>(arguments)...), kernel);
      },
      py::kw_only(), py::arg(names)...);
}

// A field of a launcher's arguments, and its name.
template <typename Call, typename T>
struct Field {
  const char* name;
  T Call::* member;
};
template <typename Call, typename T>
Field(const char*, T Call::*) -> Field<Call, T>;

// Likewise for a launcher whose arguments are one struct: the fields are the keywords. Those that
// are not listed are 0.
template <typename Call, typename... Calls, typename... Ts>
void define_call(py::module_& m, const char* kernel,
                 cudaError_t (*launcher)(const Call&, cudaStream_t), Field<Calls, Ts>... fields) {
  m.def(
      kernel,
      [kernel, launcher, fields...](Passed<Ts>... values, int64_t stream) {
        Call call{};
        ((call.*fields.member = received<Ts>(values)), ...);
        check(launcher(call, received<cudaStream_t>(stream)), kernel);
      },
      py::kw_only(), py::arg(fields.name)..., py::arg("stream"));
}
#define FIELD(name)    \
  Field {              \
    #name, &Call::name \
  }

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA kernels of pydllm.";
  m.def("version", [] { return PYDLLM_VERSION; }, "Version of pydllm these kernels belong to.");
  m.def("archs", [] { return PYDLLM_ARCHS; }, "Architectures compiled for, as PYDLLM_CUDA_ARCHS.");
  // Limits that pydllm/_backend/cuda has to know; a test compares both sides.
  m.attr("CUT_DIGITS") = pydllm::kCutDigits;
  m.attr("DRAFT_ROWS") = pydllm::kDraftRows;
  m.attr("MAX_SUPPRESS_IDS") = pydllm::kMaxSuppressIds;
  m.attr("MAX_CAPACITY") = pydllm::kMaxCapacity;
  m.attr("MAX_PIECES") = pydllm::kMaxPieces;
  m.attr("MIXTURE_CANDIDATES") = pydllm::kCandidateTile;
  m.attr("MIXTURE_TILE_BYTES") = pydllm::kTileBytes;
  m.attr("MIXTURE_VOCAB") = pydllm::kMaxSharedVocab;
  m.attr("MULTIBLOCK_BLOCKS") = pydllm::kMaxBlocks;
  m.attr("MULTIBLOCK_POSITIONS") = pydllm::kMaxPositions;
  m.attr("RMS_NORM_WIDTH") = pydllm::kRmsNormWidth;
  m.attr("ROUTE_EXPERTS") = pydllm::kRouteExperts;
  m.attr("EDIT_TOKENS_WINDOW") = pydllm::kMaxEditedWindow;
  m.attr("UNMASK_WINDOW") = pydllm::kMaxWindow;
  m.attr("VERIFY_BRANCHES") = pydllm::kVerifyBranches;
  m.attr("VOCAB_PIECE") = pydllm::kVocabPiece;
  define(m, "commit_branch", pydllm::commit_branch, "k_cache", "v_cache", "k", "v", "branch",
         "start", "commit", "pad", "cos", "sin", "k_norm", "block_table", "dtype", "batch",
         "window", "branches", "kv_heads", "head_dim", "half", "slots", "page", "pages", "eps",
         "stride_k_batch", "stride_k_row", "stride_k_head", "stride_v_batch", "stride_v_row",
         "stride_v_head", "stride_k_cache_batch", "stride_k_cache_row", "stride_k_cache_head",
         "stride_v_cache_batch", "stride_v_cache_row", "stride_v_cache_head", "stream");
  define(m, "draft", pydllm::draft, "candidates", "x", "token", "score", "start", "length", "dtype",
         "batch", "slots", "rows", "branches", "mask_id", "block_size", "stride_x_row",
         "stride_token_row", "stride_score_row", "stream");
  {
    using Call = pydllm::EditTokens;
    define_call(m, "edit_tokens", pydllm::edit_tokens, FIELD(remaining), FIELD(filled),
                FIELD(edited), FIELD(x), FIELD(step_map), FIELD(nfe), FIELD(post_steps),
                FIELD(complete), FIELD(token), FIELD(score), FIELD(start), FIELD(length),
                FIELD(editable_from), FIELD(dtype), FIELD(batch), FIELD(slots), FIELD(rows),
                FIELD(mask_id), FIELD(threshold), FIELD(edit_threshold), FIELD(min_tokens),
                FIELD(max_post_steps), FIELD(confirm), FIELD(stride_x_row),
                FIELD(stride_step_map_row), FIELD(stride_token_row), FIELD(stride_score_row));
  }
  {
    using Call = pydllm::Experts;
    define_call(m, "experts", pydllm::experts, FIELD(out), FIELD(act), FIELD(y), FIELD(shared_act),
                FIELD(order), FIELD(starts), FIELD(hidden), FIELD(gate_up), FIELD(down),
                FIELD(gate_up_scale), FIELD(down_scale), FIELD(ids), FIELD(weights),
                FIELD(shared_gate_up), FIELD(shared_down), FIELD(dtype), FIELD(stored),
                FIELD(per_block), FIELD(gelu), FIELD(rows), FIELD(width), FIELD(inner),
                FIELD(experts), FIELD(top_k), FIELD(shared_inner));
  }
  define(m, "merge_stats", pydllm::merge_stats, "token", "prob", "entropy", "margin", "logsumexp",
         "values", "ids", "rows", "pieces", "sampled", "stream");
  {
    using Call = pydllm::Linear;
    define_call(m, "linear", pydllm::linear, FIELD(y), FIELD(partial), FIELD(x), FIELD(weight),
                FIELD(scale), FIELD(bias), FIELD(dtype), FIELD(stored), FIELD(per_block),
                FIELD(swiglu), FIELD(rows), FIELD(width), FIELD(depth), FIELD(splits),
                FIELD(stride_x_row), FIELD(stride_weight_row), FIELD(stride_scale_row), FIELD(pdl));
  }
  {
    using Call = pydllm::MixtureAccept;
    define_call(m, "mixture_accept", pydllm::mixture_accept, FIELD(accepted), FIELD(correction),
                FIELD(target), FIELD(least), FIELD(best), FIELD(least_of_tiles), FIELD(token),
                FIELD(length), FIELD(mixtures), FIELD(temperatures), FIELD(batch), FIELD(rows),
                FIELD(tiles), FIELD(mixture), FIELD(inverse), FIELD(first_free), FIELD(logits),
                FIELD(verifier), FIELD(threshold), FIELD(counter), FIELD(suppress_ids),
                FIELD(dtype), FIELD(vocab), FIELD(verifier_vocab), FIELD(shared),
                FIELD(suppress_count), FIELD(seed), FIELD(stride_logits_row),
                FIELD(stride_verifier_row), FIELD(stride_counter_row), FIELD(stride_counter_word));
  }
  {
    using Call = pydllm::MixtureAcceptSparse;
    define_call(m, "mixture_accept_sparse", pydllm::mixture_accept_sparse, FIELD(accepted),
                FIELD(correction), FIELD(target), FIELD(least), FIELD(best), FIELD(least_of_tiles),
                FIELD(token), FIELD(length), FIELD(mixtures), FIELD(temperatures), FIELD(batch),
                FIELD(rows), FIELD(tiles), FIELD(mixture), FIELD(inverse), FIELD(first_free),
                FIELD(ids), FIELD(values), FIELD(noise), FIELD(size), FIELD(hidden), FIELD(head),
                FIELD(bias), FIELD(dtype), FIELD(capacity), FIELD(width), FIELD(verifier_vocab),
                FIELD(softcap), FIELD(stride_hidden_row), FIELD(stride_head_row));
  }
  {
    using Call = pydllm::MixtureDraft;
    define_call(m, "mixture_draft", pydllm::mixture_draft, FIELD(token), FIELD(logsumexp),
                FIELD(threshold), FIELD(ids), FIELD(values), FIELD(noise), FIELD(size),
                FIELD(overflow), FIELD(noted_ids), FIELD(noted), FIELD(logits), FIELD(rows),
                FIELD(counter), FIELD(temperatures), FIELD(top_ps), FIELD(suppress_ids),
                FIELD(dtype), FIELD(wide_rows), FIELD(count), FIELD(sources), FIELD(vocab),
                FIELD(shared), FIELD(suppress_count), FIELD(capacity), FIELD(notes), FIELD(inverse),
                FIELD(top_p), FIELD(seed), FIELD(stride_logits_row), FIELD(stride_counter_row),
                FIELD(stride_counter_word));
  }
  {
    using Call = pydllm::MultiblockStep;
    define_call(m, "multiblock_step", pydllm::multiblock_step, FIELD(x), FIELD(step_map),
                FIELD(numbers), FIELD(blocks), FIELD(eligible), FIELD(token), FIELD(entropy),
                FIELD(prompt), FIELD(eos), FIELD(dtype), FIELD(batch), FIELD(slots), FIELD(columns),
                FIELD(count), FIELD(ends), FIELD(mask_id), FIELD(generated), FIELD(size),
                FIELD(limit), FIELD(add), FIELD(full_at), FIELD(delay), FIELD(refresh), FIELD(tail),
                FIELD(early_stop), FIELD(cached), FIELD(shifted), FIELD(stride_x_row),
                FIELD(stride_step_map_row), FIELD(stride_numbers_row), FIELD(stride_blocks_plane),
                FIELD(stride_blocks_row), FIELD(stride_eligible_row), FIELD(stride_token_row),
                FIELD(stride_entropy_row));
  }
  {
    using Call = pydllm::RmsNorm;
    define_call(m, "rms_norm", pydllm::rms_norm, FIELD(y), FIELD(residual), FIELD(x),
                FIELD(partial), FIELD(scale), FIELD(bias), FIELD(weight), FIELD(dtype), FIELD(rows),
                FIELD(width), FIELD(splits), FIELD(eps), FIELD(stride_x_row),
                FIELD(stride_residual_row), FIELD(pdl));
  }
  {
    using Call = pydllm::Route;
    define_call(m, "route", pydllm::route, FIELD(ids), FIELD(weights), FIELD(logits), FIELD(pool),
                FIELD(hidden), FIELD(router), FIELD(bias), FIELD(start), FIELD(length),
                FIELD(dtype), FIELD(sigmoid), FIELD(renormalize), FIELD(batch), FIELD(branches),
                FIELD(rows), FIELD(width), FIELD(experts), FIELD(top_k), FIELD(groups),
                FIELD(topk_groups), FIELD(capacity), FIELD(block_size), FIELD(blocks),
                FIELD(scale));
  }
  define(m, "swiglu", pydllm::swiglu, "y", "gate_up", "dtype", "rows", "width", "pdl", "stream");
  {
    using Call = pydllm::Unmask;
    define_call(m, "unmask", pydllm::unmask, FIELD(remaining), FIELD(accepted), FIELD(x),
                FIELD(step_map), FIELD(nfe), FIELD(token), FIELD(score), FIELD(start),
                FIELD(length), FIELD(quota), FIELD(request), FIELD(done), FIELD(end),
                FIELD(eos_ids), FIELD(ends_from), FIELD(dtype), FIELD(batch), FIELD(slots),
                FIELD(rows), FIELD(mask_id), FIELD(rule), FIELD(min_tokens), FIELD(limit),
                FIELD(seed), FIELD(ends), FIELD(last), FIELD(stride_x_row),
                FIELD(stride_step_map_row), FIELD(stride_token_row), FIELD(stride_score_row));
  }
  define(m, "verify", pydllm::verify, "following", "branch", "accepted", "remaining", "complete",
         "x", "step_map", "nfe", "candidates", "token", "score", "start", "length", "dtype",
         "batch", "slots", "rows", "branches", "drafts", "mask_id", "block_size", "stride_x_row",
         "stride_step_map_row", "stream");
  {
    using Call = pydllm::VocabCut;
    define_call(m, "vocab_cut", pydllm::vocab_cut, FIELD(cut), FIELD(keys), FIELD(counts),
                FIELD(masses), FIELD(best), FIELD(logits), FIELD(row_list), FIELD(temperatures),
                FIELD(suppress_ids), FIELD(top_ks), FIELD(top_ps), FIELD(dtype), FIELD(rows),
                FIELD(sources), FIELD(vocab), FIELD(suppress_count), FIELD(long_row_list),
                FIELD(has_top_k), FIELD(has_top_p), FIELD(top_k), FIELD(top_p),
                FIELD(inverse_temperature), FIELD(softcap), FIELD(stride_logits_row));
  }
  define(m, "vocab_stats", pydllm::vocab_stats, "token", "prob", "entropy", "margin", "logsumexp",
         "values", "ids", "logits", "row_list", "counter", "temperatures", "suppress_ids", "cut",
         "dtype", "rows", "sources", "vocab", "suppress_count", "long_row_list", "tempered", "seed",
         "inverse_temperature", "softcap", "stride_logits_row", "stride_counter_row",
         "stride_counter_word", "stream");
  {
    using Call = pydllm::WindowAttention;
    define_call(
        m, "window_attention", pydllm::window_attention, FIELD(out), FIELD(k_cache), FIELD(v_cache),
        FIELD(q), FIELD(k), FIELD(v), FIELD(start), FIELD(length), FIELD(kv_len), FIELD(commit),
        FIELD(pad), FIELD(cos), FIELD(sin), FIELD(q_norm), FIELD(k_norm), FIELD(table),
        FIELD(block_offset), FIELD(part), FIELD(state), FIELD(stride_q_batch), FIELD(stride_q_row),
        FIELD(stride_q_head), FIELD(stride_k_batch), FIELD(stride_k_row), FIELD(stride_k_head),
        FIELD(stride_v_batch), FIELD(stride_v_row), FIELD(stride_v_head),
        FIELD(stride_k_cache_batch), FIELD(stride_k_cache_row), FIELD(stride_k_cache_head),
        FIELD(stride_v_cache_batch), FIELD(stride_v_cache_row), FIELD(stride_v_cache_head),
        FIELD(dtype), FIELD(batch), FIELD(rows), FIELD(heads), FIELD(kv_heads), FIELD(head_dim),
        FIELD(half), FIELD(branches), FIELD(leaf_rows), FIELD(slots), FIELD(page), FIELD(pages),
        FIELD(splits), FIELD(split_tiles), FIELD(stages), FIELD(block_size), FIELD(sliding_window),
        FIELD(causal), FIELD(pdl), FIELD(eps), FIELD(scale), FIELD(softcap));
  }
}
