"""``pydllm compare --original ... --patched ...``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pydllm._backend.errors import PydllmError
from pydllm.integrations.compare import compare, load_callable, write_csv
from pydllm.integrations.entrypoint import find_function, read_prompts
from pydllm.models.load import find_folder
from pydllm.models.tokenizer import read_tokenizer


def side_by_side(
    names: tuple[str, str],
    folder: str,
    texts: list[str],
    device: str | None,
    out: Path,
    *,
    loader: str | None,
    prepare: str | None,
    prompts: Path | None,
    settings: tuple[str, ...],
    first: tuple[str, ...],
    second: tuple[str, ...],
    batch: int,
    repeat: int,
    strict: bool,
    as_json: bool,
) -> list[dict[str, Any]]:
    """Run the command; returns a row a function. ``texts`` are used where there is no file."""
    functions = [find_function(name) for name in names]
    prepared = None if prepare is None else find_function(prepare)
    shared = dict(map(read_setting, settings))
    own = [shared | dict(map(read_setting, more)) for more in (first, second)]
    if loader is None:
        model: Any = load_callable(folder, device)
    else:
        model = find_function(loader)(folder)
        if device is not None:
            model = model.to(device)
    tokenizer = getattr(model, "tokenizer", None) or _tokenizer(folder)
    if prompts is not None:
        tokens = read_prompts(prompts, tokenizer)
    else:
        tokens = [tokenizer.encode(text).ids for text in texts]
    console = Console(stderr=as_json, markup=False)
    labels = list(names) if names[0] != names[1] else [names[0], f"{names[1]} (patched)"]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        bar = progress.add_task("calls", total=None)

        def advance() -> None:
            progress.advance(bar)

        result = compare(
            model,
            tokens,
            dict(zip(labels, functions, strict=True)),
            settings=(own[0], own[1]),
            batch_size=batch,
            repeat=repeat,
            prepare=prepared,
            on_call=advance,
        )
    rows = result.rows()
    table = Table(*rows[0], title=f"{folder}: {len(tokens)} prompts, {model.device}")
    for row in rows:
        table.add_row(*map(str, row.values()))
    (console if console.is_terminal else Console(stderr=as_json, width=160, markup=False)).print(
        table
    )
    if result.first_difference is not None:
        prompt, place = result.first_difference
        sides = (
            side.answers[prompt][place : place + 8] for side in (result.original, result.patched)
        )
        left, right = sides
        console.print(f"first difference: prompt {prompt}, token {place}: {left} and {right}")
    path = out / "side-by-side.csv"
    write_csv(result, path)
    console.print(f"written: {path}")
    if strict and result.equal_tokens < 1:
        raise click.ClickException(f"expected equal tokens, {1 - result.equal_tokens:.2%} differ")
    return rows


def read_setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise click.BadParameter(f"expected NAME=VALUE, got {text!r}", param_hint="--set")
    try:
        return name, json.loads(
            {"True": "true", "False": "false", "None": "null"}.get(value, value)
        )
    except json.JSONDecodeError:
        return name, value


def _tokenizer(folder: str) -> Any:
    try:
        return read_tokenizer(find_folder(folder))
    except PydllmError:  # a name that only the loader knows: prompts are token ids then
        return None
