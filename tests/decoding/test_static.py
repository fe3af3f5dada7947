"""Parity with the published loops, batches, ends of sequence, seeds and callbacks."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch
from safetensors.torch import save_file

import pydllm
from tests.decoding.published import PlainLLaDA, fast_dllm_generate, llada_generate
from training.llada import CONFIG, TinyLLaDA

MASK = 1


def _random_model(folder, seed, *, vocab=48, eos=(), shift=False, **sizes):
    """A tiny random fp64 LLaDA as (pydllm model, plain model); weights wide enough to disagree."""
    torch.manual_seed(seed)
    config = CONFIG | {
        "d_model": 32,
        "n_heads": 2,
        "n_kv_heads": 2,
        "n_layers": 2,
        "mlp_hidden_size": 48,
        "vocab_size": vocab,
        "embedding_size": vocab,
        "mask_token_id": MASK,
        **sizes,
    }
    module = TinyLLaDA(config).double()
    for parameter in module.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.25)
    weights = {name: value.contiguous() for name, value in module.state_dict().items()}
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    model = pydllm.load(folder, device="cpu", dtype=torch.float64)
    model.spec = dataclasses.replace(model.spec, eos_ids=eos, shift_logits=shift)
    return model, PlainLLaDA(weights, config)


def _prompt(seed, length, vocab=48):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, vocab, (length,), generator=generator).tolist()


@pytest.mark.parametrize("part", range(4))
def test_static_equals_the_published_loop_on_100_models(tmp_path, part):
    for seed in range(25 * part, 25 * part + 25):
        model, plain = _random_model(tmp_path / str(seed), seed)
        prompt = _prompt(seed, 3 + seed % 5)
        per_step, block = ((1, 8), (2, 8), (4, 16), (1, 16))[seed % 4]
        expected = llada_generate(
            plain, prompt, steps=16 // per_step, gen_length=16, block_length=block
        )
        algorithm = pydllm.Static(block_length=block, tokens_per_step=per_step, compat="llada")
        got = pydllm.generate(model, [prompt], algorithm, max_new_tokens=16)
        assert torch.equal(got.sequences[0], expected), seed
        assert got.nfe.item() <= 16 // per_step


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("limit", [0.03, 0.1, 0.9])
def test_threshold_equals_fast_dllm(tmp_path, cache, limit):
    for seed in range(8):
        model, plain = _random_model(tmp_path / str(seed), seed)
        prompt = _prompt(seed, 5)
        expected, forwards = fast_dllm_generate(
            plain, prompt, gen_length=24, block_length=8, cache=cache, threshold=limit
        )
        algorithm = pydllm.Threshold(
            threshold=limit, block_length=8, cache=cache, compat="fast_dllm"
        )
        got = pydllm.generate(model, [prompt], algorithm, max_new_tokens=24)
        assert torch.equal(got.sequences[0], expected), seed
        assert got.nfe.item() == forwards


ALGORITHMS = [
    pydllm.Static(block_length=8),
    pydllm.Static(block_length=8, tokens_per_step=3),
    pydllm.Static(block_length=8, score="entropy", cache="prefix"),
    pydllm.Static(block_length=8, score="margin", cache="dual"),
    pydllm.Static(block_length=8, score="left_to_right"),
    pydllm.Static(block_length=8, score="random", cache="dual"),
    pydllm.Threshold(threshold=0.1, block_length=8, cache="dual"),
    pydllm.Threshold(threshold=0.1, block_length=8, cache="dual", first_token="forced"),
    pydllm.Static(block_length=8, tokens_per_step=3, cache="dual", first_token="forced"),
    pydllm.Factor(factor=2.0, block_length=8, cache="prefix"),
    pydllm.EntropyBound(bound=2.0, block_length=8, cache="dual"),
]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("shift", [False, True], ids=["plain", "shifted"])
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_a_ragged_batch_equals_its_sequences_alone(tmp_path, algorithm, shift, temperature):
    if not shift:
        algorithm = dataclasses.replace(algorithm, first_token="window")
    model, _ = _random_model(tmp_path / "model", 3, eos=(7, 9), shift=shift)
    prompts = [_prompt(seed, length) for seed, length in enumerate((4, 1, 11, 6, 2))]
    options = {"max_new_tokens": 20, "temperature": temperature, "seed": 5}
    together = pydllm.generate(model, prompts, algorithm, **options)
    for row, prompt in enumerate(prompts):
        alone = pydllm.generate(model, [prompt], algorithm, request_ids=[row], **options)
        assert torch.equal(alone.sequences[0], together.sequences[row])
        assert torch.equal(alone.step_map[0], together.step_map[row])
        assert alone.nfe[0] == together.nfe[row]
        assert torch.equal(together.sequences[row][: len(prompt)], torch.tensor(prompt))


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_what_follows_an_end_of_sequence_is_end_of_sequence(tmp_path, algorithm):
    ended = 0
    shift = algorithm.first_token == "forced"
    model, _ = _random_model(tmp_path / "model", 0, vocab=12, eos=(5, 6), shift=shift)
    got = pydllm.generate(
        model, [_prompt(seed, 4, 12) for seed in range(12)], algorithm, max_new_tokens=32
    )
    for sequence, step_map, nfe in zip(got.sequences, got.step_map, got.nfe, strict=True):
        answer = sequence[4:]
        assert not (answer == MASK).any()
        ends = ((answer == 5) | (answer == 6)).nonzero().flatten()
        first = int(ends[0]) if len(ends) else 32
        assert (answer[first + 1 :] == 5).all()
        assert (step_map[first + 1 :] == -1).all()
        assert (step_map[: first + 1] >= 0).all()
        assert step_map.max() < nfe
        ended += first < 24
    assert ended  # otherwise nothing was shown


def test_fewer_forwards_after_an_early_end(tmp_path):
    model, _ = _random_model(tmp_path / "model", 0, vocab=12, eos=(5, 6))
    prompts = [_prompt(seed, 4, 12) for seed in range(12)]
    got = pydllm.generate(model, prompts, pydllm.Static(block_length=8), max_new_tokens=32)
    for sequence, nfe in zip(got.sequences, got.nfe, strict=True):
        ends = ((sequence[4:] == 5) | (sequence[4:] == 6)).nonzero().flatten()
        blocks = int(ends[0]) // 8 + 1 if len(ends) else 4
        assert nfe == 8 * blocks


def test_the_backends_give_the_same_tokens(tmp_path):
    torch.manual_seed(0)
    model, _ = _random_model(tmp_path / "model", 4)
    model = pydllm.load(tmp_path / "model", device="cpu", dtype=torch.float32)
    prompts = [_prompt(1, 3), _prompt(2, 5)]
    for algorithm in (
        pydllm.Threshold(threshold=0.1, block_length=4, cache="dual"),
        pydllm.Static(block_length=4, tokens_per_step=2),
    ):
        options = {"max_new_tokens": 8, "temperature": 0.5, "seed": 1}
        expected = pydllm.generate(model, prompts, algorithm, backend="torch", **options)
        got = pydllm.generate(model, prompts, algorithm, backend="triton", **options)
        assert torch.equal(torch.cat(got.sequences), torch.cat(expected.sequences))
        assert torch.equal(got.step_map, expected.step_map)


def test_temperature_and_seed(tmp_path):
    model, _ = _random_model(tmp_path / "model", 2)
    prompt = _prompt(0, 4)

    def decode(seed, temperature=1.0):
        options = {"max_new_tokens": 16, "temperature": temperature, "seed": seed}
        return pydllm.generate(model, [prompt], pydllm.Static(block_length=8), **options).sequences[
            0
        ]

    assert torch.equal(decode(3), decode(3))
    assert not torch.equal(decode(3), decode(4))
    assert torch.equal(decode(3, 0.0), decode(4, 0.0))


def test_the_callback_sees_every_step(tmp_path):
    model, _ = _random_model(tmp_path / "model", 2)
    seen = []

    def on_step(step):
        seen.append((step.index, int((step.x == MASK).sum())))

    got = pydllm.generate(
        model,
        [_prompt(0, 4)],
        pydllm.Static(block_length=8, tokens_per_step=2),
        max_new_tokens=16,
        on_step=on_step,
    )
    assert seen == [(index + 1, 16 - 2 * (index + 1)) for index in range(8)]
    assert got.nfe.tolist() == [8]


def test_the_loop_reads_nothing_on_the_host_but_the_flag(tmp_path, monkeypatch):
    """Counts host reads: one per step where the steps are not known, else one per block.

    And one per block of what its window masks, on a CPU without recorded steps alone.
    """
    model, _ = _random_model(tmp_path / "model", 2)
    prompts = [_prompt(0, 4)]
    reads = []
    # A CPU looks at its windows to spare itself work, and the results are read at the end.
    elsewhere = ("_values", "collect", "check_finite")

    def counting(plain):
        def read(self):
            if sys._getframe(1).f_code.co_name not in elsewhere:
                reads.append(plain)
            return plain(self)

        return read

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, counting(getattr(torch.Tensor, name)))
    pydllm.generate(
        model, prompts, pydllm.Static(block_length=8, tokens_per_step=2), max_new_tokens=16
    )
    static = len(reads)
    reads.clear()
    got = pydllm.generate(
        model, prompts, pydllm.Threshold(threshold=0.1, block_length=8), max_new_tokens=16
    )
    monkeypatch.undo()
    assert static == 2
    assert len(reads) == got.nfe.item()


def _call(model, **changes):
    arguments = {
        "prompts": [[2, 3]],
        "algorithm": pydllm.Static(block_length=8),
        "max_new_tokens": 8,
    }
    arguments |= changes
    prompts, algorithm = arguments.pop("prompts"), arguments.pop("algorithm")
    algorithm = algorithm() if callable(algorithm) else algorithm
    return pydllm.generate(model, prompts, algorithm, **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prompts": []}, ValueError, "prompts: expected a list of one or more prompts, got"),
        ({"prompts": "text"}, ValueError, "prompts: expected a list of one or more prompts, got"),
        ({"prompts": ["text"]}, ValueError, r"prompts\[0\]: expected token ids .* got a string"),
        ({"prompts": [[2.5]]}, TypeError, r"prompts\[0\]: expected a list of ints, got"),
        (
            {"prompts": [[2], [48]]},
            ValueError,
            r"prompts\[1\]\[0\]: expected a token id in \[0, 48\)",
        ),
        (
            {"prompts": [torch.ones(1, 2).long()]},
            ValueError,
            r"expected shape \(n,\), got \(1, 2\)",
        ),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens: expected an int of at least 1, got 0"),
        ({"max_new_tokens": 127}, ValueError, "128 positions .* got 129: lower max_new_tokens"),
        (
            {"temperature": -1.0},
            ValueError,
            r"temperature: expected a number in \[0, 1e\+06\], got -1",
        ),
        ({"temperature": float("nan")}, ValueError, "temperature: expected a number in .* got nan"),
        ({"seed": -1}, ValueError, r"seed: expected an int in \[0, 2\^64\), got -1"),
        ({"request_ids": [1, 2]}, ValueError, "request_ids: expected 1, one per prompt, got 2"),
        ({"backend": "gpu"}, ValueError, "backend: expected one of auto, cuda, triton, torch"),
        (
            {"algorithm": lambda: pydllm.Static(block_length=0)},
            ValueError,
            "block_length: expected an int of at least 1, got 0",
        ),
        (
            {"algorithm": lambda: pydllm.Static(block_length=8, tokens_per_step=9)},
            ValueError,
            r"tokens_per_step: expected an int in \[1, 8\], got 9",
        ),
        (
            {"algorithm": lambda: pydllm.Static(score="best")},
            ValueError,
            "score: expected one of confidence, entropy",
        ),
        (
            {"algorithm": lambda: pydllm.Static(cache="full")},
            ValueError,
            "cache: expected one of none, prefix, dual, got",
        ),
        (
            {"algorithm": lambda: pydllm.Threshold(threshold=1.5)},
            ValueError,
            r"threshold: expected a number in \[0, 1\], got 1.5",
        ),
        (
            {"algorithm": lambda: pydllm.Threshold(compat="x")},
            ValueError,
            "compat: expected one of None, fast_dllm, dllm, got 'x'",
        ),
        (
            {"algorithm": lambda: pydllm.Static(semantics="llada")},
            TypeError,
            "Static: semantics is no argument any more, use compat",
        ),
        (
            {"algorithm": lambda: pydllm.Threshold(min_tokens=0)},
            ValueError,
            "min_tokens: expected an int of at least 1, got 0",
        ),
        (
            {"algorithm": lambda: pydllm.Factor(factor=-1.0)},
            ValueError,
            r"factor: expected a number of at least 0, got -1",
        ),
        (
            {"algorithm": lambda: pydllm.EntropyBound(bound=float("nan"))},
            ValueError,
            "bound: expected a number of at least 0",
        ),
        (
            {"algorithm": lambda: pydllm.Static(first_token="x")},
            ValueError,
            "first_token: expected one of window, forced",
        ),
    ],
)
def test_bad_input(tmp_path, changes, error, message):
    model, _ = _random_model(tmp_path / "model", 0)
    with pytest.raises(error, match=message):
        _call(model, **changes)


def test_a_shifted_model_needs_a_prompt(tmp_path):
    model, _ = _random_model(tmp_path / "model", 0, shift=True)
    with pytest.raises(ValueError, match=r"prompts\[0\]: expected at least one token"):
        _call(model, prompts=[[]])
    model.spec = dataclasses.replace(model.spec, shift_logits=False)
    assert len(_call(model, prompts=[[]]).sequences[0]) == 8


def test_the_first_token_is_forced_on_shifted_models_alone(tmp_path):
    model, _ = _random_model(tmp_path / "model", 0)
    prompts = [_prompt(seed, 4) for seed in range(8)]

    def decode(first_token, cache="dual"):
        algorithm = pydllm.Static(block_length=8, cache=cache, first_token=first_token)
        got = pydllm.generate(model, prompts, algorithm, max_new_tokens=16)
        return torch.stack(got.sequences), got.step_map

    with pytest.raises(ValueError, match="'window' with logits that are not shifted, got 'forced'"):
        decode("forced")
    model.spec = dataclasses.replace(model.spec, shift_logits=True)
    with pytest.raises(ValueError, match="'window' with cache 'none', got 'forced'"):
        decode("forced", cache="none")
    sequences, step_map = decode("forced")
    assert (step_map[:, 0] == 0).all() and (step_map[:, 8] == 8).all()
    assert not torch.equal(step_map, decode("window")[1])
    assert (sequences[:, 4:] != MASK).all()


def test_an_autoregressive_model_is_refused(tmp_path):
    model, _ = _random_model(tmp_path / "model", 0)
    model.spec = dataclasses.replace(model.spec, attention="causal")
    with pytest.raises(ValueError, match="full or block-causal attention, got 'causal'"):
        _call(model)
