"""Writes docs/recordings.md: what some commands print, by running them.

    python docs/_build/recordings.py
"""

from __future__ import annotations

import re
import shlex
import tempfile
from pathlib import Path

from click.testing import CliRunner

from pydllm.cli import main as pydllm

PAGE = Path(__file__).parents[1] / "recordings.md"
PROMPT = "sam has 7 coins . he finds 5 . they double . he loses 3 . how many coins ?"
# Every word of a message and a blank: the bundled models have no turns.
TEMPLATE = "{% for m in messages if m.role != 'system' %}{{ m.content }} {% endfor %}"
CHAT = f"""\
/help
{PROMPT} in order
/algorithm freedave draft_steps=8
/reset
{PROMPT} in order
/algorithm multiblock
/reset
{PROMPT} each once
/speed
/history
/quit
"""
# Title, arguments, and what is typed.
SESSIONS = [
    (
        "A conversation",
        "chat --model llada-tiny --template words.jinja --max-new-tokens 48 --device cpu",
        CHAT,
    ),
    (
        "A model that fills blocks, watched",
        f'generate --model sdar-tiny --prompt "{PROMPT} in order" --watch --device cpu '
        "--algorithm freedave --set mode=pipelined --set block_length=8",
        None,
    ),
    (
        "Full attention, watched",
        f'generate --prompt "{PROMPT} each once" --watch --device cpu --set block_length=24',
        None,
    ),
    (
        "A gap",
        f'generate --infill --device cpu --prompt "{PROMPT} in order tom 7 + 5 = 12 ann '
        '12 x 2 = <mask:1> eva 24 - 3 = 21 answer 21"',
        None,
    ),
    (
        "Streamed, with a stop",
        f'generate --prompt "{PROMPT} in order" --stream --stop answer --device cpu '
        "--set block_length=8",
        None,
    ),
]
HEAD = """\
# Recordings of a terminal

What these commands print, on a CPU; `python docs/_build/recordings.py` writes this page anew. Lines that
begin with `>` were typed. In a terminal `--watch` draws in place; here, as into a file, it writes a line per
forward. `words.jinja` is `{template}`.
"""


def record(arguments: str, typed: str | None) -> str:
    """What a command prints, both streams as they come."""
    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder, "words.jinja")
        template.write_text(TEMPLATE)
        words = [str(template) if w == template.name else w for w in shlex.split(arguments)]
        result = CliRunner().invoke(pydllm, words, input=typed, catch_exceptions=False)
    lines = [line.rstrip() for line in result.output.splitlines()]
    return "\n".join(lines).strip("\n")


def page() -> str:
    parts = [HEAD.replace("{template}", TEMPLATE)]
    for title, arguments, typed in SESSIONS:
        text = record(arguments, typed)
        parts.append(f"## {title}\n\n```text\n$ pydllm {arguments}\n{text}\n```\n")
    return "\n".join(parts)


def without_times(text: str) -> str:
    """The page with every rate per second as one word: they differ from run to run."""
    return re.sub(r"[\d.]+ per second", "RATE per second", text)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written: {PAGE}")
