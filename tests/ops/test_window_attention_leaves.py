"""Leaves: rows that continue the sequence after a row of the trunk, many in one forward."""

import pytest
import torch

from pydllm import ops
from pydllm._backend.cuda import window_attention as launcher
from pydllm.testing import error_budget, max_error, random_normal
from tests.ops.test_window_attention import BACKENDS, BITS, KERNELS, NAN, copy, dtypes, rotate
from tests.ops.test_window_attention_forms import paged
from tests.ops.test_window_attention_masks import matrix, normed

SLOTS = 150
# start, length, commit, pad; tiles have 64 positions. In the middle of a tile, over its edge, all
# of the cache's end, no row, fewer rows than leaves, rows before the padding's end, the first.
SEQUENCES = [
    (66, 5, 5, 0),
    (60, 4, 2, 5),
    (145, 5, 5, 0),
    (20, 0, 0, 0),
    (126, 2, 2, 1),
    (9, 5, 5, 11),
    (0, 3, 3, 0),
]
NUMBERS = ("start", "length", "commit", "pad")
TREES = [(5, 4), (2, 10), (1, 1), (5, 1)]  # leaves, rows of each
# Triton's bf16 is its fp16 with other conversions; in CUDA it is other instructions.
RUNS = [
    (name, dtype)
    for name in BACKENDS
    for dtype in dtypes(name)
    if (name, dtype) != ("triton", torch.bfloat16)
]


def make(
    leaves,
    leaf_rows,
    dtype=torch.float32,
    *,
    sequences=SEQUENCES,
    rows=5,
    heads=(2, 1),
    head_dim=64,
    slots=SLOTS,
):
    """Inputs with NaN wherever nothing may be read: slots from ``start`` on, unused rows."""
    batch, (q_heads, kv_heads) = len(sequences), heads
    count, parts = rows + leaves * leaf_rows, (q_heads, kv_heads, kv_heads)
    qkv = random_normal(batch, count, sum(parts), head_dim, seed=0, dtype=dtype)
    cache = random_normal(2, batch, slots, kv_heads, head_dim, seed=1, dtype=dtype)
    for b, (start, length, _, pad) in enumerate(sequences):
        cache[:, b, start:] = NAN
        cache[:, b, :pad] = NAN
        qkv[b, length:rows] = NAN
        qkv[b, : max(0, pad - start)] = NAN
        for leaf in range(leaves):
            if length - leaves + leaf < 0:
                qkv[b, rows + leaf * leaf_rows : rows + (leaf + 1) * leaf_rows] = NAN
    angle = torch.arange(slots + leaf_rows)[:, None] * 0.3 ** torch.arange(head_dim // 2)
    start, length, commit, pad = torch.tensor(sequences, dtype=torch.int32).t().contiguous()
    return {
        **dict(zip(("q", "k", "v"), qkv.split(parts, 2), strict=True)),
        **{"k_cache": cache[0], "v_cache": cache[1], "cos": angle.cos(), "sin": angle.sin()},
        **{"start": start, "length": length, "commit": commit, "pad": pad},
        "kv_len": torch.full_like(start, -7),  # means nothing
    }


def in_use(b, inputs, leaves, leaf_rows):
    """(row, position, leaf) of the rows in use; leaf None in the trunk."""
    start, length, _, pad = (int(inputs[name][b]) for name in NUMBERS)
    rows = inputs["q"].shape[1] - leaves * leaf_rows
    found = [(row, start + row - pad, None) for row in range(length)]
    for leaf in range(leaves):
        behind = length - leaves + leaf
        for i in range(leaf_rows if behind >= 0 else 0):
            found.append((rows + leaf * leaf_rows + i, start + behind + 1 + i - pad, leaf))
    return [each for each in found if each[1] >= 0]


def listed(inputs, dtype, leaves, leaf_rows, scale=None, softcap=None, window=None, eps=1e-6):
    """Out, keys and values; for each row, which keys of an explicit list it sees."""
    q, k, v, keys, values = (
        inputs[name].to(dtype, copy=True) for name in ("q", "k", "v", "k_cache", "v_cache")
    )
    if inputs.get("q_norm") is not None:
        q, k = (normed(x, inputs[n].to(dtype), eps) for x, n in ((q, "q_norm"), (k, "k_norm")))
    wide, tables = torch.promote_types(dtype, torch.float32), (inputs["cos"], inputs["sin"])
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for b in range(q.shape[0]):
        start, length, commit, pad = (int(inputs[name][b]) for name in NUMBERS)
        used = in_use(b, inputs, leaves, leaf_rows)
        at = [row for row, _, _ in used]
        position = torch.tensor([p for _, p, _ in used], dtype=torch.long)
        turned_q, turned_k = (
            rotate(x[b, at].to(wide), position, *tables).to(dtype) for x in (q, k)
        )
        cached = list(range(pad, start))
        for i, (row, mine, leaf) in enumerate(used):
            last = row if leaf is None else length - leaves + leaf
            fresh = [
                j
                for j, (other, p, of) in enumerate(used)
                if (of is None and other <= last) or (of == leaf and leaf is not None)
                if window is None or abs(p - mine) < window
            ]
            old = [s for s in cached if window is None or abs(s - pad - mine) < window]
            for h in range(q.shape[2]):
                g = h // (q.shape[2] // k.shape[2])
                all_k = torch.cat((keys[b, old, g], turned_k[fresh, g]))
                all_v = torch.cat((values[b, old, g], v[b, [at[j] for j in fresh], g]))
                scores = (all_k @ matrix(turned_q[i, h]).t())[:, 0]
                scores = (scores * (scale or q.shape[3] ** -0.5)).to(wide)
                scores = softcap * (scores / softcap).tanh() if softcap else scores
                out[b, row, h] = (matrix(scores.softmax(-1).to(dtype)) @ all_v)[0]
        for j, (row, _, leaf) in enumerate(used):
            if leaf is None and row < commit:
                keys[b, start + row], values[b, start + row] = turned_k[j], v[b, row]
    return out, keys, values


def run(inputs, backend, **options):
    used = copy(inputs) | {name: inputs[name] for name in ("q", "k", "v")}
    out = ops.window_attention(**used, causal=True, **options, backend=backend)
    return out, used["k_cache"], used["v_cache"]


def agrees(inputs, backend, leaves, leaf_rows, **options):
    tree = {"leaves": leaves, "leaf_rows": leaf_rows}
    dtype = inputs["q"].dtype
    expected = (listed(inputs, kind, **tree, **options) for kind in (torch.float64, dtype))
    got = run(inputs, backend, **tree, **options)
    for one, want, same in zip(got, *expected, strict=True):
        assert max_error(one, want) <= error_budget(want, same)
    return got


def same_bits(a, b):
    bits = BITS[a.itemsize]
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


# The interpreter is slow: one tree in its second type.
CASES = [(*run, *tree) for run in RUNS for tree in TREES]
CASES = [case for case in CASES if case[:2] != ("triton", torch.float16) or case[2:] == TREES[0]]


@pytest.mark.parametrize(("backend", "dtype", "leaves", "leaf_rows"), CASES, ids=str)
def test_every_row_sees_its_list(backend, dtype, leaves, leaf_rows):
    inputs = make(leaves, leaf_rows, dtype)
    out, keys, _ = agrees(inputs, backend, leaves, leaf_rows)
    rows = out.shape[1] - leaves * leaf_rows
    for b, (start, length, commit, _) in enumerate(SEQUENCES):
        assert (out[b, length:rows] == 0).all() and out[b].isfinite().all()
        assert same_bits(keys[b, start + commit :], inputs["k_cache"][b, start + commit :])


@pytest.mark.parametrize(("leaves", "leaf_rows"), TREES)
def test_the_definition_in_fp64(leaves, leaf_rows):
    inputs = make(leaves, leaf_rows, torch.float64, head_dim=6)
    inputs |= {name: inputs[name].double() for name in ("cos", "sin")}
    got = run(inputs, "torch", leaves=leaves, leaf_rows=leaf_rows)
    for one, other in zip(got, listed(inputs, torch.float64, leaves, leaf_rows), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13, equal_nan=True)


FORMS = {
    "window": {"window": 7},
    "window over tiles": {"window": 70},
    "softcap": {"softcap": 1.5, "scale": 0.4},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_and_scores(backend, form):
    agrees(make(5, 4, dtypes(backend)[0]), backend, 5, 4, **FORMS[form])


@pytest.mark.parametrize(("heads", "head_dim"), [((1, 1), 128), ((4, 1), 64), ((7, 1), 64)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_norms_and_pages(backend, head_dim, heads):
    dtype, sequences = torch.float16, [(64, 5, 5, 0), (30, 4, 2, 3)]
    inputs = make(5, 5, dtype, sequences=sequences, heads=heads, head_dim=head_dim, slots=96)
    for seed, name in enumerate(("q_norm", "k_norm")):
        inputs[name] = random_normal(head_dim, seed=seed, dtype=dtype)
    want = agrees(inputs, backend, 5, 5)
    if backend in KERNELS:
        cut = paged(inputs)
        got = run(cut, backend, leaves=5, leaf_rows=5)
        assert same_bits(got[0], want[0])
        for name, cache in zip(("k_cache", "v_cache"), want[1:], strict=True):
            place = 1 if name == "k_cache" else 2
            whole = got[place][cut["block_table"].long()].flatten(1, 2)
            assert same_bits(whole, cache)


def alone(inputs, b, leaves, leaf_rows, backend):
    """Each part of a sequence as a plain window: the trunk, then each leaf over a cache that has
    the trunk, which is longer by a leaf."""
    names = ("q", "k", "v", "k_cache", "v_cache", "start", "length", "commit", "pad")
    one = {name: inputs[name][b : b + 1].clone() for name in names}
    for name in ("k_cache", "v_cache"):
        one[name] = torch.nn.functional.pad(one[name], (0, 0, 0, 0, 0, leaf_rows))
    rows, length = inputs["q"].shape[1] - leaves * leaf_rows, int(one["length"])
    tables = {"cos": inputs["cos"], "sin": inputs["sin"]}
    heads = {name: one[name] for name in ("q", "k", "v")}
    out = torch.zeros_like(heads["q"])
    trunk = one | {name: heads[name][:, :rows] for name in heads}
    trunk |= {"kv_len": one["start"], "commit": one["length"]}
    options = {"backend": backend, "batch_invariant": True}
    out[:, :rows] = ops.window_attention(**trunk, **tables, causal=True, **options)
    for leaf in range(leaves):
        behind = length - leaves + leaf
        part = slice(rows + leaf * leaf_rows, rows + (leaf + 1) * leaf_rows)
        if behind < 0:
            continue
        at = one["start"] + behind + 1
        own = {name: heads[name][:, part] for name in heads}
        own |= {"start": at, "kv_len": at, "commit": at * 0, "pad": one["pad"]}
        own |= {"length": at * 0 + leaf_rows}
        caches = {name: trunk[name] for name in ("k_cache", "v_cache")}
        out[:, part] = ops.window_attention(**own, **caches, **tables, **options)
    return out


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bits_are_those_of_windows_one_by_one(backend):
    """Alone, in a batch, permuted, with other leaves or none: a row's bits are its keys' alone."""
    leaves, leaf_rows, sequences = 5, 4, SEQUENCES
    if backend == "triton":  # the interpreter is slow
        leaves, leaf_rows, sequences = 3, 6, SEQUENCES[:4]
    inputs = make(leaves, leaf_rows, torch.float16, sequences=sequences)
    inputs |= {name: inputs[name].nan_to_num(3) for name in ("q", "k", "v", "k_cache", "v_cache")}
    options = {"leaves": leaves, "leaf_rows": leaf_rows, "batch_invariant": True}
    out, keys, values = run(inputs, backend, **options)
    for b in range(len(sequences)):
        if sequences[b][3]:  # in torch, padding moves a row in its tile
            continue
        assert same_bits(alone(inputs, b, leaves, leaf_rows, backend)[0], out[b]), b
    order = torch.tensor([2, 6, 0, 3, 5, 1, 4])
    order = order[order < len(sequences)]
    names = (*NUMBERS, "q", "k", "v", "k_cache", "v_cache", "kv_len")
    mixed = inputs | {name: inputs[name][order] for name in names}
    for one, other in zip(run(mixed, backend, **options), (out, keys, values), strict=True):
        assert same_bits(one, other[order])
    for one, other in zip(run(inputs, backend, **options), (out, keys, values), strict=True):
        assert same_bits(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_leaf_changes_no_other_row(backend):
    leaves, leaf_rows, rows = 5, 4, 5
    inputs = make(leaves, leaf_rows, dtypes(backend)[0], sequences=SEQUENCES[:3])
    options = {"leaves": leaves, "leaf_rows": leaf_rows}
    before = run(inputs, backend, **options)
    for leaf, value in ((2, NAN), (4, float("inf")), (3, 9.0)):
        part = slice(rows + leaf * leaf_rows, rows + (leaf + 1) * leaf_rows)
        changed = inputs | {name: inputs[name].clone() for name in ("q", "k", "v")}
        for name in ("q", "k", "v"):
            changed[name][:, part] = value
        after = run(changed, backend, **options)
        others = [row for row in range(before[0].shape[1]) if not part.start <= row < part.stop]
        assert same_bits(after[0][:, others], before[0][:, others])
        assert not same_bits(after[0][:, part], before[0][:, part])
        for one, other in zip(after[1:], before[1:], strict=True):
            assert same_bits(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_long_trunk_with_one_leaf(backend):
    """The forward of a prompt, over several tiles of queries; and without a cache."""
    sequences = [(0, 140, 140, 0), (0, 70, 70, 9), (3, 130, 10, 0)]
    inputs = make(1, 6, dtypes(backend)[0], sequences=sequences, rows=140, heads=(2, 1))
    agrees(inputs, backend, 1, 6)
    first = {n: t[:2] if n not in ("cos", "sin") else t for n, t in inputs.items()}
    kept = run(first, backend, leaves=1, leaf_rows=6)[0]
    if backend in KERNELS:  # the trunk's rows are those of a plain causal window
        trunk = first | {name: first[name][:, :140] for name in ("q", "k", "v")}
        assert same_bits(run(trunk | {"kv_len": first["start"]}, backend)[0], kept[:, :140])
    bare = first | {"k_cache": None, "v_cache": None}
    got = ops.window_attention(**bare, causal=True, leaves=1, leaf_rows=6, backend=backend)
    assert max_error(got, kept) <= error_budget(got.double(), kept)


@pytest.mark.parametrize("backend", KERNELS)
def test_splits_change_no_bit(backend):
    """A long cache, whose keys are summed in parts, and leaves over the edge of a part."""
    sequences = [(508, 3, 3, 0), (251, 3, 3, 0)]
    inputs = make(3, 7, torch.float16, sequences=sequences, rows=3, heads=(1, 1), slots=511)
    agrees(inputs, backend, 3, 7)
    inputs |= {n: inputs[n].nan_to_num(3) for n in ("q", "k", "v", "k_cache", "v_cache")}
    out = run(inputs, backend, leaves=3, leaf_rows=7)[0]
    for b in range(len(sequences)):
        assert same_bits(alone(inputs, b, 3, 7, backend)[0], out[b])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"causal": False}, "leaves: expected causal=True, .* got causal=False"),
        ({"branches": 2}, "and branches=2"),
        ({"block_size": 4}, "block_size=4"),
        ({"leaves": -1}, "leaves: expected an int of at least 0, got -1"),
        ({"leaf_rows": 0}, "leaf_rows: expected an int of at least 1, got 0"),
        ({"leaves": 7, "leaf_rows": 4}, "leaves: expected fewer than the 25 rows of q, got 7"),
        ({"cos": torch.ones(153, 32)}, "cos: expected at least 154 positions, got 153"),
    ],
    ids=str,
)
def test_bad_arguments(change, message):
    inputs = make(5, 4) | {"causal": True, "leaves": 5, "leaf_rows": 4} | change
    if "cos" in change:
        inputs["sin"] = inputs["cos"]
    with pytest.raises(ValueError, match=message):
        ops.window_attention(**inputs)


def check():
    """What a planted bug has to fail."""
    agrees(make(5, 4, torch.float16), "cuda", 5, 4)
    agrees(make(2, 10, torch.bfloat16, heads=(7, 1), head_dim=128), "cuda", 2, 10, window=7)
    long = make(1, 6, torch.float16, sequences=[(0, 140, 140, 0)], rows=140, heads=(1, 1))
    agrees(long, "cuda", 1, 6)
    split, multiprocessors = launcher.SPLIT, launcher.multiprocessors
    launcher.SPLIT, launcher.multiprocessors = 64, lambda device: 10**6
    agrees(make(3, 7, torch.float16, sequences=[(124, 3, 3, 0)], rows=3, slots=128), "cuda", 3, 7)
    launcher.SPLIT, launcher.multiprocessors = split, multiprocessors
    inputs = make(5, 4, torch.float16, sequences=SEQUENCES[:1])
    for name in ("q", "k", "v"):
        inputs[name][:, 13:17] = NAN  # leaf 2
    out = run(inputs, "cuda", leaves=5, leaf_rows=4)[0]
    assert out[:, 13:17].isnan().all() and out[:, [*range(13), *range(17, 25)]].isfinite().all()


# Planted by test_window_attention_cuda.py, with those of the other forms: one build for all.
MUTANTS = {
    "trunk: as wide as all rows": (
        "attention_schedule.cuh",
        "call.rows - (call.branches - 1) * call.leaf_rows",
        "call.rows",
    ),
    "roots: from the first row on": (
        "attention_schedule.cuh",
        "return length - call.branches + branch;",
        "return branch - 1;",
    ),
    "roots: a row late": (
        "attention_schedule.cuh",
        "return length - call.branches + branch;",
        "return length - call.branches + branch + 1;",
    ),
    "keys: all of the trunk": (
        "attention_schedule.cuh",
        "sequence.root_of(call, branch) + 1",
        "length",
    ),
    "keys: of the first leaf": (
        "attention_schedule.cuh",
        "int64_t{sequence.window} + (branch - 1) * call.leaf_rows - trunk",
        "int64_t{sequence.window} - trunk",
    ),
    "keys: one of the leaf too few": (
        "attention_schedule.cuh",
        "trunk > 0 ? trunk + call.leaf_rows : 0",
        "trunk > 0 ? trunk + call.leaf_rows - 1 : 0",
    ),
    "keys: a leaf that is not in use": (
        "attention_schedule.cuh",
        "branch == 0 ? own < sequence.length : root >= 0",
        "branch == 0 ? own < sequence.length : true",
    ),
    "position: of the row": (
        "attention_schedule.cuh",
        "branch == 0 ? row : root + 1 + row - first",
        "branch == 0 ? row : row",
    ),
    "mask: causal in a leaf": (
        "attention_schedule.cuh",
        "branch == 0 ? own : root + call.leaf_rows",
        "own",
    ),
    "cache: one slot too few": (
        "attention_schedule.cuh",
        "visible_end = start - pad;",
        "visible_end = start - 1 - pad;",
    ),
    "schedule: to the end of the trunk": (
        "attention_schedule.cuh",
        "window_end += call.leaf_rows;",
        ";",
    ),
    "schedule: the last leaf's tiles alone": (
        "attention_schedule.cuh",
        "high = max(high, last_root + call.leaf_rows)",
        "high = max(high, last_root)",
    ),
    "splits: of the cache alone": (
        "window_attention.cu",
        "int64_t{call.slots} + call.leaf_rows + split",
        "int64_t{call.slots} + split",
    ),
}


def test_it_compiles_to_one_graph():
    backend = "triton"
    inputs = make(5, 4)
    options = {"causal": True, "leaves": 5, "leaf_rows": 4, "backend": backend}
    compiled = torch.compile(ops.window_attention, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert same_bits(
            compiled(**copy(inputs), **options), run(inputs, backend, leaves=5, leaf_rows=4)[0]
        )
