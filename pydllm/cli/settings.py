"""What several commands read from their options: algorithms and chat templates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


def read_algorithm(name: str, settings: tuple[str, ...], verifier: Callable[[], Any]) -> Any:
    """Build an algorithm from ``NAME=VALUE`` strings."""
    from pydllm.decoding.settings import SettingError, make_algorithm

    pairs = (setting.partition("=") for setting in settings)
    try:
        return make_algorithm(name, {key: value for key, _, value in pairs}, verifier)
    except SettingError as error:
        raise click.BadParameter(str(error), param_hint="--algorithm, --set") from None


def read_template(path: Path) -> Any:
    """A chat template from a jinja file."""
    from pydllm.models import ChatTemplate

    return ChatTemplate({"default": path.read_text()}, {})
