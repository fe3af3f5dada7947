"""``rms_norm`` with the residual addition, at three models' widths."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.ops import peers
from pydllm import ops, reference
from pydllm.testing import random_normal

EPS = 1e-5
SHAPES = {
    f"{name}-{rows}": {"rows": rows, "width": width}
    for name, width in (("llada-8b", 4096), ("dream-7b", 3584), ("tiny", 128))
    for rows in (32, 1024)
}


def make(dtype: torch.dtype, device: str, *, rows: int, width: int) -> dict[str, Tensor]:
    return {
        "x": random_normal(rows, width, seed=0, dtype=dtype, device=device),
        "weight": random_normal(width, seed=1, dtype=dtype, device=device),
        "residual": random_normal(rows, width, seed=2, dtype=dtype, device=device),
    }


def call(inputs: dict[str, Tensor], backend: str) -> Tensor:
    return ops.rms_norm(
        inputs["x"], inputs["weight"], EPS, residual=inputs["residual"], backend=backend
    )


def _torch_fused(inputs: dict[str, Tensor]) -> Tensor:
    inputs["residual"].add_(inputs["x"])
    width = inputs["weight"].shape
    return torch.nn.functional.rms_norm(inputs["residual"], width, inputs["weight"], EPS)


def _compiled() -> Callable[[dict[str, Tensor]], Tensor]:
    compiled = torch.compile(reference.rms_norm)
    return lambda inputs: compiled(inputs["x"], inputs["weight"], EPS, inputs["residual"])


def _peer(
    norm: Callable[[Tensor, Tensor, Tensor, float], Tensor],
) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda inputs: norm(inputs["x"], inputs["residual"], inputs["weight"], EPS)


BASELINES = {
    "torch F.rms_norm": lambda: _torch_fused,
    "torch.compile": _compiled,
    "FlashInfer": lambda: _peer(peers.flashinfer_rms_norm),
    "Liger": lambda: _peer(peers.liger_rms_norm),
}


def bytes_moved(inputs: dict[str, Tensor]) -> int:
    x = inputs["x"]
    return (4 * x.numel() + x.shape[-1]) * x.element_size()


def operations(inputs: dict[str, Tensor]) -> int:
    """Residual, square, sum, scale, weight."""
    return 5 * inputs["x"].numel()


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    from pydllm.kernels import rms_norm as kernel

    for dtype in (torch.bfloat16, torch.float32):
        for width in (128, 3584, 4096, 16384):
            x = torch.empty(32, width, dtype=dtype, device="meta")
            weight = torch.empty(width, dtype=dtype, device="meta")
            for residual in (None, torch.empty_like(x)):
                label = f"{width} {dtype} {'plain' if residual is None else 'residual'}"
                arguments = (x, weight, EPS, residual)
                yield label, lambda arguments=arguments: kernel.rms_norm(*arguments)
