"""The native forward against an independent one: caches, ragged and padded batches, backends."""

import dataclasses

import pytest
import torch

from pydllm import ops
from pydllm.models import StaticCache, load
from tests.models.plain import CONFIGS, random_plain, write_checkpoint

FULL = [name for name in CONFIGS if name != "sdar"]
EXACT = 1e-10


@pytest.fixture(params=FULL)
def pair(request, tmp_path):
    return make_pair(tmp_path, request.param)


def make_pair(folder, name, dtype=torch.float64, seed=0):
    plain = random_plain(CONFIGS[name], seed, dtype)
    return load(write_checkpoint(folder / name, plain), device="cpu", dtype=dtype), plain


def at(*values):
    return torch.tensor(values, dtype=torch.int32)


def random_ids(*shape, seed=0):
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


def close(got, expected, limit=EXACT):
    torch.testing.assert_close(got, expected, rtol=0, atol=limit)


def refresh(model, ids, cache, **options):
    """Every position computed and, where the cache has slots, committed."""
    whole = at(*[ids.shape[1]] * ids.shape[0])
    commit = whole if cache.max_len else torch.zeros_like(whole)
    numbers = {"length": whole, "kv_len": whole, "commit": commit} | options
    return model.forward(ids, torch.zeros_like(whole), cache, **numbers)


@pytest.mark.parametrize("slots", [0, 13, 20])
def test_full_forward(pair, slots):
    model, plain = pair
    ids = random_ids(2, 13)
    got = refresh(model, ids, model.new_cache(2, slots))
    for row in range(2):
        hidden, logits, _ = plain(ids[row])
        close(got[row], hidden)
        close(model.head(got)[row], logits)
        assert len(logits.argmax(-1).unique()) > 4  # otherwise the model is too tame to tell


@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_window_over_a_cache(pair, kind):
    """The prefix, or all but the window, is frozen at what an earlier forward made of it."""
    model, plain = pair
    before, after = random_ids(14, seed=1), random_ids(14, seed=2)
    start, stop, seen = 5, 9, 9 if kind == "prefix" else 14
    cache = model.new_cache(1, 16)
    refresh(model, before[None], cache)
    _, _, kept = plain(before)
    outside = [*range(start), *range(stop, seen)]
    frozen = [(k[outside], v[outside]) for k, v in kept]
    hidden, logits, _ = plain(after[start:stop], start, frozen)
    got = model.forward(
        after[None, start:stop], at(start), cache, length=at(4), kv_len=at(seen), commit=at(0)
    )
    close(got[0], hidden)
    close(model.head(got)[0], logits)
    for layer, (k, v) in enumerate(kept):  # nothing was committed
        close(cache.k(layer)[0, :14], k)
        close(cache.v(layer)[0, :14], v)


def test_ragged_batch_and_commit(pair):
    """Windows of four sequences, each with its own numbers, and what each leaves in the cache."""
    model, plain = pair
    totals = (12, 7, 10, 9)
    ids = random_ids(4, 12, seed=3)
    cache = model.new_cache(4, 12)
    whole = at(*totals)
    refresh(model, ids, cache, length=whole, kv_len=whole, commit=whole)
    new = random_ids(4, 5, seed=4)
    start, length, kv_len, commit = (3, 2, 0, 4), (5, 3, 4, 0), (12, 5, 10, 9), (2, 3, 0, 0)
    numbers = {"length": at(*length), "kv_len": at(*kv_len), "commit": at(*commit)}
    got = model.forward(new, at(*start), cache, **numbers)
    for row, total in enumerate(totals):
        _, _, kept = plain(ids[row, :total])
        stop = start[row] + length[row]
        outside = [*range(start[row]), *range(stop, kv_len[row])]
        frozen = [(k[outside], v[outside]) for k, v in kept]
        fresh = new[row, : length[row]]
        if length[row]:
            hidden, _, made = plain(fresh, start[row], frozen)
            close(got[row, : length[row]], hidden)
        for layer, pair_of_layer in enumerate(kept):
            for index, cached in enumerate((cache.k(layer), cache.v(layer))):
                expected = pair_of_layer[index].clone()
                place = slice(start[row], start[row] + commit[row])
                if commit[row]:
                    expected[place] = made[layer][index][: commit[row]]
                close(cached[row, :total], expected)
                assert not cached[row, total:].any()
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("slots", [0, 11])
def test_left_padding(pair, slots):
    model, plain = pair
    lengths, width = (11, 4, 8), 11
    ids = random_ids(3, width, seed=5)
    pad = at(*(width - length for length in lengths))
    cache = model.new_cache(3, slots)
    got = refresh(model, ids, cache, pad=pad)
    for row, length in enumerate(lengths):
        close(got[row, width - length :], plain(ids[row, width - length :])[0])
    assert torch.isfinite(got).all()
    if not slots:
        return
    new = random_ids(3, 2, seed=6)
    numbers = {"length": at(2, 2, 2), "kv_len": at(11, 11, 11), "commit": at(0, 0, 0), "pad": pad}
    got = model.forward(new, at(8, 8, 8), cache, **numbers)
    for row, length in enumerate(lengths):
        first = 8 - (width - length)
        _, _, kept = plain(ids[row, width - length :])
        outside = [*range(first), *range(first + 2, length)]
        frozen = [(k[outside], v[outside]) for k, v in kept]
        close(got[row], plain(new[row], first, frozen)[0])


@pytest.mark.parametrize("name", ["llada", "a2d-qwen3"])
def test_a_sequence_does_not_depend_on_its_batch(tmp_path, name):
    model, _ = make_pair(tmp_path, name)
    ids = random_ids(5, 9, seed=7)
    cache = model.new_cache(5, 9)
    together = refresh(model, ids, cache)
    for row in range(5):
        own = model.new_cache(1, 9)
        close(refresh(model, ids[row : row + 1], own), together[row : row + 1], 1e-12)
        close(own.keys, cache.keys[:, row : row + 1], 1e-12)


def test_block_causal_blocks_one_after_the_other(tmp_path):
    model, plain = make_pair(tmp_path, "sdar")
    assert (model.spec.attention, model.spec.block_size) == ("block_causal", 4)
    ids = random_ids(2, 12, seed=8)
    cache = model.new_cache(2, 12)
    for start in range(0, 12, 4):
        numbers = {"length": at(4, 4), "kv_len": at(start + 4, start + 4), "commit": at(4, 4)}
        got = model.forward(ids[:, start : start + 4], at(start, start), cache, **numbers)
        for row in range(2):
            hidden, _, _ = plain(ids[row, : start + 4], block=4)
            close(got[row], hidden[start:])
    whole = model.new_cache(2, 12)
    got = refresh(model, ids, whole)  # a window over several blocks
    for row in range(2):
        close(got[row], plain(ids[row], block=4)[0])
    close(whole.keys, cache.keys)
    rest = model.forward(ids[:, 6:], at(6, 6), whole, **spread(6, 12, 0))
    close(rest, got[:, 6:])


def spread(length, kv_len, commit):
    """The same numbers for two sequences."""
    numbers = {"length": length, "kv_len": kv_len, "commit": commit}
    return {name: at(value, value) for name, value in numbers.items()}


@pytest.mark.parametrize("name", ["dream", "a2d-qwen3", "partial-rotary"])
def test_interpreted_kernels_agree(tmp_path, name):
    model, plain = make_pair(tmp_path, name, torch.float32)
    ids = random_ids(2, 7, seed=9)
    whole = at(7, 5)
    outputs = []
    for backend in ("torch", "triton"):
        cache = model.new_cache(2, 8)
        options = {"length": whole, "kv_len": whole, "commit": whole, "backend": backend}
        outputs.append((refresh(model, ids, cache, **options), cache.keys))
    exact = random_plain(CONFIGS[name], 0)
    for row, length in enumerate((7, 5)):
        truth = exact(ids[row, :length])[0]
        # Twice the error of plain torch in fp32, and one rounding of the largest value.
        error = (plain(ids[row, :length])[0] - truth).abs().max().item()
        limit = 2 * error + torch.finfo(torch.float32).eps * truth.abs().max().item()
        for hidden, _ in outputs:
            close(hidden[row, :length].double(), truth, limit)
    close(outputs[0][1], outputs[1][1], 1e-5)


def test_head_stats_are_those_of_the_logits(pair):
    model, _ = pair
    hidden = refresh(model, random_ids(1, 9, seed=4), model.new_cache(1, 9))[0]
    expected = ops.vocab_stats(model.head(hidden))
    got = model.head_stats(hidden)
    some = model.head_stats(hidden, torch.tensor([7, 2]), suppress_ids=expected.token[:1].int())
    assert torch.equal(got.token, expected.token)
    for one, other in zip(got[1:], expected[1:], strict=True):
        close(one, other, 1e-5)
    assert some.token.shape == (2,)
    assert not (some.token == expected.token[0]).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_stays_near(tmp_path, dtype):
    model, plain = make_pair(tmp_path, "dream", dtype)
    ids = random_ids(1, 9, seed=10)
    got = refresh(model, ids, model.new_cache(1, 9))
    assert got.dtype == model.head(got).dtype == model.dtype == dtype
    wide = random_plain(CONFIGS["dream"], 0, dtype)
    wide.weights = {name: value.double() for name, value in wide.weights.items()}
    expected = wide(ids[0])[0]
    error = ((got[0].double() - expected).norm() / expected.norm()).item()
    assert error < 16 * torch.finfo(dtype).eps  # some roundings of the residual stream, and no bug


def test_cos_and_sin_grow_with_the_cache(tmp_path):
    model, plain = make_pair(tmp_path, "llada")
    ids = random_ids(1, 40, seed=11)
    for width in (3, 40, 17):
        got = refresh(model, ids[:, :width], model.new_cache(1, width))
        close(got[0], plain(ids[0, :width])[0])


def test_compiles_as_one_graph(tmp_path):
    model, plain = make_pair(tmp_path, "a2d-qwen3")
    ids, cache = random_ids(1, 6, seed=12), model.new_cache(1, 8)
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    numbers = {"length": at(6), "kv_len": at(6), "commit": at(6)}
    got = compiled(ids, at(0), cache, **numbers)
    hidden, _, kept = plain(ids[0])
    close(got[0], hidden)
    close(cache.k(2)[0, :6], kept[2][0])


def test_the_cache_is_a_view_of_itself():
    shape = {"layers": 2, "batch": 3, "max_len": 5, "kv_heads": 2, "head_dim": 4}
    cache = StaticCache.allocate(**shape, dtype=torch.float32, device=torch.device("cpu"))
    assert (cache.batch, cache.max_len) == (3, 5)
    assert not cache.keys.any() and not cache.values.any()
    part = cache.first(2)
    part.k(1)[1, 4] = 7
    part.v(0)[0, 0] = 9
    assert (cache.k(1)[1, 4] == 7).all() and (cache.values[0, 0, 0] == 9).all()
    assert part.batch == 2 and part.k(0).shape == (2, 5, 2, 4)
    with pytest.raises(ValueError, match="batch: expected 0 to 3, got 4"):
        cache.first(4)


def test_a_batch_shrinks_without_a_copy(tmp_path):
    model, plain = make_pair(tmp_path, "llada-gqa")
    ids, cache = random_ids(3, 6, seed=13), model.new_cache(3, 6)
    refresh(model, ids, cache)
    kept = cache.keys[:, 2].clone()
    got = refresh(model, ids[1:], cache.first(2))
    for row in range(2):
        close(got[row], plain(ids[row + 1])[0])
    assert torch.equal(cache.keys[:, 2], kept)


def test_nothing_wants_a_gradient(tmp_path):
    model, _ = make_pair(tmp_path, "dream")
    with torch.enable_grad():
        got = refresh(model, random_ids(1, 4), model.new_cache(1, 4))
        assert not model.head(got).requires_grad


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_a_causal_model(tmp_path, architecture):
    """In one window, and in windows one after the other over the cache."""
    config = CONFIGS["a2d-qwen3"] | {"architectures": [architecture]}
    plain = random_plain(config)
    model = load(write_checkpoint(tmp_path, plain), device="cpu", dtype=torch.float64)
    assert (model.spec.attention, model.spec.mask_id) == ("causal", None)
    ids = random_ids(2, 11)
    cache, parts = model.new_cache(2, 11), []
    for start, stop in ((0, 6), (6, 7), (7, 11)):
        numbers = spread(stop - start, stop, stop - start)
        parts.append(model.forward(ids[:, start:stop], at(start, start), cache, **numbers))
    got = refresh(model, ids, model.new_cache(2, 0))
    close(torch.cat(parts, 1), got)
    for row in range(2):
        close(got[row], plain(ids[row], block=1)[0])
    model.spec = dataclasses.replace(model.spec, attention="full")
    close(refresh(model, ids, model.new_cache(2, 11))[0], plain(ids[0])[0])


BAD = {
    "ids dtype": ({"ids": torch.zeros(2, 3)}, TypeError, "ids: expected dtype torch.int64"),
    "ids shape": ({"ids": random_ids(3, 3)}, ValueError, r"ids: expected shape \(2, T\), got"),
    "too wide": ({"ids": random_ids(2, 9)}, ValueError, "at most the 8 slots .* got 9"),
    "number dtype": ({"length": torch.tensor([3, 3])}, TypeError, "length: expected dtype .*int32"),
    "number shape": ({"start": at(0)}, ValueError, r"start: expected shape \(2,\), got \(1,\)"),
    "pad shape": ({"pad": at(0)}, ValueError, r"pad: expected shape \(2,\), got \(1,\)"),
    "device": (
        {"commit": at(0, 0).to("meta")},
        ValueError,
        "commit: expected device cpu, got meta",
    ),
    "backend": ({"backend": "opencl"}, ValueError, "backend: expected one of .* 'opencl'"),
}


@pytest.mark.parametrize("change, error, message", BAD.values(), ids=BAD)
def test_bad_input(tmp_path, change, error, message):
    model, _ = make_pair(tmp_path, "llada")
    cache = model.new_cache(2, 8)
    numbers = {"start": at(0, 0), "length": at(3, 3), "kv_len": at(3, 3), "commit": at(3, 3)}
    with pytest.raises(error, match=message):
        model.forward(**({"ids": random_ids(2, 3), "cache": cache} | numbers | change))
    assert not cache.keys.any()


def test_bad_caches(tmp_path):
    model, _ = make_pair(tmp_path, "llada")
    other, _ = make_pair(tmp_path, "llada-gqa")
    with pytest.raises(ValueError, match="cache: expected a cache of this model"):
        refresh(model, random_ids(1, 3), other.new_cache(1, 4))
    with pytest.raises(ValueError, match="max_len: expected at least 0, got -1"):
        model.new_cache(1, -1)
