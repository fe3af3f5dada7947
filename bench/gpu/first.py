"""What the first six minutes on a GPU are spent on, in the order of what they decide.

    python -m bench.gpu first            # on a machine with a GPU, torch and Triton
    python -m bench.gpu.first --dry          # the order and the budgets; needs no GPU
    python -m bench.gpu.first --device cpu --model tiny --out DIR    # a rehearsal

A step gets its budget and what the steps before it left. It gives rows, and after each row
``first.json`` and ``first.md`` are written anew: whatever ends the run, the rows so far are there.
What could not be done is listed with its reason.
"""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
from torch.nn import functional as F

from bench.gpu.roofline import Rates
from bench.ops.cases import CASES
from bench.ops.run import DTYPES, copied, is_right, provenance
from bench.ops.timing import time_calls
from bench.shapes import CONFIGS, make_model, make_verifier
from bench.steps import algorithms, measure
from pydllm import ops
from pydllm._backend import cuda
from pydllm.models import ModelSpec
from pydllm.testing import random_normal

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 360
Row = dict[str, Any]


@dataclass
class Run:
    """One run: where, on what, and what came of it."""

    device: str
    model: str
    results: dict[str, list[Row]] = field(default_factory=dict)
    could_not: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> str:
        return "bf16" if self.on_gpu else "fp32"

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def backends(self) -> tuple[str, ...]:
        return ("triton", "cuda") if self.on_gpu else ("torch",)

    def milliseconds(self, call: Callable[[], object], seconds: float = 0.1) -> float:
        return time_calls(lambda _: call(), dict, self.device, seconds=seconds).p50

    def tried(self, what: str, call: Callable[[], Any]) -> Any:
        """What ``call`` returns; None, and a line in the report, where it cannot be run."""
        try:
            return call()
        except Exception as error:  # a compiler's or a driver's: the others go on
            self.could_not.append(f"{what}: {type(error).__name__}: {str(error)[:300]}")
            return None


def kernels(run: Run) -> Iterator[Row]:
    """The CUDA kernels, if they are built or a wheel in dist/ has them: a build takes minutes."""
    if not list((ROOT / "pydllm").glob("_C*.so")):
        for wheel in sorted((ROOT / "dist").glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                names = [n for n in archive.namelist() if n.startswith("pydllm/_C")]
                archive.extractall(ROOT, names)
            if names:
                break
    missing = cuda.available(torch.device(run.device))
    if missing is not None:
        run.could_not.append(f"CUDA kernels: {missing}")
    yield {"CUDA kernels": ", ".join(cuda.archs()) if missing is None else "none"}


def rates(run: Run) -> Iterator[Row]:
    measured = Rates.measure(run.device, DTYPES[run.dtype])
    yield {"copy GB/s": measured.copy / 1e9, f"{run.dtype} TFLOP/s": measured.matmul / 1e12}


def correctness(run: Run) -> Iterator[Row]:
    """Every op and backend against the reference, at one shape of an 8B model, and its time."""
    for op, case in CASES.items():
        wanted = (name for name in case.SHAPES if name.startswith(run.model))
        name = next(wanted, next(iter(case.SHAPES)) if run.on_gpu else None)
        if name is None:
            continue  # on a CPU its shapes take minutes
        inputs = case.make(DTYPES[run.dtype], run.device, **case.SHAPES[name])
        for backend in run.backends:

            def check(case: Any = case, inputs: Any = inputs, backend: str = backend) -> Row:
                call = case.call
                right = is_right(case, inputs, lambda i: call(i, backend), strict=True)
                timing = time_calls(
                    lambda i: call(i, backend), lambda: copied(inputs), run.device, seconds=0.05
                )
                return {"right": right, "ms": timing.p50}

            row = run.tried(f"{op} {name} {backend}", check)
            if row is not None:
                yield {"op": op, "shape": name, "backend": backend} | row


def decisions(run: Run) -> Iterator[Row]:
    """What the tables of tiles and preferences wait for."""
    yield from _linear(run)
    yield from _attention(run)
    if run.on_gpu:
        yield from _columns(run)
        yield from _layers(run)


def _linear(run: Run) -> Iterator[Row]:
    layers = CASES["linear"].LAYERS["llada-8b"] if run.on_gpu else {"out": (256, 512)}
    for layer, (width, depth) in layers.items():
        x = random_normal(256, depth, seed=0, dtype=DTYPES[run.dtype], device=run.device)
        weight = random_normal(width, depth, seed=1, dtype=x.dtype, device=run.device)
        yield from _products(run, f"{layer} {width} x {depth}, 32 rows", x, weight / depth**0.5)


def _products(run: Run, what: str, x: torch.Tensor, weight: torch.Tensor) -> Iterator[Row]:
    """The skinny product, and whether a row's bits depend on the number of rows."""
    few = x[:32]
    yield {"what": what, "how": "F.linear", "ms": run.milliseconds(lambda: F.linear(few, weight))}

    def measured(small: Any, backend: str) -> Row:
        whole = ops.linear(x, small, backend=backend)
        same = all(
            torch.equal(ops.linear(x[:n], small, backend=backend), whole[:n])
            for n in (1, 32, 64, 100, 256)
        )
        ms = run.milliseconds(lambda: ops.linear(few, small, backend=backend))
        return {"ms": ms, "invariant": same}

    for kind in (None, "fp8", "fp8_channel", "int8"):
        small = weight if kind is None else ops.quantize(weight, kind)
        for backend in run.backends:
            how = f"ops.linear {kind or run.dtype} {backend}"
            row = run.tried(f"{what} {how}", partial(measured, small, backend))
            if row is not None:
                yield {"what": what, "how": how} | row


def _columns(run: Run) -> Iterator[Row]:
    """Gate and up in one launch: a wider tile reads the rows fewer times, in fewer programs."""
    from pydllm.kernels import _tiles, linear

    width, depth = CASES["linear"].LAYERS["llada-8b"]["gate_up"]
    x = random_normal(32, depth, seed=0, dtype=DTYPES[run.dtype], device=run.device)
    weight = random_normal(width, depth, seed=1, dtype=x.dtype, device=run.device) / depth**0.5
    what = f"gate_up {width} x {depth} with swiglu, 32 rows"
    for columns in (128, 256):
        tile = _tiles.LinearTile(columns, 64, 1, 4, 4)
        how = f"triton, tile of {columns} columns"
        call = partial(linear.linear_swiglu, x, weight, None, None, tile, 64)
        ms = run.tried(f"{what}, {how}", partial(run.milliseconds, call))
        if ms is not None:
            yield {"what": what, "how": how, "ms": ms}


def _layers(run: Run) -> Iterator[Row]:
    """All products of two layers at 32 rows, as a graph: what a forward at batch 1 should take."""

    def random(*shape: int) -> torch.Tensor:
        made = random_normal(*shape, seed=len(shape), dtype=DTYPES[run.dtype], device=run.device)
        return made / shape[-1] ** 0.5

    x, norm, inner = random(32, 4096), random(4096), 12288
    sizes = ((12288, 4096), (4096, 4096), (2 * inner, 4096), (4096, inner))
    layers = [[random(*size) for size in sizes] for _ in range(2)]
    expected = multiply_layers("ops.linear", x, norm, layers)

    def measured(how: str, pdl: bool) -> Row:
        multiply_layers(how, x, norm, layers, pdl)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = multiply_layers(how, x, norm, layers, pdl)
        ms = run.milliseconds(graph.replay)
        return {"ms": ms} if how == "F.linear" else {"ms": ms, "equal": torch.equal(y, expected)}

    what = "products, norms and swiglu of two layers, 32 rows"
    for how in ("F.linear", "ops.linear", "ops.linear, fused"):
        for pdl in (False, True):
            name = f"{how}, dependent launches" if pdl else how
            row = run.tried(f"{what}, {name}", partial(measured, how, pdl))
            if row is not None:
                yield {"what": what, "how": name} | row


def multiply_layers(
    how: str,
    x: torch.Tensor,
    norm: torch.Tensor,
    layers: Sequence[Sequence[torch.Tensor]],
    pdl: bool = False,
) -> torch.Tensor:
    """Layers without their attention, of qkv, out, gate_up and down; Triton but for the products.

    Products are ``F.linear``'s, ``ops.linear``'s, or fused with the norm or the activation that
    follows, as the native forward does.
    """
    from pydllm.kernels import linear, rms_norm, swiglu

    def product(y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if how == "F.linear":
            return F.linear(y, weight)
        return linear.linear(y, weight, None, None, pdl=pdl)

    residual, eps = x.clone(), 1e-5
    y = rms_norm.rms_norm(x, norm, eps, None, pdl=pdl)
    for qkv, out, gate_up, down in layers:
        attended = product(y, qkv)[:, : x.shape[1]]
        if how == "ops.linear, fused":
            y = linear.linear_rms_norm(attended, out, None, None, norm, eps, residual, pdl=pdl)
            y = linear.linear_swiglu(y, gate_up, None, None, pdl=pdl)
            y = linear.linear_rms_norm(y, down, None, None, norm, eps, residual, pdl=pdl)
        else:
            y = rms_norm.rms_norm(product(attended, out), norm, eps, residual, pdl=pdl)
            y = swiglu.swiglu(product(y, gate_up), pdl=pdl)
            y = rms_norm.rms_norm(product(y, down), norm, eps, residual, pdl=pdl)
    return y


def _attention(run: Run) -> Iterator[Row]:
    """Backends and stages at batch 1, and a refresh of a whole cache."""
    case, heads = CASES["window_attention"], {"heads": 32, "kv_heads": 32, "head_dim": 128}
    slots = 2048 if run.on_gpu else 64
    for what, rows in (("window of 32", 32), ("refresh", slots)):
        inputs = case.make(DTYPES[run.dtype], run.device, batch=1, rows=rows, slots=slots, **heads)
        base = {"what": f"attention, {what}, {slots} slots"}
        for backend in run.backends:
            call = partial(case.call, inputs, backend)
            ms = run.tried(f"{base['what']} {backend}", partial(run.milliseconds, call))
            if ms is not None:
                yield base | {"how": backend, "ms": ms}
        if run.on_gpu and rows == 32:
            yield from _stages(run, base, partial(case.call, inputs, "triton"))


def _stages(run: Run, base: Row, call: Callable[[], object]) -> Iterator[Row]:
    from pydllm.kernels import _tiles

    key = _tiles.attention_key(torch.device(run.device), 2, 128)
    for stages in (2, 3, 4):
        table = _tiles.WINDOW_ATTENTION
        changed = table | {key: table[key]._replace(num_stages=stages)}
        with mock.patch.object(_tiles, "WINDOW_ATTENTION", changed):
            ms = run.tried(f"attention, {stages} stages", partial(run.milliseconds, call))
        if ms is not None:
            yield base | {"how": f"triton, {stages} stages", "ms": ms}


def model_steps(run: Run) -> Iterator[Row]:
    """Whole steps as graphs, of random weights: time, floor, launches, host."""
    dtype, (prompt, new) = DTYPES[run.dtype], ((1024, 64) if run.on_gpu else (8, 8))
    model, verifier = (make(run.model, run.device, dtype) for make in (make_model, make_verifier))
    for each in (model, verifier):
        longest = max(each.spec.max_positions or 0, prompt + new)
        changes = {"eos_ids": (), "max_positions": longest}
        each.spec = ModelSpec(**(vars(each.spec) | changes))
    ids = torch.randint(3, model.spec.vocab_size - 8, (1, prompt))
    prompts = [*ids.masked_fill(ids == model.spec.mask_id, 3)]
    measured = Rates.measure(run.device, dtype)
    known = algorithms(model, verifier, 32 if run.on_gpu else 4)
    for name in ("threshold", "freedave", "apd", "multiblock"):
        arguments = (model, verifier, known[name], prompts, new, 4.0, measured)
        rows = run.tried(f"{run.model} {name}", lambda a=arguments: list(measure(*a)))
        model.graphs.clear()
        yield from ({"algorithm": name} | row for row in rows or ())


def baselines(run: Run) -> Iterator[Row]:
    """What else computes the same: torch, and FlashInfer and FA3 where they are installed."""
    case, slots = CASES["window_attention"], 2048 if run.on_gpu else 64
    sizes = {"batch": 1, "rows": 32, "slots": slots, "heads": 32, "kv_heads": 32, "head_dim": 128}
    inputs = case.make(DTYPES[run.dtype], run.device, **sizes)
    contenders = {name: lambda make=make: make()(inputs) for name, make in case.BASELINES.items()}
    if run.on_gpu:
        q, k, v = (inputs[name] for name in ("q", "k_cache", "v_cache"))
        contenders |= {"FA3": lambda: _fa3()(q, k, v), "FlashInfer": lambda: _flashinfer()(q, k, v)}
    else:
        contenders.pop("torch.compile", None)  # minutes, and of no interest
    for name, call in contenders.items():
        ms = run.tried(f"attention by {name}", lambda call=call: run.milliseconds(call))
        if ms is not None:
            yield {"what": f"attention, window of 32, {slots} slots", "how": name, "ms": ms}


def _fa3() -> Callable[..., object]:
    from flash_attn_interface import flash_attn_func

    return flash_attn_func


def _flashinfer() -> Callable[..., object]:
    from flashinfer import single_prefill_with_kv_cache

    return lambda q, k, v: single_prefill_with_kv_cache(q[0], k[0], v[0])


# Name, seconds, what gives its rows.
STEPS: tuple[tuple[str, int, Callable[[Run], Iterator[Row]]], ...] = (
    ("kernels", 5, kernels),
    ("rates", 10, rates),
    ("correctness", 115, correctness),
    ("decisions", 75, decisions),
    ("model steps", 110, model_steps),
    ("baselines", 45, baselines),
)


def execute(run: Run, out: Path, seconds: float) -> None:
    """All steps in order, each to the end of its budget; the report is written row by row."""
    started, planned = time.monotonic(), 0.0
    for name, budget, function in STEPS:
        planned += budget * seconds / SECONDS
        rows = run.results.setdefault(name, [])
        steps = function(run)
        while True:
            try:
                row = next(steps, None)
            except Exception as error:  # the step, not the run, is over
                run.could_not.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
                break
            if row is None:
                break
            rows.append(row)
            write(run, out)
            if time.monotonic() - started > planned:
                run.could_not.append(f"{name}: out of time after {len(rows)} rows")
                break
    write(run, out)


def write(run: Run, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    facts = provenance(run.device) | {"command": "python -m bench.gpu first"}
    report = {"facts": facts, "results": run.results, "could_not": run.could_not}
    (out / "first.json").write_text(json.dumps(report, indent=1, default=str))
    (out / "first.md").write_text(markdown(run, facts))


def markdown(run: Run, facts: Row) -> str:
    """One table per step, and what could not be done."""
    lines = ["# The first minutes", "", ", ".join(f"{k} {v}" for k, v in facts.items() if v)]
    for name, rows in run.results.items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines += ["", f"## {name}", ""]
        lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)] if rows else []
        lines += ["| " + " | ".join(_cell(row.get(c, "")) for c in columns) + " |" for row in rows]
    lines += ["", "## Could not be done", "", *(f"- {line}" for line in run.could_not)]
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@click.command()
@click.option("--device", default="cuda", show_default=True)
@click.option("--model", default="llada-8b", type=click.Choice(["tiny", *CONFIGS]))
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "bench/results/first")
@click.option("--seconds", default=float(SECONDS), show_default=True)
@click.option("--dry", is_flag=True, help="Print the order and the budgets.")
def main(device: str, model: str, out: Path, seconds: float, dry: bool) -> None:
    """The measurements that decide most, in at most six minutes."""
    if dry:
        at = 0.0
        for name, budget, function in STEPS:
            budget_s = budget * seconds / SECONDS
            what = (function.__doc__ or "Copy and matmul rates.").splitlines()[0]
            click.echo(f"{at:5.0f} s + {budget_s:3.0f} s  {name}: {what}")
            at += budget_s
        click.echo(f"{at:5.0f} s in all; writes first.json and first.md to {out}")
        return
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise click.ClickException("expected a CUDA device, torch finds none (--dry needs none)")
    run = Run(device, model)
    execute(run, out, seconds)
    click.echo((out / "first.md").read_text())


if __name__ == "__main__":
    main()
