"""``mixture_accept`` at the vocabularies of Dream-7B and Qwen2.5-0.5B, dense and sparse.

A name says the form, the sequences and the rows of each. The published arithmetic mixes all
logits; the sparse form reads the verifier's head where the draft's nucleus is, and its baseline is
the whole head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.ops.cases import mixture_draft
from pydllm import ops
from pydllm._backend.errors import BackendError
from pydllm.testing import random_normal

VERIFIER_VOCAB, WIDTH = 151936, 896  # Qwen2.5-0.5B
SHAPES = {
    f"{form}-{batch}x{rows}": {"form": form, "batch": batch, "rows": rows}
    for form in ("dense", "sparse")
    for batch, rows in ((1, 64), (4, 64))
}
_SHARED = ("temperature", "length", "mixture")


def make(
    dtype: torch.dtype,
    device: str,
    *,
    form: str,
    batch: int,
    rows: int,
    vocab: int = VERIFIER_VOCAB,
) -> dict[str, object]:
    inputs = mixture_draft.make(dtype, device, rows=batch * rows, temperature=0.2, vocab=vocab)
    options = {name: value for name, value in inputs.items() if name != "logits"}
    found = ops.mixture_draft(inputs["logits"], **options, backend="torch")
    hidden = random_normal(batch * rows, WIDTH, seed=2, dtype=dtype, device=device)
    return inputs | {
        "form": form,
        "hidden": hidden,
        "weight": random_normal(vocab, WIDTH, seed=3, dtype=dtype, device=device) / 30,
        "token": found.token,
        "threshold": found.threshold,
        **{f"list {name}": field for name, field in found.candidates._asdict().items()},
        "length": torch.full((batch,), rows, dtype=torch.int32, device=device),
        "mixture": 0.7,
    }


def _verifier_logits(inputs: dict[str, object]) -> Tensor:
    return F.linear(inputs["hidden"], inputs["weight"])


def call(inputs: dict[str, object], backend: str) -> tuple[Tensor, ...]:
    options = {name: inputs[name] for name in _SHARED}
    if inputs["form"] == "sparse":
        fields = (inputs[f"list {name}"] for name in ops.Candidates._fields)
        operands = (ops.Candidates(*fields), inputs["hidden"], inputs["weight"], inputs["token"])
        return ops.mixture_accept_sparse(*operands, **options, backend=backend)[:2]
    options |= {
        name: inputs[name] for name in ("counter", "suppress_ids", "shared_vocab", "threshold")
    }
    logits = (inputs["logits"], _verifier_logits(inputs))
    return ops.mixture_accept(*logits, inputs["token"], **options, backend=backend)[:2]


def published(inputs: dict[str, object]) -> Tensor:
    """Arg-max of the mixture in the dtype of the logits, the leading run read by the host.

    Its rule has no noise: its counts are not compared with the op's.
    """
    verifier = _verifier_logits(inputs)[:, : inputs["shared_vocab"]]
    logits = inputs["logits"][:, : inputs["shared_vocab"]]
    weight = inputs["mixture"]
    target = (weight * logits + (1 - weight) * verifier).argmax(-1)
    same = (target == inputs["token"]).view(len(inputs["length"]), -1).int()
    same[:, 0] = 1
    runs = [run.item() for run in same.cumprod(1).sum(1)]
    return torch.tensor(runs, dtype=torch.int32)


def _dense() -> Callable[[dict[str, object]], tuple[Tensor, ...]]:
    def run(inputs: dict[str, object]) -> tuple[Tensor, ...]:
        if inputs["form"] == "dense":
            raise BackendError("is the dense form itself")
        return call(inputs | {"form": "dense"}, "auto")

    return run


BASELINES = {"published": lambda: published, "dense form": _dense}


def bytes_moved(inputs: dict[str, object]) -> int:
    """Dense: the head, and both logits once; sparse: the head's rows of all candidates."""
    size, width = inputs["weight"].element_size(), inputs["weight"].shape[1]
    if inputs["form"] == "sparse":
        return int(inputs["list size"].sum()) * (width * size + 12)
    rows = len(inputs["token"])
    logits = 2 * rows * inputs["shared_vocab"] * size
    return logits + inputs["weight"].numel() * size


def operations(inputs: dict[str, object]) -> int:
    """Of the verifier's head: all of it, or at the candidates."""
    if inputs["form"] == "sparse":
        return 2 * int(inputs["list size"].sum()) * inputs["weight"].shape[1]
    return 2 * len(inputs["token"]) * inputs["weight"].numel()


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    from pydllm.kernels import mixture_accept as kernel

    def meta(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    token, length = meta(256, dtype=torch.int64), meta(4)
    each, weights = meta(256, dtype=torch.float32), meta(4, dtype=torch.float32)
    counter, suppress_ids = meta(256, 3), meta(1)
    shared = mixture_draft.SHARED
    options = {
        "nucleus": (0.7, None, each, 0.2, None, 5, counter, suppress_ids, shared, True, False),
        "each row": (0.0, weights, each, 0.0, each, 5, counter, None, shared, True, True),
        "greedy": (0.7, None, None, 0.0, None, 5, None, suppress_ids, shared, False, False),
    }
    for dtype, name in (
        *((torch.bfloat16, name) for name in options),
        (torch.float16, "nucleus"),
        (torch.float32, "each row"),
    ):
        logits = (
            meta(256, mixture_draft.VOCAB, dtype=dtype),
            meta(256, VERIFIER_VOCAB, dtype=dtype),
        )
        arguments = (*logits, token, length, *options[name])
        yield f"{dtype} {name}", lambda arguments=arguments: kernel.mixture_accept(*arguments)
    for dtype, capacity, critical in (
        (torch.bfloat16, 128, False),
        (torch.bfloat16, 1000, True),
        (torch.float16, 128, False),
        (torch.float32, 1024, True),
    ):
        values = meta(256, capacity, dtype=torch.float32)
        hidden, head = meta(256, WIDTH, dtype=dtype), meta(VERIFIER_VOCAB, WIDTH, dtype=dtype)
        operands = (hidden, head, meta(VERIFIER_VOCAB, dtype=dtype) if critical else None)
        rest = (0.7, None, 0.2, None, None) if not critical else (0.0, weights, 0.0, each, 30.0)
        arguments = (meta(256, capacity), values, values, meta(256), *operands, token, length)
        arguments = (*arguments, *rest, True, critical)
        yield (
            f"{dtype} sparse {capacity}",
            lambda arguments=arguments: kernel.mixture_accept_sparse(*arguments),
        )
