"""What may be given as prompts, and what a result says of itself."""

from __future__ import annotations

import numpy
import pytest
import torch

import pydllm
from pydllm.decoding.prompts import encode_prompts
from pydllm.demo import WEIGHTS
from pydllm.models import ChatTemplate
from tests.decoding.test_graph import models


@pytest.fixture(scope="module")
def model():
    return pydllm.load(WEIGHTS)


IDS = [[3, 4, 5], [6, 7, 8]]


FORMS = {
    "lists": IDS,
    "tuples": tuple(map(tuple, IDS)),
    "tensors": [torch.tensor(row) for row in IDS],
    "arrays": [numpy.array(row) for row in IDS],
    "tensor": torch.tensor(IDS),
    "int32": torch.tensor(IDS, dtype=torch.int32),
    "array": numpy.array(IDS),
    "mapping": {"input_ids": torch.tensor(IDS)},
    "padded": {
        "input_ids": [[9, 3, 4, 5], [6, 7, 8, 9]],
        "attention_mask": [[0, 1, 1, 1], [1, 1, 1, 0]],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_prompts(model, form):
    assert encode_prompts(model, FORMS[form]) == IDS


def test_messages_are_rendered_by_the_template(model):
    messages = [{"role": "user", "content": "tom has 3 coins"}]
    with pytest.raises(ValueError, match=r"prompts\[0\]: .*without a template"):
        encode_prompts(model, [messages])
    template = "{% for m in messages %}{{ m.content }} .{% endfor %}"
    model.chat_template = ChatTemplate({"default": template}, {})
    try:
        assert encode_prompts(model, [messages]) == encode_prompts(model, ["tom has 3 coins ."])
    finally:
        model.chat_template = None


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        (None, ValueError, "prompts: expected a list of one or more prompts, got None"),
        ([], ValueError, "prompts: expected a list of one or more prompts, got list"),
        ("tom", ValueError, "prompts: expected a list of one or more prompts, got 'tom'"),
        ({"ids": [[3]]}, ValueError, "prompts: expected a mapping with input_ids, got ids"),
        ({"input_ids": [3]}, ValueError, r"input_ids and attention_mask of one shape \(B, L\)"),
        (torch.tensor([3]), ValueError, r"prompts: expected shape \(B, L\), got \(1,\)"),
        (torch.ones(1, 2), TypeError, r"prompts\[0\]: expected integer token ids, got torch.float"),
        ([[3.0]], TypeError, r"prompts\[0\]: expected a list of ints, got list \[3.0\]"),
        ([[True]], TypeError, r"prompts\[0\]: expected a list of ints"),
        ([None], TypeError, r"prompts\[0\]: expected a list of ints, got None"),
        ([[1000]], ValueError, r"prompts\[0\]\[0\]: expected a token id in \[0, \d+\), got 1000"),
    ],
)
def test_prompts_that_are_refused(model, prompts, error, message):
    with pytest.raises(error, match=message):
        pydllm.generate(model, prompts, pydllm.Static(), max_new_tokens=4)


def test_a_result_says_what_it_is():
    tiny, _ = models()
    got = pydllm.generate(tiny, [[10], [11, 12]], pydllm.Static(block_length=4), max_new_tokens=12)
    for row, new in enumerate(got.new_tokens):
        start = len(got.sequences[row]) - 12
        assert new.tolist() == got.sequences[row][start : start + len(new)].tolist()
        ended = int(new[-1]) in tiny.spec.eos_ids
        assert got.finish_reason[row] == ("eos" if ended else "length")
        assert ended or len(new) == 12
        assert got.tokens_per_forward[row] == pytest.approx(len(new) / int(got.nfe[row]))
    total = sum(map(len, got.new_tokens))
    assert repr(got).startswith(f"Generation(2 sequences, {total} new tokens, ")
