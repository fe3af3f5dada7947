"""The modes that a computation runs in do not depend on those of its caller."""

from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch

from pydllm._backend.context import call_in_op_context, compute_context

CPU = torch.device("cpu")
MODES = {
    "none": nullcontext,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "gradients off": torch.no_grad,
}


def modes():
    return (
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_device().type,
    )


@pytest.mark.parametrize("mode", MODES)
def test_compute_context_replaces_the_modes_and_restores_them(mode):
    with MODES[mode]():
        outside = modes()
        with compute_context(CPU):
            assert modes() == (False, False, False, "cpu")
            kept = torch.zeros(3)
        assert modes() == outside
        with pytest.raises(KeyError), compute_context(CPU):
            raise KeyError
        assert modes() == outside
    assert not kept.is_inference()
    kept.add_(1)


def test_op_context_turns_autocast_off_and_leaves_inference_mode():
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        written = torch.zeros(2)
        product = call_in_op_context(CPU, lambda a: a.add_(1) @ a, written)
    assert product.dtype == torch.float32 and product == 2


@pytest.mark.parametrize("index, entered", [(None, 0), (0, 0), (1, 1)])
def test_the_device_of_the_tensors_is_made_current(monkeypatch, index, entered):
    current, seen = [0], []

    @contextmanager
    def on(device):
        current.append(device.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    device = mock.Mock(side_effect=on)
    monkeypatch.setattr(torch.cuda, "device", device)
    target = torch.device("cuda", index) if index is not None else torch.device("cuda")
    with compute_context(target):
        seen.append(current[-1])
    call_in_op_context(target, lambda: seen.append(current[-1]))
    assert seen == [index or 0] * 2
    assert device.call_count == 2 * entered
    assert current == [0]
