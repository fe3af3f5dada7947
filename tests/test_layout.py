"""The rules of the layout: which room may import which, what is banned where, one word an op."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A room imports itself and the rooms below it. Those on the first line are the package's front, and
# import each other; "__init__" stands for the public names, which the first two lines may use.
LAYERS = (
    ("cli", "__init__", "__main__", "env", "testing"),
    ("integrations", "distill", "demo"),
    ("decoding", "metrics"),
    ("models",),
    ("ops", "_options"),
    ("_backend", "reference", "_checks"),
    ("kernels", "_C"),
)
LAYER = {room: depth for depth, rooms in enumerate(LAYERS) for room in rooms}
# Imported by these alone, and only inside a function.
LAZY = {"kernels": ("_backend", "ops"), "_C": ("_backend",)}
KERNELS_IMPORT = {"torch", "triton"} | sys.stdlib_module_names


def imports(tree, room):
    """(module, at module level) of every import; relative ones are made absolute."""

    def walk(node, top):
        for child in ast.iter_child_nodes(node):
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = f"pydllm.{room}" if child.level == 1 else "." * child.level
                module = ".".join(part for part in (base, child.module) if part)
                if module == "pydllm":  # from pydllm import ops: each name may be a room
                    yield from ((f"pydllm.{alias.name}", top) for alias in child.names)
                else:
                    yield module, top
            elif isinstance(child, ast.Call) and "import_module" in ast.unparse(child.func):
                yield from ((name.value, top) for name in child.args[:1] if hasattr(name, "value"))
            yield from walk(child, top and not inside)

    yield from walk(tree, True)


def import_violation(room, module, top):
    """What an import of ``module`` in ``room`` breaks, as a sentence; None if nothing."""
    package, _, rest = module.partition(".")
    if not package:
        return "write the module's name, not more than one dot"
    if package in ("tests", "bench", "training"):
        return "it is not installed"
    ours = package == "pydllm"
    target = rest.partition(".")[0] if rest.partition(".")[0] in LAYER else "__init__"
    if room == "kernels":
        alone = package in KERNELS_IMPORT or (ours and target == room)
        return None if alone else "kernels import torch, triton and each other"
    if not ours or room == target or rest == "__version__":
        return None
    if room == "reference":
        return "the reference stands alone"
    if target in LAZY:
        if room not in LAZY[target]:
            return f"only {' and '.join(LAZY[target])} may"
        return "only inside a function" if top else None
    if LAYER[room] == 0 or (LAYER[room] == 1 and target == "__init__"):
        return None
    return None if LAYER[target] > LAYER[room] else "imports run one way"


def import_violations(room, tree):
    for module, top in imports(tree, room):
        broken = import_violation(room, module, top)
        if broken is not None:
            yield f"imports {module}: {broken}"


def content_violations(path, tree):
    """What a shipped file must not contain, as sentences; ``path`` is relative to the checkout."""
    path = str(path)
    if Path(path).stem in sys.stdlib_module_names:
        yield "is named like a module of the standard library"
    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ""
        if isinstance(node, ast.Assert):
            yield "asserts: it vanishes under -O, raise instead"
        if text in ("os.environ", "os.getenv", "os.putenv") and path != "pydllm/_backend/env.py":
            yield "touches the environment: only _backend/env.py reads it"
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            names = {alias.name for alias in node.names}
            if names & {"environ", "getenv"}:
                yield "imports os.environ: only _backend/env.py reads it"
        if path.startswith("kernels/"):
            if text.endswith("autotune"):
                yield "uses triton.autotune: tiles come from _tiles.py"
            if text.endswith("make_block_ptr"):
                yield "uses make_block_ptr: Triton 3.9 has none"


def shipped():
    """(path relative to the checkout, room) of every shipped Python file."""
    for path in sorted((ROOT / "kernels").glob("*.py")):
        yield path.relative_to(ROOT), "kernels"
    for path in sorted((ROOT / "pydllm").rglob("*.py")):
        parts = path.relative_to(ROOT / "pydllm").parts
        if parts[0] != "kernels":
            yield path.relative_to(ROOT), parts[0].removesuffix(".py")


@pytest.mark.parametrize("path, room", [pytest.param(*case, id=str(case[0])) for case in shipped()])
def test_shipped_file_keeps_the_rules(path, room):
    tree = ast.parse((ROOT / path).read_text())
    assert room in LAYER, f"{room}: a new room has to be given its place in LAYERS"
    assert [*import_violations(room, tree), *content_violations(path, tree)] == []


PLANTED = {
    "upwards": ("models", "from pydllm.decoding import Static", "one way"),
    "upwards, by name": ("ops", "from pydllm import models", "one way"),
    "upwards, inside a function": ("ops", "def f():\n import pydllm.models.spec", "one way"),
    "through the package": ("decoding", "import pydllm", "one way"),
    "its public names": ("models", "from pydllm import generate", "one way"),
    "sideways": ("decoding", "from pydllm.metrics import aup", "one way"),
    "kernels, early": ("ops", "from pydllm.kernels import unmask", "inside a function"),
    "kernels, from a model": ("models", "def f():\n from pydllm import kernels", "may"),
    "_C, by name": ("ops", "def f():\n importlib.import_module('pydllm._C')", "may"),
    "kernel, the reference": ("kernels", "from pydllm.reference import unmask", "each other"),
    "kernel, numpy": ("kernels", "import numpy", "each other"),
    "reference, an op": ("reference", "from pydllm._backend import env", "stands alone"),
    "reference, another way": ("reference", "from .._backend import env", "one dot"),
    "tests": ("demo", "from tests.conftest import HAS_GPU", "not installed"),
    "assert": ("ops", "def f(x):\n assert x > 0", "vanishes"),
    "environment": ("models", "import os\nos.environ.get('X')", "environment"),
    "environment, by name": ("models", "from os import getenv", "environ"),
    "autotune": ("kernels", "@triton.autotune([])\ndef f(): pass", "autotune"),
    "block pointer": ("kernels", "tl.make_block_ptr(x)", "make_block_ptr"),
}


@pytest.mark.parametrize("room, source, message", PLANTED.values(), ids=PLANTED.keys())
def test_planted_violation_is_found(room, source, message):
    tree = ast.parse(source)
    path = Path("kernels/x.py" if room == "kernels" else f"pydllm/{room}/x.py")
    found = [*import_violations(room, tree), *content_violations(path, tree)]
    assert len(found) == 1 and message in found[0], found


def test_allowed_imports_are_not_violations():
    lazily = ast.parse("def f():\n from pydllm.kernels import unmask")
    downwards = ast.parse("from pydllm import ops, reference\nfrom pydllm.models import Model")
    public = ast.parse("import pydllm\nfrom pydllm import generate")
    assert list(import_violations("ops", lazily)) == []
    assert list(import_violations("decoding", downwards)) == []
    assert list(import_violations("demo", public)) == []
    assert list(import_violations("kernels", ast.parse("from . import _tiles"))) == []
    assert list(content_violations("kernels/x.py", ast.parse("tl.static_assert(x)"))) == []


@pytest.mark.parametrize("folder", ["tests", "bench", "training"])
def test_no_file_is_named_like_the_standard_library(folder):
    names = {path.stem for path in (ROOT / folder).rglob("*.py")}
    assert names.isdisjoint(sys.stdlib_module_names)


def words(folder, pattern="*.py"):
    names = {path.stem for path in (ROOT / folder).glob(pattern)}
    return {name for name in names if not name.startswith("_")}


def test_one_word_an_op():
    ops = words("pydllm/ops")
    assert ops
    assert ops <= words("pydllm/reference")
    assert ops <= words("kernels")
    assert {f"test_{op}" for op in ops} <= words("tests/ops")
    assert ops <= words("bench/ops/cases")
    assert words("csrc", "*.cu") <= ops
    assert words("csrc", "*.cu") == words("pydllm/_backend/cuda")
    assert words("csrc", "*.h") - {"dtype"} == words("csrc", "*.cu")


def test_an_op_is_exported_and_its_bench_case_listed():
    import pydllm.ops
    import pydllm.reference

    cases = (ROOT / "bench/ops/cases/__init__.py").read_text()
    for op in words("pydllm/ops"):
        assert op in pydllm.ops.__all__ and callable(getattr(pydllm.ops, op))
        assert callable(getattr(pydllm.reference, op))
        assert f"    {op},\n" in cases.partition("_MODULES")[2]


def test_pages_name_files_that_exist():
    """Paths of this repository in backticks; ``<op>`` stands for any name."""
    pages = [ROOT / "AGENTS.md", ROOT / "ENVS.md", ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
    roots = ("pydllm/", "kernels/", "csrc/", "tests/", "bench/", "docs/", "_backend/", "training/")
    lost = []
    for page in pages:
        for path in re.findall(r"`([\w./<>-]+\.(?:py|md|cu|cuh|h))`", page.read_text()):
            pattern = path.replace("<op>", "*")
            places = (ROOT, ROOT / "pydllm")
            if path.startswith(roots) and not any(any(p.glob(pattern)) for p in places):
                lost.append(f"{page.name}: {path}")
    assert lost == []


def test_every_environment_variable_is_listed():
    listed = set(re.findall(r"PYDLLM_\w+", (ROOT / "ENVS.md").read_text()))
    used = set()
    for file in ("setup.py", "pydllm/**/*.py", "bench/**/*.py", "tests/**/*.py"):
        for path in ROOT.glob(file):
            text = path.read_text()
            used |= set(re.findall(r"environ(?:\.get\(|\[)\"(PYDLLM_\w+)\"", text))
            used |= set(re.findall(r"_choice\(\"(PYDLLM_\w+)\"", text))
    assert used - listed == set()


def test_a_kernel_file_belongs_to_an_op():
    ops = words("pydllm/ops")
    strangers = {name for name in words("kernels") if not name.startswith(tuple(ops))}
    assert strangers == set()


def test_kernels_is_no_package_of_its_own():
    assert not (ROOT / "kernels/__init__.py").exists()
    link = ROOT / "pydllm/kernels"
    assert link.is_symlink() and link.readlink() == Path("../kernels")


def test_the_build_knows_no_torch():
    names = {name.partition(".")[0] for name, _ in imports(ast.parse(read("setup.py")), "")}
    assert "torch" not in names
    assert not re.search(r"requires = \[[^\]]*torch", read("pyproject.toml"))
    for path in (ROOT / "csrc").iterdir():
        includes = re.findall(r'#include\s*[<"](.+?)[>"]', path.read_text())
        assert not [name for name in includes if name.startswith(("torch/", "ATen/", "c10/"))]
        if path.name != "binding.cpp":
            assert not [name for name in includes if name.startswith(("pybind11", "Python.h"))]


def read(name):
    return (ROOT / name).read_text()
