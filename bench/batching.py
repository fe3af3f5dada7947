"""Decode prompts of mixed lengths at several ``max_batch``, and compare each with the prompt alone.

    python -m bench.batching --prompts 500
    python -m bench.batching --algorithm freedave --model sdar-tiny --max-batch 1 --max-batch 16

A waiting prompt takes the slot of a finished one. Every answer, step map and count has to be that
of the prompt alone with its request id; the command fails where one is not. Tokens per second are
those of the answers, set-up and results included.
"""

from __future__ import annotations

import time
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

import pydllm
from pydllm.decoding.settings import make_algorithm
from pydllm.demo import WEIGHTS

SHORTEST, LONGEST = 4, 40  # tokens of a prompt


def make_prompts(model: Any, count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (count,), generator=generator).tolist()
    ids = torch.randint(3, model.spec.vocab_size, (count, LONGEST), generator=generator)
    ids = ids.masked_fill(ids == model.spec.mask_id, 3).tolist()
    return [row[:length] for row, length in zip(ids, lengths, strict=True)]


def differing(batched: pydllm.Generation, alone: list[pydllm.Generation]) -> int:
    """Prompts whose answer, step map or number of forwards is not that of the prompt alone."""
    return sum(
        not (
            torch.equal(batched.sequences[row], one.sequences[0])
            and torch.equal(batched.step_map[row], one.step_map[0])
            and batched.nfe[row] == one.nfe[0]
            and batched.finish_reason[row] == one.finish_reason[0]
        )
        for row, one in enumerate(alone)
    )


@click.command()
@click.option("--model", default="llada-tiny", show_default=True, help="A bundled one or a folder.")
@click.option("--algorithm", default="threshold", show_default=True)
@click.option("--prompts", "count", default=500, show_default=True, type=click.IntRange(1))
@click.option("--new", default=32, show_default=True, type=click.IntRange(1))
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0))
@click.option("--max-batch", default=[1, 4, 16], show_default=True, multiple=True, type=int)
@click.option("--device", default="cpu", show_default=True)
def main(
    model: str,
    algorithm: str,
    count: int,
    new: int,
    temperature: float,
    max_batch: tuple[int, ...],
    device: str,
) -> None:
    """Tokens per second by the number of sequences in the batch."""
    bundled = WEIGHTS.parent / model
    # fp64: a product of another height differs in its last bits, and must decide nothing.
    loaded = pydllm.load(bundled if bundled.is_dir() else model, device=device, dtype=torch.float64)
    size = loaded.spec.block_size
    made = make_algorithm(algorithm, {} if size is None else {"block_length": str(size)})
    prompts = make_prompts(loaded, count)
    options: dict[str, Any] = {"max_new_tokens": new, "temperature": temperature}
    started = time.perf_counter()
    alone = [
        pydllm.generate(loaded, [prompt], made, request_ids=[row], **options)
        for row, prompt in enumerate(prompts)
    ]
    runs = [("alone", time.perf_counter() - started, 0)]
    for batch in max_batch:
        started = time.perf_counter()
        batched = pydllm.generate(loaded, prompts, made, max_batch=batch, **options)
        runs.append((str(batch), time.perf_counter() - started, differing(batched, alone)))
    tokens = sum(len(one.new_tokens[0]) for one in alone)
    table = Table("max_batch", "seconds", "tokens_per_s", "differing", title=f"{made}")
    for name, seconds, wrong in runs:
        table.add_row(name, f"{seconds:.2f}", f"{tokens / seconds:.1f}", f"{wrong} of {count}")
    Console(width=100).print(table)
    if any(wrong for _, _, wrong in runs):
        raise click.ClickException("expected every prompt as it is alone")


if __name__ == "__main__":
    main()
