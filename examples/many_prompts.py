"""Decode many prompts through a batch of four: a waiting prompt takes the slot of a finished one.

python examples/many_prompts.py
"""

import pydllm
from pydllm.demo import WEIGHTS
from pydllm.demo.task import held_out_problems

model = pydllm.load(WEIGHTS)
prompts = [problem.prompt for problem in held_out_problems(12)]
forwards = []
got = pydllm.generate(
    model,
    prompts,
    pydllm.Threshold(threshold=0.9, block_length=24),
    max_new_tokens=48,
    max_batch=4,
    on_step=lambda step: forwards.append(step.index),
)
for prompt, text in zip(prompts, got.text, strict=True):
    print(f"{prompt}\n    {text}")
print(f"{forwards[-1]} forwards of the batch, {int(got.nfe.sum())} of its sequences")
