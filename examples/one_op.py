"""A denoising step of one's own loop by two ops: logits to statistics, statistics to tokens.

python examples/one_op.py
"""

import torch

from pydllm import ops

vocab, mask_id, rows = 1000, 999, 8
logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0))
x = torch.full((1, rows), mask_id)
step_map = torch.full_like(x, -1, dtype=torch.int32)
nfe = torch.zeros(1, dtype=torch.int32)

# One pass over the logits; the mask is never predicted.
stats = ops.vocab_stats(logits, suppress_ids=torch.tensor([mask_id], dtype=torch.int32))
ops.unmask(
    x,
    step_map,
    nfe,
    stats.token[None],
    stats.prob[None],
    mask_id=mask_id,
    start=torch.zeros(1, dtype=torch.int32),
    length=torch.full((1,), rows, dtype=torch.int32),
    rule="quota",
    quota=torch.full((1,), 3, dtype=torch.int32),  # the three most confident positions
)
print("token      ", x[0].tolist())
print("confidence ", [round(p, 3) for p in stats.prob.tolist()])
print("written in ", step_map[0].tolist())
