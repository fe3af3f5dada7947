"""What a harness asks for, without the harness; algorithms from names and text."""

import dataclasses
import json
import shutil

import pytest
import torch

import pydllm
from pydllm.decoding.settings import (
    ALGORITHMS,
    SettingError,
    fit_blocks,
    make_algorithm,
    parameters,
)
from pydllm.demo import MODELS, VERIFIER
from pydllm.demo.task import held_out_problems
from pydllm.integrations.evaluation import Evaluator
from pydllm.metrics import log_likelihood, matches_greedy

PROBLEMS = held_out_problems(5)
OPTIONS = {"until": [], "max_gen_toks": 48}


@pytest.fixture(scope="module")
def model():
    return pydllm.load(MODELS["llada-tiny"], device="cpu")


def _evaluator(model, **options):
    algorithm = options.pop("algorithm", pydllm.Threshold(threshold=0.9, block_length=24))
    return Evaluator(model, algorithm, **options)


@pytest.fixture(scope="module")
def expected(model):
    prompts = [problem.prompt for problem in PROBLEMS]
    return pydllm.generate(
        model, prompts, pydllm.Threshold(threshold=0.9, block_length=24), max_new_tokens=48
    )


def test_answers_are_those_of_generate_in_any_batch(model, expected):
    requests = [(problem.prompt, OPTIONS) for problem in PROBLEMS]
    for size in (1, 2, 5):
        evaluator, done = _evaluator(model, batch_size=size), []
        tasks = ["a", "a", "b", "a", "b"]
        answers = evaluator.generate_until(
            requests, tasks=tasks, on_done=lambda i, text, done=done: done.append((i, text))
        )
        assert answers == expected.text
        assert sorted(done) == list(enumerate(answers))
        report = evaluator.report()
        assert [report[task]["requests"] for task in "ab"] == [3, 2]
        assert sum(row["forwards"] for row in report.values()) == expected.nfe.sum()
        rate = expected.tokens_per_forward[[2, 4]].mean().item()
        assert abs(report["b"]["tokens_per_forward"] - rate) < 1e-3
        assert report["a"]["tokens_per_second"] > 0


def test_an_answer_stops_at_the_first_of_its_strings(model, expected):
    text = expected.text[0]
    words = text.split()
    options = OPTIONS | {"until": [words[4], words[2], ""]}
    got = _evaluator(model).generate_until([(PROBLEMS[0].prompt, options)])
    first = min(text.index(word) for word in (words[4], words[2]))
    assert got == [text[:first]]
    one = _evaluator(model).generate_until([(PROBLEMS[0].prompt, OPTIONS | {"until": words[2]})])
    assert one == [text.partition(words[2])[0]]


@pytest.mark.parametrize("stop", ["answer", " answer"])
def test_a_stop_string_may_be_a_special_token(model, tmp_path, stop):
    """As a chat model's end of turn is: what is dropped from the text still ends it."""
    shutil.copytree(MODELS["sdar-tiny"], tmp_path / "model")
    file = tmp_path / "model/tokenizer.json"
    tokenizer = json.loads(file.read_text())
    token = {"id": tokenizer["model"]["vocab"]["answer"], "content": "answer", "special": True}
    token |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    requests = [(problem.prompt, OPTIONS | {"until": [stop]}) for problem in PROBLEMS]
    algorithm = pydllm.Static(block_length=8)
    plain = pydllm.load(tmp_path / "model", device="cpu")
    want = _evaluator(plain, algorithm=algorithm).generate_until(requests)
    tokenizer["added_tokens"].append(token)
    file.write_text(json.dumps(tokenizer))
    special = pydllm.load(tmp_path / "model", device="cpu")
    whole = _evaluator(special, algorithm=algorithm).generate_until(
        [(problem.prompt, OPTIONS) for problem in PROBLEMS]
    )
    got = _evaluator(special, algorithm=algorithm).generate_until(requests)
    assert [text.strip() for text in got] == [text.strip() for text in want]
    assert all(len(short) < len(text) for short, text in zip(got, whole, strict=True))


def test_lengths_and_temperatures_are_each_requests_own(model):
    prompts = [problem.prompt for problem in PROBLEMS]
    options = [
        {"max_new_tokens": 24, "do_sample": False, "temperature": 5.0, "top_k": 3},
        {"max_gen_toks": 48, "temperature": 1.0, "top_p": 0.6, "top_k": 8},
        {"max_tokens": 24, "top_p": 1.0},
        {},
        {"max_gen_toks": 48, "temperature": 0.0, "do_sample": True},
    ]
    evaluator = _evaluator(model, batch_size=3, max_gen_toks=24, seed=7)
    got = evaluator.generate_until(list(zip(prompts, options, strict=True)))
    for index, (length, heat) in enumerate([(24, 0), (48, 1), (24, 0), (24, 0), (48, 0)]):
        alone = pydllm.generate(
            model,
            [prompts[index]],
            pydllm.Threshold(threshold=0.9, block_length=24),
            max_new_tokens=length,
            temperature=float(heat),
            top_p=0.6 if heat else None,
            top_k=8 if heat else None,
            seed=7,
            request_ids=[index],
        )
        assert got[index] == alone.text[0]


def test_a_prompt_that_is_too_long_loses_its_beginning(model, caplog):
    evaluator = _evaluator(model, max_length=60)
    prompt = PROBLEMS[0].prompt
    long = "sam has 5 coins . " * 9 + prompt
    got = evaluator.generate_until([(long, {"max_gen_toks": 24})])
    ids = evaluator.encode(long)
    want = pydllm.generate(model, [ids[-36:]], evaluator.algorithm, max_new_tokens=24)
    assert got == want.text
    assert f"lost its first {len(ids) - 36}" in caplog.text
    with pytest.raises(ValueError, match="max_gen_toks: expected fewer than the 60 positions"):
        evaluator.generate_until([(prompt, {"max_gen_toks": 60})])


def test_likelihoods(model):
    problem = PROBLEMS[0]
    evaluator = _evaluator(model, mc_num=8, batch_size=4)
    work, _, answer = problem.solution.rpartition(" ")
    context = f"{problem.prompt} {work} "  # its space moves to the continuation
    requests = [(context, answer), (context, "39"), (problem.prompt, " " + problem.solution)]
    got = evaluator.loglikelihood(requests)
    pairs = []
    for given, continuation in requests:
        whole = evaluator.encode(given + continuation)
        cut = len(evaluator.encode(given.rstrip()))
        pairs.append((whole[:cut], whole[cut:]))
    assert len(pairs[0][1]) == 1 and len(pairs[2][1]) > 10
    want = log_likelihood(model, pairs, samples=8)
    torch.testing.assert_close(torch.tensor([s for s, _ in got]).double(), want, rtol=1e-5, atol=0)
    assert [greedy for _, greedy in got] == matches_greedy(model, pairs).tolist()
    assert got[0][1] and not got[1][1] and got[0][0] > got[1][0]
    quick = _evaluator(model, mc_num=8, check_greedy=False).loglikelihood(requests)
    assert not any(greedy for _, greedy in quick)
    with pytest.raises(ValueError, match="continuation: expected fewer than 8 tokens, got 16"):
        _evaluator(model, max_length=8).loglikelihood([("tom", " 3" * 16)])


def test_a_text_is_scored_in_pieces(model):
    evaluator = _evaluator(model, mc_num=4, max_length=16, batch_size=3)
    begun = "sam has 5 coins . he finds 3 . they double . "
    texts = [begun + PROBLEMS[0].prompt, "sam has 5 coins ."]
    ids = evaluator.encode(texts[0])
    pieces = [([], ids[i : i + 16]) for i in range(0, len(ids), 16)]
    assert len(pieces) == 3
    want = log_likelihood(model, pieces, samples=4).sum().item()
    got = evaluator.loglikelihood_rolling(texts)
    assert abs(got[0] / want - 1) < 1e-5
    assert got[1] < 0


def test_a_shifted_model_reads_an_end_of_sequence_first(model):
    shifted = pydllm.load(MODELS["llada-tiny"], device="cpu")
    shifted.spec = dataclasses.replace(shifted.spec, shift_logits=True)
    evaluator = _evaluator(shifted, mc_num=4)
    ids = evaluator.encode("sam has")
    want = log_likelihood(shifted, [([shifted.spec.eos_ids[0]], ids)], samples=4).item()
    close = pytest.approx(want, rel=1e-5)  # other batches, other roundings
    assert evaluator.loglikelihood_rolling(["sam has"])[0] == close
    assert evaluator.loglikelihood([("", "sam has")])[0][0] == close
    assert evaluator.generate_until([("", {"max_gen_toks": 24})])[0] is not None


def test_a_special_token_is_added_once_and_not_scored():
    """A tokenizer that adds BOS; a rendered template has it already."""
    from tokenizers.processors import TemplateProcessing

    model = pydllm.load(MODELS["llada-tiny"], device="cpu")
    bos = model.tokenizer.token_to_id("<pad>")
    bare = model.tokenizer.encode("tom has").ids
    model.tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", bos)]
    )
    evaluator = _evaluator(model, mc_num=4)
    assert evaluator.encode("tom has") == evaluator.encode("<pad> tom has") == [bos, *bare]
    want = log_likelihood(model, [([bos], bare)], samples=4).item()
    assert evaluator.loglikelihood([("", "tom has")])[0][0] == pytest.approx(want, rel=1e-5)
    assert evaluator.loglikelihood_rolling(["tom has"])[0] == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 1.0, "min_p": 0.9}, "min_p: expected one of the options until, max_gen"),
        (
            {"temperature": 1.0, "top_p": 1.9, "max_gen_toks": 8},
            r"top_p: expected a number in \(0, 1\] or None, got 1.9",
        ),
        ({"num_beams": 4}, "num_beams: expected one of the options"),
        ({"colour": "red"}, "colour: expected one of the options"),
    ],
)
def test_options_that_no_algorithm_has(model, options, message):
    with pytest.raises(ValueError, match=message):
        _evaluator(model).generate_until([("tom", options)])


def test_bad_settings_of_the_evaluator(model):
    with pytest.raises(ValueError, match="mc_num: expected an int of at least 1, got 0"):
        _evaluator(model, mc_num=0)
    with pytest.raises(ValueError, match="max_length: expected 2 to 128, got 4096"):
        _evaluator(model, max_length=4096)
    bare = pydllm.load(MODELS["llada-tiny"], device="cpu")
    bare.tokenizer = None
    with pytest.raises(ValueError, match="expected one with a tokenizer.json, got none"):
        _evaluator(bare)


def test_every_algorithm_and_every_parameter_can_be_named():
    verifier = pydllm.load(VERIFIER, device="cpu")
    for name, kind in ALGORITHMS.items():
        default = make_algorithm(name, {}, lambda: verifier)
        values = {key: getattr(default, key) for key in parameters(kind)}
        again = make_algorithm(
            name.upper(), {k: str(v) for k, v in values.items()}, lambda: verifier
        )
        assert {key: getattr(again, key) for key in values} == values
    got = make_algorithm(
        "freedave",
        {"draft_steps": "4", "baseline": "threshold", "baseline.threshold": 0.8},
    )
    assert got == pydllm.FreeDave(draft_steps=4, baseline=pydllm.Threshold(threshold=0.8))


def test_blocks_are_those_of_the_model_unless_named():
    causal, full = (pydllm.load(MODELS[name], device="cpu") for name in ("sdar-tiny", "llada-tiny"))
    for name in ALGORITHMS.keys() - {"apd"}:
        for settings in ({}, {"block_length": 16}):
            if settings and "block_length" not in parameters(ALGORITHMS[name]):
                continue
            made = make_algorithm(name, settings)
            assert fit_blocks(made, settings, full) is made
            length = getattr(fit_blocks(made, settings, causal), "block_length", None)
            assert length == settings.get("block_length", 8) or not hasattr(made, "block_length")
    drafts = {"baseline": "threshold"}
    got = fit_blocks(make_algorithm("freedave", drafts), drafts, causal)
    assert got == pydllm.FreeDave(baseline=pydllm.Threshold(block_length=8))
    drafts["baseline.block_length"] = "4"
    made = make_algorithm("freedave", drafts)
    assert fit_blocks(made, drafts, causal) == made


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("best", {}, "algorithm: expected one of static, threshold, .*, multiblock, .*got best"),
        ("threshold", {"speed": 1}, "threshold takes threshold, block_length, .*; got 'speed'"),
        ("freedave", {"speed": 1}, "freedave takes draft_steps, .*, baseline, baseline.NAME; got"),
        ("freedave", {"baseline.threshold": 1}, "got 'baseline.threshold'"),
        ("freedave", {"baseline": "best"}, "algorithm: expected one of static"),
        ("threshold", {"threshold": "x"}, "threshold: expected float, got 'x'"),
    ],
)
def test_names_that_do_not_exist(name, settings, message):
    with pytest.raises(SettingError, match=message):
        make_algorithm(name, settings)
