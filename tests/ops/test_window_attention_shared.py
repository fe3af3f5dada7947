"""What the calls of a forward share, windows without a cache, and what a caller promises."""

import pytest
import torch

from pydllm import ops
from pydllm.models import load
from pydllm.testing import random_normal
from tests.models.plain import CONFIGS, random_plain, write_checkpoint
from tests.ops.test_window_attention import NUMBERS, copy, make

NAN = float("nan")
CLOSE = {"rtol": 0, "atol": 1e-12}  # fp64
# (start, length, kv_len, commit, pad) of each sequence
WHOLE = [(3, 4, 9, 0, 0), (0, 4, 9, 0, 0), (5, 4, 9, 0, 0)]
RAGGED = [(3, 4, 7, 2, 0), (0, 2, 9, 1, 0), (5, 3, 8, 0, 0)]


def attend(inputs, **options):
    """The output and the caches after it."""
    used = copy(inputs)
    out = ops.window_attention(**used, **options)
    return out, used["k_cache"], used["v_cache"]


def same(got, expected):
    for tensor, want in zip(got, expected, strict=True):
        torch.testing.assert_close(tensor, want, **CLOSE)


@pytest.mark.parametrize(
    "masks", [{}, {"causal": True}, {"block_size": 2}, {"window": 3}, {"softcap": 5.0}], ids=str
)
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("form", [WHOLE, RAGGED], ids=["whole", "ragged"])
def test_promises_change_nothing(form, branches, masks):
    inputs = make(form, torch.float64, heads=(4, 2), head_dim=8, slots=9, rows=4 * branches)
    inputs = {name: tensor.nan_to_num() for name, tensor in inputs.items()}
    expected = attend(inputs, branches=branches, **masks)
    whole = form is WHOLE
    shared = ops.SharedWindow(whole=whole, read_only=whole)
    same(attend(inputs, branches=branches, shared=shared, **masks), expected)
    bits = attend(inputs, branches=branches, batch_invariant=True, **masks)
    shared = ops.SharedWindow(whole=whole, read_only=whole)
    again = attend(inputs, branches=branches, batch_invariant=True, shared=shared, **masks)
    assert all(torch.equal(a, b) for a, b in zip(again, bits, strict=True))


def test_a_second_call_has_the_first_one_s_layout_and_other_arguments_a_new_one():
    first = make(RAGGED, torch.float64, heads=(2, 2), head_dim=8, slots=9, rows=4)
    first = {name: tensor.nan_to_num() for name, tensor in first.items()}
    shared = ops.SharedWindow()
    numbers = {name: first[name] for name in (*NUMBERS, "cos", "sin")}
    for seed in (3, 4):
        qkv = random_normal(3, *first["q"].shape, seed=seed, dtype=torch.float64)
        layer = first | dict(zip("qkv", qkv, strict=True))
        want = ops.window_attention(**copy(layer))
        got = ops.window_attention(**(copy(layer) | numbers), shared=shared)
        torch.testing.assert_close(got, want, **CLOSE)
        assert len(shared.layouts) == 1
    layout = shared.layouts[None]
    ops.window_attention(**(copy(first) | numbers), shared=shared, window=2)
    assert shared.layouts.keys() == {None, 2} and shared.layouts[None] is layout
    moved = first | numbers | {"start": first["start"] + 1}
    expected = ops.window_attention(**copy(moved))
    numbers["start"] = moved["start"]
    got = ops.window_attention(**(copy(moved) | numbers), shared=shared)
    torch.testing.assert_close(got, expected, **CLOSE)
    assert shared.layouts[None] is not layout
    with pytest.raises(TypeError, match="start: expected dtype torch.int32"):
        ops.window_attention(**(moved | {"start": first["start"].long()}), shared=shared)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("branches", [1, 2])
def test_without_a_cache_a_window_sees_itself(backend, branches):
    form = [(0, 3, 3, 0, 0), (0, 1, 1, 0, 0)]
    inputs = make(form, heads=(4, 2), head_dim=16, slots=3, rows=3 * branches)
    if branches == 2:  # make() knows one branch: rows in use of both
        inputs["q"], inputs["k"], inputs["v"] = (
            random_normal(*inputs[name].shape, seed=9) for name in ("q", "k", "v")
        )
        for name in ("k", "v"):
            inputs[name][1, [1, 2, 4, 5]] = NAN
    with_cache = ops.window_attention(**copy(inputs), branches=branches, backend=backend)
    bare = {n: t for n, t in inputs.items() if n not in ("k_cache", "v_cache", "pad")}
    got = ops.window_attention(
        k_cache=None, v_cache=None, **bare, branches=branches, backend=backend
    )
    torch.testing.assert_close(got, with_cache, rtol=0, atol=1e-5)
    assert got[1].isfinite().all() and (got[1, 1:3] == 0).all()


def test_a_cache_of_one_kind_alone_is_refused():
    inputs = make(RAGGED, heads=(2, 2), head_dim=8, slots=9, rows=4)
    for name in ("k_cache", "v_cache"):
        with pytest.raises(ValueError, match="expected None without a cache, got a tensor"):
            ops.window_attention(**(copy(inputs) | {name: None}))


@pytest.mark.parametrize("name", ["llada-gqa", "sdar", "a2d-qwen3"])
@pytest.mark.parametrize("slots", [0, 9])
def test_rows_of_a_forward(tmp_path, name, slots):
    """Rows that are asked for are those of the whole forward, and promises change none."""
    plain = random_plain(CONFIGS[name])
    model = load(write_checkpoint(tmp_path, plain), device="cpu", dtype=torch.float64)
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    start, length = torch.zeros(2, dtype=torch.int32), torch.full((2,), 9, dtype=torch.int32)
    call = {"length": length, "kv_len": length, "commit": start}
    expected = model.forward(ids, start, model.new_cache(2, slots), **call)
    rows = torch.tensor([17, 0, 3, 3, 9])
    promises = {"whole": True, "read_only": True}
    for more in ({}, promises):
        got = model.forward(ids, start, model.new_cache(2, slots), rows=rows, **call, **more)
        torch.testing.assert_close(got, expected.flatten(0, 1)[rows], rtol=0, atol=1e-10)
    none = model.forward(ids, start, model.new_cache(2, slots), rows=rows[:0], **call)
    assert none.shape == (0, expected.shape[2])
