"""``route`` at the routers of LLaDA2 (mini, flash, with block pools) and SDAR-30B."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from pydllm import ops
from pydllm.testing import random_normal

_LLADA2 = {"score": "sigmoid", "groups": 8, "topk_groups": 4, "scale": 2.5}
_POOLS = {"score": "sigmoid", "scale": 2.5, "capacity": 48, "block_size": 32}
_QWEN = {"score": "softmax"}
ROUTERS = {
    "llada2-mini": (2048, 256, _LLADA2),
    "llada2-flash": (4096, 256, _LLADA2),
    "llada2.2-flash": (4096, 256, _POOLS),
    "sdar-30b": (2048, 128, _QWEN),
}
SHAPES = {
    f"{name}-{rows}": {"router": name, "rows": rows} for name in ROUTERS for rows in (1, 32, 256)
}


def make(dtype: torch.dtype, device: str, *, router: str, rows: int) -> dict[str, object]:
    """Hidden states of -1 and 1, weights in steps of 2^-9: logits are exact in every dtype."""
    width, experts, options = ROUTERS[router]
    hidden = random_normal(1, rows, width, seed=0, device=device).sign().to(dtype)
    weight = (random_normal(experts, width, seed=1, device=device) * 3).round() * 2**-9
    sigmoid = options["score"] == "sigmoid"
    inputs = {"hidden": hidden, "router": weight if sigmoid else weight.to(dtype), **options}
    if sigmoid:
        inputs["bias"] = 0.1 * random_normal(experts, seed=2, device=device)
    if "capacity" in options:
        inputs["start"] = torch.zeros(1, dtype=torch.int32, device=device)
    if dtype == torch.float64:
        inputs = {
            name: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t
            for name, t in inputs.items()
        }
    return inputs


def call(inputs: dict[str, object], backend: str) -> ops.Routes:
    wide = {k: v for k, v in inputs.items() if k not in ("hidden", "router", "bias")}
    hidden, router, bias = inputs["hidden"], inputs["router"], inputs.get("bias")
    if hidden.dtype == torch.float64:
        router, bias = router.double(), None if bias is None else bias.double()
    return ops.route(hidden, router, bias, top_k=8, **wide, backend=backend)


def _topk() -> Callable[[dict[str, object]], tuple[Tensor, ...]]:
    """What published models do, without pools: its order of equals is another."""

    def run(inputs: dict[str, object]) -> tuple[Tensor, ...]:
        hidden, router, bias = inputs["hidden"], inputs["router"], inputs.get("bias")
        if inputs["score"] == "softmax":
            scores = F.linear(hidden, router).softmax(-1, dtype=torch.float32)
            weights, ids = scores.topk(8)
            return ids, weights / weights.sum(-1, keepdim=True)
        scores = F.linear(hidden.float(), router).sigmoid()
        choice = scores + bias
        if inputs.get("groups", 1) > 1:
            grouped = choice.unflatten(-1, (inputs["groups"], -1))
            best = grouped.topk(2).values.sum(-1).topk(inputs["topk_groups"]).indices
            keep = torch.zeros_like(grouped[..., 0]).scatter(-1, best, 1.0).bool()
            choice = grouped.masked_fill(~keep[..., None], -torch.inf).flatten(-2)
        ids = choice.topk(8).indices
        weights = scores.gather(-1, ids)
        return ids, weights / (weights.sum(-1, keepdim=True) + 1e-20) * inputs["scale"]

    return run


def _compiled() -> Callable[[dict[str, object]], tuple[Tensor, ...]]:
    return torch.compile(_topk())


BASELINES = {"linear, topk": _topk, "torch.compile": _compiled}


def bytes_moved(inputs: dict[str, object]) -> int:
    hidden, router = inputs["hidden"], inputs["router"]
    written = hidden.shape[1] * 8 * 8
    return sum(each.numel() * each.element_size() for each in (hidden, router)) + written


def operations(inputs: dict[str, object]) -> int:
    return 2 * inputs["hidden"].numel() * len(inputs["router"])


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    from pydllm.kernels import route as kernel

    def meta(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    for name, (width, experts, options) in ROUTERS.items():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            sigmoid = options["score"] == "sigmoid"
            numbers = meta(2, dtype=torch.int32)
            arguments = (
                meta(2, 32, width, dtype=dtype),
                meta(experts, width, dtype=torch.float32 if sigmoid else dtype),
                meta(experts, dtype=torch.float32) if sigmoid else None,
                numbers,
                numbers,
                8,
                options["score"],
                True,
                options.get("scale", 1.0),
                options.get("groups", 1),
                options.get("topk_groups", 1),
                options.get("capacity"),
                options.get("block_size"),
                1,
            )
            yield f"{name} {dtype}", lambda arguments=arguments: kernel.route(*arguments)
