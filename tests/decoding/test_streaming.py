"""Text as it is decoded, and requests that do not fit."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

import pydllm
from pydllm.decoding import memory
from pydllm.demo import WEIGHTS
from pydllm.demo.task import held_out_problems
from tests.decoding.test_graph import FULL, models, prompts

TEXTS = [problem.prompt for problem in held_out_problems(3)]
ALGORITHMS = {
    "static": pydllm.Static(block_length=8),
    "threshold": pydllm.Threshold(block_length=24, cache="dual"),
    "freedave": pydllm.FreeDave(block_length=24),
    "multiblock": pydllm.MultiBlock(block_length=16),
    "left-to-right": pydllm.LeftToRight(tokens_per_step=2),
}


@pytest.fixture(scope="module")
def tiny():
    return pydllm.load(WEIGHTS)


@pytest.mark.parametrize("options", [{}, {"stop": ["then 1", "ans"], "max_batch": 2}], ids=str)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_pieces_are_the_final_text(tiny, name, options):
    options = {"max_new_tokens": 48} | options
    run = pydllm.stream(tiny, TEXTS, ALGORITHMS[name], **options)
    joined, count = [""] * len(TEXTS), 0
    for index, text in run:
        assert text
        joined[index] += text
        count += 1
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    expected = pydllm.generate(tiny, TEXTS, ALGORITHMS[name], **options)
    assert joined == expected.text == run.generation.text
    assert run.generation.finish_reason == expected.finish_reason
    assert torch.equal(run.generation.nfe, expected.nfe)
    assert count > len(TEXTS)
    assert list(run) == []


def byte_level(model):
    """A tokenizer of bytes for a model with random weights: characters may take several tokens."""
    alphabet = ["a", "b", " ", "\N{LATIN CAPITAL LETTER A WITH TILDE}", "\u00a9", "\u00a4", "c"]
    bytes_ = ["\u0120" if letter == " " else letter for letter in alphabet]
    vocab = {f"<{token}>": token for token in range(model.spec.vocab_size - len(bytes_))}
    vocab |= {letter: len(vocab) + place for place, letter in enumerate(bytes_)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["threshold", "left-to-right", "freedave"])
def test_pieces_of_bytes_are_the_final_text(name, seed):
    model, _ = models()
    model.tokenizer = byte_level(model)
    options = {"max_new_tokens": 14, "temperature": 2.0, "seed": seed, "stop": ["ab", "c "]}
    run = pydllm.stream(model, prompts((4, 1, 9), 0), FULL[name], **options)
    joined = [""] * 3
    for index, text in run:
        joined[index] += text
    assert joined == run.generation.text
    assert joined == pydllm.generate(model, prompts((4, 1, 9), 0), FULL[name], **options).text


def test_a_stream_can_be_interrupted_and_closed(tiny):
    def interrupt(step):
        if step.index == 5:
            raise KeyboardInterrupt

    algorithm = pydllm.LeftToRight()
    run = pydllm.stream(tiny, TEXTS[:1], algorithm, max_new_tokens=48, on_step=interrupt)
    text = "".join(piece for _, piece in run)
    assert run.generation.finish_reason == ["interrupted"]
    assert run.generation.text == [text]
    assert run.generation.nfe.tolist() == [5]
    closed = pydllm.stream(tiny, TEXTS[:1], algorithm, max_new_tokens=48)
    next(closed)
    closed.close()
    assert list(closed) == []


def test_on_step_receives_copies(tiny):
    def spoil(step):
        step.x.fill_(5)
        step.step_map.fill_(9)

    plain, spoiled = (
        pydllm.generate(tiny, TEXTS, ALGORITHMS["static"], max_new_tokens=16, on_step=on_step)
        for on_step in (None, spoil)
    )
    assert plain.text == spoiled.text
    assert torch.equal(plain.step_map, spoiled.step_map)


def test_what_is_refused(tiny):
    with pytest.raises(TypeError, match="unexpected keyword argument 'warm'"):
        pydllm.stream(tiny, TEXTS, ALGORITHMS["static"], max_new_tokens=4, warm=True)
    model, _ = models()
    with pytest.raises(ValueError, match="expected one with a tokenizer to stream text"):
        pydllm.stream(model, [[3]], ALGORITHMS["static"], max_new_tokens=4)


@pytest.mark.parametrize("name", ["static-dual", "static", "multiblock", "left-to-right"])
def test_a_request_that_cannot_fit_is_refused(name, monkeypatch):
    model, _ = models()
    given = prompts((4, 1, 9), 0)
    slot = memory.slot_bytes(model)
    assert slot == 2 * 2 * 8 * 8  # keys and values, heads, their size, bytes
    cached = 0 if name in ("static", "left-to-right") else 3 * 23 * slot
    needed = cached + 3 * 23 * 64
    monkeypatch.setattr(memory, "free_memory", lambda device: needed)
    pydllm.generate(
        model,
        given,
        FULL[name] if name != "left-to-right" else pydllm.LeftToRight(),
        max_new_tokens=14,
    )
    monkeypatch.setattr(memory, "free_memory", lambda device: needed - 1)
    algorithm = FULL[name] if name != "left-to-right" else pydllm.LeftToRight()
    with pytest.raises(ValueError, match=r"got 0\.00 GiB for 3 sequences of 23 positions"):
        pydllm.generate(model, given, algorithm, max_new_tokens=14)
    if cached:
        pydllm.generate(model, given, algorithm, max_new_tokens=14, max_batch=1)
    assert (memory.free_memory(torch.device("cpu")) or 1) > 0
