"""What exceeds a grid (65,535 programs along its second and third dimension), a tile, or the int32
that ids are: it is refused."""

from __future__ import annotations

import pytest
import torch

from pydllm._backend.cuda import route as cuda_route
from pydllm.kernels import (
    certainty_loss,
    commit_branch,
    edit_block,
    experts,
    linear,
    mixture_accept,
    mixture_draft,
    route,
    swiglu,
    window_attention,
)

MOST = 65535


def meta(*shape, dtype=torch.float16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def numbers(*shape):
    return meta(*shape, dtype=torch.int32)


def attention(batch, heads):
    k, table, each = meta(batch, 1, heads, 64), meta(1, 32, dtype=torch.float32), numbers(batch)
    return window_attention.supports(*[k] * 5, *[each] * 4, table, table, *[None] * 5)


def commit(batch, heads):
    k, table, each = meta(batch, 1, heads, 64), meta(1, 32, dtype=torch.float32), numbers(batch)
    return commit_branch.supports(*[k] * 4, *[each] * 3, table, table, None, None, None)


def routed(kernel, rows, capacity=None, width=8):
    options = (2, "softmax", True, 1.0, 1, 1, capacity, 1, 1)
    return kernel.supports(meta(1, rows, width), meta(4, width), None, None, None, *options)


def drafted(vocab):
    given = meta(1, vocab), 1.0, 0, numbers(1, 3)
    return mixture_draft.supports(*given, None, None, None, vocab, 0.9, None, 4)


def mixed(vocab):
    given = meta(1, vocab), meta(1, vocab), meta(1, dtype=torch.int64), numbers(1)
    options = 0.0, None, 0, None, None, vocab, True, False
    return mixture_accept.supports(*given, 0.5, None, None, *options)


def edited(vocab):
    x, flag, each = meta(1, 4, dtype=torch.int64), meta(1, 4, dtype=torch.bool), numbers(1)
    table, logits = numbers(1, 5, 4), meta(1, 4, vocab)
    state = x, numbers(1, 4), each, flag, each, each, table, table, each, logits
    return edit_block.supports(*state, 0, 1, 2, each, each, each, 0.5, 0.5, 1)


def mlp(width, inner):
    halves = meta(4, 2 * inner, width), meta(4, width, inner)
    routes = numbers(1, 2), meta(1, 2, dtype=torch.float32)
    return experts.supports(meta(1, width), *halves, *routes, None, None, "silu")


CASES = {
    "window_attention, sequences": (attention, (MOST, 1), (MOST + 1, 1)),
    "window_attention, heads": (attention, (1, MOST), (1, MOST + 1)),
    "commit_branch": (commit, (MOST, MOST), (MOST + 1, 1)),
    "route, rows": (routed, (route, 2**19), (route, 2**23)),
    "route, columns": (routed, (route, 1, None, 2**23), (route, 1, None, 2**25)),
    "route, blocks": (routed, (route, MOST - 2, 4), (route, MOST - 1, 4)),
    "route in CUDA, rows": (routed, (cuda_route, 8 * MOST), (cuda_route, 8 * MOST + 1)),
    "route in CUDA, blocks": (routed, (cuda_route, MOST - 2, 4), (cuda_route, MOST - 1, 4)),
    "experts": (mlp, (64 * MOST, 1), (1, 64 * MOST + 1)),
    "linear": (lambda n: linear.supports(meta(1, 1), meta(n, 1), None, None), (2**25,), (2**27,)),
    "swiglu": (lambda n: swiglu.supports(meta(1, 2 * n)), (2**25,), (2**27,)),
    "mixture_draft": (drafted, (2**30,), (2**30 + 1,)),
    "mixture_accept": (mixed, (2**21,), (2**26,)),
    "edit_block": (edited, (2**30,), (2**30 + 1,)),
    "certainty_loss": (
        lambda n: certainty_loss.supports(meta(1, n), meta(1, dtype=torch.int64), 1.0),
        (2**26,),
        (2**31,),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_supports_knows_the_limits_of_a_grid(name):
    supports, fits, exceeds = CASES[name]
    assert supports(*fits) is None
    assert "kernel takes up to" in supports(*exceeds)
