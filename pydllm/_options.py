"""Options that several commands of the command line have."""

import click

from pydllm._backend.env import BACKENDS

BACKEND = click.option("--backend", type=click.Choice(BACKENDS), help="For every op.")
JSON = click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
