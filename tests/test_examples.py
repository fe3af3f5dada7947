"""The examples run; the algorithm that one of them adds decodes as a plain loop does."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
import torch

import pydllm
from tests.decoding.test_graph import LENGTHS, NEW, models, prompts

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where a dataclass looks for its names
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_examples_run(name, capsys):
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out


def plain(model, prompt, tokens):
    """The same from its description, one sequence, every forward over all of it."""
    x = torch.tensor([*prompt, *[model.spec.mask_id] * NEW])
    forwards = 0
    while (x == model.spec.mask_id).any():
        length = torch.tensor([len(x)], dtype=torch.int32)
        zero = torch.zeros_like(length)
        cache = model.new_cache(1, 0)
        hidden = model.forward(x[None], zero, cache, length=length, kv_len=length, commit=zero)
        logits = model.head(hidden)[0]
        logits[:, model.spec.mask_id] = -torch.inf
        for place in (x == model.spec.mask_id).nonzero().flatten().tolist()[-tokens:]:
            x[place] = logits[place].argmax()
        forwards += 1
    ends = [place for place in range(len(prompt), len(x)) if int(x[place]) in model.spec.eos_ids]
    if ends:
        x[ends[0] + 1 :] = model.spec.eos_ids[0]
    return x, forwards


@pytest.mark.parametrize("tokens", [1, 3])
def test_right_to_left(tokens):
    algorithm = load("right_to_left").RightToLeft(tokens_per_step=tokens)
    model, _ = models()
    ids = prompts(LENGTHS, 0)
    expected = [plain(model, prompt, tokens) for prompt in ids]
    for options in ({}, {"graph": True}, {"max_batch": 2}, {"max_batch": 2, "graph": True}):
        for _ in range(3 if "graph" in options else 1):
            got = pydllm.generate(model, ids, algorithm, max_new_tokens=NEW, **options)
            for row, (x, forwards) in enumerate(expected):
                assert torch.equal(got.sequences[row], x)
                assert got.nfe[row] == forwards
