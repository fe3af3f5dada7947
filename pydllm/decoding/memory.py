"""What a call allocates, compared with what is free, before it allocates anything."""

from __future__ import annotations

from pathlib import Path

import torch

from pydllm.decoding.call import Call
from pydllm.decoding.driver import Decoder
from pydllm.decoding.graph import Eager
from pydllm.models import Model, StaticCache

_STATE = 64  # bytes per position: tokens, step map and their copies for results and reports


class _Measure(Eager):
    """A runner that adds up the caches that it is asked for, and makes none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def cache(self, name: str, model: Model, batch: int, max_len: int) -> StaticCache:
        self.bytes += batch * max_len * slot_bytes(model)
        return model.new_cache(batch, 0)


def slot_bytes(model: Model) -> int:
    """Bytes of one position's keys and values, all layers."""
    one = model.new_cache(1, 1)
    return one.keys.nbytes + one.values.nbytes


def needed_memory(call: Call, decoder: Decoder, batch: int) -> int:
    """Bytes of keys, values and tokens of a call whose batch has ``batch`` slots."""
    measure = _Measure()
    decoder.begin(call.with_runner(measure), [0] * batch)
    return measure.bytes + _STATE * call.x.numel()


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where that is not known."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    kibibytes = next(found, None)
    return None if kibibytes is None else int(kibibytes) * 1024


def expect_room(call: Call, decoder: Decoder, batch: int) -> None:
    """Raise ValueError where the caches of a call cannot be allocated.

    Forwards need room of their own besides, which depends on the model: what fits here may still
    be too large.
    """
    free = free_memory(call.device)
    if free is None:
        return
    # The state's own tensors are made to find out: only where it may matter.
    if 4 * batch * call.max_len * (slot_bytes(call.model) + _STATE) < free:
        return
    needed = needed_memory(call, decoder, batch)
    if needed > free:
        raise ValueError(
            f"prompts: expected at most the {free / 2**30:.2f} GiB that are free on {call.device}, "
            f"got {needed / 2**30:.2f} GiB for {batch} sequences of {call.max_len} positions "
            "(max_batch= decodes fewer at a time)"
        )
