import math

import pytest
import torch

from pydllm import ops
from pydllm.reference import philox
from pydllm.testing import random_normal


def _counter(rows, draw=0):
    counter = torch.full((rows, 3), 7, dtype=torch.int32)
    counter[:, 0] += torch.arange(rows, dtype=torch.int32)
    counter[:, 2] = draw
    return counter


@pytest.mark.parametrize("top_p", [0.3, 0.8, 0.95])
def test_nucleus_and_draft_against_a_loop(top_p):
    logits = random_normal(20, 97, seed=0, dtype=torch.float64) * 2
    noise = philox.vocab_gumbel(97, _counter(20), 5)
    draft = ops.mixture_draft(
        logits, temperature=0.7, seed=5, counter=_counter(20), top_p=top_p, capacity=97
    )
    for row, x in enumerate((logits / 0.7).tolist()):
        total = math.fsum(math.exp(v) for v in x)
        nucleus, mass = [], 0.0
        for v in sorted(range(97), key=lambda v: -x[v]):
            nucleus.append(v)
            mass += math.exp(x[v]) / total
            if mass > top_p:
                break
        assert draft.candidates.ids[row, : len(nucleus)].tolist() == sorted(nucleus)
        assert draft.candidates.size[row] == len(nucleus)
        assert draft.threshold[row] == min(logits[row, v] for v in nucleus)
        assert draft.logsumexp[row].item() == pytest.approx(math.log(total), rel=1e-12)
        assert draft.token[row] == max(nucleus, key=lambda v: (x[v] + noise[row, v].item(), -v))
