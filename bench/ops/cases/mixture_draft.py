"""``mixture_draft`` at Dream-7B's vocabulary against the draft of the published code.

A name says the rows and the temperature. Some ids stand out, so that a nucleus holds a few of them
at temperature 0.2 and some hundreds at 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pydllm import ops, reference
from pydllm._backend.errors import BackendError
from pydllm.testing import random_normal

VOCAB, SHARED = 152064, 151665  # Dream-7B; ids that Qwen2.5-0.5B shares
SHAPES = {
    f"{rows}-T{temperature:g}": {"rows": rows, "temperature": temperature}
    for rows in (1, 64, 256)
    for temperature in (0.2, 1.0)
}


def make(
    dtype: torch.dtype, device: str, *, rows: int, temperature: float, vocab: int = VOCAB
) -> dict[str, object]:
    logits = random_normal(rows, vocab, seed=0, dtype=torch.float32) * 2
    logits[:, 7::401] += 12
    counter = torch.zeros(rows, 3, dtype=torch.int32)
    counter[:, 0] = torch.arange(rows)
    return {
        "logits": logits.to(device, dtype),
        "temperature": temperature,
        "counter": counter.to(device),
        "top_p": 0.95,
        "suppress_ids": torch.tensor([min(SHARED, vocab) - 1], dtype=torch.int32, device=device),
        "shared_vocab": min(SHARED, vocab),
        "capacity": 128,
    }


def call(inputs: dict[str, object], backend: str) -> tuple[Tensor, ...]:
    options = {name: value for name, value in inputs.items() if name != "logits"}
    draft = ops.mixture_draft(inputs["logits"], **options, backend=backend)
    return draft.token, draft.logsumexp, draft.threshold


def published(inputs: dict[str, object]) -> Tensor:
    """Sorted nucleus in the dtype of the logits, then an exponential race in fp64, as published.

    Its draws are those of ``softmax(logits / temperature^2)`` and its noise is torch's: tokens that
    are not compared with the op's.
    """
    x = inputs["logits"] / inputs["temperature"]
    ordered, ids = x.sort(descending=True)
    beyond = ordered.softmax(-1).cumsum(-1) > inputs["top_p"]
    beyond = torch.cat((torch.zeros_like(beyond[:, :1]), beyond[:, :-1]), -1)
    outside = torch.zeros_like(beyond).scatter_(1, ids, beyond)
    x = x.masked_fill(outside, torch.finfo(x.dtype).min).double()
    race = -torch.rand_like(x).log()
    return (x.exp() / race ** inputs["temperature"]).argmax(-1)


def _compiled() -> Callable[[dict[str, object]], tuple[Tensor, ...]]:
    compiled = torch.compile(reference.mixture_draft)

    def run(inputs: dict[str, object]) -> tuple[Tensor, ...]:
        if inputs["logits"].device.type == "cpu":
            raise BackendError("the compiler takes minutes for the generator on a CPU")
        where = (inputs["counter"], inputs["suppress_ids"], None, None, inputs["shared_vocab"])
        limits = (inputs["top_p"], None, inputs["capacity"])
        return compiled(inputs["logits"], inputs["temperature"], 0, *where, *limits)[:3]

    return run


BASELINES = {"published": lambda: published, "torch.compile": _compiled}


def bytes_moved(inputs: dict[str, object]) -> int:
    """One read of the shared columns; what is written is small."""
    logits = inputs["logits"]
    return logits.shape[0] * inputs["shared_vocab"] * logits.element_size()


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    from pydllm.kernels import mixture_draft as kernel

    def meta(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    each = meta(64, dtype=torch.float32)
    options = {
        "list": (None, None, SHARED, 0.95, None, 128),
        "no list": (None, None, SHARED, 0.95, None, 0),
        "each row": (each, meta(64), SHARED, 1.0, each, 1024),
        "not aligned": (None, None, SHARED - 2, 0.95, None, 128),
    }
    for dtype, vocab, name in (
        (torch.bfloat16, VOCAB, "list"),
        (torch.bfloat16, VOCAB, "each row"),
        (torch.bfloat16, SHARED, "not aligned"),
        (torch.float16, VOCAB, "list"),
        (torch.float32, VOCAB, "no list"),
        (torch.float32, VOCAB, "each row"),
    ):
        arguments = (meta(80, vocab, dtype=dtype), 0.2, 5, meta(64, 3), meta(1), *options[name])
        yield f"{dtype} {name}", lambda arguments=arguments: kernel.mixture_draft(*arguments)
