"""What the trainer adds to the model's own forwards and backward.

    python -m bench.distill                                      # a small shape on the CPU
    python -m bench.distill --device cuda --model llada-8b --dtype bf16 --batch 4 --answer 256

Random weights of the named shape, random trajectories. A step of ``pydllm.distill`` draws windows,
makes the two noisy copies of the batch, and takes cross-entropy and entropy of the rows that count.
The bare model does two forwards of the same ids and one backward from a sum of logits: of all rows,
which is what a model that returns logits does, or of the rows that count alone. The optimiser runs
in neither. The runs take turns, so that a busy machine is unfair to none.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from bench.ops.run import DTYPES
from bench.shapes import CONFIGS
from pydllm.distill import PRESETS, Trajectories
from pydllm.distill.masking import Noisy
from pydllm.distill.trainer import Objective, draw_batch
from pydllm.distill.transformer import Transformer
from pydllm.models.config import Config
from pydllm.models.families import find_family
from pydllm.models.overrides import make_spec

SMALL = CONFIGS["llada-100m"] | {
    "d_model": 512,
    "n_heads": 8,
    "n_kv_heads": 8,
    "n_layers": 8,
    "mlp_hidden_size": 1408,
    "vocab_size": 32000,
    "embedding_size": 32000,
    "mask_token_id": 31999,
    "eos_token_id": 31998,
}
SHAPES = {"small": SMALL, **CONFIGS}


def random_transformer(settings: dict, device: str, dtype: torch.dtype) -> Transformer:
    config = Config(settings)
    family = find_family(config)
    sizes = family.sizes(config, family)
    torch.manual_seed(0)
    with torch.device(device):
        model = Transformer(family, sizes, make_spec(config, family, sizes, None))
    return model.to(dtype).train()


def random_trajectories(vocab: int, rows: int, prompt: int, answer: int) -> Trajectories:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab - 2, (rows, prompt + answer), generator=generator).int()
    steps = torch.rand(rows, answer, generator=generator).argsort(1).short()
    return Trajectories(ids, torch.full((rows,), prompt, dtype=torch.int32), steps)


class Contenders:
    """One step each way, gradients included."""

    def __init__(self, model: Transformer, trajectories: Trajectories, batch: int, window: int):
        self.model, self.trajectories = model, trajectories
        recipe = replace(PRESETS["dream"], batch_size=batch, windows=(window,))
        self.recipe, self.objective = recipe, Objective(model, recipe, None)
        self.device = next(model.parameters()).device
        self.drawn = self.draw(0)

    def draw(self, step: int) -> Noisy:
        mask_id = self.model.spec.mask_id or 0
        place = (step, 1000, 0, 0, 1)
        batch, *_ = draw_batch(self.trajectories, self.recipe, mask_id, 0, place)
        return Noisy(**{name: tensor.to(self.device) for name, tensor in vars(batch).items()})

    def trainer(self, step: int) -> None:
        self.drawn = self.draw(step)
        self.objective(self.drawn)[0].backward()

    def bare(self, count_all: bool) -> None:
        """On the batch that the trainer has just had."""
        batch = self.drawn
        weight, bias = self.model.head
        inputs = torch.cat((batch.noisy, batch.complement))
        hidden = self.model(inputs, batch.lengths.repeat(2)).chunk(2)
        total: Tensor | float = 0.0
        for states, rows in zip(hidden, (batch.masked, batch.unmasked), strict=True):
            chosen = states if count_all else states[rows]
            total = total + F.linear(chosen, weight, bias).sum()
        total.backward()  # type: ignore[union-attr]


def measure(contenders: Contenders, repeat: int) -> dict[str, list[float]]:
    """Milliseconds of every run, by contender, in turns; the first turn is thrown away."""
    runs: dict[str, Callable[[int], object]] = {
        "trainer": contenders.trainer,
        "bare, logits of all rows": lambda _: contenders.bare(True),
        "bare, rows that count": lambda _: contenders.bare(False),
        "drawing and masking alone": contenders.draw,
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    cuda = contenders.device.type == "cuda"
    for turn in range(repeat + 1):
        for name, run in runs.items():
            contenders.model.zero_grad()
            if cuda:
                torch.cuda.synchronize()
            started = time.perf_counter()
            run(turn)
            if cuda:
                torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - started))
    return {name: values[1:] for name, values in times.items()}


@click.command()
@click.option("--model", "name", default="small", show_default=True, type=click.Choice([*SHAPES]))
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--dtype", type=click.Choice(sorted(DTYPES)), help="Default: bf16 on cuda.")
@click.option("--batch", default=2, show_default=True, type=click.IntRange(1), help="Samples.")
@click.option("--prompt", default=96, show_default=True, type=click.IntRange(1), help="Tokens.")
@click.option("--answer", default=96, show_default=True, type=click.IntRange(1), help="Tokens.")
@click.option("--window", default=32, show_default=True, type=click.IntRange(1), help="Tokens.")
@click.option("--repeat", default=9, show_default=True, type=click.IntRange(1))
def main(
    name: str,
    device: str,
    dtype: str | None,
    batch: int,
    prompt: int,
    answer: int,
    window: int,
    repeat: int,
) -> None:
    """Print what a step of the trainer costs beside two bare forwards and a backward."""
    chosen = DTYPES[dtype or ("bf16" if device.startswith("cuda") else "fp32")]
    model = random_transformer(SHAPES[name], device, chosen)
    trajectories = random_trajectories(model.spec.vocab_size, 4 * batch, prompt, answer)
    times = measure(Contenders(model, trajectories, batch, window), repeat)
    title = f"distill: {name}, {str(chosen)[6:]}, {batch} x ({prompt} + {answer}), window {window}"
    table = Table("one step", "ms, median", "trainer over it", title=title)
    for label, values in times.items():
        # Turn by turn: both ran within the same moment of a busy machine.
        pairs = zip(times["trainer"], values, strict=True)
        ratio = statistics.median(ours / theirs for ours, theirs in pairs)
        shown = f"{100 * (ratio - 1):+.1f} %" if label.startswith("bare") else ""
        table.add_row(label, f"{statistics.median(values):.1f}", shown)
    Console(width=None if sys.stdout.isatty() else 100).print(table)


if __name__ == "__main__":
    main()
