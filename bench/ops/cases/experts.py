"""``experts`` at the layers of LLaDA2, LLaDA-MoE and SDAR-30B: rows, and distinct experts of them.

``llada2-mini-32x163`` is 32 rows that touch 163 experts, the number expected of even and
independent routes; the bytes that have to move are those of the touched experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from pydllm import ops, reference
from pydllm.testing import random_normal

F32 = torch.float32
# Width, inner width, experts, experts of a row, width of the shared expert.
LAYERS = {
    "llada2-mini": (2048, 512, 256, 8, 512),
    "llada2-flash": (4096, 1024, 256, 8, 1024),
    "llada-moe": (2048, 1024, 64, 8, 0),
    "sdar-30b": (2048, 768, 128, 8, 0),
    "llada2-mini/tp4": (2048, 128, 256, 8, 128),
}
ROUTES = {
    "llada2-mini": ((1, 8), (32, 48), (32, 163), (64, 222), (256, 256)),
    "llada2-flash": ((32, 48), (32, 163)),
    "llada-moe": ((32, 64),),
    "sdar-30b": ((4, 29), (32, 112)),
    "llada2-mini/tp4": ((32, 163),),
}
SHAPES = {
    f"{layer}-{rows}x{touched}": {"layer": layer, "rows": rows, "touched": touched}
    for layer, cases in ROUTES.items()
    for rows, touched in cases
}


def make(
    dtype: torch.dtype, device: str, *, layer: str, rows: int, touched: int
) -> dict[str, Tensor | None]:
    width, inner, experts, top_k, shared = LAYERS[layer]
    # Pairs go round the touched experts: each has a row, and a row has no expert twice.
    pool = torch.randperm(experts, generator=torch.Generator().manual_seed(0))[:touched]
    ids = pool[torch.arange(rows * top_k) % touched].view(rows, top_k)
    inputs = {
        "hidden": random_normal(rows, width, seed=1, dtype=dtype, device=device),
        "gate_up": _weight(experts, 2 * inner, width, dtype=dtype, device=device),
        "down": _weight(experts, width, inner, dtype=dtype, device=device),
        "ids": ids.to(device, torch.int32),
        "weights": torch.full((rows, top_k), 0.3, device=device),
        "shared_gate_up": None,
        "shared_down": None,
    }
    if shared:
        inputs["shared_gate_up"] = _weight(2 * shared, width, dtype=dtype, device=device)
        inputs["shared_down"] = _weight(width, shared, dtype=dtype, device=device)
    if dtype == torch.float64:
        inputs["weights"] = inputs["weights"].double()
    return inputs


def _weight(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    """Random on the device, where a million numbers take no time."""
    generator = torch.Generator(device).manual_seed(sum(shape))
    weight = torch.empty(shape, dtype=dtype, device=device)
    for part in weight.unbind() if len(shape) == 3 else (weight,):
        noise = torch.randn(part.shape, generator=generator, device=device) / shape[-1] ** 0.5
        part.copy_(noise)
    return weight


def call(inputs: dict[str, Tensor | None], backend: str) -> Tensor:
    return ops.experts(**_fitting(inputs), backend=backend)


def _fitting(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """fp64 inputs as the comparison makes them have fp32 weights of the routes."""
    wide = torch.promote_types(inputs["hidden"].dtype, torch.float32)
    return inputs | {"weights": inputs["weights"].to(wide)}


def _grouped() -> Callable[[dict[str, Tensor | None]], Tensor]:
    """PyTorch's grouped matrix product on sorted rows, swiglu between, weighted after it."""

    def run(inputs: dict[str, Tensor | None]) -> Tensor:
        hidden, gate_up, down = inputs["hidden"], inputs["gate_up"], inputs["down"]
        each = reference.experts_grouped(hidden, gate_up, down, inputs["ids"], "silu")
        out = (each * inputs["weights"][..., None]).sum(1).to(hidden.dtype)
        if inputs["shared_down"] is not None:
            gate, up = F.linear(hidden, inputs["shared_gate_up"]).chunk(2, -1)
            out = out + F.linear(F.silu(gate) * up, inputs["shared_down"])
        return out

    return run


BASELINES = {"grouped_mm": _grouped}


def distinct(inputs: dict[str, Tensor | None]) -> int:
    """How many experts the rows touch."""
    return inputs["ids"].unique().numel()


def bytes_moved(inputs: dict[str, Tensor | None]) -> int:
    """The touched experts, the shared one, and the rows."""
    size = inputs["hidden"].element_size()
    expert = inputs["gate_up"][0].numel() + inputs["down"][0].numel()
    shared = sum(
        t.numel() for name, t in inputs.items() if name.startswith("shared") and t is not None
    )
    return (distinct(inputs) * expert + shared + 2 * inputs["hidden"].numel()) * size


def operations(inputs: dict[str, Tensor | None]) -> int:
    expert = inputs["gate_up"][0].numel() + inputs["down"][0].numel()
    shared = sum(t.numel() for n, t in inputs.items() if n.startswith("shared") and t is not None)
    return 2 * (inputs["ids"].numel() * expert + len(inputs["hidden"]) * shared)


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    from pydllm.kernels import experts as kernel

    def meta(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    layers = LAYERS | {"shared of another width": (2048, 512, 64, 8, 1024)}
    layers["unaligned"] = (36, 20, 6, 2, 20)

    def arguments_of(name: str, dtype: torch.dtype, stored: torch.dtype) -> tuple:
        width, inner, experts, top_k, shared = layers[name]
        return (
            meta(32, width, dtype=dtype),
            meta(experts, 2 * inner, width, dtype=stored),
            meta(experts, width, inner, dtype=stored),
            meta(32, top_k, dtype=torch.int32),
            meta(32, top_k, dtype=torch.float32),
            meta(2 * shared, width, dtype=dtype) if shared else None,
            meta(width, shared, dtype=dtype) if shared else None,
            "gelu_tanh" if name == "llada-moe" else "silu",
        )

    for name in layers:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            arguments = arguments_of(name, dtype, dtype)
            yield f"{name} {dtype}", lambda arguments=arguments: kernel.experts(*arguments)
    for dtype, stored, per_block in (
        (torch.bfloat16, torch.float8_e4m3fn, True),
        (torch.bfloat16, torch.float8_e4m3fn, False),
        (torch.bfloat16, torch.int8, False),
        (torch.float16, torch.float8_e4m3fn, True),
        (torch.float32, torch.float8_e4m3fn, True),
    ):
        arguments = arguments_of("llada2-mini", dtype, stored)
        block = 128 if per_block else 1
        scales = tuple(
            meta(len(half), half.shape[1] // block, *[half.shape[2] // 128] * per_block, dtype=F32)
            for half in arguments[1:3]
        )
        arguments = (*arguments, *scales)
        per = "block" if per_block else "channel"
        label = f"llada2-mini {dtype} {stored} per {per}"
        yield label, lambda arguments=arguments: kernel.experts(*arguments)
