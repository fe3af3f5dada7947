"""Decode the same problems with several algorithms, and count what each costs.

python examples/decode.py
"""

import pydllm
from pydllm.demo import WEIGHTS
from pydllm.demo.task import held_out_problems

model = pydllm.load(WEIGHTS)  # or a folder, a hub id, or a loaded module
prompts = [problem.prompt for problem in held_out_problems(4)]
static = pydllm.generate(model, prompts, pydllm.Static(block_length=24), max_new_tokens=48)
for algorithm in (
    pydllm.Threshold(threshold=0.9, block_length=24, cache="dual"),
    pydllm.FreeDave(draft_steps=8, block_length=24),
    pydllm.MultiBlock(threshold=0.5, block_length=16),
):
    got = pydllm.generate(model, prompts, algorithm, max_new_tokens=48)
    same = sum(a.equal(b) for a, b in zip(got.sequences, static.sequences, strict=True))
    print(
        f"{type(algorithm).__name__:10} {got.nfe.float().mean():5.1f} forwards for "
        f"{static.nfe.float().mean():.1f}, {got.tokens_per_forward.mean():.2f} tokens per forward, "
        f"{same} of {len(prompts)} answers as one token per forward"
    )
