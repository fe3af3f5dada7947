"""``unmask`` on batches of windows that are all masks, each rule; baselines for the quota rule.

A name says the rule, the sequences and the window's length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pydllm import ops, reference

MASK = 126336
NUMBERS = {
    "threshold": {"threshold": 0.9},
    "factor": {"factor": 1.0},
    "entropy": {"threshold": 0.1},
    "entropy_bound": {"bound": 0.1},
}
RULES = ("quota", "left_to_right", "random", *NUMBERS)
SHAPES = {
    f"{rule}-{batch}x{rows}": {"rule": rule, "batch": batch, "rows": rows}
    for rule in RULES
    for batch, rows in ((1, 32), (32, 32), (32, 256), (8, 2048))
}


def make(dtype: torch.dtype, device: str, *, rule: str, batch: int, rows: int) -> dict:
    """fp32 (fp64) scores whatever the dtype of the logits: half of the masks are certain."""
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(batch, rows, generator=generator) ** 0.2
    if rule.startswith("entropy"):
        score = 1 - score
    token = torch.randint(0, MASK, (batch, rows), generator=generator)
    one = torch.ones(batch, dtype=torch.int32, device=device)
    return {
        "x": torch.full((batch, 2 * rows), MASK, device=device),
        "step_map": torch.full((batch, 2 * rows), -1, dtype=torch.int32, device=device),
        "nfe": 7 * one,
        "token": token.to(device),
        "score": score.to(device, torch.promote_types(dtype, torch.float32)),
        "start": one * rows // 2,
        "length": one * rows,
        "quota": one * max(1, rows // 32),
        "rule": rule,
    }


def call(inputs: dict, backend: str) -> tuple[Tensor, ...]:
    inputs = dict(inputs)
    rule, quota = inputs.pop("rule"), inputs.pop("quota")
    option = NUMBERS.get(rule, {"quota": quota})
    counts = ops.unmask(
        **inputs, mask_id=MASK, rule=rule, **option, request=inputs["nfe"], backend=backend
    )
    return (*counts, inputs["x"], inputs["step_map"], inputs["nfe"])


def _positional(inputs: dict) -> tuple:
    """The arguments as the reference and the launcher take them."""
    inputs = dict(inputs)
    start, length, quota, rule = (inputs.pop(k) for k in ("start", "length", "quota", "rule"))
    given = NUMBERS.get(rule, {})
    limit = next(iter(given.values()), 0.0)
    quota = None if rule in NUMBERS else quota
    request = inputs["nfe"] if rule == "random" else None
    options = (rule, quota, 1, limit, 0, request)
    ending = (None, None, None, None, False)
    return (*inputs.values(), MASK, start, length, *options, *ending)


def _compiled() -> Callable[[dict], tuple[Tensor, ...]]:
    compiled = torch.compile(reference.unmask)

    def run(inputs: dict) -> tuple[Tensor, ...]:
        counts = compiled(*_positional(inputs))
        return (*counts, inputs["x"], inputs["step_map"], inputs["nfe"])

    return run


BASELINES = {"torch.compile": _compiled}


def bytes_moved(inputs: dict) -> int:
    """The window's ids, tokens and scores once; what is written is small."""
    return inputs["token"].numel() * (8 + 8 + inputs["score"].element_size())


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every rule at every tile, a window shorter than a block, and endings."""
    from pydllm.kernels import unmask as kernel

    for rule in ("quota", "left_to_right", "threshold"):
        for rows in (20, 2048):
            inputs = make(torch.float32, "meta", rule=rule, batch=4, rows=rows)
            arguments = _positional(inputs)[:-5]
            done, eos = inputs["nfe"].bool(), inputs["x"][0, :3]
            ending = (done, inputs["nfe"], eos, inputs["nfe"], False)
            yield (
                f"{rule} {rows} ending",
                lambda arguments=(*arguments, *ending): kernel.unmask(*arguments),
            )

    for rows in (20, 128, 1024, 2048):
        for rule in RULES:
            inputs = make(torch.float32, "meta", rule=rule, batch=4, rows=rows)
            arguments = _positional(inputs)
            yield (
                f"{rule} {rows}",
                lambda arguments=arguments: kernel.unmask(*arguments),
            )
