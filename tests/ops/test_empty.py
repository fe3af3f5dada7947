"""Every op takes a batch of no sequences or rows, on every backend."""

import pytest
import torch

from tests.ops.calls import RUNS, commit_branch, window_attention, window_attention_branches

# Tensors without a batch or rows.
WHOLE = {
    *(
        "weight",
        "scale",
        "bias",
        "router",
        "suppress_ids",
        "eos_ids",
        "cos",
        "sin",
        "q_norm",
        "k_norm",
    ),
    *("gate_up", "down", "shared_gate_up", "shared_down", "norm"),
}
SECOND = {"numbers", "blocks", "values"}  # whose second dimension it is


def without_rows(name, tensor):
    if name in WHOLE or tensor.shape[0] == 5:  # pages are those of all sequences
        return tensor
    if name in SECOND or (name == "ids" and tensor.ndim == 3):
        return tensor[:, :0].clone()
    return tensor[:0].clone()


def shapes(call, backend, lay):
    torch.manual_seed(0)
    results = call(lay, backend)
    results = (results,) if isinstance(results, torch.Tensor) else tuple(results or ())
    return [(tensor.shape, tensor.dtype) for tensor in results]


@pytest.mark.parametrize("call, backend", RUNS, ids=lambda value: getattr(value, "__name__", value))
def test_no_rows(call, backend):
    expected = shapes(call, "torch", without_rows)
    assert shapes(call, backend, without_rows) == expected


@pytest.mark.parametrize("backend", ["torch", "triton", "cuda"])
@pytest.mark.parametrize(
    "call", [window_attention, window_attention_branches, commit_branch], ids=lambda c: c.__name__
)
def test_a_window_of_no_rows(call, backend):
    caches = {}

    def lay(name, tensor):
        if name in ("q", "k", "v"):
            return tensor[:, :0].clone()
        if name in ("k_cache", "v_cache"):
            caches[name] = tensor, tensor.clone()
        return tensor

    torch.manual_seed(0)
    out = call(lay, backend)
    assert out is None or out.numel() == 0
    assert len(caches) == 2
    assert all(torch.equal(*pair) for pair in caches.values())
