"""``vocab_stats`` for LLaDA-8B's, Dream-7B's and the tiny vocabulary, masks suppressed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pydllm import ops, reference
from pydllm._backend.errors import BackendError
from pydllm.testing import random_normal

SHAPES = {
    f"{name}-{rows}": {"rows": rows, "vocab": vocab}
    for name, vocab in (("llada-8b", 126464), ("dream-7b", 152064), ("tiny", 79))
    for rows in (1, 32, 256)
}
SHAPES["llada-8b-32-sampled"] = {"rows": 32, "vocab": 126464, "temperature": 0.7}


def make(
    dtype: torch.dtype, device: str, *, rows: int, vocab: int, temperature: float = 0.0
) -> dict[str, object]:
    counter = torch.arange(rows, dtype=torch.int32)[:, None] * torch.tensor([1, 0, 0])
    return {
        "logits": random_normal(rows, vocab, seed=0, dtype=dtype, device=device) * 3,
        "temperature": temperature,
        "counter": counter.to(device, torch.int32),
        "suppress_ids": torch.tensor([vocab - 1], dtype=torch.int32, device=device),
    }


def call(inputs: dict[str, object], backend: str) -> ops.VocabStats:
    options = {name: value for name, value in inputs.items() if name != "logits"}
    return ops.vocab_stats(inputs["logits"], **options, backend=backend)


def _chain(dtype: torch.dtype) -> Callable[[dict[str, object]], tuple[Tensor, ...]]:
    """What published decoding loops do: softmax in ``dtype``, its maximum, its entropy."""

    def run(inputs: dict[str, object]) -> tuple[Tensor, ...]:
        if inputs["temperature"]:
            raise BackendError("draws other noise: there is no token to compare")
        logits = inputs["logits"].to(dtype).index_fill(1, inputs["suppress_ids"].long(), -torch.inf)
        probs = logits.softmax(-1)
        prob, token = probs.max(-1)
        return token, prob, -torch.special.xlogy(probs, probs).sum(-1)

    return run


def _compiled() -> Callable[[dict[str, object]], tuple[Tensor, ...]]:
    compiled = torch.compile(reference.vocab_stats)

    def run(inputs: dict[str, object]) -> tuple[Tensor, ...]:
        temperature, counter = inputs["temperature"], inputs["counter"]
        return compiled(
            inputs["logits"], temperature, 0, counter, inputs["suppress_ids"], False, None
        )

    return run


BASELINES = {
    "fp64 chain": lambda: _chain(torch.float64),
    "fp32 chain": lambda: _chain(torch.float32),
    "torch.compile": _compiled,
}


def bytes_moved(inputs: dict[str, object]) -> int:
    logits = inputs["logits"]
    return logits.numel() * logits.element_size()


def operations(inputs: dict[str, object]) -> int:
    """Two maxima, difference, exp, sum, and a multiply-add for the entropy."""
    return 7 * inputs["logits"].numel()


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    from pydllm.kernels import vocab_stats as kernel

    modes = {  # temperature, tempered, suppressed ids, softcap
        "arg-max": (0.0, False, 1, None),
        "arg-max, softcap": (0.0, False, 2, 30.0),
        "sampled": (0.7, False, 1, None),
        "sampled, tempered, softcap": (0.7, True, 0, 30.0),
    }
    plain = ("arg-max", "sampled")
    counter = torch.empty(32, 3, dtype=torch.int32, device="meta")
    for dtype, vocab, names in (
        (torch.bfloat16, 79, modes),
        (torch.bfloat16, 126464, modes),
        (torch.bfloat16, 50257, plain),  # rows that are not aligned
        (torch.float32, 79, plain),
        (torch.float32, 126464, plain),
        (torch.float16, 126464, plain),
        (torch.bfloat16, 262144, plain),
    ):
        logits = torch.empty(32, vocab, dtype=dtype, device="meta")
        for name in names:
            temperature, tempered, count, softcap = modes[name]
            suppress_ids = torch.empty(count, dtype=torch.int32, device="meta") if count else None
            arguments = (logits, temperature, 5, counter, suppress_ids, tempered, softcap)
            label = f"{vocab} {dtype} {name}"
            yield label, lambda arguments=arguments: kernel.vocab_stats(*arguments)
    rows = torch.empty(32, dtype=torch.int32, device="meta")
    each = torch.empty(32, dtype=torch.float32, device="meta")
    suppress_ids = torch.empty(1, dtype=torch.int32, device="meta")
    for dtype, softcap, temperature, top_k, top_p in (
        (torch.bfloat16, None, None, 50, 0.95),
        (torch.bfloat16, 30.0, each, None, 0.95),
        (torch.float16, None, each, 50, None),
        (torch.float32, None, each, 50, 0.95),
    ):
        logits = torch.empty(64, 126464, dtype=dtype, device="meta")
        arguments = (logits, 0.7, 5, counter, suppress_ids, False, softcap, temperature, rows)
        label = f"126464 {dtype} top_k {top_k} top_p {top_p}"
        yield label, lambda arguments=(*arguments, top_k, top_p): kernel.vocab_stats(*arguments)
