"""The modes that pydllm computes in, whatever modes its caller is in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def compute_context(device: torch.device) -> Iterator[None]:
    """The context of a whole computation on ``device``: a generation, a warm-up, a capture.

    Inside it ``device`` is the current CUDA device, autocast and inference mode are off, gradients
    are off, and ``torch.zeros(3)`` is a CPU tensor. What is created inside may therefore be kept
    and used in any mode later: static buffers, caches, captured graphs.

    A mode is entered only where the caller's differs. Threads have modes of their own: a new thread
    enters its own context.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))  # which switches gradients on
        if torch.is_grad_enabled():
            stack.enter_context(torch.no_grad())
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if not _is_current(device):
            stack.enter_context(torch.cuda.device(device))
        yield


def call_in_op_context(device: torch.device, function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function`` with autocast off and ``device`` current (the context of a single op).

    Inference mode stays as it is: an op keeps nothing between calls, and only inference mode may
    write to an inference tensor. Costs two look-ups where nothing deviates.
    """
    kind = device.type
    if torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return _on(device, function, args)
    return function(*args) if kind == "cpu" else _on(device, function, args)


def _on(device: torch.device, function: Callable[..., Any], args: tuple) -> Any:
    if _is_current(device):
        return function(*args)
    with torch.cuda.device(device):
        return function(*args)


def _is_current(device: torch.device) -> bool:
    if device.type != "cuda" or device.index is None:
        return True
    return device.index == torch.cuda.current_device()
