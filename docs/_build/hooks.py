"""Links of the pages that lead out of docs/: what they name becomes a page of the site.

Pages link to files of the repository as they lie (``../examples/decode.py``), so that they read well
there, too. MkDocs knows docs/ alone.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(\]\(|(?:src|srcset)=\")([^)\s#\"]+)")
LANGUAGES = {".py": "python", ".toml": "toml"}


def source(page_path: str) -> str:
    """Where a page of the site lies in the repository."""
    if page_path.startswith("repository/"):
        path = page_path.removeprefix("repository/").removesuffix("/index.md")
        return path if (ROOT / path).exists() else path.removesuffix(".md")
    return f"docs/{page_path}"


def page_of(path: str) -> str:
    """Where a file of the repository lies in the site."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        return f"repository/{path}/index.md"
    return f"repository/{path}" if path.endswith(".md") else f"repository/{path}.md"


def targets(text: str, path: str) -> list[str]:
    """Files and folders of the repository that a page links to."""
    links = (link for _, link in LINK.findall(FENCE.sub("", text)) if "://" not in link)
    found = [posixpath.normpath(posixpath.join(posixpath.dirname(path), link)) for link in links]
    return [target for target in found if (ROOT / target).exists()]


def on_files(files: Files, config: MkDocsConfig) -> None:
    todo = [source(file.src_uri) for file in files.documentation_pages()]
    seen = set(todo)
    while todo:
        path = todo.pop()
        text = as_page(path)
        if not path.startswith("docs/"):
            files.append(File.generated(config, page_of(path), content=text))
        if not path.endswith(".py"):
            new = [t for t in targets(text, path) if t not in seen and not t.endswith(".png")]
            seen.update(new)
            todo += [target for target in new if not target.startswith("docs/")]


def as_page(path: str) -> str:
    file = ROOT / path
    if file.is_dir():
        names = (entry.name for entry in sorted(file.iterdir()) if entry.is_file())
        return "\n".join([f"# {path}/", "", *(f"- [{name}]({path}/{name})" for name in names), ""])
    text = file.read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    language = LANGUAGES.get(file.suffix, "text")
    return f"# {path}\n\n```{language}\n{text}```\n"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = page.file.src_uri
    path = source(here)

    def renamed(found: re.Match[str]) -> str:
        before, link = found.groups()
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
        if "://" in link or not (ROOT / target).exists():
            return found.group()
        return before + posixpath.relpath(page_of(target), posixpath.dirname(here) or ".")

    return LINK.sub(renamed, markdown)
