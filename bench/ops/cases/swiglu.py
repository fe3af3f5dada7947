"""``swiglu`` at three models' feed-forward widths."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ops import peers
from pydllm import ops, reference
from pydllm.testing import random_normal

SHAPES = {
    f"{name}-{rows}": {"rows": rows, "width": width}
    for name, width in (("llada-8b", 12288), ("dream-7b", 18944), ("tiny", 256))
    for rows in (32, 1024)
}


def make(dtype: torch.dtype, device: str, *, rows: int, width: int) -> dict[str, Tensor]:
    return {"gate_up": random_normal(rows, 2 * width, seed=0, dtype=dtype, device=device)}


def call(inputs: dict[str, Tensor], backend: str) -> Tensor:
    return ops.swiglu(inputs["gate_up"], backend=backend)


def _separate(inputs: dict[str, Tensor]) -> Tensor:
    gate, up = inputs["gate_up"].chunk(2, -1)
    return F.silu(gate) * up


def _compiled() -> Callable[[dict[str, Tensor]], Tensor]:
    compiled = torch.compile(reference.swiglu)
    return lambda inputs: compiled(inputs["gate_up"])


def _liger() -> Callable[[dict[str, Tensor]], Tensor]:
    """On two contiguous halves, which are not timed: its layer has two products."""
    ready: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    def run(inputs: dict[str, Tensor]) -> Tensor:
        gate_up = inputs["gate_up"]
        key = (gate_up.shape, gate_up.dtype)
        if key not in ready:
            ready.clear()
            gate, up = gate_up.chunk(2, -1)
            ready[key] = gate.contiguous(), up.contiguous()
        return peers.liger_swiglu(*ready[key])

    return run


BASELINES = {
    "torch silu, then mul": lambda: _separate,
    "torch.compile": _compiled,
    "FlashInfer": lambda: lambda inputs: peers.flashinfer_swiglu(inputs["gate_up"]),
    "Liger": _liger,
}


def bytes_moved(inputs: dict[str, Tensor]) -> int:
    gate_up = inputs["gate_up"]
    return gate_up.numel() * gate_up.element_size() * 3 // 2


def operations(inputs: dict[str, Tensor]) -> int:
    """Sign, exp, sum, quotient, product."""
    return 5 * inputs["gate_up"].numel() // 2


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    from pydllm.kernels import swiglu as kernel

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for width in (256, 1100, 12288):
            gate_up = torch.empty(32, 2 * width, dtype=dtype, device="meta")
            yield f"{width} {dtype}", lambda gate_up=gate_up: kernel.swiglu(gate_up)
