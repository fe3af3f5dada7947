"""``linear`` at the layers of LLaDA-8B and Dream-7B, with bf16 and 8-bit weights, and
``linear_swiglu`` at those of gate and up."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from pydllm import ops
from pydllm.testing import random_normal

LAYERS = {  # width, depth
    "llada-8b": {
        "qkv": (12288, 4096),
        "out": (4096, 4096),
        "gate_up": (24576, 4096),
        "down": (4096, 12288),
    },
    "dream-7b": {
        "qkv": (4608, 3584),
        "out": (3584, 3584),
        "gate_up": (37888, 3584),
        "down": (3584, 18944),
    },
}
SHAPES = {
    f"{model}-{layer}-{rows}": {"rows": rows, "width": width, "depth": depth}
    for model, layers in LAYERS.items()
    for layer, (width, depth) in layers.items()
    for rows in (1, 32, 64, 256)
}
SHAPES |= {
    f"llada-8b-{layer}-32-{kind}": SHAPES[f"llada-8b-{layer}-32"] | {"kind": kind}
    for layer in LAYERS["llada-8b"]
    for kind in ("fp8", "fp8_channel", "int8")
}
SHAPES |= {
    f"{model}-gate_up-{rows}-swiglu": SHAPES[f"{model}-gate_up-{rows}"] | {"swiglu": True}
    for model in LAYERS
    for rows in (1, 32, 64, 256)
}
SHAPES["tiny-32"] = {"rows": 32, "width": 384, "depth": 128}


def make(
    dtype: torch.dtype,
    device: str,
    *,
    rows: int,
    width: int,
    depth: int,
    kind: str | None = None,
    swiglu: bool = False,
) -> dict[str, object]:
    weight = random_normal(width, depth, seed=1, dtype=dtype, device=device) / depth**0.5
    return {
        "x": random_normal(rows, depth, seed=0, dtype=dtype, device=device),
        "weight": weight if kind is None else ops.quantize(weight, kind),
        "swiglu": swiglu,
    }


def call(inputs: dict[str, object], backend: str) -> Tensor:
    op = ops.linear_swiglu if inputs["swiglu"] else ops.linear
    return op(inputs["x"], inputs["weight"], backend=backend)


def _dense() -> Callable[[dict[str, object]], Tensor]:
    """The product of cuBLAS or MKL; with 8-bit weights, of weights dequantised beforehand."""
    wide: list[tuple[ops.QuantizedWeight, Tensor]] = []

    def run(inputs: dict[str, object]) -> Tensor:
        x, weight = inputs["x"], inputs["weight"]
        if isinstance(weight, ops.QuantizedWeight):
            if not wide or wide[0][0] is not weight or wide[0][1].dtype != x.dtype:
                wide[:] = [(weight, weight.dequantize(x.dtype))]
            weight = wide[0][1]
        y = F.linear(x, weight)
        return ops.swiglu(y) if inputs["swiglu"] else y

    return run


BASELINES = {"F.linear": _dense}  # then ops.swiglu, where both are one op


def bytes_moved(inputs: dict[str, object]) -> int:
    x, weight = inputs["x"], inputs["weight"]
    outputs = weight.shape[0] // (2 if inputs["swiglu"] else 1)
    return weight.nbytes + x.nbytes + x.shape[0] * outputs * x.element_size()


def operations(inputs: dict[str, object]) -> int:
    return 2 * inputs["x"].numel() * inputs["weight"].shape[0]


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    from pydllm.kernels import linear as kernel

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    bf16, fp16, fp32, fp8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
    kinds = [(bf16, bf16, 0), (bf16, fp8, 2), (bf16, fp8, 1), (bf16, torch.int8, 1)]
    jobs = [(*kind, layer, rows) for kind in kinds for layer in ("qkv", "out") for rows in (1, 256)]
    jobs += [(fp16, fp16, 0, "out", 100), (fp16, fp8, 2, "out", 1)]
    jobs += [(fp32, fp32, 0, "out", 1), (fp32, fp8, 2, "out", 1)]
    both = [(bf16, bf16, 0, 32), (bf16, bf16, 0, 256), (bf16, fp8, 2, 32), (bf16, fp8, 1, 256)]
    both += [(bf16, torch.int8, 1, 32), (fp16, fp8, 2, 100), (fp32, fp32, 0, 1)]
    jobs += [(*kind, "gate_up", rows) for *kind, rows in both]
    for dtype, stored, scales, layer, rows in jobs:
        width, depth = LAYERS["llada-8b"][layer]
        shapes = {0: None, 1: (width,), 2: (-(-width // 128), -(-depth // 128))}
        weight = empty(width, depth, dtype=stored)
        scale = empty(*shapes[scales], dtype=fp32) if scales else None
        bias = empty(width, dtype=dtype) if layer == "qkv" else None
        arguments = (empty(rows, depth, dtype=dtype), weight, scale, bias)
        label = f"llada-8b {layer} {rows} {dtype} {stored} {scales}"
        launch = kernel.linear_swiglu if layer == "gate_up" else kernel.linear
        yield label, lambda launch=launch, arguments=arguments: launch(*arguments)
    # The product's splits are merged by the norm.
    for stored, layer, model in ((bf16, "down", "dream-7b"), (torch.int8, "out", "llada-8b")):
        width, depth = LAYERS[model][layer]
        rows, norm = empty(32, width, dtype=bf16), empty(width, dtype=bf16)
        scale = None if stored == bf16 else empty(width, dtype=fp32)
        arguments = (empty(32, depth, dtype=bf16), empty(width, depth, dtype=stored), scale, None)
        arguments += (norm, 1e-5, rows)
        label = f"{model} {layer} 32 {bf16} {stored} norm"
        yield label, lambda arguments=arguments: kernel.linear_rms_norm(*arguments)
