"""``model.deterministic()``: a row's bits depend on no other row, whatever the batch."""

import pytest
import torch

import pydllm
from pydllm import FreeDave, Static, ops
from pydllm.models import load
from tests.models.plain import CONFIGS, random_plain, write_checkpoint

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
COUNT, TOTAL = 9, 37


def at(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        name: write_checkpoint(
            tmp_path_factory.mktemp(name), random_plain(CONFIGS[name], 0, torch.float32)
        )
        for name in ("llada", "dream", "sdar")
    }


def decode_a_window(model, ids, start, length, slots, rows, branches=1):
    """Prefill, then a window; hidden states, logits and statistics of its rows."""
    count = ids.shape[0]
    cache = model.new_cache(count, slots)
    whole = torch.tensor([TOTAL] * count, dtype=torch.int32)
    model.forward(ids, torch.zeros_like(whole), cache, length=whole, kv_len=whole, commit=whole)
    window = torch.stack([row[s : s + rows] for row, s in zip(ids, start.tolist(), strict=True)])
    hidden = model.forward(
        window.repeat(1, branches) % 60,
        start,
        cache,
        length=length,
        kv_len=whole,
        commit=torch.zeros_like(whole),
        branches=branches,
    )
    counter = torch.arange(3 * count * rows * branches, dtype=torch.int32).view(-1, 3)
    counter = counter.view(count, branches, rows, 3)[:, :1].expand(-1, branches, -1, -1)
    stats = model.head_stats(
        hidden.flatten(0, 1), temperature=0.7, seed=3, counter=counter.reshape(-1, 3).contiguous()
    )
    fields = [field.view(count, branches, rows) for field in stats]
    shaped = [t.view(count, branches, rows, -1) for t in (hidden, model.head(hidden))]
    return [*shaped, *fields], (cache.keys, cache.values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["llada", "dream", "sdar"])
def test_a_sequence_alone_equals_the_sequence_in_a_batch(folders, name, dtype):
    """Alone, in another order, in a longer cache, with other windows beside it, as a branch."""
    model = load(folders[name], device="cpu", dtype=dtype).deterministic()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 61, (COUNT, TOTAL), generator=generator)
    start = torch.randint(0, TOTAL - 8, (COUNT,), generator=generator, dtype=torch.int32)
    if name == "sdar":
        start = start // 4 * 4
    length = at(*[8] * COUNT)
    together, cache = decode_a_window(model, ids, start, length, TOTAL, 8)
    order = torch.randperm(COUNT, generator=generator)
    shuffled, shuffled_cache = decode_a_window(
        model, ids[order], start[order], length, TOTAL + 90, 8
    )
    for one, other in zip(shuffled[:2], together[:2], strict=True):  # noise is keyed by place
        assert torch.equal(one, other[order])
    for one, other in zip(shuffled_cache, cache, strict=True):
        assert torch.equal(one[:, :, :TOTAL], other[:, order])
    for row in (0, 5, COUNT - 1):
        own = slice(row, row + 1)
        alone, _ = decode_a_window(model, ids[own], start[own], length[:1], TOTAL, 8)
        for one, other in zip(alone[:2], together[:2], strict=True):
            assert torch.equal(one, other[own])
    drafted, _ = decode_a_window(model, ids, start, length, TOTAL, 8, branches=3)
    for one, other in zip(drafted[:2], together[:2], strict=True):
        assert all(torch.equal(one[:, branch], other[:, 0]) for branch in range(3))


def test_rows_of_head_stats_stand_alone(folders):
    model = load(folders["llada"], device="cpu", dtype=torch.float32)
    hidden = torch.randn(70, model.sizes.hidden, generator=torch.Generator().manual_seed(0))
    counter = torch.arange(210, dtype=torch.int32).view(70, 3)
    temperature = torch.linspace(0, 1, 70)
    model = model.deterministic()
    options = {"seed": 5, "tempered": True}
    whole = model.head_stats(hidden, counter=counter, temperature=temperature, **options)
    plain = ops.head_stats(hidden, model._head, counter=counter, temperature=temperature, **options)
    for got, expected in zip(whole, plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for rows in ([3], [69, 0, 33], list(range(40)), []):
        picked = torch.tensor(rows, dtype=torch.int32)
        some = model.head_stats(
            hidden, picked, counter=counter[rows], temperature=temperature[rows], **options
        )
        assert all(torch.equal(a, b[rows]) for a, b in zip(some, whole, strict=True))
    greedy = model.head_stats(hidden)
    outside = model.head_stats(hidden, torch.tensor([-1, 4]))
    assert outside.logsumexp[0] == -torch.inf and outside.token[1] == greedy.token[4]
    partial = [
        ops.head_stats_partial(hidden[part], model._head, batch_invariant=True)
        for part in (slice(0, 70), slice(41, 43))
    ]
    for one, other in zip(*partial, strict=True):
        assert torch.equal(one[:, 41:43], other)


def test_the_model_is_shared(folders):
    model = load(folders["llada"], device="cpu")
    invariant = model.deterministic()
    assert type(invariant) is type(model) and invariant.spec is model.spec
    assert invariant._layers is model._layers and not model.batch_invariant
    assert invariant.graphs is not model.graphs
    assert model.deterministic().graphs is invariant.graphs
    assert invariant.deterministic().graphs is invariant.graphs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_freedave_equals_its_baseline_whatever_the_batch(folders, dtype):
    """Random weights in bf16 have many near ties, which rounding by the number of rows decides."""
    model = load(folders["llada"], device="cpu", dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(0, 60, (int(n),), generator=generator).tolist()
        for n in torch.randint(1, 40, (12,), generator=generator)
    ]
    call = {"max_new_tokens": 24}
    baseline, drafted = Static(block_length=8), FreeDave(block_length=8)
    plain = pydllm.generate(model, prompts, baseline, **call).sequences
    model = model.deterministic()
    alone = [pydllm.generate(model, [p], baseline, **call).sequences[0] for p in prompts]
    for algorithm in (baseline, drafted):
        for size in (12, 5):
            for first in range(0, 12, size):
                part = slice(first, first + size)
                got = pydllm.generate(model, prompts[part], algorithm, **call).sequences
                assert all(map(torch.equal, got, alone[part]))
    differ = sum(not torch.equal(*pair) for pair in zip(plain, alone, strict=True))
    print(f"{dtype}: without, {differ} of 12 differ")
