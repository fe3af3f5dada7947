"""How things are timed: medians of many runs, cold caches on a GPU, and the machine's rates."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """20th, 50th and 80th percentile of the runs, in milliseconds."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, milliseconds: list[float]) -> Timing:
        ordered = sorted(milliseconds)
        last = len(ordered) - 1
        low, high = ordered[round(0.2 * last)], ordered[round(0.8 * last)]
        return cls(low, statistics.median(ordered), high)


def time_calls(
    function: Callable[[dict], object], fresh: Callable[[], dict], device: str, *, seconds: float
) -> Timing:
    """Time ``function(fresh())`` for about ``seconds``; making the inputs is not timed.

    On a GPU each call is timed alone between events, after a write larger than the L2 cache.
    """
    for _ in range(2):
        function(fresh())
    run = _time_gpu if device.startswith("cuda") else _time_cpu
    runs: list[float] = []
    stop = time.perf_counter() + seconds
    while len(runs) < 5 or (time.perf_counter() < stop and len(runs) < 500):
        runs.append(run(function, fresh()))
    return Timing.of(runs)


def _time_cpu(function: Callable[[dict], object], inputs: dict) -> float:
    started = time.perf_counter()
    function(inputs)
    return 1e3 * (time.perf_counter() - started)


def _time_gpu(function: Callable[[dict], object], inputs: dict) -> float:
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    flush.fill_(1)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function(inputs)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Measured operations a second of a large matrix product."""
    size = 8192 if device.startswith("cuda") else 512
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timing = time_calls(lambda _: a @ b, dict, device, seconds=0.3)
    return 2 * size**3 / (timing.p50 * 1e-3)


def copy_rate(device: str) -> float:
    """Measured bytes a second of a large copy, reads and writes both counted."""
    size = (2**30 if device.startswith("cuda") else 2**27) // 4
    source = torch.rand(size, device=device)
    target = torch.empty_like(source)
    timing = time_calls(lambda _: target.copy_(source), dict, device, seconds=0.5)
    return 2 * 4 * size / (timing.p50 * 1e-3)
