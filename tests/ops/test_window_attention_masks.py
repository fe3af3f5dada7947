"""Masks, branches, norms and pages: against lists of visible keys, one query at a time."""

import pytest
import torch

from pydllm import ops
from pydllm._backend.cuda import window_attention as cuda
from pydllm.kernels import _tiles
from pydllm.testing import error_budget, max_error, random_normal
from tests.ops.test_window_attention import (
    BACKENDS,
    BITS,
    DTYPES,
    KERNELS,
    NAN,
    NUMBERS,
    copy,
    dtypes,
    make,
    rotate,
)

# fp32 and fp16 as far as a backend has them; bf16 takes the same road.
BACKENDS_DTYPES = [
    (backend, dtype) for backend in BACKENDS for dtype in dtypes(backend) if dtype != torch.bfloat16
]
HALF = [(backend, torch.float16) for backend in KERNELS]
# start, length, kv_len, commit, pad; 150 slots, tiles of 64 positions.
SEQUENCES = [(66, 12, 150, 12, 0), (60, 7, 128, 3, 5), (2, 12, 14, 0, 0), (130, 0, 150, 0, 1)]
MASKS = {
    "causal": {"causal": True},
    "blocks": {"block_size": 4},
    "long blocks": {"block_size": 70},
    "window": {"window": 9},
    "window over tiles": {"window": 65},
    "causal window": {"causal": True, "window": 5},
    "blocks in a window": {"block_size": 8, "window": 20},
    "softcap": {"softcap": 1.5},
    "everything": {"causal": True, "window": 40, "softcap": 3.0, "scale": 0.4},
}


def sees(query, key, causal=False, block_size=None, window=None, offset=0, **_):
    """Whether a query at a position sees a key at another, by the masks."""
    if causal and key > query:
        return False
    if block_size:  # does a block begin after the query and not after the key?
        begins = (p for p in range(query + 1, key + 1) if (p + offset) % block_size == 0)
        if any(begins):
            return False
    return not (window and abs(key - query) >= window)


def listed(inputs, dtype, branches=1, scale=None, softcap=None, eps=1e-6, **masks):
    """Out, keys and values with, for each query, its visible keys in a list."""
    q, k, v, keys, values = (
        inputs[name].to(dtype, copy=True) for name in ("q", "k", "v", "k_cache", "v_cache")
    )
    if inputs.get("q_norm") is not None:
        q, k = (
            normed(q, inputs["q_norm"].to(dtype), eps),
            normed(k, inputs["k_norm"].to(dtype), eps),
        )
    wide = torch.promote_types(dtype, torch.float32)
    size, tables = q.shape[1] // branches, (inputs["cos"], inputs["sin"])
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    first_k, first_v = keys.clone(), values.clone()
    for b, numbers in enumerate(zip(*(inputs[name].tolist() for name in NUMBERS), strict=True)):
        start, length, kv_len, commit, pad = numbers
        offset = int(inputs["block_offset"][b]) if "block_offset" in inputs else 0
        rows = [row for row in range(length) if start + row >= pad]
        cached = [s for s in range(pad, kv_len) if not start <= s < start + length]
        position = torch.tensor([start + row - pad for row in rows], dtype=torch.long)
        for branch in range(branches if rows else 0):
            at = [branch * size + row for row in rows]
            turned_q, turned_k = (rotate(x[b, at].to(wide), position, *tables) for x in (q, k))
            turned_q, turned_k = turned_q.to(dtype), turned_k.to(dtype)
            for i, row in enumerate(at):
                mine = start + rows[i] - pad
                old = [s for s in cached if sees(mine, s - pad, **masks, offset=offset)]
                new = [
                    j
                    for j, other in enumerate(rows)
                    if sees(mine, start + other - pad, **masks, offset=offset)
                ]
                own = [at[j] for j in new]
                for h in range(q.shape[2]):
                    g = h // (q.shape[2] // k.shape[2])
                    all_k = torch.cat((first_k[b, old, g], turned_k[new, g]))
                    all_v = torch.cat((first_v[b, old, g], v[b, own, g]))
                    # As products of matrices: the sums of one vector may be shorter, and then
                    # more exact than a kernel can be asked to be.
                    scores = (all_k @ matrix(turned_q[i, h]).t())[:, 0]
                    scores = (scores * (scale or q.shape[3] ** -0.5)).to(wide)
                    scores = softcap * (scores / softcap).tanh() if softcap else scores
                    out[b, row, h] = (matrix(scores.softmax(-1).to(dtype)) @ all_v)[0]
            for j, row in enumerate(rows):
                if branch == 0 and row < commit:
                    keys[b, start + row], values[b, start + row] = turned_k[j], v[b, at[j]]
    return out, keys, values


def matrix(row):
    return row.expand(16, -1).contiguous()


def normed(x, weight, eps):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype) * weight


def check(inputs, backend, **options):
    used = copy(inputs) | {name: inputs[name] for name in ("q", "k", "v")}
    out = ops.window_attention(**used, **options, backend=backend)
    dtype = out.dtype
    exact, plain = (listed(inputs, kind, **options) for kind in (torch.float64, dtype))
    for got, want, same in zip((out, used["k_cache"], used["v_cache"]), exact, plain, strict=True):
        assert max_error(got, want) <= error_budget(want, same)
    return out


def branched(sequences, branches, dtype=torch.float32, rows=12, **sizes):
    """Inputs of ``branches`` candidates of ``rows`` rows; NaN in rows that are not in use."""
    inputs = make(sequences, dtype, rows=rows, **sizes)
    heads, kv_heads = inputs["q"].shape[2], inputs["k"].shape[2]
    shape = len(sequences), branches * rows, heads + 2 * kv_heads, inputs["q"].shape[3]
    qkv = random_normal(*shape, seed=5, dtype=dtype)
    for b, (_, length, *_) in enumerate(sequences):
        qkv[b].unflatten(0, (branches, rows))[:, length:] = NAN
    names = ("q", "k", "v")
    return inputs | dict(zip(names, qkv.split((heads, kv_heads, kv_heads), 2), strict=True))


def of_branch(inputs, branch, branches, names=("q", "k", "v")):
    """The inputs of one branch on its own."""
    rows = inputs["q"].shape[1] // branches
    part = slice(branch * rows, (branch + 1) * rows)
    return copy(inputs) | {name: inputs[name][:, part] for name in names}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_DTYPES, ids=str)
def test_masks(backend, dtype, mask):
    check(make(SEQUENCES, dtype), backend, **MASKS[mask])


OFFSETS = [3, 0, 6, 1]


@pytest.mark.parametrize(
    "mask", [{"block_size": 7}, {"block_size": 70}, {"block_size": 7, "causal": True, "window": 20}]
)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_DTYPES, ids=str)
def test_blocks_that_are_counted_from_an_offset(backend, dtype, mask):
    inputs = make(SEQUENCES, dtype)
    inputs["block_offset"] = torch.tensor(OFFSETS, dtype=torch.int32)
    out = check(inputs, backend, **mask)
    # An offset counts modulo the block; none may overflow.
    size = mask["block_size"]
    far = (2**31 - 1 - size) // size * size
    for by in (far, -size):
        again = copy(inputs) | {"block_offset": inputs["block_offset"] + by}
        assert torch.equal(ops.window_attention(**again, **mask, backend=backend), out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_offset_of_zero_changes_no_bit(backend):
    inputs = make(SEQUENCES, dtypes(backend)[0])
    zero = copy(inputs) | {"block_offset": torch.zeros(len(SEQUENCES), dtype=torch.int32)}
    out = ops.window_attention(**copy(inputs), block_size=4, backend=backend)
    assert torch.equal(ops.window_attention(**zero, block_size=4, backend=backend), out)


@pytest.mark.parametrize("mask", ["causal", "blocks", "window"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_of_a_refresh_over_several_tiles_of_queries(backend, mask):
    sequences = [(0, 150, 150, 150, 0), (0, 140, 140, 0, 9)]
    check(make(sequences, dtypes(backend)[0], heads=(2, 1)), backend, **MASKS[mask])


@pytest.mark.parametrize("backend", KERNELS)
def test_a_causal_row_sees_nothing_behind_it(backend):
    forms = [(60, 9, 150, 0, 0)], [(60, 9, 69, 0, 0)]
    whole, cut = (make(form, dtypes(backend)[0]) for form in forms)
    got, want = (ops.window_attention(**t, causal=True, backend=backend) for t in (whole, cut))
    assert torch.equal(got, want)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"block_size": 4}], ids=str)
@pytest.mark.parametrize("branches", [2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_branches(backend, branches, options):
    inputs = branched(SEQUENCES, branches, dtypes(backend)[0])
    check(inputs, backend, branches=branches, **options)


@pytest.mark.parametrize("rows", [4, 12])
@pytest.mark.parametrize(
    ("backend", "dtype"), [(name, dtype) for name in BACKENDS for dtype in dtypes(name)], ids=str
)
def test_a_branch_is_its_own_separate_call(backend, rows, dtype):
    sequences = [(62, 4, 150, 2, 0), (70, 3, 74, 0, 6)]
    inputs = branched(sequences, 8, dtype, rows=rows)
    used = copy(inputs)
    out = ops.window_attention(**used, branches=8, backend=backend).unflatten(1, (8, rows))
    for branch in (0, 1, 4, 7):
        alone = of_branch(inputs, branch, 8)
        assert torch.equal(ops.window_attention(**alone, backend=backend), out[:, branch])
        if branch == 0:
            assert torch.equal(alone["k_cache"].nan_to_num(), used["k_cache"].nan_to_num())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_poisoned_branch_changes_no_other(backend):
    sequences = [(62, 4, 150, 2, 0), (10, 4, 14, 4, 0)]
    clean = branched(sequences, 8, dtypes(backend)[0], rows=4)
    dirty = copy(clean)
    for name in ("q", "k", "v"):
        dirty[name][0, 12:16] = NAN
    out, spoilt = (ops.window_attention(**t, branches=8, backend=backend) for t in (clean, dirty))
    assert spoilt[0, 12:16].isnan().all()
    spoilt[0, 12:16] = out[0, 12:16]
    assert torch.equal(out, spoilt)
    assert torch.equal(clean["k_cache"].nan_to_num(), dirty["k_cache"].nan_to_num())


@pytest.mark.parametrize("is_normed", [False, True], ids=["plain", "norms"])
@pytest.mark.parametrize(("backend", "dtype"), HALF, ids=str)
def test_bits_alone_in_slot_7_of_12_and_among_branches(backend, dtype, is_normed):
    """What FreeDave needs to be lossless; the kernels alone promise it."""
    mine, other = (62, 4, 140, 4, 3), (17, 2, 60, 1, 0)
    batch = branched([mine if slot == 7 else other for slot in range(12)], 8, dtype, rows=4)
    alone = {n: t if n in ("cos", "sin") else t[7:8] for n, t in copy(batch).items()}
    single = of_branch(alone, 0, 8)
    norms = 1 + random_normal(2, 64, seed=9, dtype=dtype) / 4
    options = {"q_norm": norms[0], "k_norm": norms[1]} if is_normed else {}
    together = ops.window_attention(**batch, **options, branches=8, backend=backend)
    packed = ops.window_attention(**alone, **options, branches=8, backend=backend)
    one = ops.window_attention(**single, **options, backend=backend)
    assert torch.equal(together[7], packed[0])
    assert torch.equal(packed[:, :4], one)
    assert torch.equal(batch["k_cache"][7].nan_to_num(), single["k_cache"][0].nan_to_num())


@pytest.mark.parametrize("options", [{}, {"branches": 2}], ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_DTYPES, ids=str)
def test_norm_of_heads(backend, dtype, options):
    inputs = branched(SEQUENCES, 2, dtype) if options else make(SEQUENCES, dtype)
    norms = 1 + random_normal(2, 64, seed=9, dtype=dtype) / 4
    check(inputs | {"q_norm": norms[0], "k_norm": norms[1]}, backend, **options, eps=1e-5)


@pytest.mark.parametrize("page", [1, 10, 16])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"branches": 2}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_pages(backend, options, page):
    """The same bits through a block table, and not a bit changed elsewhere."""
    slots = 160
    sequences = SEQUENCES[:3]
    dtype = dtypes(backend)[0]
    inputs = branched(sequences, 2, dtype) if "branches" in options else make(sequences, dtype)
    plain = copy(inputs)
    out = ops.window_attention(**plain, **options, backend=backend)
    per = slots // page
    paged = {"block_table": torch.full((3, per), -1, dtype=torch.int32)}
    order = torch.randperm(3 * per, generator=torch.Generator().manual_seed(0)).int() + 1
    for b, (start, length, kv_len, *_) in enumerate(sequences):
        used = -(-max(kv_len, start + length) // page)
        paged["block_table"][b, :used] = order[b * per : b * per + used]
    for name in ("k_cache", "v_cache"):
        pool = torch.full((3 * per + 2, page, 2, 64), NAN, dtype=dtype)
        for b in range(3):
            padded = torch.cat(
                (inputs[name][b], torch.full((slots - 150, 2, 64), NAN, dtype=dtype))
            )
            for index, number in enumerate(paged["block_table"][b].tolist()):
                if number >= 0:
                    pool[number] = padded[index * page : (index + 1) * page]
        paged[name] = pool
    tables = {n: torch.cat((inputs[n], inputs[n][:10])) for n in ("cos", "sin")}
    before = {name: paged[name].clone() for name in ("k_cache", "v_cache")}
    got = ops.window_attention(**(inputs | tables | paged), **options, backend=backend)
    # More slots may be other sums in torch.
    torch.testing.assert_close(got, out)
    assert backend == "torch" or torch.equal(got, out)
    for name in ("k_cache", "v_cache"):
        touched = torch.zeros(before[name].shape[:2], dtype=torch.bool)
        for b, (start, _, _, commit, pad) in enumerate(sequences):
            for slot in range(max(start, pad), start + commit):
                number = paged["block_table"][b, slot // page]
                assert torch.equal(paged[name][number, slot % page], plain[name][b, slot])
                touched[number, slot % page] = True
        rest = ~touched
        assert torch.equal(paged[name][rest].nan_to_num(7), before[name][rest].nan_to_num(7))


@pytest.fixture(params=["one program", "two programs", "one for each"])
def split(request, monkeypatch):
    """Splits of 64 positions, one tile: joined by the program that has all, or by a second pass."""
    monkeypatch.setattr(_tiles, "ATTENTION_SPLIT", 64)
    monkeypatch.setattr(cuda, "SPLIT", 64)
    processors = {"one program": 0, "two programs": 0, "one for each": 10**6}[request.param]
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: processors)
    monkeypatch.setattr(_tiles, "multiprocessors", lambda device: processors)
    if request.param == "two programs":
        if request.node.callspec.params["backend"] == "cuda":
            pytest.skip("CUDA has a block for each split or for all")
        monkeypatch.setattr(_tiles, "attention_plan", halved(_tiles.attention_plan))


def halved(plan):
    """The plan with the splits of a row shared by two programs, the first with one more."""

    def change(*arguments, **options):
        made = plan(*arguments, **options)
        if made.walk != "all":
            return made
        return made._replace(groups=2, walk="each" if made.splits > 2 else "one")

    return change


@pytest.mark.parametrize("mask", [{}, *MASKS.values()], ids=["none", *MASKS])
@pytest.mark.parametrize("backend", KERNELS)
def test_split_keys(split, backend, mask):
    check(make(SEQUENCES, dtypes(backend)[0]), backend, **mask)


@pytest.mark.parametrize(("backend", "dtype"), HALF, ids=str)
def test_split_keys_of_branches_and_their_bits(split, backend, dtype):
    """A sequence alone and in slot 2 of 4, one branch and eight."""
    mine, other = (62, 4, 140, 4, 3), (17, 2, 60, 1, 0)
    batch = branched([mine if slot == 2 else other for slot in range(4)], 8, dtype, rows=4)
    alone = {n: t if n in ("cos", "sin") else t[2:3] for n, t in copy(batch).items()}
    single = of_branch(alone, 0, 8)
    together = ops.window_attention(**batch, branches=8, backend=backend)
    packed = check(alone, backend, branches=8)
    assert torch.equal(together[2], packed[0])
    assert torch.equal(packed[:, :4], ops.window_attention(**single, backend=backend))


@pytest.mark.parametrize("backend", KERNELS)
def test_a_nan_stays_in_its_sequence_when_split(split, backend):
    clean = make([(70, 9, 150, 9, 0), (60, 8, 150, 3, 2)], dtypes(backend)[0])
    dirty = copy(clean)
    for name in ("q", "k", "v", "k_cache", "v_cache"):
        dirty[name][1] = NAN
    out, spoilt = (ops.window_attention(**t, backend=backend) for t in (clean, dirty))
    assert torch.equal(out[0], spoilt[0]) and not out.isnan().any()
    assert spoilt[1, :8].isnan().all() and (spoilt[1, 8:] == 0).all()


@pytest.mark.parametrize("mask", [{}, {"causal": True, "window": 65}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_who_joins_the_splits(monkeypatch, dtype, mask):
    """One program for all splits, two, and one for each; and splits without keys among them."""
    inputs = make([*SEQUENCES, (100, 9, 130, 9, 80), (3, 2, 4, 1, 0)], dtype, heads=(2, 1))
    inputs["v"][1, 2] = NAN
    monkeypatch.setattr(_tiles, "ATTENTION_SPLIT", 64)
    out = ops.window_attention(**copy(inputs), **mask, backend="triton")
    with monkeypatch.context() as patch:
        patch.setattr(_tiles, "attention_plan", halved(_tiles.attention_plan))
        two = ops.window_attention(**copy(inputs), **mask, backend="triton")
    monkeypatch.setattr(_tiles, "multiprocessors", lambda device: 10**6)
    each = ops.window_attention(**copy(inputs), **mask, backend="triton")
    bits = BITS[dtype.itemsize]
    assert torch.equal(out.view(bits), two.view(bits))
    assert torch.equal(out.view(bits), each.view(bits))


def test_what_is_split_does_not_depend_on_the_batch_or_the_branches(monkeypatch):
    monkeypatch.setattr(_tiles, "arch", lambda device: 90)
    cpu = torch.device("cpu")

    def plan(kv_heads=32, rows=32, group=1, branches=1, slots=2048, head_dim=128, is_normed=False):
        return _tiles.attention_plan(
            cpu, 2, head_dim, kv_heads, rows, group, branches, slots, is_normed=is_normed
        )

    for kv_heads in (4, 32, 256, 4096):
        for branches in (1, 8):
            for slots in (257, 2048, 32768):
                made = plan(kv_heads, 32 * branches, branches=branches, slots=slots)
                assert made.splits == -(-slots // _tiles.ATTENTION_SPLIT)
                assert made.split_tiles * made.tile.block_n == _tiles.ATTENTION_SPLIT
                each = -(-made.splits // made.groups)
                assert (made.groups - 1) * each < made.splits <= made.groups * each
    assert plan(slots=256)[1:] == (1, 0, 1, "one", False)
    assert plan(slots=2048)[1:] == (8, 8, 8, "one", False)
    assert plan(slots=8192)[1:] == (32, 8, 8, "each", False)
    assert plan(256, slots=8192)[1:] == (32, 8, 1, "all", False)
    assert plan(rows=129)[1:] == (1, 0, 1, "one", True)
    assert plan(rows=258, branches=2)[1:] == (1, 0, 1, "one", False)
    # A pass of its own takes the registers of the norm out of the kernel, for every batch alike.
    assert all(plan(n, is_normed=True).is_rotated for n in (4, 32, 256))
    assert not plan(rows=64, branches=2, is_normed=True).is_rotated
    assert plan(head_dim=512).split_tiles == 0
    assert cuda.splits_of(264, 32768, 132) == 1
    assert cuda.splits_of(263, 1025, 132) == 3
    assert cuda.SPLIT % cuda.KEYS == 0
    for key, few in _tiles.WINDOW_ATTENTION.items():
        many = _tiles.WINDOW_ATTENTION_MANY.get(key, few)
        assert _tiles.ATTENTION_SPLIT % few.block_n == 0
        # The bits of a row must not depend on the number of rows: keys are taken alike.
        assert many.block_n == few.block_n
        assert many is few or {t.block_m // t.num_warps for t in (few, many)} == {16}
        for normed in {_tiles.WINDOW_ATTENTION_NORMED.get(key, many), many}:
            assert (normed.block_m, normed.block_n) == (many.block_m, many.block_n)
            assert normed.num_warps == many.num_warps
    assert {*_tiles.WINDOW_ATTENTION_LONG} <= {*_tiles.WINDOW_ATTENTION}


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_with_every_option(backend):
    dtype = dtypes(backend)[0]
    inputs = branched([(5, 3, 9, 2, 0), (7, 4, 30, 0, 8)], 2, dtype, rows=4)
    names = ("q", "k", "v", "k_cache", "v_cache")
    inputs |= {name: inputs[name].nan_to_num(0.5) for name in names}
    weight = torch.ones(64, dtype=dtype)
    order = (*names, *NUMBERS[:4], "cos", "sin", "pad")
    tensors = tuple(inputs[name] for name in order)
    op = torch.ops.pydllm.window_attention.default
    options = (0.125, 2, True, 4, 9, 2.0, 1e-6, 0, 1, backend)
    offset = torch.tensor([1, 3], dtype=torch.int32)
    torch.library.opcheck(op, (*tensors, weight, weight, None, offset, *options))
    pool = torch.ones(2, 15, 10, 2, 64, dtype=dtype)
    table = torch.arange(30, dtype=torch.int32).view(2, 15) % 15
    paged = (*tensors[:3], pool[0], pool[1], *tensors[5:], weight, weight, table, None)
    torch.library.opcheck(op, (*paged, *options))
    leaves = (0.125, 1, True, None, 9, 2.0, 1e-6, 3, 2, backend)
    torch.library.opcheck(op, (*tensors, weight, weight, None, None, *leaves))


GOOD = make([(5, 3, 9, 2, 0), (7, 4, 30, 0, 0)], slots=30)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"branches": 3}, ValueError, "branches: expected a divisor of the 4 rows, got 3"),
        ({"branches": 0}, ValueError, r"branches: expected an int of at least 1, got 0"),
        ({"block_size": 0}, ValueError, r"block_size: expected an int of at least 1, got 0"),
        (
            {"block_offset": torch.ones(2).int()},
            ValueError,
            "block_offset: expected None without block_size, got a tensor",
        ),
        (
            {"block_offset": torch.ones(3).int(), "block_size": 4},
            ValueError,
            r"block_offset: expected shape \(2\), got \(3,\)",
        ),
        (
            {"block_offset": torch.ones(2), "block_size": 4},
            TypeError,
            "block_offset: expected dtype torch.int32",
        ),
        ({"window": -1}, ValueError, r"window: expected an int of at least 1, got -1"),
        ({"softcap": 0.0}, ValueError, "softcap: expected a finite number above 0, got 0.0"),
        ({"q_norm": torch.ones(64)}, ValueError, "k_norm: expected weights for both norms or none"),
        (
            {"q_norm": torch.ones(63), "k_norm": torch.ones(64)},
            ValueError,
            r"q_norm: expected shape \(64\), got \(63,\)",
        ),
        (
            {"q_norm": torch.ones(64), "k_norm": torch.ones(64).half()},
            TypeError,
            "k_norm: expected dtype torch.float32, got torch.float16",
        ),
        (
            {"block_table": torch.ones(3, 1).int()},
            ValueError,
            r"block_table: expected shape \(2, n\), got \(3, 1\)",
        ),
        ({"block_table": torch.ones(2, 1)}, TypeError, "block_table: expected dtype torch.int32"),
        (
            {"block_table": torch.ones(2, 0).int()},
            ValueError,
            "block_table: expected at least one slot, got 0 of 2 pages of 30 slots",
        ),
    ],
)
def test_bad_options(change, error, message):
    with pytest.raises(error, match=message):
        ops.window_attention(**(GOOD | change))
