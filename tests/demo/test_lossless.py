"""FreeDave on a bundled model in half precision, every op a Triton kernel."""

import pytest
import torch

import pydllm
from pydllm.demo import MODELS
from pydllm.demo.task import held_out_problems


@pytest.mark.slow
def test_fp16_tokens_equal_static_ones():
    model = pydllm.load(MODELS["sdar-tiny"], dtype=torch.float16, device="cpu")
    prompts = [problem.prompt for problem in held_out_problems(1, seed=4)]
    expected, got = (
        pydllm.generate(model, prompts, algorithm, max_new_tokens=8, backend="triton")
        for algorithm in (
            pydllm.Static(block_length=8),
            pydllm.FreeDave(draft_steps=3, block_length=8, mode="pipelined"),
        )
    )
    assert torch.equal(got.sequences[0], expected.sequences[0])
    assert got.nfe < expected.nfe
