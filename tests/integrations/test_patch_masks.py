"""What a dense mask says, against the op that is then asked for it."""

import pytest
import torch
import torch.nn.functional as F

from pydllm.integrations.patch.attention import Attention, Options
from pydllm.integrations.patch.masks import Form, Masks, read

T = 9
KEY = torch.arange(T)
CAUSAL = KEY[:, None] >= KEY
FIRST, END = torch.tensor([0, 3, 2]), torch.tensor([9, 9, 7])
RUN = (FIRST[:, None] <= KEY) & (END[:, None] > KEY)  # (3, T)
LEFT = FIRST[:, None] <= KEY


def blocks(size):
    return KEY // size <= KEY[:, None] // size


FORMS = {  # mask (B or 1, 1 or T, S), what it says, rows that are looked at
    "dense": (torch.ones(1, T, T, dtype=torch.bool), {}),
    "one row for all": (torch.ones(3, 1, T, dtype=torch.bool), {}),
    "causal": (CAUSAL[None], {"causal": True}),
    "blocks of 4": (blocks(4)[None], {"block_size": 4}),
    "blocks of 2": (blocks(2)[None].expand(3, -1, -1), {"block_size": 2}),
    "sliding": ((CAUSAL & (KEY[:, None] - KEY < 5))[None], {"causal": True, "window": 5}),
    "keys of runs": (RUN[:, None], {"first": FIRST, "end": END}),
    "keys of runs, written out": (RUN[:, None].expand(-1, T, -1), {"first": FIRST, "end": END}),
    "rows and keys of runs": (RUN[:, None] & RUN[..., None], {"first": FIRST, "end": END}),
    "causal, left padding": (CAUSAL & LEFT[:, None], {"causal": True, "first": FIRST}),
    "causal, rows too": (
        CAUSAL & RUN[:, None] & RUN[..., None],
        {"causal": True, "first": FIRST, "end": END},
    ),
}
KINDS = {
    "bool": lambda m: m,
    "lowest": lambda m: torch.zeros(m.shape).masked_fill(~m, torch.finfo(torch.float32).min),
    "-inf": lambda m: torch.zeros(m.shape).masked_fill(~m, -torch.inf),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMS)
def test_forms(name, kind):
    mask, said = FORMS[name]
    form = read(KINDS[kind](mask)[:, None], T, T, window=5)
    assert form is not None
    assert (form.causal, form.block_size, form.window) == (
        said.get("causal", False),
        said.get("block_size"),
        said.get("window"),
    )
    for end in ("first", "end"):
        wanted, got = said.get(end), getattr(form, end)
        if wanted is not None:
            assert got.dtype == torch.int32 and got.tolist() == wanted.tolist()
        elif got is not None:  # trivial ends may be said
            assert got.tolist() == [0 if end == "first" else T] * len(got)


def attend(mask, q, k, v, options, **kwargs):
    attention = Attention("this", options)
    called = []

    def original():
        called.append(1)
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    return attention(original, q, k, v, mask, **kwargs), called


def states(rows=T, keys=T, batch=3, heads=4):
    generator = torch.Generator().manual_seed(1)
    shapes = ((batch, rows, heads, 8), (batch, keys, 2, 8), (batch, keys, 2, 8))
    return [torch.randn(*shape, generator=generator).transpose(1, 2) for shape in shapes]


@pytest.mark.parametrize("name", FORMS)
def test_attention_by_form(name):
    mask, said = FORMS[name]
    mask = mask[:, None].expand(3, 1, -1, -1)
    q, k, v = states()
    kept = [t.clone() for t in (q, k, v)]
    expected = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    options = Options("torch", False, "torch")
    got, called = attend(mask, q, k, v, options, window=5)
    assert called == [] and options.calls == {"window_attention": 1}
    used = RUN if "end" in said else LEFT if "first" in said else torch.ones(3, T).bool()
    used = used[:, None, :, None]
    error = ((got - expected) * used).abs().max()
    assert error <= 16 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert not got[~used.expand_as(got)].any()  # padding comes out as zeros
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), kept, strict=True))


@pytest.mark.parametrize("first", [[0, 0, 0], [0, 3, 6]], ids=["whole", "padded"])
def test_a_window_over_padded_keys(first):
    """Fewer rows than keys: where the rows stand is not known, and does not matter."""
    mask = (torch.arange(9) >= torch.tensor(first)[:, None])[:, None, None]
    q, k, v = states(rows=3)
    options = Options("torch", False, "torch")
    got, called = attend(mask, q, k, v, options)
    assert called == []
    expected = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    assert (got - expected).abs().max() <= 16 * torch.finfo(torch.float32).eps * expected.max()


NO_FORM = {
    "random": torch.rand(1, 1, T, T, generator=torch.Generator().manual_seed(0)) < 0.5,
    "a hole": (KEY != 4)[None, None, None].expand(1, 1, T, T),
    "heads of their own": torch.ones(1, 4, T, T, dtype=torch.bool),
    "a bias": torch.linspace(-1, 0, T * T).view(1, 1, T, T),
    "integers": torch.ones(1, 1, T, T, dtype=torch.int64),
    "ones that are added": torch.ones(1, 1, T, T),
    "three dimensions": torch.ones(3, T, T, dtype=torch.bool),
    "blocks that begin elsewhere": ((KEY[:, None] + 1) // 4 >= (KEY + 1) // 4)[None, None],
}


@pytest.mark.parametrize("name", [n for n in NO_FORM if n != "blocks that begin elsewhere"])
def test_no_form(name):
    assert read(NO_FORM[name], T, T, 4, 5) is None


def test_blocks_that_begin_elsewhere():
    assert read(NO_FORM["blocks that begin elsewhere"], T, T, 4, None) is None


def test_a_window_that_reaches_into_padding_has_no_form():
    mask = (torch.arange(9) >= torch.tensor([7])[:, None])[:, None, None]
    assert read(mask, 3, 9) is None
    mask = (torch.arange(9) < torch.tensor([8])[:, None])[:, None, None]
    assert read(mask, 3, 9) is None


def test_blocks_over_a_cache_take_the_models_size():
    key = torch.arange(12)
    mask = (key // 4 <= key[6:, None] // 4)[None, None]
    assert read(mask, 6, 12, 4) == Form(block_size=4)
    assert read(mask, 6, 12, 3) is None


def test_a_mask_is_looked_at_once():
    masks = Masks()
    mask = torch.ones(1, 1, T, T, dtype=torch.bool)
    for _ in range(5):
        assert masks.form(mask, T, T, None, None) == Form()
    for _ in range(5):  # LLaDA's blocks make a view each
        assert masks.form(mask[:, :, :T, :T], T, T, None, None) == Form()
    assert (masks.calls, masks.looks) == (10, 1)
    mask[0, 0, 0, 3] = False  # written: looked at again
    assert masks.form(mask, T, T, None, None) is None
    assert masks.looks == 2


def test_memory_that_is_used_again_is_another_mask():
    masks = Masks()
    for size in range(40):
        mask = torch.ones(1, 1, T, T, dtype=torch.bool)
        if size % 2:
            mask[0, 0, 2, 5] = False
        for _ in range(4):
            form = masks.form(mask, T, T, None, None)
        assert form == (None if size % 2 else Form())
        del mask
    assert len(masks._known) <= 8


def test_masks_made_in_every_layer_are_given_up():
    """Each look waits for the device: not once a layer."""
    masks = Masks()
    for _ in range(100):
        masks.form(torch.ones(1, 1, T, T, dtype=torch.bool), T, T, None, None)
    assert masks.looks <= 6


def test_inference_tensors_are_not_looked_at():
    with torch.inference_mode():
        mask = torch.ones(1, 1, T, T, dtype=torch.bool)
    assert Masks().form(mask, T, T, None, None) is None


LEFT_ALONE = {
    "fewer rows, causal": ({"rows": 3}, {"causal": True}, "causal, with fewer rows than keys"),
    "more rows than keys": ({"rows": 9, "keys": 4}, {}, "shapes of another kind"),
    "no rows": ({"rows": 0}, {}, "shapes of another kind"),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_the_op_cannot_say(name):
    shape, kwargs, reason = LEFT_ALONE[name]
    options = Options("torch", False, "torch")
    got, called = attend(None, *states(**shape), options, **kwargs)
    assert called == [1] and options.calls == {f"as before: {reason}": 1}
    assert got.shape == (3, 4, shape["rows"], 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_limits_of_the_kernel(dtype):
    options = Options("triton", False, "triton")
    q, k, v = (t.to(dtype) for t in states())
    strided = [t.repeat_interleave(2, -1)[..., ::2] for t in (q, k, v)]
    _, called = attend(None, *(strided if dtype == torch.float32 else (q, k, v)), options)
    assert called == [1]
    (reason,) = options.calls
    assert reason in ("as before: heads that are not contiguous", "as before: torch.float64")


def test_scale():
    q, k, v = states()
    options = Options("torch", True, "torch")
    got = Attention("this", options)(
        lambda: F.scaled_dot_product_attention(q, k, v, scale=1.0, enable_gqa=True),
        *(q, k, v),
        scale=1.0,
    )
    expected = F.scaled_dot_product_attention(q, k, v, scale=1.0, enable_gqa=True)
    assert (got - expected).abs().max() <= 16 * torch.finfo(torch.float32).eps * expected.max()
