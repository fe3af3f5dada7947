"""Count the experts that a block touches: ``python -m training.experts FOLDER``."""

from __future__ import annotations

from pathlib import Path

import click
import torch
from torch import Tensor

import pydllm
from pydllm.demo.task import ANSWER_LENGTH, held_out_problems
from pydllm.models.native import NativeModel

_BATCH = 100


def distinct_experts(chosen: list[Tensor], experts: int, rows: int) -> Tensor:
    """Distinct experts of each window of ``rows`` rows in use, one fp32 value per window.

    Args:
        chosen: experts of each row of a layer's forwards, ``(B, T, top_k)``; those of a row that is
            not in use are ``experts``.
    """
    counts = []
    for ids in chosen:
        touched = torch.zeros(ids.shape[0], experts + 1)
        touched.scatter_(1, ids.flatten(1).long(), 1.0)
        in_use = (ids[..., 0] < experts).sum(1)
        counts.append(touched[in_use == rows, :experts].sum(1))
    return torch.cat(counts)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--problems", default=300, show_default=True, type=click.IntRange(1))
@click.option("--threshold", default=0.9, show_default=True, type=click.FloatRange(0, 1))
def main(folder: Path, problems: int, threshold: float) -> None:
    """Decode with Threshold; print the mean over the forwards of a block, layer by layer."""
    model, tasks = pydllm.load(folder, device="cpu"), held_out_problems(problems)
    moe = model.sizes.moe if isinstance(model, NativeModel) else None
    size = model.spec.block_size
    if moe is None or size is None:
        raise click.BadParameter(f"expected a block-causal model with experts, got {folder}")
    model.routed = []
    rule = pydllm.Threshold(threshold=threshold, block_length=size)
    for start in range(0, problems, _BATCH):
        prompts = [problem.prompt for problem in tasks[start : start + _BATCH]]
        pydllm.generate(model, prompts, rule, max_new_tokens=ANSWER_LENGTH)
    layers = [layer for layer, sparse in enumerate(moe.sparse) if sparse]
    for place, layer in enumerate(layers):
        counts = distinct_experts(model.routed[place :: len(layers)], moe.experts, size)
        click.echo(
            f"layer {layer}: {counts.mean():.1f} of {moe.experts} experts, {len(counts)} blocks "
            f"forwarded, {moe.top_k} experts per row"
        )


if __name__ == "__main__":
    main()
