"""``head_stats`` at the heads of LLaDA-8B and Dream-7B, a 100M model, and the tiny one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from pydllm import ops
from pydllm.testing import random_normal

SHAPES = {
    f"{name}-{rows}": {"rows": rows, "vocab": vocab, "width": width}
    for name, vocab, width in (
        ("llada-8b", 126464, 4096),
        ("dream-7b", 152064, 3584),
        ("llada-100m", 126464, 768),
        ("tiny", 79, 128),
    )
    for rows in (1, 32, 64)
}
SHAPES["dream-7b-1024"] = {"rows": 1024, "vocab": 152064, "width": 3584}
SHAPES["llada-8b-32-sampled"] = SHAPES["llada-8b-32"] | {"temperature": 0.7}


def make(
    dtype: torch.dtype,
    device: str,
    *,
    rows: int,
    vocab: int,
    width: int,
    temperature: float = 0.0,
) -> dict[str, object]:
    counter = torch.arange(rows, dtype=torch.int32)[:, None] * torch.tensor([1, 0, 0])
    return {
        "hidden": random_normal(rows, width, seed=0, dtype=dtype, device=device),
        "weight": random_normal(vocab, width, seed=1, dtype=dtype, device=device) * 3 / width**0.5,
        "temperature": temperature,
        "counter": counter.to(device, torch.int32),
        "suppress_ids": torch.tensor([vocab - 1], dtype=torch.int32, device=device),
    }


def call(inputs: dict[str, object], backend: str) -> ops.VocabStats:
    options = {name: value for name, value in inputs.items() if name not in ("hidden", "weight")}
    return ops.head_stats(inputs["hidden"], inputs["weight"], **options, backend=backend)


def _logits_first() -> Callable[[dict[str, object]], tuple[Tensor, ...]]:
    """The matmul, its logits stored, then ``vocab_stats`` of them."""

    def run(inputs: dict[str, object]) -> tuple[Tensor, ...]:
        options = {k: v for k, v in inputs.items() if k not in ("hidden", "weight")}
        return ops.vocab_stats(F.linear(inputs["hidden"], inputs["weight"]), **options)

    return run


def _matmul() -> Callable[[dict[str, object]], tuple[Tensor, ...]]:
    """The bare matmul and nothing of what is wanted: a floor."""

    def run(inputs: dict[str, object]) -> tuple[Tensor, ...]:
        F.linear(inputs["hidden"], inputs["weight"])
        return ()

    return run


BASELINES = {"linear + vocab_stats": _logits_first, "bare matmul": _matmul}


def bytes_moved(inputs: dict[str, object]) -> int:
    operands = (inputs["hidden"], inputs["weight"])
    return sum(each.numel() * each.element_size() for each in operands)


def operations(inputs: dict[str, object]) -> int:
    return 2 * len(inputs["hidden"]) * inputs["weight"].numel()


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    from pydllm.kernels import head_stats as kernel

    modes = {  # temperature, tempered, suppressed ids, softcap
        "arg-max": (0.0, False, 1, None),
        "sampled": (0.7, False, 1, None),
        "sampled, tempered, softcap": (0.7, True, 2, 30.0),
    }
    plain = ("arg-max", "sampled")
    for dtype, vocab, width, names in (
        (torch.bfloat16, 126464, 4096, modes),
        (torch.bfloat16, 79, 100, plain),
        (torch.float16, 152064, 3584, plain),
        (torch.float32, 126464, 768, plain),
    ):
        hidden = torch.empty(64, width, dtype=dtype, device="meta")
        weight = torch.empty(vocab, width, dtype=dtype, device="meta")
        for name, height in itertools.product(names, (32, 256)):
            temperature, tempered, count, softcap = modes[name]
            suppress_ids = torch.empty(count, dtype=torch.int32, device="meta")
            counter = torch.empty(height, 3, dtype=torch.int32, device="meta")
            rows = torch.empty(height, dtype=torch.int32, device="meta")
            bias = torch.empty(vocab, dtype=dtype, device="meta") if softcap else None
            options = (bias, temperature, 5, counter, suppress_ids, tempered, softcap, None, rows)
            arguments = (hidden, weight, *options)
            label = f"{vocab} x {width} {dtype} {name}, {height} rows"
            yield label, lambda arguments=arguments: kernel.head_stats(*arguments)
