"""window_attention on caches laid out as engines lay them out, against a plain cache."""

import pytest
import torch

from pydllm import ops
from pydllm.integrations.engines.caches import sglang_pages, vllm_pages
from pydllm.testing import random_normal

PAGE, HEADS, WIDTH, BATCH, PAGES = 16, 2, 64, 3, 4


def at(*values):
    return torch.tensor(values, dtype=torch.int32)


def attend(k_cache, v_cache, block_table, backend):
    shape = (BATCH, 5, HEADS, WIDTH)
    q, k, v = (random_normal(*shape, seed=seed) for seed in range(3))
    numbers = {"start": at(20, 3, 40), "length": at(5, 4, 5), "commit": at(5, 0, 2)}
    tables = (random_normal(64, WIDTH // 2, seed=seed).clamp(-1, 1) for seed in (8, 9))
    cos, sin = tables
    return ops.window_attention(
        q, k, v, k_cache, v_cache, **numbers, kv_len=at(64, 7, 45), cos=cos, sin=sin,
        block_table=block_table, backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("layout", ["vllm", "vllm, pages first", "sglang"])
def test_an_engines_cache_is_used_in_place(layout, backend):
    plain = [random_normal(BATCH, PAGES * PAGE, HEADS, WIDTH, seed=seed) for seed in (4, 5)]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    table = order[: BATCH * PAGES].view(BATCH, PAGES).int()
    pages = [cache.view(BATCH * PAGES, PAGE, HEADS, WIDTH) for cache in plain]
    if layout == "sglang":
        buffers = [torch.full((20 * PAGE, HEADS, WIDTH), torch.nan) for _ in range(2)]
        slots = (table.long()[..., None] * PAGE + torch.arange(PAGE)).flatten(1).int()
        k_cache, v_cache, found = sglang_pages(*buffers, slots, PAGE)
        assert torch.equal(found, table)
    else:
        shape = (2, 20, PAGE, HEADS, WIDTH)
        engine = torch.full(shape, torch.nan)
        engine = engine.transpose(0, 1).contiguous() if "first" in layout else engine
        k_cache, v_cache = vllm_pages(engine)
        buffers, found = [engine], table
    for cache, own in zip((k_cache, v_cache), pages, strict=True):
        cache[table.flatten().long()] = own
        assert any(cache.data_ptr() >= b.data_ptr() for b in buffers)  # a view, no copy
    got = attend(k_cache, v_cache, found, backend)
    wanted = attend(*plain, None, backend)
    assert torch.equal(got, wanted)
    for cache, own in zip((k_cache, v_cache), plain, strict=True):  # committed in place
        used = cache[table.flatten().long()].view_as(own)
        assert torch.equal(used, own)


def test_other_layouts_are_refused():
    with pytest.raises(ValueError, match=r"expected \(2, pages, page, Hkv, D\) or .*got \(3, 4\)"):
        vllm_pages(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="two of shape"):
        sglang_pages(torch.zeros(32, 2, 4), torch.zeros(32, 2, 5), at(0)[None], 16)
    with pytest.raises(ValueError, match="multiple of the page's 16 slots, got 40"):
        sglang_pages(torch.zeros(40, 2, 4), torch.zeros(40, 2, 4), at(0)[None], 16)
