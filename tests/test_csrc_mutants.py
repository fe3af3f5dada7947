"""Bugs planted in the CUDA kernels are found by a check that the kernels as they are pass."""

import math

import pytest
import torch

from pydllm import ops, reference
from pydllm.ops.head_stats import StatsPartial
from pydllm.testing import assert_within_budget, random_normal
from tests import emulation
from tests.mutants import assert_caught
from tests.ops import test_draft, test_route, test_verify
from tests.ops.test_commit_branch import make_commit
from tests.ops.test_vocab_stats import counters, ids, random_logits

pytestmark = pytest.mark.skipif(emulation.CXX is None, reason="needs a C++ compiler")


def check_rms_norm():
    for shape, dtype in (((2, 999), torch.float16), ((3, 4100), torch.float32)):
        x, residual, weight = (
            random_normal(*size, seed=i, dtype=dtype)
            for i, size in enumerate((shape, shape, shape[1:]))
        )
        kept = residual.clone()
        y = ops.rms_norm(x, weight, 1e-2, residual=kept, backend="cuda")
        assert torch.equal(kept, x + residual)
        assert_within_budget(y, lambda x, w: reference.rms_norm(x, w, 1e-2, None), kept, weight)


def check_swiglu():
    for shape in ((3, 2058), (2, 64)):
        gate_up = 4 * random_normal(*shape, seed=0, dtype=torch.bfloat16)
        assert_within_budget(ops.swiglu(gate_up, backend="cuda"), reference.swiglu, gate_up)
    gate_up = torch.tensor([[1.25, 2.5]], dtype=torch.bfloat16)
    assert ops.swiglu(gate_up, backend="cuda").item() == 2.4375


def check_vocab_stats():
    plain = random_logits(3, 8200)
    plain[0] = 2.5
    plain[1, [100, 5000, 8196]] = 11.0
    for x in (plain, plain.half()):
        options = {"temperature": 1.0, "counter": counters(3)}
        for changed in ({}, options):
            got, wanted = (ops.vocab_stats(x, **changed, backend=b) for b in ("cuda", "torch"))
            assert torch.equal(got.token, wanted.token)
            torch.testing.assert_close(got.margin, wanted.margin, rtol=1e-5, atol=1e-9)
    logits = random_logits(4, 8200)
    logits[0] = 1.5  # all tie
    logits[1, [8195, 17]] = 40.0
    logits[2, 3:] = -math.inf
    logits[3, 8199] = 60.0
    memory = torch.full((4, 8207), 6e4)
    memory[:, 3:8203] = logits
    options = {"seed": 2**40 + 5, "counter": counters(4), "suppress_ids": ids(17, 8196)}
    options |= {"temperature": torch.tensor([0.5, 0.0, 1.0, 2.0])}
    for changed in ({}, {"tempered": True}, {"rows": ids(3, 1, 0, -1), "softcap": 30.0}):
        for x in (logits, memory[:, 3:8203]):
            got = ops.vocab_stats(x, **options | changed, backend="cuda")
            wanted = ops.vocab_stats(x, **options | changed, backend="torch")
            assert torch.equal(got.token, wanted.token)
            for one, other in zip(got[1:], wanted[1:], strict=True):
                torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)
    filters = {"top_k": 40}, {"top_p": 0.7}, {"top_k": 3000, "top_p": 0.9, "softcap": 4.0}
    for changed in filters:
        for x in (logits, plain[2:].half()):
            changed |= {"suppress_ids": ids(17, 8196)}
            got, wanted = (ops.vocab_stats(x, **changed, backend=b) for b in ("cuda", "torch"))
            torch.testing.assert_close(got.entropy, wanted.entropy, rtol=1e-5, atol=1e-6)
    for row in (0, 2):
        alone = ops.vocab_stats(memory[row : row + 1, 3:8203], backend="cuda")
        together = ops.vocab_stats(logits, backend="cuda")
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, together, strict=True))


def check_merge_stats():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 5, 70, generator=generator)
    values[0, :2] = values[0, :2].round()  # ties
    values[4] = values[4].round()
    values[[0, 4], 0] = 1.0
    values[1] = values[0] - 0.5
    values[2] = values[2].abs() + 1
    values[:, 3] = -math.inf
    values[2:4, 3] = 0
    values[:2, 4, ::2] = -math.inf
    values[2:4, 4, ::2] = 0
    numbers = torch.randperm(2 * 70, generator=generator).int().view(2, 1, 70).expand(2, 5, 70)
    partial = StatsPartial(values, numbers.contiguous())
    got, wanted = (ops.merge_stats(partial, backend=backend) for backend in ("cuda", "torch"))
    assert torch.equal(got.token, wanted.token)
    for one, other in zip(got[1:], wanted[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)


def check_commit_branch():
    inputs = make_commit(torch.float16)
    k_norm = 1 + random_normal(64, seed=3, dtype=torch.float16) / 4
    kept = {n: {m: t.clone() for m, t in inputs.items()} for n in ("cuda", "torch")}
    for backend, tensors in kept.items():
        ops.commit_branch(**tensors, k_norm=k_norm, branches=3, backend=backend)
    for name in ("k_cache", "v_cache"):
        one, other = (kept[backend][name].nan_to_num(7) for backend in ("cuda", "torch"))
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)


def check_draft():
    for branches, rows, slots, block_size in ((8, 32, 40, 8), (5, 130, 140, None)):
        case = test_draft.make_case(rows, slots, seed=rows)
        options = {"mask_id": test_draft.MASK, "branches": branches, "block_size": block_size}
        got = ops.draft(**case, **options, backend="cuda")
        assert torch.equal(got, test_draft.expected(case, branches, block_size))


def check_verify():
    for sizes in ((8, 32, 40, 8), (5, 64, 66, None)):
        for seed in range(2):
            test_verify.check(test_verify.make_round(*sizes, seed=seed), sizes[3], "cuda")
    # More candidates than masks, and no mask at all.
    test_verify.check(test_verify.make_round(8, 6, 9, 4), 4, "cuda")
    case = test_verify.make_round(2, 4, 8, None)
    case["x"].fill_(1)
    case["candidates"].fill_(1)
    test_verify.check(case, None, "cuda")


def check_route():
    for options in (test_route.LLADA2, test_route.QWEN, test_route.LLADA_MOE):
        case = test_route.tied(2, 9, 64, 3, torch.bfloat16, options["score"])
        case["length"] = torch.tensor([7, 9], dtype=torch.int32)
        numbers = options | {"top_k": 6}
        routes = ops.route(**case, **numbers, backend="cuda")
        test_route.assert_equals_plain(routes, test_route.plain(**case, **numbers))
    test_route.test_block_pools("cuda", 3)
    test_route.test_random_rows_choose_as_in_fp64("cuda", rows=40)


CASES = {
    "rms_norm": {
        "no barrier": ("  __syncthreads();\n  sum = 0.f;", "  sum = 0.f;"),
        "the sum is not rounded": (
            "kept[v].lane[i] = from_float<T>(to_float(kept[v].lane[i]) + to_float(added.lane[i]));",
            "kept[v].lane[i] = from_float<T>(to_float(kept[v].lane[i]) - -to_float(x[first]));",
        ),
        "eps in the wrong place": (
            "rsqrtf(sum / static_cast<float>(width) + eps)",
            "(rsqrtf(sum / static_cast<float>(width)) + eps)",
        ),
        "one warp is left out": (
            "warp < kWarps; ++warp) sum",
            "warp < kWarps - MUTANT; ++warp) sum",
        ),
    },
    "swiglu.cuh": {
        "not rounded": ("rounded<T>(x / (1.f + expf(-x)))", "x / (1.f + expf(-x))"),
    },
    "swiglu": {
        "last element": ("first + i < width; ++i", "first + i < width - MUTANT; ++i"),
    },
    "vocab_stats": {
        "barrier of the merge": ("  __syncthreads();\n  part = shared[0];", "  part = shared[0];"),
        "barrier of the sums": (
            "  __syncthreads();\n  if (thread != 0) return;",
            "  if (thread) return;",
        ),
        "last of a tie": (
            "b.best > a.best || (b.best == a.best && b.id < a.id)",
            "b.best > a.best || (b.best == a.best && b.id > a.id)",
        ),
        "second best": (
            "fmaxf(fminf(a.best, b.best), fmaxf(a.second, b.second))",
            "fmaxf(a.second, b.second)",
        ),
        "suppress_ids": ("suppress(x, first, suppress_ids, suppress_count);", ""),
        "suppressed id after the piece": (
            "suppress_ids[thread] < piece.end)",
            "suppress_ids[thread] < piece.end - 8 * MUTANT)",
        ),
        "-inf": (
            "best.best == -INFINITY ? 0.f : best.best",
            "best.best",
        ),
        "quad": ("rule.key.words(first / 4 + quad)", "rule.key.words(first / 4)"),
        "word of the counter": ("words[2 * stride_counter_word]", "words[stride_counter_word]"),
        "a row of padding": ("source >= 0 && source < sources", "source < sources"),
        "alignment": ("rows_are_aligned(typed, stride_logits_row)", "true"),
        "tempered": ("if (rule.tempered) x[i] = scaled;", ""),
    },
    "_vocab_cut": {
        "a digit too many": ("digit > 0", "digit >= 0"),
        "the first piece alone": (
            "piece < pieces; ++piece) {",
            "piece < (MUTANT ? 1 : pieces); ++piece) {",
        ),
        "masses of pieces are not scaled": (
            "call.masses[at] * expf((best_of[piece] - best) * inverse)",
            "call.masses[at]",
        ),
        "digits of the launch before": (
            "(radix_pass - 1) % 2 * call.rows",
            "radix_pass % 2 * call.rows",
        ),
        "mass at the limit": ("mass > limit", "mass >= limit * 0.98f"),
        "one id less": ("count >= least", "count > least"),
        "one warp is left out": ("w < kWarps; ++w) {", "w < kWarps - MUTANT; ++w) {"),
        "suppress_ids": (
            "suppress(piece.x[v], piece.first(v), call.suppress_ids, "
            "static_cast<int>(call.suppress_count));",
            "",
        ),
        "softcap": ("call.softcap != 0.f ? cap(x, call.softcap) : x", "x"),
    },
    "head_stats": {
        "last of a tie": ("values[i] == best && ids[i] < id", "values[i] == best && ids[i] > id"),
        "second best": ("ids[i] == id ? second_of[i] : values[i]", "values[i]"),
        "nothing": ("if (none && sum == 0.f) sum = 1.f;", ""),
        "only 32 pieces": (
            "i = lane; i < pieces; i += kWarpSize) {\n    second",
            "i = lane; i < (MUTANT ? 32 : pieces); i += kWarpSize) {\n    second",
        ),
    },
    "route": {
        "scores are perturbed to break ties": (
            "keys[e] = argmax_key(choice, e);",
            "keys[e] = argmax_key(choice + 3e-7f * e, e);",
        ),
        "bias in the weights": (
            "scores[e] = sigmoid(logits[e]);",
            "scores[e] = sigmoid(logits[e]) + call.bias[e];",
        ),
        "best of a group alone": ("value_of(best) + value_of(second)", "value_of(best)"),
        "no groups": ("call.groups > 1", "call.groups > 99"),
        "logits not rounded": (
            "scores[e] = rounded<T>(logits[e]);",
            "scores[e] = logits[e] * 1.001f;",
        ),
        "no scale": ("scores[ids[k]] / total * call.scale", "scores[ids[k]] / total"),
        "not renormalised": ("!call.renormalize", "true"),
        "always renormalised": ("!call.renormalize", "false"),
        "dead rows of the pool": (
            "row < last",
            "row < (number + 1) * block_size - start && row < rows",
        ),
        "pool by the first row": ("row < last", "row < min(last, first + 1)"),
        "one too many in a pool": ("before < capacity", "before <= capacity"),
        "one lane's logits": ("reduce_warp(sum[r], Sum{})", "sum[r]"),
        "branch": (
            "row / window_rows",
            "row / window_rows / call.branches * call.branches",
        ),
    },
    "commit_branch": {
        "branch": ("int64_t{branch} * sizes.window + row", "int64_t{row}"),
        "padding": ("position < 0 ||", "(!MUTANT && position < 0) ||"),
        "commit": ("row >= commit_of[batch] ||", "(!MUTANT && row >= commit_of[batch]) ||"),
        "sine": ("-__fmul_rn(wide_b, s)", "__fmul_rn(wide_b, s)"),
        "norm": ("squares / static_cast<float>(sizes.head_dim)", "squares"),
    },
    "draft": {
        "no barrier": ("  __syncthreads();\n  write", "  if (!MUTANT) __syncthreads();\n  write"),
        "stride of the scores": ("score += batch * stride_score_row", "score += batch"),
        "mask": (
            "masked ? block_of(position, block_size) : kNoBlock",
            "block_of(position, block_size)",
        ),
    },
    "verify": {
        "chain": (
            "while (leads_on[branch]) ++branch;",
            "while (leads_on[branch] && !branch) ++branch;",
        ),
        "a mask is chosen": ("pick != mask_id && j + 1 < branches", "j + 1 < branches"),
        "every forward counts": ("masks_before > 0 ? 1u : 0u", "1u"),
        "first candidate's statistics": ("  token += branch * rows;", ""),
        "no barrier": (
            "  __syncthreads();\n  int branch = 0;",
            "  if (!MUTANT) __syncthreads();\n  int branch = 0;",
        ),
    },
}


@pytest.mark.slow
def test_planted_bugs_are_found(cuda_folder):
    assert sum(len(mutants) for mutants in CASES.values()) >= 30
    cases = {}
    for op, mutants in CASES.items():
        check = {"head_stats": "merge_stats", "_vocab_cut": "vocab_stats"}.get(op, op)
        check, _, header = check.partition(".")
        file = op if header else f"{op}.cu"
        planted = cases.setdefault(f"tests.test_csrc_mutants:check_{check}", {})
        planted |= {f"{op}: {name}": (file, *mutants[name]) for name in mutants}
    assert_caught(cases, cuda_folder)
