"""The recordings in docs/recordings.md are what their commands print."""

from __future__ import annotations

import importlib.util
from pathlib import Path

FILE = Path(__file__).parents[1] / "docs" / "_build" / "recordings.py"


def load():
    spec = importlib.util.spec_from_file_location("recordings", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_commands_print():
    recordings = load()
    shown = recordings.PAGE.read_text(encoding="utf-8")
    assert recordings.without_times(shown) == recordings.without_times(recordings.page())
    # In a chat answers appear under the question; watched, masks become fewer with every line.
    masks = [line.count("\N{LIGHT SHADE}") for line in shown.splitlines()]
    assert shown.count("per second") == 3 and max(masks) > 40
