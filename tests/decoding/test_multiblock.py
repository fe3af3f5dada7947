"""MultiBlock on scripted and random models: what is decoded when, and in which windows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pydllm
from pydllm import ops
from pydllm.decoding.state import Selection
from pydllm.decoding.step import select_rows
from pydllm.models import StaticCache
from pydllm.models.spec import ModelSpec
from tests.decoding.test_multiblock_published import EOS, MASK, VOCAB, tiny_model
from tests.decoding.test_static import _prompt

PROMPT = [7, 8, 9]


class Scripted:
    """Position p gets token ``5 + p % 7``; ``certain(ids, start)`` says which rows are sure of it.

    Remembers (start, length, commit) of every forward of its only sequence.
    """

    tokenizer = None
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, certain, shifted=False, tokens=None):
        self.spec = ModelSpec(16, MASK, (EOS,), shifted, "full", None, 4096)
        self.certain, self.tokens, self.forwards, self.masks = certain, tokens or {}, [], []

    def new_cache(self, batch, max_len):
        return StaticCache.allocate(1, batch, max_len, 1, 1, dtype=self.dtype, device=self.device)

    def forward(self, ids, start, cache, *, length, kv_len, commit, **_):
        self.forwards.append((int(start[0]), int(length[0]), int(commit[0])))
        self.masks.append(int((ids[0, : length[0]] == MASK).sum()))
        shift = int(self.spec.shift_logits)
        hidden = torch.zeros(1, ids.shape[1], 16)
        target = torch.arange(ids.shape[1]) + int(start[0]) + shift
        sure = self.certain(ids[0], target, shift)
        for row, position in enumerate(target.tolist()):
            token = self.tokens.get(position - len(PROMPT), 5 + position % 7)
            hidden[0, row, token] = 50.0 if sure[row] else 2.0 - position / 1000
        return hidden

    def head_stats(self, hidden, rows=None, *, counter=None, backend=None, **options):
        return ops.vocab_stats(hidden if rows is None else hidden[rows], backend=backend, **options)


def everything(ids, target, shift):
    return torch.ones(len(ids), dtype=torch.bool)


def nothing(ids, target, shift):
    return torch.zeros(len(ids), dtype=torch.bool)


def leftmost(count):
    """The first ``count`` masks of the window."""

    def certain(ids, target, shift):
        masked = torch.cat((ids[shift:], ids.new_full((shift,), MASK)) if shift else (ids,))
        masked = masked == MASK
        return masked & (masked.cumsum(0) <= count)

    return certain


def run(model, algorithm, new=96, **options):
    return pydllm.generate(model, [PROMPT], algorithm, max_new_tokens=new, **options)


@pytest.mark.parametrize("shifted", [False, True], ids=["llada", "dream"])
def test_a_certain_model_decodes_a_block_a_forward(shifted):
    model = Scripted(everything, shifted)
    got = run(model, pydllm.MultiBlock(cache=False))
    assert got.nfe.tolist() == [3] and model.masks == [96, 64, 32]
    want = [5 + p % 7 for p in range(3, 99)]
    assert got.sequences[0][3:].tolist() == want
    assert got.step_map.tolist() == [[0] * 32 + [1] * 32 + [2] * 32]


@pytest.mark.parametrize("count, forwards", [(3, 32), (4, 24), (8, 12)])
@pytest.mark.parametrize("shifted", [False, True], ids=["llada", "dream"])
def test_a_few_tokens_a_forward(shifted, count, forwards):
    got = run(Scripted(leftmost(count), shifted), pydllm.MultiBlock(cache=False))
    assert got.nfe.tolist() == [forwards]


def test_without_a_threshold_only_what_is_forced():
    """Dream: one token a forward, in order of entropy within the block; LLaDA: up to two."""
    algorithm = pydllm.MultiBlock(threshold=-1.0, block_length=8, cache=False)
    got = run(Scripted(nothing, shifted=True), algorithm, new=24)
    assert got.nfe.tolist() == [24] and got.step_map.tolist() == [list(range(24))]
    # The most certain of all is the leftmost, so it is in the block: again one.
    assert run(Scripted(nothing), algorithm, new=24).nfe.tolist() == [24]


@pytest.mark.parametrize("early_stop", [True, False])
def test_behind_an_end_of_sequence_nothing_is_decoded(early_stop):
    model = Scripted(everything, tokens={0: EOS})
    algorithm = pydllm.MultiBlock(cache=False, early_stop=early_stop)
    got = run(model, algorithm)
    assert got.nfe.tolist() == [1 if early_stop else 3]
    assert got.sequences[0][3:].tolist() == [EOS] * 96
    assert got.step_map.tolist() == [[0] + [-1] * 95]


@pytest.mark.parametrize("shifted", [False, True], ids=["llada", "dream"])
def test_what_the_last_forward_leaves_behind_an_end_of_sequence(shifted):
    model = Scripted(everything, shifted, tokens={70: EOS})
    got = run(model, pydllm.MultiBlock(cache=False))
    assert got.nfe.tolist() == [3]
    assert got.sequences[0][3 + 71 :].eq(EOS).all()


def test_masks_before_an_end_of_sequence_are_decoded():
    def certain(ids, target, shift):
        return target == 3 + 20

    model = Scripted(certain, tokens={20: EOS})
    got = run(
        model, pydllm.MultiBlock(threshold=0.5, block_length=8, add_at=0.0, cache=False), new=64
    )
    new = got.sequences[0][3:]
    assert new[:20].ne(EOS).all() and new[:20].ne(MASK).all() and new[20:].eq(EOS).all()
    assert got.step_map[0, 21:].eq(-1).all()


def test_a_rest_of_a_block_is_decoded():
    algorithm = pydllm.MultiBlock(threshold=0.5, block_length=32, cache=False)
    got = run(Scripted(everything), algorithm, new=70)
    assert got.nfe.tolist() == [3] and got.sequences[0].ne(MASK).all()


@pytest.mark.parametrize("delay", [0, 1, 2, 3])
def test_windows_of_a_delayed_commit(delay):
    """The prompt is kept in forward D; a finished block after D full forwards."""
    model = Scripted(leftmost(4))
    run(
        model,
        pydllm.MultiBlock(threshold=0.5, block_length=8, delay=delay, add_at=1.0),
        new=32,
    )
    full, total = (0, 35), 35
    # Every block takes two forwards, so it is finished behind the 2nd, 4th, ...
    expected = {
        0: [(*full, 3), (3, 32, 0), (3, 32, 8), (11, 24, 0), (11, 24, 8), (19, 16, 0)],
        1: [(*full, 3), (3, 32, 0), (*full, 3), (3, 32, 8), (*full, 11), (11, 24, 8)],
        2: [(*full, 0), (*full, 3), (*full, 3), (*full, 3), (3, 32, 8), (*full, 11)],
        3: [(*full, 0), (*full, 0), (*full, 3), (*full, 3), (*full, 3), (3, 32, 8)],
    }[delay]
    if delay == 2:  # the second block waits when the first is kept
        expected[4] = (*full, 11)
    if delay == 3:
        expected[5] = (*full, 11)
    assert model.forwards[:6] == expected
    assert all(start + length == total for start, length, _ in model.forwards)


def test_the_tail():
    for tail, lengths in (("full", [99, 99, 99]), ("blocks", [35, 67, 99]), (10, [45, 77, 99])):
        model = Scripted(everything)
        run(model, pydllm.MultiBlock(cache=False, tail=tail))
        assert [length for _, length, _ in model.forwards] == lengths


VARIANTS = [
    {"cache": False},
    {"delay": 1},
    {"delay": 0, "refresh": 4, "tail": "blocks"},
    {"delay": 2, "tail": 3, "early_stop": False},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("shift", [False, True], ids=["llada", "dream"])
def test_a_batch_is_its_sequences(tmp_path, shift, options):
    model, _ = tiny_model(tmp_path / "model", 3, shift)
    prompts = [_prompt(row, 2 + 3 * row % 7, VOCAB) for row in range(5)]
    algorithm = pydllm.MultiBlock(threshold=1.2, block_length=6, add_at=0.3, full_at=0.6, **options)
    for temperature in (0.0, 0.7):
        common = {"max_new_tokens": 20, "temperature": temperature, "seed": 1}
        together = pydllm.generate(model, prompts, algorithm, **common)
        assert len(set(together.nfe.tolist())) > 1  # they leave at different times
        for row, prompt in enumerate(prompts):
            alone = pydllm.generate(model, [prompt], algorithm, request_ids=[row], **common)
            assert torch.equal(alone.sequences[0], together.sequences[row])
            assert torch.equal(alone.step_map[0], together.step_map[row])
            assert alone.nfe[0] == together.nfe[row]


@pytest.mark.parametrize("shift", [False, True], ids=["llada", "dream"])
def test_a_cache_that_is_always_renewed_or_never_used_changes_nothing(tmp_path, shift):
    prompts = [_prompt(row, 3 + row, VOCAB) for row in range(4)]
    for seed in range(4):
        model, _ = tiny_model(tmp_path / str(seed), seed, shift)
        common = {"threshold": 1.0, "block_length": 8, "early_stop": seed % 2 == 0}
        plain, renewed, never = (
            pydllm.generate(model, prompts, pydllm.MultiBlock(**common, **extra), max_new_tokens=30)
            for extra in ({"cache": False}, {"delay": 1, "refresh": 1}, {"delay": 10_000})
        )
        for other in (renewed, never):
            assert torch.equal(torch.cat(other.sequences), torch.cat(plain.sequences))
            assert torch.equal(other.nfe, plain.nfe)


@pytest.mark.parametrize("shift", [False, True], ids=["llada", "dream"])
def test_a_window_over_an_up_to_date_cache_is_a_full_forward(tmp_path, shift):
    """O11: of all rows, the first included, because a shifted window starts one position early."""
    model, _ = tiny_model(tmp_path / "model", 0, shift)
    x = torch.tensor([_prompt(1, 20, VOCAB)])
    x[0, 9:] = MASK

    def number(value):
        return torch.tensor([value], dtype=torch.int32)

    cache = model.new_cache(1, 20)
    options = {"kv_len": number(20)}
    whole = model.forward(x, number(0), cache, length=number(20), commit=number(9), **options)
    start = 9 - shift
    window = {"length": number(20 - start), "commit": number(0)}
    part = model.forward(x[:, start:], number(start), cache, **window, **options)
    wanted = Selection(number(9), number(11), 11)
    want = select_rows(model, whole, number(0), wanted)
    got = select_rows(model, part, number(start), wanted)
    assert (model.head(want) - model.head(got)).abs().max() < 1e-12


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [tiny_model(folder / str(n), n, shift)[0] for n, shift in enumerate((False, True) * 2)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    which=st.integers(0, 3),
    new=st.integers(1, 14),
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    options=st.fixed_dictionaries(
        {
            "threshold": st.sampled_from([-1.0, 0.5, 1.5, 9.0]),
            "block_length": st.sampled_from([1, 3, 8, 40]),
            "add_at": st.sampled_from([0.0, 0.1, 1.0]),
            "full_at": st.sampled_from([0.0, 0.95, 1.0]),
            "delay": st.integers(0, 3),
            "refresh": st.sampled_from([None, 1, 2]),
            "early_stop": st.booleans(),
            "cache": st.booleans(),
            "tail": st.sampled_from(["full", "blocks", 2]),
        }
    ),
)
def test_every_forward_writes_something(models, which, new, lengths, options):
    """O6, O9: at most N forwards, no mask left, no token changed but by an end of sequence."""
    prompts = [_prompt(row, length, VOCAB) for row, length in enumerate(lengths)]
    seen = []

    def look(step):
        seen.append(step.x.clone())

    algorithm = pydllm.MultiBlock(**options)
    got = pydllm.generate(models[which], prompts, algorithm, max_new_tokens=new, on_step=look)
    assert (got.nfe <= new).all() and len(seen) == got.nfe.max()
    for before, after in zip(seen, seen[1:], strict=False):
        changed = (before != after) & (before != MASK)
        assert (after[changed] == EOS).all()
        assert (after == MASK).sum() < (before == MASK).sum()
    # One block more a forward at most, so nothing of block k is written before forward k.
    # (An add_at of 0 opens the second block before the first forward.)
    block = torch.arange(new) // options["block_length"] - int(options["add_at"] == 0)
    assert ((got.step_map >= block) | (got.step_map < 0)).all()
    for row, sequence in enumerate(got.sequences):
        answer = sequence[len(prompts[row]) :]
        assert answer.ne(MASK).all()
        assert answer[(answer == EOS).cumsum(0) > 0].eq(EOS).all()


def test_logits_that_are_nan_end(tmp_path):
    model, _ = tiny_model(tmp_path / "model", 0, False)
    model._head.fill_(float("nan"))
    got = pydllm.generate(
        model, [[2, 4]], pydllm.MultiBlock(threshold=0.5, block_length=4), max_new_tokens=10
    )
    assert got.nfe.item() <= 10 and got.sequences[0].ne(MASK).all()


BAD = [
    ({"threshold": "low"}, "threshold: expected a number"),
    ({"block_length": 0}, "block_length: expected an int of at least 1"),
    ({"add_at": 1.1}, r"add_at: expected a number in \[0, 1\]"),
    ({"full_at": -0.1}, r"full_at: expected a number in \[0, 1\]"),
    ({"delay": -1}, "delay: expected an int of at least 0"),
    ({"refresh": 0}, "refresh: expected an int of at least 1"),
    ({"tail": "none"}, "tail: expected one of full, blocks"),
    ({"tail": -1}, "tail: expected an int of at least 0"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_parameters(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        pydllm.MultiBlock(**options)


def test_models_and_lengths_that_do_not_fit():
    model = Scripted(everything)
    model.spec = ModelSpec(16, MASK, (EOS,), False, "block_causal", 4, 4096)
    with pytest.raises(ValueError, match="block_length: expected 4, the block of the block-caus"):
        run(model, pydllm.MultiBlock())
    model.spec = ModelSpec(16, MASK, (EOS,), False, "causal", None, 4096)
    with pytest.raises(ValueError, match="MultiBlock: expected a model with full or block-causal"):
        run(model, pydllm.MultiBlock())
