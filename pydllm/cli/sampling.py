"""Options of the commands that decode: what tokens are drawn from, and where answers end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

_OPTIONS = (
    click.option("--temperature", default=0.0, show_default=True, help="0 takes the arg-max."),
    click.option("--top-k", type=int, help="Draw from the k most probable tokens."),
    click.option("--top-p", type=float, help="Draw from the most probable tokens of this mass."),
    click.option("--guidance", default=0.0, show_default=True, help="Classifier-free guidance."),
    click.option("--stop", multiple=True, metavar="TEXT", help="Ends an answer; repeat for more."),
    click.option("--ignore-eos", is_flag=True, help="Decode past EOS."),
    click.option("--suppress-id", "suppress_ids", multiple=True, type=int, help="Never predicted."),
    click.option("--seed", default=0, show_default=True),
)
NAMES = (
    *("temperature", "top_k", "top_p", "guidance", "stop", "ignore_eos", "suppress_ids", "seed"),
)


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command, which receives them as keywords."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def read_sampling(values: dict[str, Any]) -> dict[str, Any]:
    """Take the options out of a command's keywords, as keywords of ``pydllm.generate``."""
    taken = {name: values.pop(name) for name in NAMES}
    return taken | {"stop": list(taken["stop"]) or None, "suppress_ids": taken["suppress_ids"]}
