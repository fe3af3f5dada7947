"""Options that several commands of the command line have."""

from __future__ import annotations

import click

from pydllm._backend.env import BACKENDS
from pydllm._checks import check_usable

BACKEND = click.option("--backend", type=click.Choice(BACKENDS), help="For every op.")


def _usable(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    try:
        if value is not None:
            check_usable("--device", value)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    return value


DEVICE = click.option("--device", callback=_usable, help="Default: the GPU if there is one.")
JSON = click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
