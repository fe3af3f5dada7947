"""Prompts that wait for a slot are decoded as if alone."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import pydllm
from tests.decoding.test_graph import CASES, IDS, NEW, models, prompts

LENGTHS = (4, 1, 9, 7, 20, 3, 12)
PER_PROMPT = {"target", "then"}  # APD with one value per prompt, for five prompts


def one_each(settings, row):
    """The settings of one prompt."""
    return {k: [v[row]] if isinstance(v, list) else v for k, v in settings.items()}


@pytest.mark.parametrize("graph", [False, True], ids=["runs", "replays"])
@pytest.mark.parametrize(("kind", "shift", "name", "algorithm"), CASES, ids=IDS)
def test_admitted_prompts_equal_lone_ones(kind, shift, name, algorithm, graph):
    model, verifier = models(block=4 if kind == "blocks" else None, shift=shift)
    lengths = LENGTHS
    settings = algorithm if isinstance(algorithm, dict) else None
    if settings is not None:
        if any(isinstance(value, list) for value in settings.values()):
            lengths = LENGTHS[:5]
        algorithm = pydllm.APD(verifier, **settings)
    ids = prompts(lengths, 0)
    temperature = 0.7 if "static" in name or "apd" in name else 0.0
    options = {"max_new_tokens": NEW, "temperature": temperature, "seed": 3}
    for batch in (1, 3) if graph else (1, 2, 4):
        got = pydllm.generate(model, ids, algorithm, **options, max_batch=batch, graph=graph)
        for row, prompt in enumerate(ids):
            lone = algorithm
            if settings is not None:
                lone = pydllm.APD(verifier, **one_each(settings, row))
            expected = pydllm.generate(model, [prompt], lone, **options, request_ids=[row])
            assert torch.equal(got.sequences[row], expected.sequences[0]), (batch, row)
            if "auto" not in name:  # its forwards depend on the batch
                assert torch.equal(got.step_map[row], expected.step_map[0]), (batch, row)
                assert got.nfe[row] == expected.nfe[0], (batch, row)
            if settings is not None:
                assert got.verifier_nfe[row] == expected.verifier_nfe[0], (batch, row)


def threads_over_a_model(graph, calls):
    """Whether each of four threads' calls gives what it gives alone."""
    model, _ = models()
    algorithm = pydllm.Threshold(threshold=0.3, block_length=4, cache="dual")
    asked = [prompts((4 + row, 9, 2), 10 * row) for row in range(4)]
    expected = [pydllm.generate(model, ids, algorithm, max_new_tokens=NEW) for ids in asked]

    def decode(row):
        got = [
            pydllm.generate(model, asked[row], algorithm, max_new_tokens=NEW, graph=graph)
            for _ in range(calls)
        ]
        return [
            torch.equal(torch.cat(g.sequences), torch.cat(expected[row].sequences)) for g in got
        ]

    with ThreadPoolExecutor(4) as pool:
        return [one for many in pool.map(decode, range(4)) for one in many]


@pytest.mark.parametrize("graph", [False, True], ids=["runs", "replays"])
def test_threads_share_a_model(graph):
    """Four threads over one model: the one that finds the buffers in use runs without them."""
    same = threads_over_a_model(graph, calls=5)
    assert len(same) == 20 and all(same)


def test_a_call_within_a_call():
    """``on_step`` may decode with the same model; the outer call is none the wiser."""
    model, _ = models(block=4)
    algorithm, ids = (
        pydllm.FreeDave(draft_steps=4, block_length=4, mode="pipelined"),
        prompts((4, 9), 0),
    )
    options = {"max_new_tokens": NEW, "graph": True}
    expected = pydllm.generate(model, ids, algorithm, **options)
    inner = []

    def within(step):
        inner.append(pydllm.generate(model, ids[::-1], algorithm, **options))

    got = pydllm.generate(model, ids, algorithm, **options, on_step=within)
    assert torch.equal(torch.cat(got.sequences), torch.cat(expected.sequences))
    assert inner and torch.equal(inner[0].sequences[0], expected.sequences[1])


def test_steps_are_copies():
    model, _ = models()
    seen = []
    pydllm.generate(
        model,
        prompts((4, 9), 0),
        pydllm.Static(block_length=4),
        max_new_tokens=8,
        on_step=seen.append,
    )
    left = [int((step.x == model.spec.mask_id).sum()) for step in seen]
    assert left == sorted(left, reverse=True) and len(set(left)) > 3


@pytest.mark.parametrize("copies", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_a_model_begin_with_nothing_recorded(copies):
    model, verifier = models()
    ids, algorithm = prompts((4, 9), 0), pydllm.APD(verifier, mixture=0.5)
    expected = pydllm.generate(model, ids, algorithm, max_new_tokens=NEW, graph=True)
    assert model.graphs
    twin, other = copies(model), copies(algorithm)
    assert not twin.graphs
    got = pydllm.generate(twin, ids, other, max_new_tokens=NEW)
    assert torch.equal(torch.cat(got.sequences), torch.cat(expected.sequences))


def test_a_call_leaves_inference_mode_and_autocast_alone():
    model, _ = models()
    ids, algorithm = (
        prompts((4, 9), 0),
        pydllm.Threshold(threshold=0.3, block_length=4, cache="dual"),
    )
    expected = pydllm.generate(model, ids, algorithm, max_new_tokens=NEW)
    for graph in (False, True):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            got = pydllm.generate(model, ids, algorithm, max_new_tokens=NEW, graph=graph)
        assert torch.equal(torch.cat(got.sequences), torch.cat(expected.sequences))
    for _ in range(3):  # outside, over the buffers that were made inside
        got = pydllm.generate(model, ids, algorithm, max_new_tokens=NEW, graph=True)
        assert torch.equal(torch.cat(got.sequences), torch.cat(expected.sequences))


def test_nan_is_said():
    """Weights of NaN for one token: the prompt that holds it is named, the other is not."""
    model, _ = models()
    model._embedding[12] = torch.nan
    ids = [[10, 11, 13], [10, 12, 13]]
    with pytest.warns(RuntimeWarning, match=r"prompts\[1\]: expected finite numbers .*NaN"):
        got = pydllm.generate(model, ids, pydllm.Static(block_length=4), max_new_tokens=8)
    assert got.finite is not None and not got.finite[1]


def test_deterministic_is_of_loaded_models():
    model, _ = models()
    algorithm = pydllm.Threshold(threshold=0.3, block_length=4)
    options = {"max_new_tokens": NEW, "deterministic": True}
    got = pydllm.generate(model, prompts(LENGTHS, 0), algorithm, **options)
    for row, prompt in enumerate(prompts(LENGTHS, 0)):
        lone = pydllm.generate(model, [prompt], algorithm, **options, request_ids=[row])
        assert torch.equal(lone.sequences[0], got.sequences[row])
    with pytest.raises(TypeError, match="deterministic: expected True or False, got 1"):
        pydllm.generate(model, [[10]], algorithm, max_new_tokens=4, deterministic=1)


if __name__ == "__main__":  # python -m tests.decoding.test_driver
    same = threads_over_a_model(graph=True, calls=25)
    print(f"four threads over recorded steps: {sum(same)} of {len(same)} right")
