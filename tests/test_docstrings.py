"""Docstrings name arguments that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def undocumented_arguments(function, docstring):
    """Names in the Args of a docstring that are no parameters of the function."""
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    known = {argument.arg for argument in every}
    known |= {extra.arg for extra in (arguments.vararg, arguments.kwarg) if extra}
    section = re.search(r"^Args:\n((?:^(?: +.*)?\n?)+)", docstring, re.MULTILINE)
    if section is None or (arguments.kwarg and arguments.kwarg.arg in ("keywords", "options")):
        return set()
    entries = re.findall(r"^    ([a-z_][\w, *]*):", section[1], re.MULTILINE)
    return {name.strip(" *") for entry in entries for name in entry.split(",")} - known


def violations(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            strangers = undocumented_arguments(node, ast.get_docstring(node) or "")
            if strangers:
                yield f"{path.relative_to(ROOT)}: {node.name}: {', '.join(sorted(strangers))}"


def test_documented_arguments_exist():
    files = [
        path for path in sorted((ROOT / "pydllm").rglob("*.py")) if "kernels" not in path.parts
    ]
    assert [line for path in files for line in violations(path)] == []


@pytest.mark.parametrize(
    ("source", "strangers"),
    [
        ('def f(k, v):\n """F.\n\n Args:\n     k, v: two.\n """', set()),
        ('def f(k):\n """F.\n\n Args:\n     k, v: two.\n """', {"v"}),
        ('def f(a):\n """F.\n\n Args:\n     b: one.\n         c: not an entry.\n """', {"b"}),
        (
            'def f(a, *more):\n """F.\n\n Args:\n     *more: some.\n\n Returns:\n     z: no.\n """',
            set(),
        ),
    ],
)
def test_a_stranger_is_found(source, strangers):
    function = ast.parse(source).body[0]
    assert undocumented_arguments(function, ast.get_docstring(function)) == strangers
