"""``pydllm distill``: trajectories, training and the student's checkpoint, from one command."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from pydllm._options import BACKEND
from pydllm.distill.prompts import Prompt, read_prompts
from pydllm.distill.recipe import PRESETS, Recipe


def _options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The recipe's options, in the recipe's words; what is not given is the preset's."""
    kinds: dict[str, Any] = {"int": int, "float": float, "str": str, "bool": bool}
    for field in reversed(dataclasses.fields(Recipe)):
        name = "--" + field.name.replace("_", "-")
        if field.type == "bool":
            name += "/--no-" + field.name.replace("_", "-")
            option = click.option(name, default=None)
        elif field.name in ("windows", "ratios"):
            kind = "a,b,..." if field.name == "windows" else "low,high"
            option = click.option(name, metavar=kind)
        else:
            option = click.option(name, type=kinds[str(field.type)])
        function = option(function)
    return function


def make_recipe(preset: str, changes: dict[str, Any]) -> Recipe:
    """The preset with the options that were given."""
    given = {name: value for name, value in changes.items() if value is not None}
    for name, kind in (("windows", int), ("ratios", float)):
        if name in given:
            try:
                given[name] = tuple(kind(part) for part in given[name].split(","))
            except ValueError:
                raise ValueError(
                    f"--{name}: expected {kind.__name__}s with commas between, got {given[name]!r}"
                ) from None
    return dataclasses.replace(PRESETS[preset], **given)


@click.command()
@click.option(
    "--teacher",
    required=True,
    type=click.Path(path_type=Path),
    help="Its checkpoint, or a bundled name.",
)
@click.option("--data", type=click.Path(path_type=Path), help="Prompts, JSONL.")
@click.option(
    "--trajectories",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Instead: d3LLM's trajectory data, files or a folder; repeat for more.",
)
@click.option("--keep-incorrect", is_flag=True, help="Also records whose is_correct is false.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write to.")
@click.option("--preset", type=click.Choice(list(PRESETS)), default="llada", show_default=True)
@click.option("--steps", type=click.IntRange(1), help="Default: an epoch for each window.")
@click.option("--answer-pattern", help="Keep answers whose last match is the line's answer.")
@click.option("--shard", default=256, show_default=True, type=click.IntRange(1), help="Prompts.")
@click.option("--save-every", default=200, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True)
@click.option("--device", help="Default: the GPU if there is one.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="Of matrix products.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads (default: torch's choice).")
@click.option("--accelerate", is_flag=True, help="Several devices, under `accelerate launch`.")
@BACKEND
@_options
def distill(
    teacher: Path,
    data: Path | None,
    trajectories: tuple[Path, ...],
    keep_incorrect: bool,
    out: Path,
    preset: str,
    steps: int | None,
    answer_pattern: str | None,
    shard: int,
    save_every: int,
    seed: int,
    device: str | None,
    dtype: str | None,
    threads: int | None,
    accelerate: bool,
    backend: str | None,
    **changes: Any,
) -> None:
    """Distil a model on its own trajectories, so that it decodes in fewer forwards (d3LLM).

    Decodes every prompt with the teacher, one token per step, or reads trajectories that exist;
    trains a copy of the teacher to predict the same tokens early and with certainty; writes the
    copy's checkpoint to --out. Prompts are taken as they stand: apply a chat template before. The
    same command goes on where it was interrupted. Options below from --score on are the preset's
    unless given.
    """
    import torch

    from pydllm.distill.published import read_published
    from pydllm.distill.run import Job, run
    from pydllm.models.load import bundled

    if threads is not None:
        torch.set_num_threads(threads)
    recipe = make_recipe(preset, changes)
    prompts: list[Prompt] = []
    recorded = None
    if (data is None) == (not trajectories):
        raise ValueError("--data: expected this or --trajectories, got both or neither")
    if data is not None:
        prompts = read_prompts(data) if data.is_file() else _no_file(data)
    else:
        if answer_pattern is not None:
            raise ValueError(
                "--answer-pattern: expected none with --trajectories (--keep-incorrect)"
            )
        recorded = read_published(
            trajectories, max_new_tokens=recipe.max_new_tokens, keep_incorrect=keep_incorrect
        )
    job = Job(
        teacher=bundled(teacher) or teacher,
        prompts=prompts,
        recipe=recipe,
        out=out,
        steps=steps or _default_steps(recipe, len(recorded.trajectories if recorded else prompts)),
        answer_pattern=answer_pattern,
        shard=shard,
        save_every=save_every,
        seed=seed,
        device=device,
        dtype=None if dtype is None else getattr(torch, dtype),
        accelerate=accelerate,
        backend=backend,
        recorded=recorded,
    )
    for line in run(job):
        click.echo(line)


def _no_file(path: Path) -> Any:
    raise ValueError(f"--data: expected a file, got {path}, which is none")


def _default_steps(recipe: Recipe, prompts: int) -> int:
    """As many epochs as there are windows in the list."""
    samples = recipe.batch_size * recipe.accumulation
    return max(1, len(recipe.windows) * prompts // samples)
