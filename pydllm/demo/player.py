"""A page that plays how answers were unmasked: one file, no network, no dependency."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from pydllm.demo.replay import Run

_PAGE = Path(__file__).with_name("player.html")


@dataclass(frozen=True)
class Scene:
    """What is shown side by side: one prompt, answered by several algorithms.

    Attributes:
        group: the model's name.
        prompt: the text, or the ids, of the prompt.
        runs: one per algorithm.
    """

    group: str
    prompt: str
    runs: list[Run]


def write_page(scenes: Sequence[Scene], title: str, path: Path) -> None:
    """Write the page.

    Raises:
        ValueError: there is nothing to play.
    """
    if not any(run.words for scene in scenes for run in scene.runs):
        raise ValueError("scenes: expected at least one answer with a token, got none")
    data = json.dumps(
        {"scenes": [_record(scene) for scene in scenes]},
        separators=(",", ":"),
        ensure_ascii=False,
    )
    # "</script>" in a prompt would end the element; JSON has another spelling of "<".
    page = _PAGE.read_text(encoding="utf-8")
    page = page.replace("{{title}}", escape(title)).replace(
        "{{data}}", data.replace("<", "\\u003c")
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _record(scene: Scene) -> dict[str, Any]:
    return {"group": scene.group, "prompt": scene.prompt, "runs": [_run(r) for r in scene.runs]}


def _run(run: Run) -> dict[str, Any]:
    """A run as the page reads it; numbers are rounded, what is unknown is null."""
    rounded = [
        None if numbers is None else [round(number, 3) for number in numbers]
        for numbers in (run.probability, run.entropy)
    ]
    return {
        "name": run.name,
        "forwards": run.forwards,
        "words": run.words,
        "steps": run.steps,
        "wrong": run.wrong,
        "probability": rounded[0],
        "entropy": rounded[1],
    }
