"""Where answers end: stops, lengths of their own, EOS that is ignored."""

from __future__ import annotations

import pytest
import torch
from tokenizers import AddedToken

import pydllm
from pydllm.decoding.stops import read_stops
from pydllm.demo import WEIGHTS
from tests.decoding.test_graph import FULL, VERIFIED, models, prompts

LENGTHS = (4, 1, 9)
NEW = (14, 6, 11)
BLOCKS = pydllm.FreeDave(draft_steps=4, block_length=4, mode="pipelined")


@pytest.fixture(scope="module")
def tiny():
    return pydllm.load(WEIGHTS)


def cases():
    names = ("static-dual", "threshold", "factor", "freedave", "multiblock", "left-to-right")
    yield from ((name, "full", FULL[name]) for name in names)
    yield "apd", "full", VERIFIED["draft"]
    yield "pipelined", "blocks", BLOCKS
    yield "block-causal", "blocks", pydllm.Static(block_length=4)
    yield "autoregressive", "causal", pydllm.Autoregressive()


CASES = [pytest.param(kind, algorithm, id=name) for name, kind, algorithm in cases()]


def setting(kind, algorithm):
    model, verifier = models(block=4 if kind == "blocks" else None)
    if isinstance(algorithm, dict):
        algorithm = pydllm.APD(verifier, **algorithm)
    return (verifier if kind == "causal" else model), algorithm


@pytest.mark.parametrize(("kind", "algorithm"), CASES)
def test_a_length_per_prompt_is_that_of_the_prompt_alone(kind, algorithm):
    model, algorithm = setting(kind, algorithm)
    given = prompts(LENGTHS, 0)
    together = pydllm.generate(model, given, algorithm, max_new_tokens=list(NEW))
    for row, (prompt, new) in enumerate(zip(given, NEW, strict=True)):
        alone = pydllm.generate(model, [prompt], algorithm, max_new_tokens=new, request_ids=[row])
        assert torch.equal(together.sequences[row], alone.sequences[0])
        assert torch.equal(together.step_map[row, :new], alone.step_map[0])
        assert (together.step_map[row, new:] == -1).all()
        assert together.nfe[row] == alone.nfe[0]


@pytest.mark.parametrize(("kind", "algorithm"), CASES)
def test_a_stop_cuts_the_answer_and_nothing_else(kind, algorithm):
    """The tokens before a stop are those of a run without it; forwards after it are saved."""
    model, algorithm = setting(kind, algorithm)
    given = prompts(LENGTHS, 0)
    free = pydllm.generate(model, given, algorithm, max_new_tokens=14, ignore_eos=True)
    assert free.finish_reason == ["length"] * 3
    stop = [[int(row[len(prompt) + 2])] for row, prompt in zip(free.sequences, given, strict=True)]
    for stops in (stop, stop[0]):  # by the host, and by the device
        got = pydllm.generate(
            model, given, algorithm, max_new_tokens=14, ignore_eos=True, stop=stops
        )
        ids = stops if stops is stop else [stops] * 3
        for row, prompt in enumerate(given):
            answer = free.sequences[row][len(prompt) :].tolist()
            if not set(ids[row]) & set(answer):
                assert torch.equal(got.sequences[row], free.sequences[row])
                continue
            kept = answer[: answer.index(ids[row][0]) + 1]
            assert got.new_tokens[row].tolist() == kept
            assert got.sequences[row].tolist() == prompt + kept
            assert got.finish_reason[row] == "stop"
            assert got.nfe[row] <= free.nfe[row]
            assert torch.equal(got.step_map[row, : len(kept)], free.step_map[row, : len(kept)])
            assert (got.step_map[row, len(kept) :] == -1).all()
    if kind == "causal":
        assert got.nfe[0] == len(got.new_tokens[0])


@pytest.mark.parametrize("name", ["threshold", "multiblock", "left-to-right"])
def test_recorded_steps_stop_where_steps_that_are_run_do(name):
    model, algorithm = setting("full", FULL[name])
    given = prompts(LENGTHS, 0)
    options = {"max_new_tokens": list(NEW), "ignore_eos": True, "stop": [[3], None, [7, 4]]}
    run, replayed = (
        pydllm.generate(model, given, algorithm, graph=graph, **options) for graph in (False, True)
    )
    assert "stop" in run.finish_reason
    assert list(map(torch.Tensor.tolist, run.sequences)) == list(
        map(torch.Tensor.tolist, replayed.sequences)
    )
    assert torch.equal(run.nfe, replayed.nfe)


def test_waiting_prompts_take_the_slots_of_stopped_ones():
    model, _ = models()
    given = prompts(LENGTHS, 0)
    options = {"max_new_tokens": list(NEW), "ignore_eos": True, "stop": [[3], None, [7, 4]]}
    for name in ("threshold", "multiblock", "left-to-right"):
        all_at_once, queued = (
            pydllm.generate(model, given, FULL[name], max_batch=most, **options)
            for most in (None, 1)
        )
        for one, other in zip(all_at_once.sequences, queued.sequences, strict=True):
            assert torch.equal(one, other)
        assert torch.equal(all_at_once.nfe, queued.nfe)


SAM = 8  # a name that no answer has
PROMPTS = ["sam has 7 coins . he finds 5 . he loses 2 . they double . how many coins ? in order"]


@pytest.mark.parametrize(
    "stop", ["answer", "nn 1", "2 an", ["eva", "= 1", "zebra", SAM], [["20", "eva"]], "zebra"]
)
@pytest.mark.parametrize("algorithm", [pydllm.Static(block_length=8), pydllm.LeftToRight()])
def test_strings_stop_across_tokens(tiny, algorithm, stop):
    free = pydllm.generate(tiny, PROMPTS, algorithm, max_new_tokens=48).text[0]
    got = pydllm.generate(tiny, PROMPTS, algorithm, max_new_tokens=48, stop=stop)
    flat = stop if isinstance(stop, list) else [stop]
    flat = [text for text in (flat[0] if isinstance(flat[0], list) else flat) if text != SAM]
    places = [free.index(text) for text in flat if text in free]
    assert got.finish_reason == ["stop" if places else "eos"]
    assert got.text == [free[: min(places, default=None)]]
    raw = tiny.tokenizer.decode(got.new_tokens[0].tolist())
    assert raw.startswith(got.text[0])
    shorter = tiny.tokenizer.decode(got.new_tokens[0][:-1].tolist())
    assert not any(text in shorter for text in flat)


class Letters:
    """Bytes as tokens: a character may take four; 1 is a special token."""

    special = "<end>"

    def decode(self, ids, skip_special_tokens=True):
        parts = [bytes([i]) if i != 1 else b"" if skip_special_tokens else b"<end>" for i in ids]
        return b"".join(parts).decode(errors="replace")

    def get_added_tokens_decoder(self):
        return {1: AddedToken("<end>")}


@pytest.mark.parametrize(
    ("answer", "stop", "kept", "text"),
    [
        ("hello world", "lo w", 7, "hel"),
        ("naïve café", "é", 12, "naïve caf"),
        ("a\N{SNOWMAN}b", "\N{SNOWMAN}b", 5, "a"),
        ("x\x01y", "<end>", 2, "x"),
        ("ab\x01cd", "d", 5, "abc"),
        ("ab\x01cd", "b<end>", 3, "a"),
        ("a\x01b\x01cd", "b<end>c", 5, "a"),
        ("ab\x01cd", "bc", 4, "a"),
        ("abc", ["c", "b"], 2, "a"),
    ],
)
def test_bytes_and_special_tokens(answer, stop, kept, text):
    ids = list(answer.encode())
    stops = read_stops(stop, 1, 256, Letters())
    found = stops.find(0, ids)
    assert (found.tokens, found.text) == (kept, text)
    grown = [stops.reached(0, ids[: count + 1]) for count in range(len(ids))]
    assert grown.index(True) + 1 == kept


def test_an_interrupted_call_returns_what_was_decoded():
    model, _ = models()
    given = prompts(LENGTHS, 0)

    def interrupt(step):
        if step.index == 3:
            raise KeyboardInterrupt

    algorithm = FULL["left-to-right"]
    free = pydllm.generate(model, given, algorithm, max_new_tokens=14, ignore_eos=True)
    got = pydllm.generate(
        model, given, algorithm, max_new_tokens=14, ignore_eos=True, on_step=interrupt, max_batch=2
    )
    assert got.finish_reason == ["interrupted"] * 3
    assert got.nfe.tolist() == [3, 3, 0]
    assert [len(row) for row in got.new_tokens] == [6, 6, 0]
    for row, whole in zip(got.new_tokens, free.new_tokens, strict=True):
        assert torch.equal(row, whole[: len(row)])
    with pytest.raises(KeyboardInterrupt):
        got.expect_complete()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stop": ""}, ValueError, "stop: expected a string of at least one character, got ''"),
        ({"stop": [4.0]}, TypeError, "stop: expected strings and token ids, got 4.0"),
        ({"stop": True}, TypeError, "stop: expected strings and token ids, got True"),
        ({"stop": 10**6}, ValueError, r"stop: expected an int in \[0, \d+\], got 1000000"),
        ({"stop": [["a"], ["b"]]}, ValueError, "stop: expected 1 lists, one per prompt, got 2"),
        ({"ignore_eos": 1}, TypeError, "ignore_eos: expected True or False, got 1"),
        ({"max_new_tokens": [4, 4]}, ValueError, "max_new_tokens: expected 1, one per prompt"),
        ({"max_new_tokens": [True]}, TypeError, "max_new_tokens: expected an int of at least 1"),
    ],
)
def test_what_is_refused(tiny, options, error, message):
    options = {"max_new_tokens": 4} | options
    with pytest.raises(error, match=message):
        pydllm.generate(tiny, PROMPTS, pydllm.Static(), **options)
    model, _ = models()
    with pytest.raises(ValueError, match="the model has no tokenizer"):
        pydllm.generate(model, [[3]], pydllm.Static(), max_new_tokens=4, stop="a")
