"""CUDA kernels of decoding, on the CPU, where the ops' own tests do not reach: loops of more than a
block's threads, several tiles, room that runs out; and bugs planted in them, which are caught."""

import ctypes
import math
import subprocess
from unittest import mock

import pytest
import torch

from pydllm import ops
from pydllm._backend.cuda import edit_tokens as edit_launcher
from pydllm._backend.cuda import mixture_accept as accept_launcher
from pydllm._backend.cuda import mixture_draft as draft_launcher
from pydllm._backend.cuda import multiblock_step as multiblock_launcher
from pydllm._backend.cuda import unmask as unmask_launcher
from pydllm.ops.mixture_draft import MAX_CAPACITY
from pydllm.reference import philox
from pydllm.testing import random_normal
from tests.emulation import CSRC, CXX, ROOT
from tests.mutants import assert_caught
from tests.ops import test_edit_tokens as edits
from tests.ops.test_mixture_draft import _assert_near
from tests.ops.test_multiblock_step import ENDS, MASK, clone, start, statistics
from tests.ops.test_philox import KNOWN, WORDS
from tests.ops.test_unmask import copied, integers, make_case, numbers
from tests.ops.test_unmask_ending import make_ending

INF = math.inf
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

PHILOX = """
#include "philox.cuh"
extern "C" void words(uint32_t* out, const uint32_t* counters, int count, uint64_t seed) {
  for (int i = 0; i < count; ++i) {
    const uint32_t* c = counters + 4 * i;
    const pydllm::Words four = pydllm::philox(c[0], c[1], c[2], c[3], seed);
    for (int j = 0; j < 4; ++j) out[4 * i + j] = four.word[j];
  }
}
extern "C" void gumbels(float* out, const uint32_t* words, int count) {
  for (int i = 0; i < count; ++i) out[i] = pydllm::gumbel(words[i]);
}
extern "C" void noise(float* out, int vocab, const uint32_t* counter, uint64_t seed) {
  const pydllm::NoiseKey key = {counter[0], counter[1], counter[2], seed};
  for (int id = 0; id < vocab; ++id) out[id] = key.of(id);
}
"""


@pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")
def test_noise_has_the_known_words_and_the_bits_of_the_definition(tmp_path):
    (tmp_path / "noise.cpp").write_text(PHILOX)
    command = [CXX, "-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", f"-I{CSRC}"]
    command += ["-DPYDLLM_HOST_EMULATION", f"-I{ROOT / 'tests'}", "noise.cpp", "-o", "noise.so"]
    subprocess.run(command, cwd=tmp_path, check=True)
    library = ctypes.CDLL(str(tmp_path / "noise.so"))

    def address(tensor):
        return ctypes.c_void_p(tensor.data_ptr())

    for counter, (low, high), expected in KNOWN.values():
        given, out = torch.tensor(counter).to(torch.uint32), torch.zeros(4, dtype=torch.int32)
        library.words(address(out), address(given), 1, ctypes.c_uint64(high << 32 | low))
        assert tuple(word & 0xFFFFFFFF for word in out.tolist()) == expected
    words = torch.cat((torch.tensor(WORDS), integers(200000, low=0, high=2**32, seed=0)))
    given, out = words.to(torch.uint32), torch.empty(len(words))
    library.gumbels(address(out), address(given), len(words))
    assert torch.equal(out, philox.gumbel(words))
    counter, out = torch.tensor([[7, -3, 1]], dtype=torch.int32), torch.empty(1003)
    library.noise(address(out), 1003, address(counter), ctypes.c_uint64(2**63 + 5))
    assert torch.equal(out[None], philox.vocab_gumbel(1003, counter, 2**63 + 5))


def test_the_constants_of_both_sides_agree(cuda_module):
    module = cuda_module.module
    assert module.MAX_CAPACITY == MAX_CAPACITY
    assert module.MIXTURE_CANDIDATES == accept_launcher.CANDIDATE_TILE
    assert module.MIXTURE_TILE_BYTES == accept_launcher.TILE_BYTES
    assert module.MIXTURE_VOCAB == draft_launcher.MAX_SHARED_VOCAB
    assert module.MULTIBLOCK_BLOCKS == multiblock_launcher.MAX_BLOCKS
    assert module.MULTIBLOCK_POSITIONS == multiblock_launcher.MAX_POSITIONS
    assert module.EDIT_TOKENS_WINDOW == edit_launcher.MAX_WINDOW
    assert module.UNMASK_WINDOW == unmask_launcher.MAX_WINDOW
    text = (CSRC / "unmask.h").read_text()
    rules = text[text.index("enum class Rule") : text.index("};")]
    named = [rule.replace("_", "") for rule in unmask_launcher.RULES]
    assert [name.strip().lower() for name in rules.partition("{")[2].split(",")] == [
        f"k{name}" for name in named
    ]


UNMASK = [
    ("quota", {}),
    ("left_to_right", {}),
    ("random", {}),
    ("threshold", {"threshold": 0.8}),
    ("threshold", {"threshold": 0.9, "min_tokens": 3}),
    ("factor", {"factor": 1.0}),
    ("entropy", {"threshold": 0.3}),
    ("entropy_bound", {"bound": 2.5}),
]


def check_unmask():
    """Windows of one warp, of more rows than half the threads, and of several rows a thread."""
    for index, (rows, slots) in enumerate([(5, 9), (33, 60), (128, 130), (2100, 2200)]):
        for rule, options in UNMASK:
            batch = 12 if rows < 1000 else 4
            case = make_case(batch, rows, slots, index, entropies="entropy" in rule)
            case["score"] = case["score"].to((F32, F16, BF16)[index % 3])
            if rule in ("quota", "left_to_right", "random"):
                options = {"quota": numbers(integers(batch, low=0, high=rows + 2, seed=index))}
            options = dict(options)
            results = []
            for backend in ("torch", "cuda"):
                own = copied(case)
                ending = make_ending(batch, slots, index, eos=[7, 3], ends_from=True, last=False)
                if rule in ("quota", "threshold"):
                    options["ending"] = ops.Ending(**ending)
                counts = ops.unmask(**own, rule=rule, backend=backend, **options)
                results.append((own["x"], own["step_map"], own["nfe"], ending["done"], *counts))
            for one, other in zip(*results, strict=True):
                assert torch.equal(one, other), (rule, rows)


def test_unmask_in_windows_of_every_size(cuda_on_cpu):
    check_unmask()


def check_edit_tokens():
    """Windows of one warp, of more rows than half the threads, and of several rows a thread."""
    for index, (rows, slots) in enumerate([(5, 9), (33, 60), (128, 130), (2100, 2200)]):
        dtype = (F32, F16, BF16)[index % 3]
        close = {"threshold": 0.3, "edit_threshold": 0.3, "min_tokens": 3, "max_post_steps": 1}
        for option in (*edits.OPTIONS, close):
            for confirm in (False, True):
                results = []
                for backend in ("torch", "cuda"):
                    case = edits.make(30 if rows < 1000 else 8, rows, slots, 10 * index, dtype)
                    case["score"][2::4] = 0.3  # not a number of half precision
                    case["score"][3::4, 1::2], case["score"][3::4, ::2] = 0.0, -0.0
                    case["start"][::4] = case["editable_from"][::4] = -2
                    given = {"mask_id": edits.MASK, "confirm": confirm, "backend": backend} | option
                    counts = ops.edit_tokens(**case, **given)
                    results.append((*counts, *(case[name] for name in edits.WRITTEN)))
                assert all(map(torch.equal, *results)), (rows, option, confirm)


def test_edit_tokens_in_windows_of_every_size(cuda_on_cpu):
    check_edit_tokens()


def check_multiblock_step(long=False):
    """Every kind on a trajectory; long: more positions and blocks than there are threads."""
    shapes = ((700, 33), (520, 2)) if long else ((20, 5),)
    for new, size in shapes:
        for number in range(4):
            cached, shifted = number & 1 > 0, number & 2 > 0
            x, steps, state, lengths = start([2, 1, 5], new, size)
            options = {"mask_id": MASK, "prompt_length": lengths, "eos_ids": torch.tensor(ENDS)}
            options |= {"max_new_tokens": new, "block_length": size, "threshold": 0.25}
            options |= {"add_at": 0.3, "full_at": 0.5, "cached": cached, "shifted": shifted}
            options |= {"delay": 1, "refresh": 3}
            if long:
                state.created[:] = -(-new // size) - 1
                x[0, 2 : new // 2] = 7
            token, entropy = x[:, :0], torch.empty(3, 0)
            for step in range(4 if long else 7):
                other = clone(x, steps, state)
                ops.multiblock_step(x, steps, state, token, entropy, **options, backend="torch")
                ops.multiblock_step(*other, token, entropy, **options, backend="cuda")
                for want, got in zip((x, steps, *state), (*other[:2], *other[2]), strict=True):
                    assert torch.equal(want, got), (number, step)
                token, entropy = statistics(x, state, step)
                if step % 3 == 0:  # ends of sequences only now and then
                    token[(token == 8) | (token == 9)] = 7


def test_multiblock_step_of_more_than_a_block_of_threads(cuda_on_cpu):
    check_multiblock_step(long=True)


def counters(rows, first=7):
    counter = torch.full((rows, 3), 7, dtype=torch.int32)
    counter[:, 0] = first + torch.arange(rows, dtype=torch.int32)
    counter[:, 2] = 0
    return counter


def rows_to_draft_from(vocab, dtype):
    """Peaked; flat; peaked late, behind much that is soon forgotten; all the same; few."""
    logits = random_normal(6, vocab, seed=1)
    logits[0] *= 6
    logits[2] *= 0.1
    logits[2, -9:] += 30
    logits[3] = 0.5
    logits[4, 40:] = -INF
    logits[5] = logits[5].sort().values * 4
    return logits.to(dtype)


def check_mixture_draft(vocab=9001):
    """All ways through a row give what the reference gives, whatever room there is for notes."""
    for dtype in (F32, BF16):
        logits = rows_to_draft_from(vocab, dtype)
        options = {"temperature": 0.9, "seed": 11, "counter": counters(6), "top_p": 0.9}
        options |= {"suppress_ids": numbers([0, vocab - 2]), "capacity": 1024}
        expected = ops.mixture_draft(logits, **options, backend="torch")
        assert (expected.candidates.size > 0).any() and expected.candidates.overflow.any()
        for notes in (draft_launcher.NOTES, 64):
            with mock.patch.object(draft_launcher, "NOTES", notes):
                got = ops.mixture_draft(logits, **options, backend="cuda")
            _assert_near(got, expected)


@pytest.mark.parametrize("vocab", [20000, 16387])
def test_mixture_draft_in_several_pieces_and_without_room(vocab, cuda_on_cpu):
    check_mixture_draft(vocab)


def test_a_top_p_that_leaves_out_nothing_but_rounding(cuda_on_cpu):
    logits = random_normal(3, 50, seed=0)
    top_p = 1 - 2**-24
    options = {"temperature": 1.0, "counter": counters(3), "top_p": top_p, "capacity": 64}
    expected = ops.mixture_draft(logits, **options, backend="torch")
    got = ops.mixture_draft(logits, **options, backend="cuda")
    assert torch.equal(got.token, expected.token)
    assert (got.candidates.size >= 49).all()  # the last may be kept or not, see the op


def check_mixture_accept():
    """Two tiles of a row and a bit, at 16-byte boundaries and off them, every kind of mixture."""
    for dtype, vocab in ((F32, 8200), (F16, 8199)):
        logits = random_normal(12, vocab, seed=3).to(dtype) * 3
        verifier = (logits + random_normal(12, vocab + 5, seed=4)[:, :vocab]).to(dtype)
        logits[:, ::7] = 1.25  # ties
        logits[1] = 2.0
        verifier[1] = 2.0
        verifier[2, 40] = INF
        logits[3, 9] = math.nan
        logits[4, 5:] = -INF
        token = logits.nan_to_num(0).argmax(1)
        threshold = logits.nan_to_num(0).float().sort(1).values[:, -300].contiguous()
        call = {"length": numbers([3, 2, 0, 3]), "threshold": threshold, "seed": 3}
        call |= {
            "counter": counters(12),
            "suppress_ids": numbers([8, vocab - 1]),
            "shared_vocab": 8190,
        }
        each = torch.tensor([0.5, 0.0, 1.0] * 4)
        for mixture in (0.0, 0.4, 1.0, torch.tensor([0.3, 0.0, 1.0, 2.0])):
            for temperature, critical in ((0.0, False), (0.7, True), (each, False)):
                one, other = (
                    ops.mixture_accept(
                        logits,
                        verifier,
                        token,
                        **call,
                        mixture=mixture,
                        temperature=temperature,
                        critical=critical,
                        emit="draft" if critical else "target",
                        backend=backend,
                    )
                    for backend in ("torch", "cuda")
                )
                for want, got in zip(one[:3], other[:3], strict=True):
                    assert torch.equal(want, got), (dtype, mixture, temperature)
                if critical:
                    sound = [0, 1, 4, 9, 10, 11]  # elsewhere a NaN or infinity takes part
                    near = {"rtol": 1e-5, "atol": 1e-5}
                    torch.testing.assert_close(one.critical[sound], other.critical[sound], **near)


def test_mixture_accept_in_several_tiles(cuda_on_cpu):
    check_mixture_accept()


def check_mixture_accept_sparse():
    """Lists of more than a tile, rows of the head at 16-byte boundaries and off them."""
    vocab, width = 300, 132
    logits = random_normal(8, vocab, seed=5)
    options = {"temperature": 1.0, "seed": 2, "counter": counters(8)}
    draft = ops.mixture_draft(logits, top_p=0.9, capacity=200, **options, backend="torch")
    assert 64 < draft.candidates.size.max() <= 200
    draft.candidates.size[5] = 0
    for dtype in (F32, BF16):
        hidden = (random_normal(8, width, seed=6) / 4).to(dtype)
        head = random_normal(vocab, width, seed=7).to(dtype)
        bias = random_normal(vocab, seed=8).to(dtype)
        for softcap, critical, emit in ((None, False, "target"), (4.0, True, "draft")):
            one, other = (
                ops.mixture_accept_sparse(
                    draft.candidates,
                    hidden,
                    head,
                    draft.token,
                    length=numbers([4, 3]),
                    mixture=torch.tensor([0.3, 0.8]),
                    temperature=1.0,
                    bias=bias if critical else None,
                    softcap=softcap,
                    critical=critical,
                    emit=emit,
                    backend=backend,
                )
                for backend in ("torch", "cuda")
            )
            for want, got in zip(one[:3], other[:3], strict=True):
                assert torch.equal(want, got)
            if critical:
                torch.testing.assert_close(one.critical, other.critical, rtol=1e-3, atol=1e-3)


def test_mixture_accept_sparse_in_several_tiles(cuda_on_cpu):
    check_mixture_accept_sparse()


MUTANTS = {
    "unmask.cu": (
        "check_unmask",
        {
            "keep is read before it is written": (
                "  __syncthreads();\n\n  int part",
                "  if (!MUTANT) __syncthreads();\n\n  int part",
            ),
            "other word of the order": ("words_of(j).word[0]", "words_of(j).word[1]"),
            "rank off by one": ("static_cast<float>(j + 2)", "static_cast<float>(j + 1)"),
            "limit is not rounded": ("rounded<Score>(call.limit)", "call.limit"),
            "ends before the region count": ("if (start + j < ends_from) continue;", ""),
            "filled from the end on": ("place + 1 + thread", "place + thread"),
            "ties to a neighbour": ("static_cast<uint32_t>(j)", "static_cast<uint32_t>(j ^ 1)"),
        },
    ),
    "edit_tokens.cu": (
        "check_edit_tokens",
        {
            "fill is read before it is written": (
                "    __syncthreads();\n  }\n\n  int32_t post",
                "    if (!MUTANT) __syncthreads();\n  }\n\n  int32_t post",
            ),
            "a mask at the threshold is filled": ("value > limit", "value >= limit"),
            "a token at the threshold is replaced": (
                "value_of(j) > edit_limit",
                "value_of(j) >= edit_limit",
            ),
            "limits are not rounded": ("rounded<Score>(call.threshold)", "call.threshold"),
            "tokens of the prompt are replaced": ("start + j >= editable_from", "true"),
            "an edit writes a mask": ("token[j] != call.mask_id", "true"),
            "the closing step writes": ("!closing", "true"),
            "ties to a neighbour": ("static_cast<uint32_t>(j)", "static_cast<uint32_t>(j ^ 1)"),
            "a negative zero is worse": ("ordered(__fsub_rn(0.f, value))", "ordered(-value)"),
            "windows outside of x": ("start < 0 ? -start : 0", "0"),
            "complete windows go on": (
                "call.complete[sequence] ? 0 : call.length[sequence]",
                "call.length[sequence]",
            ),
            "the budget is one more": (
                "post_steps >= call.max_post_steps",
                "post_steps > call.max_post_steps",
            ),
        },
    ),
    "multiblock_step.cu": (
        "check_multiblock_step",
        {
            "masks are counted before they are wiped": (
                "masks[k] = 0;\n  __syncthreads();",
                "masks[k] = 0;\n  if (!MUTANT) __syncthreads();",
            ),
            "limit is strict": ("cost <= bound", "cost < bound"),
            "young blocks are not waited for": (
                "wrapped(int64_t{nfe} - done[k]) >= call.delay && !kept[k]",
                "!kept[k]",
            ),
            "end of sequence is filled too": ("ended && j > last", "ended && j >= last"),
        },
    ),
    "mixture_draft.cu": (
        "check_mixture_draft",
        {
            "noise of the next id": ("draft.key.of(id));", "draft.key.of(id + MUTANT));"),
            "cut is one key too low": ("key >= cut + unit", "key > cut + unit"),
            "list in any order": ("sort_block(list, room);", ""),
            "notes are read before they are there": (
                "  filtered = filtered && usable;\n  __syncthreads();",
                "  filtered = filtered && usable;",
            ),
        },
    ),
    "mixture_accept.cu": (
        "check_mixture_accept",
        {
            "words of the first quad": ("key.words((first + quad) / 4)", "key.words(first / 4)"),
            "the cut itself is outside": (
                "to_float(x[u].lane[i]) < threshold",
                "to_float(x[u].lane[i]) <= threshold",
            ),
            "nucleus at mixture 0": (
                "if (weight != 0.f) inside[u] = nucleus[u];",
                "inside[u] = nucleus[u];",
            ),
        },
    ),
    "_mixture_accept_scan.cu": (
        "check_mixture_accept",
        {
            "every row is free": ("round.first_free && index == 0", "round.first_free"),
            "last tile is not looked at": ("tile < round.tiles", "tile + 1 < round.tiles"),
        },
    ),
    "_mixture_accept_sparse.cu": (
        "check_mixture_accept_sparse",
        {
            "rest of a row of the head": (
                "i < width; i += kWarpSize",
                "i < (MUTANT ? 0 : width); i += kWarpSize",
            ),
            "every second candidate": (
                "i < end; i += kWarps",
                "i < end; i += (1 + MUTANT) * kWarps",
            ),
        },
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")
def test_planted_bugs_are_caught(cuda_folder):
    cases = {}
    for source, (check, mutants) in MUTANTS.items():
        planted = cases.setdefault(f"tests.test_csrc_decoding:{check}", {})
        planted |= {name: (source, *change) for name, change in mutants.items()}
    assert_caught(cases, cuda_folder)
