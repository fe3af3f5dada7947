import mmap

import pytest
import torch

from pydllm import ops
from pydllm.testing import error_budget, max_error, random_normal

NAN = float("nan")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KERNELS = ["triton", "cuda"]
BACKENDS = ["torch", *KERNELS]
NUMBERS = ("start", "length", "kv_len", "commit", "pad")
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def dtypes(backend):
    """What a backend takes, the usual one first."""
    return DTYPES[1:] if backend == "cuda" else DTYPES


KERNELS_DTYPES = [(backend, dtype) for backend in KERNELS for dtype in dtypes(backend)]
BACKENDS_DTYPES = [("torch", dtype) for dtype in DTYPES] + KERNELS_DTYPES

# A sequence a row: start, length, kv_len, commit, pad. Caches have 150 slots, tiles 64 positions.
FORMS = {
    "prefix": [(70, 9, 79, 0, 0)],
    "dual": [(70, 9, 150, 9, 0)],
    "refresh": [(0, 150, 150, 150, 0)],
    "first": [(0, 9, 9, 9, 0)],
    "last": [(141, 9, 150, 4, 0)],
    "ragged": [(3, 9, 12, 9, 0), (64, 5, 150, 2, 0), (60, 8, 128, 0, 0), (141, 1, 142, 1, 0)],
    "empty": [(70, 0, 150, 0, 0), (5, 3, 8, 3, 0), (0, 0, 0, 0, 0)],
    "padded": [(70, 9, 79, 9, 13), (2, 9, 150, 9, 5), (20, 4, 24, 4, 30), (66, 2, 130, 0, 65)],
    "cut": [(70, 9, 40, 3, 0)],  # visible slots that end before the window
}


def make(
    form, dtype=torch.float32, *, heads=(4, 2), head_dim=64, rotary=None, slots=150, rows=None
):
    """Inputs with NaN wherever nothing may be read."""
    sequences = FORMS[form] if isinstance(form, str) else form
    batch, (q_heads, kv_heads) = len(sequences), heads
    rows = rows or max(1, *(length for _, length, *_ in sequences))
    parts = (q_heads, kv_heads, kv_heads)
    qkv = random_normal(batch, rows, sum(parts), head_dim, seed=0, dtype=dtype)
    cache = random_normal(2, batch, slots, kv_heads, head_dim, seed=1, dtype=dtype)
    for b, (start, length, kv_len, _, pad) in enumerate(sequences):
        qkv[b, length:] = NAN
        qkv[b, : max(0, pad - start)] = NAN
        cache[:, b, start : start + length] = NAN
        cache[:, b, kv_len:] = NAN
        cache[:, b, :pad] = NAN
    q, k, v = qkv.split(parts, 2)
    angle = torch.arange(slots)[:, None] * 0.3 ** torch.arange((rotary or head_dim) // 2)
    if rotary == 0:
        angle = angle[:, :0]
    numbers = torch.tensor(sequences, dtype=torch.int32).t().contiguous()
    return {
        **{"q": q, "k": k, "v": v, "k_cache": cache[0], "v_cache": cache[1]},
        **{"cos": angle.cos(), "sin": angle.sin()},
        **dict(zip(NUMBERS, numbers, strict=True)),
    }


def copy(inputs):
    return {name: tensor.clone() for name, tensor in inputs.items()}


def rotate(x, position, cos, sin):
    """(T, H, D) by the definition: pair i is dimensions i and i + rotary / 2, one by one."""
    half, y = cos.shape[1], x.clone()
    for i in range(half):
        c, s = cos[position, i, None].to(x.dtype), sin[position, i, None].to(x.dtype)
        y[..., i] = x[..., i] * c - x[..., i + half] * s
        y[..., i + half] = x[..., i + half] * c + x[..., i] * s
    return y


def dense(inputs, dtype, scale=None):
    """Concatenate, rotate and take the softmax, a sequence and a head at a time: (out, K, V)."""
    names = ("q", "k", "v", "k_cache", "v_cache")
    q, k, v, keys, values = (inputs[name].to(dtype, copy=True) for name in names)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for b, numbers in enumerate(zip(*(inputs[name].tolist() for name in NUMBERS), strict=True)):
        start, length, kv_len, commit, pad = numbers
        skip = max(0, pad - start)
        rows = slice(skip, max(length, skip))
        position = torch.arange(start, start + q.shape[1])[rows] - pad
        wide = torch.promote_types(dtype, torch.float32)
        tables = inputs["cos"], inputs["sin"]
        turned = [rotate(x[b, rows].to(wide), position, *tables).to(dtype) for x in (q, k)]
        head, tail = slice(pad, max(pad, min(start, kv_len))), slice(start + length, kv_len)
        all_k = torch.cat((keys[b, head], turned[1], keys[b, tail]))
        all_v = torch.cat((values[b, head], v[b, rows], values[b, tail]))
        for h in range(q.shape[2]):
            kv_head = h // (q.shape[2] // k.shape[2])
            scores = turned[0][:, h] @ all_k[:, kv_head].t() * (scale or q.shape[3] ** -0.5)
            weights = scores.to(wide).softmax(-1).to(dtype)
            out[b, rows, h] = weights @ all_v[:, kv_head]
        kept = slice(start + skip, start + max(commit, skip))
        keys[b, kept] = turned[1][: max(commit - skip, 0)]
        values[b, kept] = v[b, skip : max(commit, skip)]
    return out, keys, values


def check(inputs, backend, scale=None):
    """Output, keys and values against the dense formulation in fp64."""
    dtype = inputs["q"].dtype
    used = copy(inputs)
    used |= {name: inputs[name] for name in ("q", "k", "v")}  # views of one projection, as they are
    out = ops.window_attention(**used, scale=scale, backend=backend)
    exact, plain = (dense(inputs, kind, scale) for kind in (torch.float64, dtype))
    for got, want, same in zip((out, used["k_cache"], used["v_cache"]), exact, plain, strict=True):
        assert got.shape == want.shape and got.dtype == dtype
        assert max_error(got, want) <= error_budget(want, same)
    assert out.is_contiguous()
    for name, fresh in (("k_cache", None), ("v_cache", inputs["v"])):
        check_untouched(inputs, used[name], name, fresh)
    return out


def check_untouched(inputs, got, name, fresh):
    """Outside of the commit every bit is what it was; V is copied bit by bit."""
    expected = inputs[name].clone()
    for b, numbers in enumerate(zip(*(inputs[n].tolist() for n in NUMBERS), strict=True)):
        start, _, _, commit, pad = numbers
        skip = max(0, pad - start)
        kept = slice(start + skip, start + max(skip, commit))
        expected[b, kept] = got[b, kept] if fresh is None else fresh[b, skip : max(skip, commit)]
    bits = BITS[got.itemsize]
    assert torch.equal(got.view(bits), expected.view(bits))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_DTYPES, ids=str)
def test_every_form_agrees_with_the_dense_formulation(backend, dtype, form):
    check(make(form, dtype), backend)


@pytest.mark.parametrize("form", FORMS)
def test_the_definition_in_fp64(form):
    inputs = make(form, torch.float64, head_dim=6)
    inputs |= {name: inputs[name].double() for name in ("cos", "sin")}
    expected = dense(inputs, torch.float64)
    out = ops.window_attention(**inputs, backend="torch")
    got = (out, inputs["k_cache"], inputs["v_cache"])
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13, equal_nan=True)


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 1), (6, 2), (14, 2)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_of_heads(backend, heads):
    sequences = [(70, 37, 150, 37, 0), (10, 20, 30, 11, 4)]
    check(make(sequences, dtypes(backend)[0], heads=heads), backend)


HEADS = [(64, 64), (64, 0), (64, 16), (128, 64), (128, 128)]
OTHER_HEADS = [(8, 8), (32, 32), (80, 80), (80, 32), (96, 96), (256, 64), (256, 256), (512, 512)]


@pytest.mark.parametrize(
    ("backend", "head_dim", "rotary"),
    [(backend, *head) for backend in BACKENDS for head in HEADS]
    + [(backend, *head) for backend in BACKENDS[:2] for head in OTHER_HEADS],
)
def test_head_sizes_and_partial_rotary(backend, head_dim, rotary):
    check(make("ragged", torch.float16, head_dim=head_dim, rotary=rotary), backend)


@pytest.mark.parametrize("commit", [0, 5, 9])
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_commit_is_written(backend, commit):
    check(make([(60, 9, 150, commit, 0)], torch.float16), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale(backend):
    inputs = make("dual", dtypes(backend)[0])
    out = check(inputs, backend, scale=0.7)
    assert not torch.equal(out, check(inputs, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_scores_give_the_mean(backend):
    inputs = make("dual", dtypes(backend)[0])
    inputs["q"].zero_()
    for name in ("v", "v_cache"):
        inputs[name].fill_(3.0)
    out = ops.window_attention(**inputs, backend=backend)
    assert torch.equal(out, torch.full_like(out, 3.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_are_read_and_written_in_place(backend):
    inputs = make("ragged", torch.float16)
    dense_inputs = copy(inputs)
    layers = torch.stack((inputs["k_cache"], inputs["v_cache"]), 3)  # (B, L, Hkv, 2, D)
    inputs |= {"k_cache": layers[..., 0, :], "v_cache": layers[..., 1, :]}
    out = ops.window_attention(**inputs, backend=backend)
    assert torch.equal(out, ops.window_attention(**dense_inputs, backend=backend))
    for name in ("k_cache", "v_cache"):
        one, other = (t[name].contiguous().view(torch.int16) for t in (inputs, dense_inputs))
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_stays_in_its_sequence(backend):
    sequences = [(70, 9, 150, 9, 0), (60, 8, 150, 3, 2)]
    clean, dirty = (make(sequences, dtypes(backend)[0]) for _ in range(2))
    for name in ("q", "k", "v", "k_cache", "v_cache"):
        dirty[name][1] = NAN
    out, spoilt = (ops.window_attention(**t, backend=backend) for t in (clean, dirty))
    assert torch.equal(out[0], spoilt[0]) and not out.isnan().any()
    assert spoilt[1, :8].isnan().all() and (spoilt[1, 8:] == 0).all()
    for name in ("k_cache", "v_cache"):
        assert torch.equal(clean[name][0].nan_to_num(), dirty[name][0].nan_to_num())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_query_spoils_its_row_alone(backend):
    inputs = make("dual", dtypes(backend)[0])
    inputs["q"][0, 4, 1] = NAN
    out = ops.window_attention(**inputs, backend=backend)
    assert out[0, 4, 1].isnan().all()
    out[0, 4, 1] = 0
    assert not out.isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_visible_nan_is_not_hidden(backend):
    for name, index in (("k_cache", 3), ("v_cache", 149), ("k", 0), ("v", 8)):
        inputs = make("dual", dtypes(backend)[0])
        inputs[name][0, index] = NAN
        assert ops.window_attention(**inputs, backend=backend).isnan().all(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_do_not_fit_the_cache_are_dropped(backend):
    cut, whole = (make([(145, rows, 150, rows, 0)], dtypes(backend)[0], rows=9) for rows in (5, 9))
    out, over = (ops.window_attention(**t, backend=backend) for t in (cut, whole))
    assert torch.equal(out, over) and torch.equal(cut["k_cache"], whole["k_cache"])
    assert torch.equal(cut["v_cache"], whole["v_cache"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4), (2, 0)], ids=["no sequences", "no rows"])
def test_nothing_to_do(backend, shape):
    inputs = make([(5, 4, 9, 4, 0), (5, 4, 9, 4, 0)], dtypes(backend)[0])
    batch, rows = shape
    inputs = {name: t if name in ("cos", "sin") else t[:batch] for name, t in inputs.items()}
    inputs |= {name: inputs[name][:, :rows] for name in ("q", "k", "v")}
    before = inputs["k_cache"].clone()
    assert ops.window_attention(**inputs, backend=backend).shape == (batch, rows, 4, 64)
    assert torch.equal(inputs["k_cache"].nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize(("backend", "dtype"), KERNELS_DTYPES, ids=str)
def test_the_bits_of_a_sequence_do_not_depend_on_the_batch(backend, dtype):
    together = make("ragged", dtype)
    alone = {name: t if name in ("cos", "sin") else t[3:] for name, t in copy(together).items()}
    out, single = (ops.window_attention(**t, backend=backend) for t in (together, alone))
    assert torch.equal(out[3], single[0])
    assert torch.equal(together["k_cache"][3].nan_to_num(), alone["k_cache"][0].nan_to_num())


@pytest.mark.parametrize("backend", KERNELS)
def test_the_bits_do_not_depend_on_padding(backend):
    plain = make([(70, 9, 130, 9, 0)], torch.float16)
    padded = make([(80, 9, 140, 9, 10)], torch.float16)
    padded |= {name: plain[name] for name in ("q", "k", "v")}
    for name in ("k_cache", "v_cache"):
        padded[name][:, 10:] = plain[name][:, :140]
    out, shifted = (ops.window_attention(**t, backend=backend) for t in (plain, padded))
    assert torch.equal(out, shifted)
    assert torch.equal(plain["k_cache"][:, :130], padded["k_cache"][:, 10:140])


@pytest.mark.parametrize(("backend", "dtype"), KERNELS_DTYPES, ids=str)
def test_the_bits_do_not_depend_on_which_keys_are_cached(backend, dtype):
    whole = make([(50, 24, 150, 24, 0)], dtype)
    out = ops.window_attention(**whole, backend=backend)
    rest = whole | {name: whole[name][:, 12:] for name in ("q", "k", "v")}
    rest |= {name: whole[name].clone() for name in ("k_cache", "v_cache")}
    rest |= {"start": whole["start"] + 12, "length": whole["length"] - 12}
    rest |= {"commit": whole["commit"] - 12}
    assert torch.equal(ops.window_attention(**rest, backend=backend), out[:, 12:])
    assert torch.equal(rest["k_cache"], whole["k_cache"])


@pytest.mark.parametrize("backend", KERNELS)
def test_offsets_beyond_two_to_the_31(backend):
    """Slots 2^26 elements apart: memory that is mapped, and touched only where a slot lies."""
    slots, stride, rows = 140, 2**26, 4  # tiles of 64 before the window, on it and behind it
    memory = mmap.mmap(
        -1,
        (slots * stride + 256) * 2,
        flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0),
    )
    flat = torch.frombuffer(memory, dtype=torch.float16)
    near = make([(70, rows, slots, rows, 0)], torch.float16, heads=(2, 1), slots=slots)
    near |= {"cos": near["cos"].contiguous(), "sin": near["sin"].contiguous()}
    far = dict(near)
    for offset, name in ((0, "k_cache"), (128, "v_cache")):
        view = flat.as_strided((1, slots, 1, 64), (slots * stride, stride, 64, 1), offset)
        far[name] = view.copy_(near[name])
    expected = ops.window_attention(**near, backend=backend)
    assert torch.equal(ops.window_attention(**far, backend=backend), expected)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(far[name], near[name])
    del far, view, flat


def arguments(inputs, backend):
    names = ("q", "k", "v", "k_cache", "v_cache", "start", "length", "kv_len", "commit")
    tensors = (inputs[n] for n in (*names, "cos", "sin", "pad"))
    extra = (inputs.get(n) for n in ("q_norm", "k_norm", "block_table", "block_offset"))
    return (*tensors, *extra, 0.125, 1, False, None, None, None, 1e-6, 0, 1, backend)


def small(form="padded", dtype=torch.float32):
    inputs = make(form, dtype, slots=150)
    for name in (
        "q",
        "k",
        "v",
        "k_cache",
        "v_cache",
    ):  # opcheck compares with NaN unequal to itself
        inputs[name] = inputs[name].nan_to_num(0.5)
    return inputs


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    op = torch.ops.pydllm.window_attention.default
    inputs = small([(5, 3, 9, 2, 0), (7, 4, 30, 0, 8)], dtypes(backend)[0])
    torch.library.opcheck(op, arguments(inputs, backend))
    torch.library.opcheck(op, arguments(inputs | {"pad": None}, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_fullgraph_compile(backend):
    dtype = dtypes(backend)[0]
    inputs = small(dtype=dtype)
    eager, compiled = copy(inputs), copy(inputs)

    def call(tensors):
        return ops.window_attention(**tensors, backend=backend)

    results = call(eager), eager["k_cache"], eager["v_cache"]
    out = torch.compile(call, fullgraph=True, backend="aot_eager")(compiled)
    exact, plain = (dense(small(dtype=dtype), kind) for kind in (torch.float64, dtype))
    got = out, compiled["k_cache"], compiled["v_cache"]
    for one, eager_one, want, same in zip(got, results, exact, plain, strict=True):
        # The compiler splits addcmul, which rounds once, into two operations.
        assert max_error(one, want) <= error_budget(want, same)
        assert backend == "torch" or torch.equal(one, eager_one)


GOOD = make([(5, 3, 9, 2, 0), (7, 4, 30, 0, 0)], slots=30)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("q", torch.ones(2, 4, 64), ValueError, r"q: expected shape \(B, T, Hq, D\), got"),
        ("q", torch.ones(2, 4, 4, 64).int(), TypeError, "q: expected dtype .*, got torch.int32"),
        (
            "q",
            torch.ones(2, 4, 3, 64),
            ValueError,
            "q: expected a multiple of the 2 KV heads, got 3",
        ),
        ("k", torch.ones(2, 5, 2, 64), ValueError, r"k: expected shape \(2, 4, Hkv, 64\), got"),
        ("k", torch.ones(2, 4, 0, 64), ValueError, r"v: expected shape \(2, 4, 0, 64\), got"),
        ("v", torch.ones(2, 4, 2, 64).half(), TypeError, "v: expected dtype torch.float32, got"),
        (
            "k_cache",
            torch.ones(2, 3, 2, 64),
            ValueError,
            r"v_cache: expected shape \(2, 3, 2, 64\)",
        ),
        (
            "k_cache",
            torch.ones(2, 30, 1, 64),
            ValueError,
            r"k_cache: expected shape \(2, L, 2, 64\)",
        ),
        ("start", torch.ones(2), TypeError, "start: expected dtype torch.int32, got torch.float32"),
        ("length", torch.ones(3).int(), ValueError, r"length: expected shape \(2\), got \(3,\)"),
        ("commit", torch.ones(2), TypeError, "commit: expected dtype torch.int32"),
        ("pad", torch.ones(()).int(), ValueError, r"pad: expected shape \(2\), got \(\)"),
        ("cos", torch.ones(30, 33), ValueError, r"sin: expected shape \(30, 33\), got"),
        ("sin", torch.ones(30, 32).half(), TypeError, "sin: expected dtype torch.float32, got"),
        ("start", torch.ones(2, device="meta").int(), ValueError, "start: expected device cpu"),
        ("backend", "cuda", RuntimeError, "the kernel takes fp16 and bf16, got torch.float32"),
        ("backend", "gpu", ValueError, "backend: expected one of auto, cuda, triton, torch"),
        ("k", torch.ones(2, 4, 2, 64, requires_grad=True), ValueError, "got k with requires_grad"),
    ],
)
def test_bad_input(name, value, error, message):
    with pytest.raises(error, match=message):
        ops.window_attention(**(GOOD | {name: value}))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"cos": (29, 32), "sin": (29, 32)},
            ValueError,
            "cos: expected at least 30 positions, got",
        ),
        (
            {"cos": (30, 33), "sin": (30, 33)},
            ValueError,
            "cos: expected at most 32 columns, got 33",
        ),
        (
            {"k_cache": (2, 3, 2, 64), "v_cache": (2, 3, 2, 64)},
            ValueError,
            "q: expected at most the 3 rows of the cache, got 4",
        ),
    ],
)
def test_sizes_that_do_not_fit(change, error, message):
    tensors = {name: torch.ones(shape) for name, shape in change.items()}
    with pytest.raises(error, match=message):
        ops.window_attention(**(GOOD | tensors))


def test_what_the_triton_kernel_does_not_take():
    wide = make([(5, 3, 9, 2, 0)], head_dim=514, slots=30)
    with pytest.raises(RuntimeError, match="even head sizes up to 512, got 514"):
        ops.window_attention(**wide, backend="triton")
    double = make([(5, 3, 9, 2, 0)], torch.float64, slots=30)
    with pytest.raises(RuntimeError, match="fp32, fp16 and bf16, got torch.float64"):
        ops.window_attention(**double, backend="triton")
    apart = GOOD | {"k_cache": torch.ones(2, 30, 64, 2).transpose(2, 3)}
    with pytest.raises(RuntimeError, match="k_cache must have contiguous heads, got strides"):
        ops.window_attention(**apart, backend="triton")
    with pytest.raises(RuntimeError, match="start must be contiguous, got strides"):
        ops.window_attention(**(GOOD | {"start": GOOD["start"][:1].expand(2)}), backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("backend", "dtype"), KERNELS_DTYPES, ids=str)
def test_on_a_gpu(backend, dtype, form, head_dim):
    if backend == "cuda" and head_dim not in (64, 128):
        pytest.skip("the CUDA kernel takes head sizes 64 and 128")
    inputs = make(form, dtype, head_dim=head_dim)
    on_gpu = {name: tensor.cuda() for name, tensor in inputs.items()}
    out = ops.window_attention(**on_gpu, backend=backend).cpu()
    exact, plain = (dense(inputs, kind) for kind in (torch.float64, dtype))
    got = (out, on_gpu["k_cache"].cpu(), on_gpu["v_cache"].cpu())
    for one, want, same in zip(got, exact, plain, strict=True):
        assert max_error(one, want) <= error_budget(want, same)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_captured_in_a_cuda_graph(backend):
    inputs = {name: tensor.cuda() for name, tensor in small("ragged", dtypes(backend)[0]).items()}
    expected = ops.window_attention(**copy(inputs), backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.window_attention(**inputs, backend=backend)
    graph.replay()
    assert torch.equal(out, expected)
