"""Time every kind of step that decoding takes, against the least that the machine could take.

    python -m bench.steps --model llada-8b --device cuda --batch 1 --prompt 1024
    python -m bench.steps --model tiny --device cpu --prompt 16 --new 32
    python -m bench.steps --model dream-7b --algorithm threshold --trace out/trace.json
    python -m bench.steps --model llada2-mini --device cuda --batch 1 --prompt 1024

The weights are random, of the named model's shape. Each algorithm decodes through
``pydllm.generate`` with captured steps (on a CPU: ``bench.recorder``); what is timed are the
replays, alone, by kind: the first forward of a block, its others, the verification of candidates.

``floor_ms`` is the longer of two times: weights, and keys and values that are seen, over the
measured copy rate; multiplications over the measured rate of a large matrix product. Of a mixture
the weights are those of the experts that even and independent routes would touch: rows that share
experts read fewer. ``host_us`` is what the host spends on a replay; ``launches`` are kernels (on a
CPU: operators). ``run_ms`` is a forward of the same decoding with ``graph=False``, host and device
together.

A random model predicts no better than chance, so few tokens are accepted a forward:
``tokens_per_s`` is for ``--tokens-per-forward``, at the mean forward of the whole decoding.

Baselines, same run and weights: the plain forward of bench/baselines over the whole sequence and
over a block with the keys and values before it, the same compiled, and a Hugging Face Llama of the
same sizes if the model is dense.
"""

from __future__ import annotations

import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pydllm
from bench.baselines.loops import PlainForward
from bench.gpu.roofline import Rates, Watch, count_launches
from bench.ops.run import DTYPES, provenance
from bench.ops.timing import time_calls
from bench.recorder import Recording
from bench.shapes import CONFIGS, make_model, make_verifier
from pydllm.decoding.graph import Graphs
from pydllm.models import ModelSpec, NativeModel
from pydllm.models.config import Config
from pydllm.models.moe import has_experts

COLUMNS = (
    *("model", "dtype", "batch", "prompt", "new", "algorithm", "step", "rows", "seen", "count"),
    *("ms_p50", "floor_ms", "of_floor", "bound", "host_us", "launches", "run_ms", "tokens_per_s"),
    *("peak_gb", "copy_gbps", "matmul_tflops"),
)
_MORE = ("gpu", "driver", "torch", "triton", "cuda", "commit", "command", "date")


def algorithms(
    model: NativeModel, verifier: NativeModel | None, block: int
) -> dict[str, pydllm.decoding.driver.Algorithm]:
    """What is timed, by name."""
    size = model.spec.block_size or block
    cache = "none" if model.spec.block_size else "dual"
    found: dict[str, Any] = {
        "static": pydllm.Static(block_length=size, cache=cache),
        "threshold": pydllm.Threshold(threshold=0.9, block_length=size, cache=cache),
        "freedave": pydllm.FreeDave(draft_steps=8, block_length=size, cache=cache),
    }
    if model.spec.block_size:
        return found | {
            "pipelined": pydllm.FreeDave(draft_steps=8, block_length=size, mode="pipelined")
        }
    found["static-none"] = pydllm.Static(block_length=size)
    found["multiblock"] = pydllm.MultiBlock(threshold=0.5, block_length=size)
    if verifier is not None:
        found["apd"] = pydllm.APD(verifier)
    return found


def measure(
    model: NativeModel,
    verifier: NativeModel | None,
    algorithm: Any,
    prompts: list[Tensor],
    new: int,
    per_forward: float,
    rates: Rates,
) -> Iterator[dict[str, Any]]:
    """A row for each kind of step, and one for the whole decoding."""
    on_gpu, batch = model.device.type == "cuda", len(prompts)
    context = len(prompts[0]) + new
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Graphs.recorder = Recording
    pydllm.warmup(model, algorithm, batch, context, max_new_tokens=new)
    graphs = next(reversed(model.graphs.values()))
    with Watch(graphs, context, model, verifier) as watch:
        for _ in range(3):
            pydllm.generate(model, prompts, algorithm, max_new_tokens=new, graph=True)
    peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0
    seconds, forwards = {}, 1
    for graph in (True, False):
        started = time.perf_counter()
        got = pydllm.generate(model, prompts, algorithm, max_new_tokens=new, graph=graph)
        seconds[graph] = time.perf_counter() - started
        forwards = int(got.nfe.max())
    for key, kind in watch.kinds.items():
        if not kind.ms or not kind.work:
            continue
        floor, bound = kind.floor(rates)
        typical = statistics.median(kind.ms)
        yield {
            "step": label(key),
            "rows": kind.work[0].rows,
            "seen": kind.work[0].seen,
            "count": len(kind.ms),
            "ms_p50": typical,
            "floor_ms": floor,
            "of_floor": typical / floor,
            "bound": bound,
            "host_us": statistics.median(kind.host),
            "launches": count_launches(graphs.steps[key]),
        }
    yield {
        "step": "all",
        "count": forwards,
        "ms_p50": 1e3 * seconds[True] / forwards,
        "run_ms": 1e3 * seconds[False] / forwards,
        "tokens_per_s": batch * per_forward * forwards / seconds[True],
        "peak_gb": peak,
    }


def label(key: Any) -> str:
    """A step's key in few letters: True is +, False is -."""
    if isinstance(key, tuple):
        return " ".join(label(part) for part in key)
    return {True: "+", False: "-"}.get(key, str(key)) if isinstance(key, bool) else str(key)


def baselines(
    model: NativeModel, prompts: list[Tensor], new: int, block: int, compiled: bool
) -> Iterator[dict[str, Any]]:
    """What a forward takes elsewhere, on the same weights or sizes."""
    ids = torch.stack(prompts).to(model.device)
    whole = torch.nn.functional.pad(ids, (0, new), value=3)
    forward, before = PlainForward(model), ids.shape[1]
    _, past = forward(ids)
    window = whole[:, before : before + block]
    contenders: dict[str, Callable[[], Any]] = {
        "published-style, whole": lambda: forward(whole),
        "published-style, block": lambda: forward(window, before, past),
    }
    if compiled:
        faster = torch.compile(forward, mode="reduce-overhead", dynamic=False)
        contenders["published-style, whole, compiled"] = lambda: faster(whole)
        contenders["published-style, block, compiled"] = lambda: faster(window, before, past)
    llama = make_llama(model)
    if llama is not None:
        contenders["Hugging Face Llama, whole"] = lambda: llama(whole, use_cache=False)
    for name, call in contenders.items():
        rows = (window if "block" in name else whole).numel()
        try:
            with torch.no_grad():
                timing = time_calls(
                    lambda _, call=call: call(), dict, model.device.type, seconds=0.5
                )
        except Exception as error:  # whatever a compiler raises; the others go on
            click.echo(f"{name}: failed: {error}"[:500], err=True)
            continue
        yield {"step": name, "rows": rows, "ms_p50": timing.p50}


def make_llama(model: NativeModel) -> Any:
    """A causal model of the same sizes; None for a mixture, or without transformers."""
    if model.sizes.moe is not None:
        return None
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return None
    sizes = model.sizes
    config = LlamaConfig(
        vocab_size=model.spec.vocab_size,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
    )
    with torch.device(model.device):
        return LlamaForCausalLM(config).to(model.dtype).eval()


def plot(rows: list[dict[str, Any]], rates: Rates, path: Path) -> None:
    """Each step's time, and of it the floor; and the steps under the machine's roof."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if "floor_ms" in row]
    figure = Figure(figsize=(12, 0.3 * len(rows) + 2), layout="constrained")
    bars, roof = figure.subplots(1, 2)
    names = [f"{row['algorithm']} {row['step']}" for row in rows]
    bars.barh(names, [row["ms_p50"] for row in rows], color="lightgrey", label="measured")
    bars.barh(names, [row["floor_ms"] for row in rows], color="tab:blue", label="floor")
    bars.set_xlabel("ms per step")
    bars.tick_params(labelsize=6)
    bars.legend()
    widths = [row["rows"] for row in rows]
    roof.scatter(widths, [1 / row["of_floor"] for row in rows], s=12)
    roof.axhline(1.0, color="black", linewidth=0.5)
    roof.set(xscale="log", xlabel="rows of a step", ylabel="floor / measured", ylim=(0, 1.1))
    roof.set_title(f"{rates.copy / 1e9:.0f} GB/s, {rates.matmul / 1e12:.1f} TFLOP/s measured")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def trace(model: NativeModel, algorithm: Any, prompts: list[Tensor], new: int, path: Path) -> None:
    """A profile of one decoding, for chrome://tracing or Perfetto."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as profile:
        pydllm.generate(model, prompts, algorithm, max_new_tokens=new, graph=True)
    profile.export_chrome_trace(str(path))


@click.command()
@click.option("--model", "name", default="tiny", type=click.Choice(["tiny", *CONFIGS]))
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--dtype", type=click.Choice(sorted(DTYPES)), help="Default: bf16 on cuda.")
@click.option("--algorithm", "wanted", multiple=True, help="Default: all.")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1))
@click.option("--prompt", "prompt_length", default=128, show_default=True, type=click.IntRange(1))
@click.option("--new", default=64, show_default=True, type=click.IntRange(2))
@click.option("--block", default=32, show_default=True, type=click.IntRange(2))
@click.option("--tokens-per-forward", default=4.0, show_default=True)
@click.option("--compiled/--no-compiled", default=True, help="Compile the published-style forward.")
@click.option("--csv", "csv_file", type=click.Path(path_type=Path), help="Append rows to it.")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Write a PNG.")
@click.option("--trace", "trace_file", type=click.Path(path_type=Path), help="Write a profile.")
def main(
    name: str,
    device: str,
    dtype: str | None,
    wanted: tuple[str, ...],
    batch: int,
    prompt_length: int,
    new: int,
    block: int,
    tokens_per_forward: float,
    compiled: bool,
    csv_file: Path | None,
    plot_file: Path | None,
    trace_file: Path | None,
) -> None:
    """Time the steps of each algorithm on one model's shape."""
    dtype = dtype or ("bf16" if device.startswith("cuda") else "fp32")
    if not device.startswith("cuda") and has_experts(Config(CONFIGS.get(name, {}))):
        raise click.UsageError(
            f"--model {name}: expected a GPU for a mixture of experts, got {device}: on a CPU its "
            "routes are read by the host, and no step is recorded"
        )
    model = make_model(name, device, DTYPES[dtype])
    # The work is to be the same whatever is predicted; the rotary tables are as long as need be.
    longest = max(model.spec.max_positions or 0, prompt_length + new)
    changes = {"eos_ids": (), "max_positions": longest}
    model.spec = ModelSpec(**(vars(model.spec) | changes))
    full = model.spec.attention == "full"
    verifier = None
    if full and (not wanted or "apd" in wanted):
        verifier = make_verifier(name, device, DTYPES[dtype])
        verifier.spec = ModelSpec(**(vars(verifier.spec) | {"max_positions": longest}))
    known = algorithms(model, verifier, block)
    unknown = set(wanted) - set(known)
    if unknown:
        raise click.UsageError(
            f"--algorithm: expected one of {', '.join(known)}, got {', '.join(unknown)}"
        )
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, model.spec.vocab_size - 8, (batch, prompt_length), generator=generator)
    prompts = [*ids.masked_fill(ids == model.spec.mask_id, 3)]
    rates = Rates.measure(device, DTYPES[dtype])
    facts = {"model": name, "dtype": dtype, "batch": batch, "prompt": prompt_length, "new": new}
    facts |= {"copy_gbps": rates.copy / 1e9, "matmul_tflops": rates.matmul / 1e12}
    rows = []
    for label_, algorithm in known.items():
        if wanted and label_ not in wanted:
            continue
        for row in measure(model, verifier, algorithm, prompts, new, tokens_per_forward, rates):
            rows.append(facts | {"algorithm": label_} | row)
        model.graphs.clear()  # its cache may be large
    for row in baselines(model, prompts, new, block, compiled):
        rows.append(facts | {"algorithm": "baseline"} | row)
    shown = [column for column in COLUMNS if column not in facts]
    table = Table(*shown, title=f"{name}, {dtype}, batch {batch}, {prompt_length} + {new} tokens")
    for row in rows:
        table.add_row(*(_cell(row.get(column, "")) for column in shown))
    Console(width=None if sys.stdout.isatty() else 180).print(table)
    if csv_file is not None:
        more = provenance(device) | {"command": "python -m bench.steps " + " ".join(sys.argv[1:])}
        csv_file.parent.mkdir(parents=True, exist_ok=True)
        is_new = not csv_file.exists()
        with csv_file.open("a", newline="") as file:
            writer = csv.DictWriter(file, [*COLUMNS, *_MORE])
            if is_new:
                writer.writeheader()
            writer.writerows(row | more for row in rows)
    if plot_file is not None:
        plot(rows, rates, plot_file)
    if trace_file is not None:
        trace(model, known[wanted[0] if wanted else "threshold"], prompts, new, trace_file)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
