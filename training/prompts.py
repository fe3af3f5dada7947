"""Prompts of the training side, to distil with: ``python -m training.prompts --out FILE``."""

from __future__ import annotations

import json
import random
from pathlib import Path

import click

from pydllm.demo.task import draw_problem


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSONL to write.")
@click.option("--count", default=6144, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True)
def main(out: Path, count: int, seed: int) -> None:
    """Write problems that are not held out, each with its answer, for ``pydllm distill``."""
    rng = random.Random(f"distill {seed}")
    problems = (draw_problem(rng, held_out=False) for _ in range(count))
    lines = [json.dumps({"prompt": p.prompt, "answer": str(p.answer)}) for p in problems]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(line + "\n" for line in lines))


if __name__ == "__main__":
    main()
