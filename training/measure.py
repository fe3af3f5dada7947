"""Decode held-out problems of the new task: ``python -m training.measure FOLDER --only Static``."""

from __future__ import annotations

from pathlib import Path

import click
import torch

import pydllm
from pydllm.decoding.driver import Algorithm
from pydllm.demo.task import ANSWER_LENGTH, held_out_problems, is_correct
from pydllm.models import Model

_BATCH = 100


def decoders(block: int, verifier: Model | None) -> dict[str, Algorithm]:
    """What is measured, by the name in the table; the others are compared with the first."""
    return {
        "Static, 1 token a step": pydllm.Static(block_length=block),
        "Static, 2 tokens a step": pydllm.Static(block_length=block, tokens_per_step=2),
        "Static, 4 tokens a step": pydllm.Static(block_length=block, tokens_per_step=4),
        "Static, a block a step": pydllm.Static(block_length=block, tokens_per_step=block),
        "Threshold 0.9": pydllm.Threshold(threshold=0.9, block_length=block),
        "Threshold 0.6": pydllm.Threshold(threshold=0.6, block_length=block),
        "EntropyBound 0.1": pydllm.EntropyBound(bound=0.1, block_length=block),
        "Factor 1.0": pydllm.Factor(factor=1.0, block_length=block),
        "FreeDave, 8 drafts": pydllm.FreeDave(draft_steps=8, block_length=block),
        **({"APD": pydllm.APD(verifier)} if verifier is not None else {}),
    }


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--verifier", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--problems", default=300, show_default=True, type=click.IntRange(1))
@click.option("--block", default=24, show_default=True, type=click.IntRange(1))
@click.option("--only", default="", help="Only decoders whose name contains this.")
def main(folder: Path, verifier: Path | None, problems: int, block: int, only: str) -> None:
    """Print right solutions, those of each rule, forwards, and tokens per forward."""
    model, tasks = pydllm.load(folder, device="cpu"), held_out_problems(problems)
    proposer = pydllm.load(verifier, device="cpu") if verifier is not None else None
    first: list[torch.Tensor] = []
    for name, algorithm in decoders(block, proposer).items():
        if only.lower() not in name.lower():
            continue
        batches = []
        for start in range(0, problems, _BATCH):
            prompts = [problem.prompt for problem in tasks[start : start + _BATCH]]
            batches.append(pydllm.generate(model, prompts, algorithm, max_new_tokens=ANSWER_LENGTH))
        texts = [text for batch in batches for text in batch.text or ()]
        sequences = [sequence for batch in batches for sequence in batch.sequences]
        first = first or sequences
        right = [is_correct(*pair) for pair in zip(tasks, texts, strict=True)]
        ordered = [problem.in_order for problem in tasks]
        told = sum(r for r, o in zip(right, ordered, strict=True) if o)
        forwards = torch.cat([batch.nfe for batch in batches]).float().mean()
        rate = torch.cat([batch.tokens_per_forward for batch in batches]).mean()
        click.echo(
            f"{name:24} {100 * sum(right) / problems:5.1f} % right (in order {told}/{sum(ordered)},"
            f" each once {sum(right) - told}/{problems - sum(ordered)}), {forwards:5.2f} forwards,"
            f" {rate:5.2f} tokens per forward,"
            f" {100 * sum(map(torch.equal, sequences, first)) / problems:5.1f} % as the first"
        )


if __name__ == "__main__":
    main()
