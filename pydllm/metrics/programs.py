"""Answers to code tasks: the program in an answer, and whether it passes the task's tests.

What the evaluation scripts of Dream, Fast-dLLM and d3LLM do with the samples of lm-eval's HumanEval
and MBPP after a run.
"""

from __future__ import annotations

import ast
import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_FENCE = "```"
_LINES = 100  # of an answer that are looked at
SECONDS = 3.0  # of a program


def first_block(answer: str) -> str:
    """The first block of Python in an answer; without one the answer, up to the first fence."""
    _, opened, block = answer.partition(f"{_FENCE}python\n")
    return (block if opened else answer).split(_FENCE)[0]


def sanitize(text: str, entry_point: str | None = None) -> str:
    """The program in a text: the longest run of lines that is Python, reduced to its definitions.

    Of the first 100 lines. What remains are imports, classes, functions that return something,
    and assignments to a name; with ``entry_point`` those alone that it needs.
    """
    text = text.replace("\t", "    ").replace("\r\n", "\n").replace("\r", "\n").strip() + "\n"
    imports: list[ast.stmt] = []
    definitions: dict[str, ast.stmt] = {}
    for node in _longest_program(text.splitlines()[:_LINES]).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports.append(node)
        elif (name := _defined(node)) is not None:
            definitions[name] = node
    needed = _needed(definitions, entry_point)
    kept = [node for name, node in definitions.items() if name in needed]
    return "\n".join(ast.unparse(node) for node in [*imports, *kept])


def _longest_program(lines: list[str]) -> ast.Module:
    """The run of lines with most lines that are not blank; of equal ones the first."""
    filled = [0]
    for line in lines:
        filled.append(filled[-1] + bool(line.strip()))
    spans = [(i, j) for i in range(len(lines)) for j in range(i + 1, len(lines) + 1)]
    spans.sort(key=lambda span: (filled[span[0]] - filled[span[1]], *span))
    for first, last in spans:
        if filled[first] == filled[last]:
            break
        try:
            return ast.parse("\n".join(lines[first:last]))
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            continue
    return ast.Module([], [])


def _defined(node: ast.stmt) -> str | None:
    if isinstance(node, ast.ClassDef):
        return node.name
    if isinstance(node, ast.FunctionDef):
        returns = any(isinstance(part, ast.Return) for part in ast.walk(node))
        return node.name if returns else None
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return None


def _needed(definitions: Mapping[str, ast.stmt], entry_point: str | None) -> set[str]:
    if not entry_point:
        return set(definitions)
    needed: set[str] = set()
    waiting = {entry_point}
    while waiting:
        name = waiting.pop()
        needed.add(name)
        if name in definitions:
            waiting |= _names(definitions[name]) - needed
    return needed


def _names(node: ast.AST) -> set[str]:
    """Names and attributes that a definition uses; not what an attribute is taken of."""
    found: set[str] = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Name):
            found.add(child.id)
        elif isinstance(child, ast.Attribute):
            found.add(child.attr)
        else:
            found |= _names(child)
    return found


def program(sample: Mapping[str, Any]) -> str:
    """The program of a sample that lm-eval logged (``--log_samples``).

    HumanEval's problems name an ``entry_point`` and begin the program; MBPP's do neither.

    Raises:
        ValueError: a sample without an answer or problem.
    """
    try:
        answer, problem = sample["resps"][0][0], sample["doc"]
        entry_point = problem.get("entry_point") if "prompt" in problem else None
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"expected resps and doc of a sample, got {error!r}") from error
    code = first_block(answer)
    if entry_point:
        return sanitize(f"{problem['prompt']}\n{code}", entry_point)
    return sanitize(code)


def passes(code: str, tests: str, seconds: float = SECONDS) -> bool:
    """Whether a program, followed by its tests, runs to its end within ``seconds``.

    It runs in a Python process and folder of its own, which protects from accidents and not from
    malice: run what a model wrote in a container.
    """
    token = secrets.token_hex(16)
    text = f"{code}\n{tests}\nimport os as _os\n_os.write(1, b'{token}')\n"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "program.py")
        file.write_text(text, encoding="utf-8", errors="replace")
        process = subprocess.Popen(
            [sys.executable, "-I", str(file)],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            printed, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    # A program that leaves early has not passed.
    return process.returncode == 0 and printed.endswith(token.encode())
