"""LLaDA's own ``generate``, its import replaced: the same arguments, the same tokens.

python examples/drop_in.py
"""

import torch

import pydllm
from pydllm.demo import WEIGHTS
from pydllm.demo.task import held_out_problems
from pydllm.integrations.llada import generate  # before: from generate import generate

model = pydllm.load(WEIGHTS)  # or your loaded LLaDA module, whose weights are then shared
prompt = held_out_problems(1)[0].prompt
ids = torch.tensor([model.tokenizer.encode(prompt).ids])
mask_id = model.spec.mask_id
x = generate(model, ids, steps=48, gen_length=48, block_length=24, temperature=0.0, mask_id=mask_id)
print(prompt)
print(model.tokenizer.decode(x[0, ids.shape[1] :].tolist()))
