"""The CUDA kernel's own: its stages, what it refuses, and bugs planted in it."""

import pytest
import torch

from pydllm import ops
from pydllm._backend.cuda import window_attention as launcher
from pydllm.testing import error_budget, max_error, random_normal
from tests import emulation
from tests.mutants import assert_caught
from tests.ops import test_window_attention_leaves as leaves
from tests.ops.test_window_attention import copy, make
from tests.ops.test_window_attention_forms import run
from tests.ops.test_window_attention_masks import SEQUENCES, branched, of_branch

NAMES = ("q", "k", "v", "k_cache", "v_cache")


def agrees(inputs, **options):
    """Against the definition in fp64; NaN, wherever nothing may be read, have to stay unread."""
    wide = {k: t.double() if t.is_floating_point() else t for k, t in inputs.items()}
    exact, plain = run(wide, "torch", **options), run(inputs, "torch", **options)
    for got, want, same in zip(run(inputs, "cuda", **options), exact, plain, strict=True):
        assert max_error(got, want) <= error_budget(want, same)


def with_norms(inputs):
    head_dim, dtype = inputs["q"].shape[3], inputs["q"].dtype
    norms = 1 + random_normal(2, head_dim, seed=9, dtype=dtype) / 4
    return inputs | {"q_norm": norms[0], "k_norm": norms[1]}


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "window": 70}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("stages", [2, 3])
def test_stages(cuda_on_cpu, monkeypatch, stages, head_dim, dtype, options):
    """The ring of tiles turns more than once, and gives the same bits whatever its size."""
    sequences = [(200, 5, 300, 5, 3), (0, 9, 260, 2, 0), (10, 9, 280, 9, 20)]
    inputs = with_norms(branched(sequences, 2, dtype, rows=9, head_dim=head_dim, slots=300))
    default = run(inputs, "cuda", branches=2, **options)
    monkeypatch.setattr(launcher, "STAGES", stages)
    agrees(inputs, branches=2, **options)
    for one, other in zip(run(inputs, "cuda", branches=2, **options), default, strict=True):
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_a_refresh_over_many_tiles(cuda_on_cpu, monkeypatch, order):
    """Copies land late in one order and early in the other."""
    monkeypatch.setenv("PYDLLM_EMULATION_ORDER", order)
    agrees(make([(0, 200, 200, 200, 0)], torch.bfloat16, heads=(3, 1), head_dim=128, slots=200))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_one_block_for_all_splits_or_one_for_each(cuda_on_cpu, monkeypatch, head_dim):
    """The same bits, whatever the device, the batch and the length of the cache make of it."""
    monkeypatch.setattr(launcher, "SPLIT", 64)
    sequences = [(200, 5, 300, 5, 3), (0, 9, 9, 2, 0), (10, 9, 280, 9, 20), (62, 4, 66, 0, 0)]
    inputs = branched(sequences, 2, torch.bfloat16, rows=9, head_dim=head_dim, slots=300)
    for options in ({}, {"causal": True}, {"window": 70}):
        one = run(inputs, "cuda", branches=2, **options)
        with monkeypatch.context() as patch:
            patch.setattr(launcher, "multiprocessors", lambda device: 10**6)
            many = run(inputs, "cuda", branches=2, **options)
        assert all(
            torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(one, many, strict=True)
        )


def test_the_bits_do_not_depend_on_the_rows_or_the_slots(cuda_on_cpu):
    """A short window over a long cache, and its last row in a window over all of a short one."""
    whole = make([(0, 600, 600, 600, 0)], torch.float16, heads=(1, 1), slots=600)
    out = ops.window_attention(**whole, backend="cuda")
    tail = {name: whole[name][:, 590:] for name in ("q", "k", "v")}
    tail |= {name: torch.cat((whole[name], whole[name]), 1) for name in ("k_cache", "v_cache")}
    tail |= {name: torch.cat((whole[name], whole[name])) for name in ("cos", "sin")}
    tail |= {"start": whole["start"] + 590, "length": whole["length"] - 590}
    again = ops.window_attention(**(whole | tail | {"commit": tail["length"]}), backend="cuda")
    assert torch.equal(again, out[:, 590:])


def test_a_committed_key_is_the_one_that_was_attended_to(cuda_on_cpu):
    """Bit for bit: attending to the cache afterwards gives what attending to the window gave."""
    for head_dim in (64, 128):
        inputs = with_norms(
            make([(40, 24, 96, 24, 0)], torch.float16, head_dim=head_dim, slots=96, heads=(2, 2))
        )
        out = ops.window_attention(**inputs, backend="cuda")
        # The last row alone, its neighbours cached now.
        last = {name: inputs[name][:, 23:] for name in ("q", "k", "v")}
        last |= {name: inputs[name] + by for name, by in (("start", 23), ("length", -23))}
        again = ops.window_attention(**(inputs | last), backend="cuda")
        assert torch.equal(again[:, 0], out[:, 23])


@pytest.mark.parametrize(("head_dim", "rotary"), [(64, 64), (64, 16), (128, 64), (128, 128)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_commit_branch_writes_the_same_bits(cuda_on_cpu, dtype, head_dim, rotary):
    sequences = [(62, 4, 150, 0, 0), (70, 3, 74, 0, 6)]
    inputs = with_norms(branched(sequences, 8, dtype, rows=4, head_dim=head_dim, rotary=rotary))
    alone, used = of_branch(inputs, 5, 8), copy(inputs)
    alone["commit"] = alone["length"].clone()
    ops.window_attention(**alone, backend="cuda")
    names = ("k", "v", "k_cache", "v_cache", "start", "cos", "sin", "pad", "k_norm")
    ops.commit_branch(
        **{name: used[name] for name in names},
        branch=torch.full((2,), 5, dtype=torch.int32),
        commit=used["length"],
        branches=8,
        backend="cuda",
    )
    for name in ("k_cache", "v_cache"):
        assert torch.equal(used[name].nan_to_num(7), alone[name].nan_to_num(7))


def test_numbers_that_make_no_sense_write_nothing(cuda_on_cpu):
    """Values stay on the device and are not checked; no address may come from them unclamped."""
    low, high = -(2**31), 2**31 - 1
    for start, length, kv_len, commit, pad in (
        (low, 4, 30, 4, 0),
        (high, 4, high, 4, high),
        (5, low, low, low, low),
        (30, 4, 30, 4, 0),
        (-2, 4, 30, 4, 0),
        (28, high, high, high, 0),
    ):
        inputs = make([(5, 4, 30, 0, 0)], torch.float16, slots=30)
        for name in NAMES:
            inputs[name] = inputs[name].nan_to_num(0.5)
        values = {"start": start, "length": length, "kv_len": kv_len, "commit": commit, "pad": pad}
        used = copy(inputs) | {n: torch.tensor([v]).int() for n, v in values.items()}
        expected = copy(used)
        out = ops.window_attention(**used, backend="cuda")
        want = ops.window_attention(**expected, backend="torch")
        torch.testing.assert_close(out, want, rtol=4e-3, atol=4e-3, msg=str(values))
        for name in ("k_cache", "v_cache"):
            changed = (used[name] != inputs[name]).flatten(2).any(2)
            allowed = (expected[name] != inputs[name]).flatten(2).any(2)
            assert torch.equal(changed, allowed), values


def test_the_tiles_of_both_sides_agree():
    for file, name, value in (
        ("window_attention.h", "kAttentionKeys", launcher.KEYS),
        ("attention_schedule.cuh", "kQueries", launcher.QUERIES),
    ):
        assert f"constexpr int {name} = {value};" in (emulation.CSRC / file).read_text()


GOOD = make([(5, 3, 9, 2, 0), (7, 4, 30, 0, 0)], torch.float16, slots=30)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (make([(5, 3, 9, 2, 0)], slots=30), "fp16 and bf16, got torch.float32"),
        (make([(5, 3, 9, 2, 0)], torch.float16, head_dim=80), "head sizes 64 and 128, got 80"),
        ({n: torch.ones(30, 12) for n in ("cos", "sin")}, "a multiple of 16 dimensions, got 24"),
        (
            {"k_cache": torch.ones(2, 30, 64, 2).half().transpose(2, 3)},
            "k_cache must have contiguous heads, got strides",
        ),
        (
            {"q": torch.ones(2, 4, 4, 68).half()[..., :64]},
            r"heads of q must begin at 16 bytes, got strides \(1088, 272, 68, 1\) and offset 0",
        ),
        (
            {"v": torch.ones(2, 4, 2, 72).half()[..., 4:68]},
            "heads of v must begin at 16 bytes, .* and offset 4 in elements",
        ),
        ({"start": GOOD["start"][:1].expand(2)}, "start must be contiguous, got strides"),
        ({"cos": torch.ones(993)[1:].view(31, 32)}, "cos must begin at 16 bytes, got offset 1"),
    ],
)
def test_what_the_kernel_refuses(cuda_on_cpu, change, message):
    inputs = GOOD | change
    if "sin" not in change:
        inputs["sin"] = torch.ones(inputs["cos"].shape)
    with pytest.raises(RuntimeError, match=message):
        ops.window_attention(**inputs, backend="cuda")


def test_a_head_off_16_bytes_is_an_error_of_the_launch(cuda_on_cpu):
    """What the compiler cannot ask beforehand."""
    inputs = copy(GOOD) | {"pad": None}
    inputs["q"] = torch.ones(2, 4, 4, 72).half()[..., 4:68]
    with pytest.raises(RuntimeError, match="window_attention: misaligned address"):
        launcher.window_attention(**inputs, scale=1.0)


def check():
    """What a planted bug has to fail: short, and the forms that show most first."""
    agrees(branched(SEQUENCES, 2, torch.float16), branches=2)
    agrees(with_norms(branched(SEQUENCES[:2], 1, torch.float16, rotary=32)), causal=True)
    agrees(make([(0, 100, 100, 40, 0)], torch.float16, slots=150), window=20, softcap=1.5)
    offset = torch.tensor([3, 1, 0, 2], dtype=torch.int32)
    agrees(make(SEQUENCES, torch.float16) | {"block_offset": offset}, block_size=5)
    inputs = branched([(66, 4, 150, 2, 0)], 2, torch.float16, rows=4)
    inputs["q"][0, :4], inputs["k"][0, :4], inputs["v"][0, :4] = (torch.nan,) * 3
    out = ops.window_attention(**copy(inputs), branches=2, backend="cuda")
    assert out[0, :4].isnan().all() and not out[0, 4:].isnan().any()
    inputs = make([(70, 9, 150, 9, 0), (60, 8, 128, 3, 5)], torch.bfloat16, head_dim=128)
    split, multiprocessors = launcher.SPLIT, launcher.multiprocessors
    launcher.SPLIT = 64
    agrees(inputs)
    one = run(inputs, "cuda")
    launcher.multiprocessors = lambda device: 10**6
    agrees(inputs)
    assert torch.equal(one[0], run(inputs, "cuda")[0])
    launcher.SPLIT, launcher.multiprocessors = split, multiprocessors
    inputs = make([(66, 9, 150, 9, 0), (60, 7, 128, 3, 5)], torch.float16)
    table = torch.arange(60).flip(0).view(2, 30).int()
    for name in ("k_cache", "v_cache"):
        inputs[name] = inputs[name].unflatten(1, (30, 5)).flatten(0, 1).flip(0).contiguous()
    agrees(inputs | {"block_table": table})


TILE, SCHEDULE, SPLIT, KERNEL = (
    "attention_tile.cuh",
    "attention_schedule.cuh",
    "attention_split.cuh",
    "window_attention.cu",
)
BEFORE = "{merged ? rows[0] : nullptr, merged ? rows[1] : nullptr}"
MUTANTS = {
    "keys: lanes of a fragment": (TILE, "lane / 16 * 8 + lane % 8", "lane % 16"),
    "keys: dimensions of a fragment": (TILE, "lane / 8 % 2", "lane / 16"),
    "values: keys and dimensions of a fragment exchanged": (
        TILE,
        "swizzled<kHeadDim>(k, lane % 16, d, lane / 16)",
        "swizzled<kHeadDim>(k, lane / 16 * 8 + lane % 8, d, lane / 8 % 2)",
    ),
    "swizzle: of the reader alone": (TILE, "((chunk ^ row % 8) ^ 2 * k)", "(chunk ^ 2 * k)"),
    "rope: sign of the second half": (
        TILE,
        "fmaf(wide_b[i], c, wide_a[i] * s)",
        "fmaf(wide_b[i], c, -(wide_a[i] * s))",
    ),
    "rope: partner of a partial rotation": (
        TILE,
        "rotates ? index + half / kChunk : index + kCount",
        "index + kCount",
    ),
    "norm: of half a head": (TILE, "1.f / kHeadDim", "2.f / kHeadDim"),
    "softmax: maximum of half a row": (TILE, "__shfl_xor_sync(kFullWarp, best, 2)", "best"),
    "softmax: sums of the tiles before not scaled": (
        TILE,
        "fmaf(online.sum[r], alpha[r], sum)",
        "online.sum[r] + sum",
    ),
    "branches: NaN of another": (TILE, "mine[i % 4 / 2]", "true"),
    "schedule: no last tile of the window": (
        SCHEDULE,
        "(max(sequence.window_end, 0) + kKeys - 1) / kKeys",
        "max(sequence.window_end, 0) / kKeys",
    ),
    "schedule: a split too long": (
        SCHEDULE,
        "(split + 1) * call.split_tiles",
        "(split + 2) * call.split_tiles",
    ),
    "schedule: a causal row sees one more": (
        SCHEDULE,
        "min(end, position + 1)",
        "min(end, position + 2)",
    ),
    "schedule: blocks without their offset": (
        SCHEDULE,
        "int64_t{position} + block_offset",
        "position",
    ),
    "schedule: a block's end without its offset": (
        SCHEDULE,
        "(shifted / call.block_size + 1) * call.block_size - block_offset",
        "(shifted / call.block_size + 1) * call.block_size",
    ),
    "schedule: the window begins late": (
        SCHEDULE,
        "position - call.sliding_window + 1",
        "position - call.sliding_window + 2",
    ),
    "pages: slot of the sequence in the page": (SCHEDULE, "slot % call.page", "slot"),
    "copy: one slot too many": (
        KERNEL,
        "tile * kKeys + key < sequence.visible_end",
        "tile * kKeys + key <= sequence.visible_end",
    ),
    "copy: values of branch 0": (
        KERNEL,
        "(kLeaves ? leaf.row_of(row) : first_row + row) * call.stride_v_row",
        "row * call.stride_v_row",
    ),
    "copy: keys without rotation": (KERNEL, "if (branch < 0) return;", "return;"),
    "commit: all rows": (KERNEL, "sequence.commit", "sequence.length"),
    "commit: position of the slot": (KERNEL, "slot - sequence.pad", "slot"),
    "mask: none": (KERNEL, "if (!seen) s[n][i] = -INFINITY;", ";"),
    "mask: a tile at the edge taken for full": (
        KERNEL,
        "(tile + 1) * kKeys <= schedule.all_end",
        "true",
    ),
    "ring: no wait for the copy": (KERNEL, "wait_for_oldest(call.stages);", ";"),
    "ring: no barrier behind the wait": (
        KERNEL,
        "__syncthreads();  // the step's",
        "if (!MUTANT) __syncthreads();  // the step's",
    ),
    "ring: fills what is read": (KERNEL, "fills = 0;", "fills = MUTANT ? 1 : 0;"),
    "split: not closed at its end": (KERNEL, "tile / call.split_tiles != split", "false"),
    "split: what came before forgotten": (
        KERNEL,
        f"merge_split(online, total, {BEFORE});\n#pragma",
        "if (MUTANT) merge_split(online, total, {nullptr, nullptr}); "
        f"else merge_split(online, total, {BEFORE});\n#pragma",
    ),
    "split: sum of half a row": (SPLIT, "sum + __shfl_xor_sync(kFullWarp, sum, 2)", "sum"),
    "split: merged without its scale": (
        SPLIT,
        "alpha, sum * beta",
        "alpha, MUTANT ? sum : sum * beta",
    ),
    "merge: a split not scaled": (SPLIT, "part_sum * beta", "part_sum"),
    "merge: order of the splits' sums": (SPLIT, "state[splits * rows + from]", "state[from]"),
}


@pytest.mark.skipif(emulation.CXX is None, reason="needs a C++ compiler")
def test_planted_bugs_are_found(cuda_folder):
    cases = {
        "tests.ops.test_window_attention_cuda:check": MUTANTS,
        "tests.ops.test_window_attention_leaves:check": leaves.MUTANTS,
    }
    assert_caught(cases, cuda_folder)
