"""The prompts of a distillation, and what a right answer to them is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Prompt:
    """A line of the data: text or token ids, and the expected answer if there is one."""

    prompt: str | list[int]
    answer: str | None


def read_prompts(path: Path) -> list[Prompt]:
    """The lines of a JSONL file: ``{"prompt": text or token ids, "answer": text, optional}``.

    Raises:
        ValueError: a line that is none, named by its number.
    """
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: expected a JSON object, got {error}") from error
        prompt = record.get("prompt") if isinstance(record, dict) else None
        if not isinstance(prompt, str | list):
            raise ValueError(
                f"{path}:{number}: expected an object whose prompt is text or token ids, "
                f"got {line:.60}"
            )
        answer = record.get("answer")
        prompts.append(Prompt(prompt, None if answer is None else str(answer)))
    if not prompts:
        raise ValueError(f"{path}: expected one prompt a line, got none")
    return prompts


def answer_checker(prompts: list[Prompt], pattern: str | None) -> Callable[[int, str], bool] | None:
    """Whether the last match of ``pattern`` (its group, if it has one) is the line's answer."""
    if pattern is None:
        return None
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"--answer-pattern: expected a regular expression, got {error}") from error
    if expression.groups > 1:
        raise ValueError(f"--answer-pattern: expected at most one group, got {expression.groups}")
    missing = [number for number, prompt in enumerate(prompts, 1) if prompt.answer is None]
    if missing:
        raise ValueError(
            f"--answer-pattern: expected an answer in each line, got none in {missing[0]}"
        )

    def accept(row: int, text: str) -> bool:
        found = expression.findall(text)
        return bool(found) and found[-1].strip() == prompts[row].answer

    return accept
