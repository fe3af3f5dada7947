"""What MultiBlock keeps in its cache and what it sees of it, forward by forward.

The published decoder of Dream fails this: test_keys_held_twice_decide_tokens in
test_multiblock_published.py.
"""

from __future__ import annotations

import pytest
import torch

import pydllm
from pydllm.models import StaticCache
from tests.decoding.test_multiblock_published import MASK, VOCAB, tiny_model
from tests.decoding.test_static import _prompt

NEW, BLOCK = 30, 6
PROMPTS = [_prompt(row, 3 + row, VOCAB) for row in range(3)]
CACHES = [(0, None), (1, None), (2, None), (2, 3), (1, 1)]


class Watched:
    """A model that looks at the cache of its only sequence around every forward.

    Slots that no forward has committed, or that the window replaces, hold NaN.
    """

    def __init__(self, model):
        self.model, self.spec, self.tokenizer = model, model.spec, model.tokenizer
        self.device, self.dtype = model.device, model.dtype
        self.head_stats, self.head = model.head_stats, model.head
        self.kept, self.modes = 0, set()

    def new_cache(self, batch, max_len):
        assert batch == 1
        cache = self.model.new_cache(batch, max_len)
        return StaticCache(*(t.fill_(torch.nan) for t in (cache.keys, cache.values)))

    def forward(self, ids, start, cache, *, length, kv_len, commit, **options):
        if not cache.max_len:  # the look at whether an answer is finite
            call = {"length": length, "kv_len": kv_len, "commit": commit, **options}
            return self.model.forward(ids, start, cache, **call)
        first, count, kept = int(start), int(commit), self.kept
        # The window begins where the cache ends (a shifted one a row earlier, to predict the first
        # position), or at 0: each position has one key, cached or fresh.
        assert first in (0, kept - int(self.spec.shift_logits)), (first, kept)
        assert first + int(length) == int(kv_len)
        assert first > 0 or count >= kept  # renewed as far as it was
        slots = (cache.keys[:, 0], cache.values[:, 0])
        assert not any(t[:, :kept].isnan().any() for t in slots)
        before = [t[:, first:kept].clone() for t in slots]
        for t in slots:
            t[:, first:] = torch.nan
        whole = StaticCache(cache.keys.clone(), cache.values.clone())
        call = {"length": length, "kv_len": kv_len, **options}
        hidden = self.model.forward(ids, start, cache, commit=commit, **call)
        again = self.model.forward(ids, start, whole, commit=length, **call)
        assert torch.equal(again, hidden) and not hidden.isnan().any()
        self.modes.add(("full" if first == 0 else "window", count > 0))
        fresh = (whole.keys[:, 0], whole.values[:, 0])
        for t, new, old in zip(slots, fresh, before, strict=True):
            # What is kept are the bits of this forward, and nothing behind them.
            assert torch.equal(t[:, first : first + count], new[:, first : first + count])
            assert t[:, first + count :].isnan().all()
            t[:, first + count : kept] = old[:, count:]
        self.kept = max(kept, first + count if count else 0)
        return hidden


@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize("shift", [False, True], ids=["llada", "dream"])
def test_every_position_has_one_key_and_commits_are_the_forward_s_bits(tmp_path, shift, cache):
    """O12, O16."""
    delay, refresh = cache
    modes = set()
    for seed in range(2):
        model, _ = tiny_model(tmp_path / str(seed), seed, shift)
        algorithm = pydllm.MultiBlock(
            threshold=1.2,
            block_length=BLOCK,
            add_at=0.3,
            full_at=0.6,
            delay=delay,
            refresh=refresh,
            early_stop=seed > 0,
        )
        for prompt in PROMPTS:
            want = pydllm.generate(model, [prompt], algorithm, max_new_tokens=NEW)
            watched = Watched(model)
            got = pydllm.generate(watched, [prompt], algorithm, max_new_tokens=NEW)
            assert torch.equal(got.sequences[0], want.sequences[0])
            assert torch.equal(got.nfe, want.nfe)
            modes |= watched.modes
    # With (1, 1) every forward renews, and a block is kept by the one that does.
    assert ("full", True) in modes
    assert {("window", True), ("window", False)} & modes or cache == (1, 1)


def test_llada_takes_the_most_certain_token_of_all_beside_the_forced_one(tmp_path):
    """O3: no entropy is below 0, and a forward still writes one token or two."""
    faster = 0
    for seed in range(4):
        model, _ = tiny_model(tmp_path / str(seed), seed, False, eos=())
        algorithm = pydllm.MultiBlock(
            threshold=-1.0, block_length=BLOCK, add_at=0.1, full_at=0.95, cache=False
        )
        got = pydllm.generate(model, PROMPTS, algorithm, max_new_tokens=NEW)
        written = torch.stack([row.bincount(minlength=NEW) for row in got.step_map])
        assert written.max() <= 2 and (got.nfe * 2 >= NEW).all() and (got.nfe <= NEW).all()
        faster += int((got.nfe < NEW).sum())
        assert all(sequence.ne(MASK).all() for sequence in got.sequences)
    assert faster >= 4
