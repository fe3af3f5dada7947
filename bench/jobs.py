"""What Ray costs a batch job: rows a second in this process and in one actor, in turns.

    python -m bench.jobs --rows 2000

Both decode the same problems with the bundled model. "steady" leaves out the time until the first
batch is done: starting Ray, starting the actor, loading the model.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from pydllm.demo import VERIFIER, WEIGHTS
from pydllm.demo.task import held_out_problems
from pydllm.integrations.jobs import Recipe, run_job


@click.command()
@click.option("--rows", default=2000, show_default=True)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--rounds", default=2, show_default=True)
@click.option("--workers", default=1, show_default=True, help="Ray's actors.")
def main(rows: int, batch_size: int, rounds: int, workers: int) -> None:
    """Print rows a second of both engines; exit with 1 where the answers differ."""
    settings = (("threshold", "0.9"), ("block_length", "24"), ("cache", "dual"))
    recipe = Recipe(
        str(WEIGHTS), "threshold", settings, str(VERIFIER), 48, 0.0, 0, "float64", None
    )  # in fp64 the answers do not depend on which rows share a matrix
    table = Table("engine", "round", "rows/s", "steady rows/s", "steady, of process", "sha256")
    sums, process = set(), 0.0
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "prompts.jsonl"
        problems = held_out_problems(rows)
        data.write_text("".join(json.dumps({"prompt": p.prompt}) + "\n" for p in problems))
        for turn in range(rounds):
            for engine in ("process", "ray"):
                marks: list[tuple[float, int]] = []
                started = time.perf_counter()
                summary = run_job(
                    data,
                    Path(temporary) / f"{engine}-{turn}",
                    recipe,
                    engine=engine,
                    batch_size=batch_size,
                    workers=workers if engine == "ray" else None,
                    device="cpu",
                    progress=lambda done, failed, marks=marks: marks.append(
                        (time.perf_counter(), done)
                    ),
                )
                seconds = time.perf_counter() - started
                (first, before), (last, after) = marks[0], marks[-1]
                steady = (after - before) / (last - first)
                process = steady if engine == "process" else process
                sums.add(summary.sha256)
                cells = (f"{rows / seconds:.1f}", f"{steady:.1f}", f"{steady / process:.3f}")
                table.add_row(engine, str(turn), *cells, summary.sha256[:12])
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    sys.exit(len(sums) > 1)


if __name__ == "__main__":
    main()
