"""``pydllm generate --html``: the page that plays how the answers were unmasked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from pydllm.cli.settings import fit_algorithm, read_algorithm


def player_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--html`` and ``--beside`` to a command."""
    for option in (
        click.option(
            "--beside",
            multiple=True,
            metavar="NAME[,SETTING=VALUE]",
            help="Algorithm to play next to it, with --html; repeat for several.",
        ),
        click.option(
            "--html",
            type=click.Path(path_type=Path, dir_okay=False),
            help="Write a page that plays the unmasking.",
        ),
    ):
        command = option(command)
    return command


def check_player(values: dict[str, Any]) -> None:
    """Raise click.UsageError where the options do not go together."""
    if values["beside"] and values["html"] is None:
        raise click.UsageError("expected --html with --beside, got none")
    if values["html"] is not None and values["infill"]:
        raise click.UsageError("expected --html or --infill, got both")


def read_beside(beside: tuple[str, ...], verifier: Callable[[], Any]) -> dict[str, Any]:
    """The algorithms of ``--beside``, by what was typed."""
    found = {}
    for text in beside:
        name, *settings = text.split(",")
        found[text] = read_algorithm(name, tuple(settings), verifier, "--beside")
    return found


def fit_beside(beside: dict[str, Any], model: Any) -> dict[str, Any]:
    """The same with the model's blocks, where the text says no others."""
    return {
        text: fit_algorithm(algorithm, tuple(text.split(",")[1:]), model)
        for text, algorithm in beside.items()
    }


def write_player(
    model: Any,
    texts: list[str],
    results: dict[str, tuple[Any, Any]],
    title: str,
    path: Path,
    *,
    write: bool,
    backend: str | None,
) -> None:
    """Play ``results``, algorithm and generation by name. Where a model is spread over processes,
    each of them takes part in the forwards, and the one with ``write`` writes.
    """
    from pydllm.demo.player import Scene, write_page
    from pydllm.demo.replay import replay

    scenes = [
        Scene(
            title,
            text,
            [
                replay(model, made, row, name, algorithm, backend=backend)
                for name, (algorithm, made) in results.items()
            ],
        )
        for row, text in enumerate(texts)
    ]
    if write:
        write_page(scenes, f"How {title} unmasks an answer", path)
