"""The kernels that a forward of the native transformer launches, counted without a GPU.

    python -m bench.gpu.launches                      # LLaDA-8B, batch 1, 2048 slots
    python -m bench.gpu.launches --model dream-7b --batch 8

The forward itself runs, at the real shape, on tensors without memory: the library's launchers
plan for sm_90 and their launches are noted, not made; operators of torch that only make views or
allocate are left out. With ``ops.linear`` and without, as ``deterministic()`` and the default take
it. What else a step launches (the head, the decoder's kernels, a few of torch) is not a part of it.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any
from unittest import mock

import click
import torch
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from bench.gpu import resources
from bench.shapes import CONFIGS
from pydllm._backend.library import Op
from pydllm.models import NativeModel
from pydllm.models.config import Config
from pydllm.models.families import find_family
from pydllm.models.overrides import make_spec
from pydllm.models.weights import slots as weight_slots

ARCH = 90
ALLOCATES = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "alias")


class _Operators(TorchDispatchMode):
    """Counts the operators of torch that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.name().removeprefix("aten::").partition(".")[0]
        returned = (result.alias_info for result in function._schema.returns)
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        if not is_view and name not in ALLOCATES:
            self.found[f"torch {name}"] += 1
        return function(*args, **(kwargs or {}))


def meta_model(name: str) -> NativeModel:
    """A model of a published shape whose weights have no memory."""
    config = Config(CONFIGS[name])
    family = find_family(config)
    sizes = family.sizes(config, family)
    weights = {
        slot.name: torch.empty(slot.shape, dtype=slot.dtype(torch.bfloat16), device="meta")
        for slot in weight_slots(family.names, sizes)
    }
    return NativeModel(make_spec(config, family, sizes, None), sizes, weights)


def launches(name: str, batch: int, window: int, slots: int, linear: bool) -> Counter[str]:
    """Kernels of a cached forward, by name."""
    model = meta_model(name)
    model = model.deterministic() if linear else model
    cache = model.new_cache(batch, slots)
    ids = torch.empty(batch, window, dtype=torch.int64, device="meta")
    number = torch.empty(batch, dtype=torch.int32, device="meta")
    numbers = {"length": number, "kv_len": number, "commit": number}

    def choose(op: Op, *arguments: Any, backend: str | None) -> str:
        op._load("triton")
        if op.triton is None or (reason := op.triton.supports(*arguments)) is not None:
            raise click.ClickException(f"{op.name}: {reason}")
        return "triton"

    def run(op: Op, chosen: str, *arguments: Any) -> Any:
        return op.triton.launch(*arguments) if op.triton is not None else None

    operators = _Operators()
    with mock.patch.multiple(Op, choose=choose, run=run), operators:
        recorded = resources.record(lambda: model.forward(ids, number, cache, **numbers), ARCH)
    kernels = Counter(each.kernel.__name__.strip("_").removesuffix("_kernel") for each in recorded)
    return kernels + operators.found


@click.command()
@click.option("--model", "name", type=click.Choice(["llada-8b", "dream-7b"]), default="llada-8b")
@click.option("--batch", default=1, show_default=True)
@click.option("--window", default=32, show_default=True)
@click.option("--slots", default=2048, show_default=True, help="Of the cache.")
def main(name: str, batch: int, window: int, slots: int) -> None:
    """Print the kernels of a forward."""
    console = Console(width=None if sys.stdout.isatty() else 100)
    default, own = (launches(name, batch, window, slots, linear) for linear in (False, True))
    table = Table("kernel", "cuBLAS", "ops.linear", title=f"{name}, batch {batch}, {slots} slots")
    for kernel in sorted(default | own):
        table.add_row(kernel, str(default[kernel]), str(own[kernel]))
    table.add_row("all", str(default.total()), str(own.total()))
    console.print(table)


if __name__ == "__main__":
    main()
