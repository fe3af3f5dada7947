"""What several commands read from their options: algorithms and chat templates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


def read_algorithm(
    name: str,
    settings: tuple[str, ...],
    verifier: Callable[[], Any],
    options: str = "--algorithm, --set",
) -> Any:
    """Build an algorithm from ``NAME=VALUE`` strings; ``options`` are what messages blame."""
    from pydllm.decoding.settings import SettingError, make_algorithm

    try:
        return make_algorithm(name, _pairs(settings), verifier)
    except SettingError as error:
        raise click.BadParameter(str(error), param_hint=options) from None


def fit_algorithm(algorithm: Any, settings: tuple[str, ...], model: Any) -> Any:
    """The algorithm of ``settings`` with the model's blocks, unless they say other ones."""
    from pydllm.decoding.settings import fit_blocks

    return fit_blocks(algorithm, _pairs(settings), model)


def _pairs(settings: tuple[str, ...]) -> dict[str, str]:
    return {key: value for key, _, value in (setting.partition("=") for setting in settings)}


def read_template(path: Path) -> Any:
    """A chat template from a jinja file."""
    from pydllm.models import ChatTemplate

    return ChatTemplate({"default": path.read_text()}, {})
