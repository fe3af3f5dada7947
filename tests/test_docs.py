"""The pages: Python in them compiles, what says ``run`` runs, links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```python([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)#]+)[^)]*\)")


def blocks():
    """Every Python block: its page and line, what stands behind the word python, its code."""
    for page in PAGES:
        text = page.read_text()
        for found in FENCE.finditer(text):
            line = text[: found.start()].count("\n") + 2
            code = "\n" * (line - 1) + found.group(2)
            yield pytest.param(page, found.group(1).split(), code, id=f"{page.name}:{line}")


BLOCKS = list(blocks())


@pytest.mark.parametrize(("page", "words", "code"), BLOCKS)
def test_python_compiles_and_runs(page, words, code):
    assert set(words) <= {"run"}
    compiled = compile(code, str(page), "exec")
    if "run" in words:
        exec(compiled, {"__name__": "docs"})


def test_some_blocks_run():
    assert sum("run" in block.values[1] for block in BLOCKS) >= 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        if "://" not in link:
            assert (page.parent / link).exists(), link


def test_every_page_is_in_the_index_and_in_the_navigation():
    docs = ROOT / "docs"
    pages = {page.relative_to(docs).as_posix() for page in docs.rglob("*.md")}
    assert pages - {"index.md"} <= set(LINK.findall((docs / "index.md").read_text()))
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    assert pages <= set(re.findall(r"- (?:.*: )?([\w./-]+\.md)$", navigation, re.MULTILINE))


def test_the_sdist_takes_the_pages():
    assert "recursive-include docs *.md" in (ROOT / "MANIFEST.in").read_text().splitlines()
