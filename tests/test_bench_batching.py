"""``bench.batching``: prompts in slots against prompts alone."""

import dataclasses

import pytest
import torch
from click.testing import CliRunner

import pydllm
from bench import batching


@pytest.mark.parametrize("algorithm", ["threshold", "multiblock"])
def test_every_prompt_is_as_alone(algorithm):
    arguments = ["--prompts", "6", "--new", "8", "--max-batch", "3", "--algorithm", algorithm]
    result = CliRunner().invoke(batching.main, arguments)
    assert result.exit_code == 0, result.output
    assert result.output.count("0 of 6") == 2, result.output  # alone, and three at a time


def test_a_difference_is_counted():
    nfe, step = torch.tensor([3]), torch.zeros(1, 2, dtype=torch.int64)
    one = pydllm.Generation([step[0]], [step[0]], ["length"], nfe, nfe / 2, step, None)
    assert batching.differing(one, [one]) == 0
    for change in (
        {"sequences": [step[0] + 1]},
        {"step_map": step + 1},
        {"nfe": nfe + 1},
        {"finish_reason": ["eos"]},
    ):
        assert batching.differing(one, [dataclasses.replace(one, **change)]) == 1
