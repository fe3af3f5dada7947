"""The pages: every block of code runs or says why it does not, links lead somewhere.

A block runs unless the line before it is ``<!-- not run: REASON -->``. The Python blocks of a page
run one after another, in one namespace. Of those that do not run, the names imported from pydllm
exist; of commands, the options.
"""

import ast
import importlib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

import pydllm
from pydllm.cli import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "AGENTS", "CONTRIBUTING", "ENVS", "CHANGELOG")),
    *sorted(DOCS.rglob("*.md")),
]
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?"
    r"^(?P<indent> *)```(?P<language>[^\n]*)\n(?P<code>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)
LINK = re.compile(r"\[[^\]]*\]\(([^)#]+)[^)]*\)")
# What is not a program: output, settings, other languages.
NOT_CODE = {"text", "json", "yaml", "toml", "cpp", "c"}


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    code: str
    reason: str | None

    @property
    def place(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page):
    text = page.read_text()
    for found in FENCE.finditer(text):
        line = text[: found.start("code")].count("\n") + 1
        indent = found["indent"]
        code = re.sub(f"^{indent}", "", found["code"], flags=re.MULTILINE)
        yield Block(page, line, found["language"], code, found["reason"])


BLOCKS = {page: list(blocks_of(page)) for page in PAGES}
ALL = [block for blocks in BLOCKS.values() for block in blocks]
NAME = {page: page.relative_to(ROOT).as_posix() for page in PAGES}
WITH_CODE = [
    page for page in PAGES if any(block.language in ("python", "sh") for block in BLOCKS[page])
]


def test_every_block_names_its_language():
    fences = sum(len(re.findall("^ *```", page.read_text(), re.MULTILINE)) for page in PAGES)
    assert 2 * len(ALL) == fences, "a block is not read as one"
    unknown = {b.place: b.language for b in ALL if b.language not in {"python", "sh"} | NOT_CODE}
    assert unknown == {}, (
        "expected ```python or ```sh, after a line <!-- not run: REASON --> if the tests cannot "
        f"run it, or one of {', '.join(sorted(NOT_CODE))}"
    )


@pytest.mark.parametrize("page", WITH_CODE, ids=NAME.get)
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "docs"}
    for block in BLOCKS[page]:
        if block.language == "python":
            # The page as the file, at its lines: where Triton looks for a kernel's source.
            compiled = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
            if block.reason is None:
                exec(compiled, namespace)
            else:
                names_exist(block)
        elif block.language == "sh":
            for words in commands(block.code):
                options_exist(words, block)
                if block.reason is None:
                    run(words, block)


def names_exist(block):
    """Modules of this package that a block imports, and the names that it takes from them."""
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pydllm"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


def commands(code):
    """The words of each command, without settings of the environment and comments."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words = words[1:]
        if words:
            yield words


def options_exist(words, block):
    """Of the package's own command, of the modules of a checkout, and the targets of make."""
    program = re.search(r"(?:^| )(pydllm|-m [\w.]+|make)(?= |$)", " ".join(words))
    if program is None:
        return
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    if program[1] == "make":
        makefile = (ROOT / "Makefile").read_text()
        targets = re.search(r"^\.PHONY:((?:.*\\\n)*.*)$", makefile, re.MULTILINE)[1].split()
        for word in words[1:]:
            name, is_setting, _ = word.partition("=")
            known = re.search(rf"\b{name}\b", makefile) if is_setting else name in targets
            assert known, f"{block.place}: make knows no {name}"
        return
    module = program[1].removeprefix("-m ")
    after = words[words.index(module) + 1 :]
    if module == "pydllm":
        known, name = main.commands, after[0] if after else ""
        assert not after or name in known or name.startswith("-"), f"{block.place}: no {name}"
        if name == "lm-eval" or name not in known:
            return  # those of the harness
        known = {option for parameter in known[name].params for option in parameter.opts}
        known |= {o for parameter in main.commands[name].params for o in parameter.secondary_opts}
        options = [word.partition("=")[0] for word in after if word.startswith("--")]
        # What follows --beside belongs to another algorithm; those of a decoder are its own.
        unknown = set(options) - known
        assert not unknown, f"{block.place}: pydllm {name} has no {', '.join(sorted(unknown))}"
    elif module.partition(".")[0] in ("bench", "tests", "training"):
        place = ROOT / module.replace(".", "/")
        files = [place.with_suffix(".py")] if place.with_suffix(".py").exists() else place.glob("*")
        source = "".join(file.read_text() for file in files if file.suffix == ".py")
        assert source, f"{block.place}: there is no {module}"
        options = [word.partition("=")[0] for word in after if word.startswith("--")]
        unknown = [option for option in options if f'"{option}' not in source]
        assert not unknown, f"{block.place}: {module} has no {', '.join(unknown)}"


def run(words, block):
    """A command of the package, in this process."""
    assert words[0] == "pydllm", f"{block.place}: {words[0]} is not run here, say so and why"
    done = CliRunner().invoke(main, words[1:])
    assert done.exit_code == 0, f"{block.place}: {done.output}"


def test_enough_blocks_run():
    assert sum(block.reason is None and block.language in ("python", "sh") for block in ALL) >= 25


@pytest.mark.parametrize(
    "code, message",
    [
        ("from pydllm.ops import nothing_such", "nothing_such"),
        ("from pydllm.nowhere import x", "nowhere"),
        ("pydllm generate --no-such-option 1", "no --no-such-option"),
        ("pydllm no-such-command", "no no-such-command"),
        ("X=1 python -m bench.decode --device cpu --no-such 2", "no --no-such"),
        ("python -m bench.nothing", "no bench.nothing"),
        ("make demo NO_SUCH=1", "NO_SUCH"),
        ("make nothing", "nothing"),
    ],
)
def test_a_stale_block_is_found(code, message):
    block = Block(ROOT / "README.md", 1, "", code, "planted")
    with pytest.raises((AssertionError, ImportError), match=message):
        if "import" in code:
            names_exist(block)
        else:
            for words in commands(code):
                options_exist(words, block)


@pytest.mark.parametrize("page", PAGES, ids=NAME.get)
def test_links_lead_somewhere(page):
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if "://" not in link:
            assert (page.parent / link).exists(), link


def test_every_page_is_in_the_index_and_in_the_navigation():
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert pages - {"index.md"} <= set(LINK.findall((DOCS / "index.md").read_text()))
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    assert pages <= set(re.findall(r"- (?:.*: )?([\w./-]+\.md)$", navigation, re.MULTILINE))


def listed_in_the_api():
    """The dotted paths of docs/api, each once."""
    text = "\n".join(page.read_text() for page in sorted((DOCS / "api").glob("*.md")))
    paths = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    assert len(paths) == len(set(paths)) > 50
    return paths


def found(path):
    """The object of a dotted path: a module, or something in one."""
    module, _, name = path.rpartition(".")
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        return getattr(importlib.import_module(module), name)


def test_the_api_pages_name_what_is_there():
    for path in listed_in_the_api():
        assert (found(path).__doc__ or "").strip(), path


@pytest.mark.parametrize("room", [pydllm, pydllm.ops], ids=lambda room: room.__name__)
def test_every_public_name_is_on_an_api_page(room):
    """In docs/api, as ``::: module.name``; modules have pages of their own."""
    listed = {id(found(path)) for path in listed_in_the_api()}
    names = [name for name in room.__all__ if name not in ("env", "metrics", "ops")]
    assert [name for name in names if id(getattr(room, name)) not in listed] == []


def test_the_sdist_takes_the_pages():
    assert "recursive-include docs *.md" in (ROOT / "MANIFEST.in").read_text().splitlines()
