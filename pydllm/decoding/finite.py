"""Whether a model's numbers are finite, asked only where an answer looks as if they were not."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from pydllm.decoding.call import Call


def check_finite(call: Call, x: Tensor, tokens: Tensor) -> Tensor:
    """Warn of sequences for which the model computes NaN or infinity; returns ``(N,)`` bool.

    A row of NaN logits predicts id 0, or leaves a mask. Answers that hold either are forwarded
    once; the others, nearly all, cost nothing.

    Args:
        x: ``(N, L)`` int64, decoded, on the call's device.
        tokens: the same on the CPU.
    """
    lengths, ends = (torch.tensor(t)[:, None] for t in (call.first_positions, call.ends))
    position = torch.arange(x.shape[1])
    new = (position >= lengths) & (position < ends)
    doubtful = tokens == call.mask_id
    if 0 not in call.model.spec.eos_ids:
        doubtful |= tokens == 0
    rows = (doubtful & new).any(1).nonzero().flatten()
    finite = torch.ones(len(x), dtype=torch.bool)
    for row in rows.tolist():
        if _is_finite(call, x[row, : call.ends[row]], call.first_positions[row]):
            continue
        finite[row] = False
        warnings.warn(
            f"prompts[{row}]: expected finite numbers from the model, got NaN or infinite logits; "
            "the answer means nothing",
            RuntimeWarning,
            stacklevel=4,
        )
    return finite


def _is_finite(call: Call, sequence: Tensor, first: int) -> bool:
    model = getattr(call.model, "unguided", call.model)
    length = torch.full_like(call.end[:1], len(sequence))
    zero, spec = torch.zeros_like(length), model.spec
    # Any mask tells; some models have no single one for a whole sequence.
    plain = spec.block_origin == "zero" and spec.context == "block"
    options: dict[str, Any] = {} if plain else {"attention": "full"}
    hidden = model.forward(
        sequence[None].clamp(min=0),
        zero,
        model.new_cache(1, 0),
        length=length,
        kv_len=length,
        commit=zero,
        backend=call.backend,
        **options,
    )
    last = hidden[0, max(0, first - 1) :]
    return bool(model.head_stats(last, backend=call.backend).logsumexp.isfinite().all())
