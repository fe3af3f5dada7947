"""What tensor parallelism sends and holds, and that it decodes the same tokens; gloo, on the CPU.

    python -m bench.tensor_parallel --model tiny --tp 2 --tp 4
    python -m bench.tensor_parallel --model llada-100m --tp 2 --new 32
    python -m bench.tensor_parallel --model llada2-200m --tp 2 --tp 4 --expert-parallel

Random weights of a named shape are written to a temporary checkpoint first, so that each process
reads its part of it as it would of a real one. Peak memory is that of the process while it loads
and decodes, less what it had before. Processes on one machine share its cores: the seconds say
nothing of several GPUs.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import distributed, multiprocessing

import pydllm
from bench.shapes import CONFIGS
from pydllm.demo import WEIGHTS
from pydllm.models.config import Config
from pydllm.models.families import find_family
from pydllm.models.weights import slots

DTYPES = {"fp64": torch.float64, "fp32": torch.float32}


def write_checkpoint(name: str, folder: Path) -> Path:
    """A checkpoint of the named shape with random weights."""
    settings = CONFIGS[name]
    config = Config(settings)
    family = find_family(config)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for slot in slots(family.names, family.sizes(config, family)):
        for source, shape in slot.sources:
            tensors[source] = torch.ones(shape)
            if len(shape) == 2:
                tensors[source].normal_(0.0, 0.02, generator=generator)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def _peak_bytes() -> int:
    """The most memory this process has had; getrusage would count its parent's at the fork."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def decode(
    rank: int, size: int, folder: str, source: str, dtype: str, new: int, expert_parallel: bool
) -> None:
    """One process's decoding; leaves what it saw in ``folder``."""
    torch.set_num_threads(1)
    if size > 1:
        store = f"file://{folder}/store-{size}"
        distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    before = _peak_bytes()
    spread = {"tp": size, "expert_parallel": expert_parallel}
    model = pydllm.load(source, device="cpu", dtype=DTYPES[dtype], **spread)
    parts = [part for layer in model._layers for part in (layer, layer.experts) if part is not None]
    values = [value for part in parts for value in vars(part).values()]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    tensors += [model._embedding, model._norm, model._head]
    held = sum({t.data_ptr(): t.nbytes for t in tensors}.values())
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 90, (n,), generator=generator).tolist() for n in (21, 32)]
    blocks = model.spec.block_size
    started = time.perf_counter()
    made = pydllm.generate(
        model,
        prompts,
        pydllm.Static(
            block_length=blocks or 16, tokens_per_step=2, cache="none" if blocks else "dual"
        ),
        max_new_tokens=new,
    )
    result = {
        "tokens": torch.stack([ids[-new:] for ids in made.sequences]),
        "forwards": int(made.nfe.max()),
        "seconds": time.perf_counter() - started,
        "weights": held,
        "peak": _peak_bytes() - before,
        "bytes": dict(getattr(model, "bytes", {})),
        "calls": dict(getattr(model, "calls", {})),
    }
    torch.save(result, f"{folder}/{size}-{rank}.pt")
    if size > 1:
        distributed.destroy_process_group()


@click.command()
@click.option("--model", "name", default="tiny", type=click.Choice(["tiny", *CONFIGS]))
@click.option("--tp", "sizes", multiple=True, type=int, help="Processes; repeat for several.")
@click.option("--expert-parallel", is_flag=True, help="Spread experts whole, not their columns.")
@click.option("--dtype", default="fp64", type=click.Choice(sorted(DTYPES)))
@click.option("--new", default=32, show_default=True, help="Tokens to decode.")
def main(name: str, sizes: tuple[int, ...], expert_parallel: bool, dtype: str, new: int) -> None:
    """Print what each process holds and sends; exit with 1 where the tokens differ."""
    table = Table(
        "processes", "same tokens", "forwards", "weights MB", "peak MB", "calls a forward",
        "layer KB a forward", "head bytes per forward", "seconds", title=f"{name}, {dtype}",
    )  # fmt: skip
    wrong = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = WEIGHTS if name == "tiny" else write_checkpoint(name, folder)
        alone = None
        for size in (1, *(sizes or (2,))):
            settings = (size, temporary, str(source), dtype, new, expert_parallel)
            multiprocessing.start_processes(decode, settings, nprocs=size, start_method="spawn")
            parts = [torch.load(folder / f"{size}-{rank}.pt") for rank in range(size)]
            first = parts[0]
            alone = first if alone is None else alone
            same = all(torch.equal(part["tokens"], alone["tokens"]) for part in parts)
            wrong += not same
            forwards = first["forwards"]
            table.add_row(
                str(size),
                "yes" if same else "NO",
                str(forwards),
                " ".join(f"{part['weights'] / 2**20:.1f}" for part in parts),
                " ".join(f"{part['peak'] / 2**20:.0f}" for part in parts),
                f"{sum(first['calls'].values()) / forwards:.1f}",
                f"{first['bytes'].get('layers', 0) / forwards / 1024:.1f}",
                f"{first['bytes'].get('statistics', 0) / forwards:.0f}",
                f"{first['seconds']:.2f}",
            )
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
