"""Wheel, sdist and editable install, built without torch."""

import importlib.util
import json
import os
import re
import shutil
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.packages import ROOT, passed, run

BUILT_FROM = ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
NVCC = shutil.which("nvcc") or (Path("/usr/local/cuda/bin/nvcc").exists() and "nvcc")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what is built from, so that builds leave nothing in the checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, copy / name)
    leave = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("csrc", "docs", "kernels", "pydllm"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=leave)
    assert (copy / "pydllm/kernels").is_symlink()
    (copy / "pydllm/_C.stale.so").write_text("left over from a build in the checkout")
    return copy


@pytest.fixture(scope="module")
def no_torch(tmp_path_factory):
    """A folder whose ``torch`` cannot be imported: first on the build's path."""
    folder = tmp_path_factory.mktemp("no_torch")
    (folder / "torch.py").write_text("raise ImportError('the build imported torch')")
    return str(folder)


@pytest.fixture(scope="module")
def built(checkout, no_torch, tmp_path_factory):
    """The sdist, and the wheel that was built from it, without CUDA kernels."""
    out = tmp_path_factory.mktemp("dist")
    settings = {"PYDLLM_BUILD_CUDA": "0", "PYTHONPATH": no_torch}
    passed(run(sys.executable, "-m", "build", "--outdir", out, cwd=checkout, **settings))
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def shipped_sources():
    """Every module and data file of the package, as paths in a wheel."""
    files = set()
    for folder, _, names in os.walk(ROOT / "pydllm", followlinks=True):
        files |= {Path(folder, name).relative_to(ROOT).as_posix() for name in names}
    return {
        file
        for file in files
        if file.endswith(".py")
        or file in ("pydllm/py.typed", "pydllm/demo/player.html")
        or file.startswith("pydllm/demo/weights/llada-tiny/")
    }


def test_wheel_holds_the_package_and_nothing_else(built):
    _, wheel = built
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        kernel = archive.read("pydllm/kernels/rms_norm.py")
        metadata = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    assert names == shipped_sources()
    assert kernel == (ROOT / "kernels/rms_norm.py").read_bytes()
    requires = [line for line in lines if line.startswith("Requires-Dist") and "extra" not in line]
    assert "Requires-Dist: torch>=2.11" in requires
    assert not any("<" in line or "==" in line.partition(";")[0] for line in requires)


def test_sdist_holds_what_a_build_needs(built):
    sdist, _ = built
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    csrc = {f"csrc/{file.name}" for file in (ROOT / "csrc").iterdir()}
    pages = {file.relative_to(ROOT).as_posix() for file in (ROOT / "docs").rglob("*.md")}
    assert csrc | pages | shipped_sources() | set(BUILT_FROM) <= names
    assert not any(name.startswith(("tests/", "kernels/")) or ".so" in name for name in names)


LINKS = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"")


def test_an_index_can_follow_the_links_of_the_readme(built):
    """What pip shows of a wheel: links elsewhere, and no picture that is not there."""
    with zipfile.ZipFile(built[1]) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        head, _, text = archive.read(name).decode().partition("\n\n")
    assert "Description-Content-Type: text/markdown" in head.splitlines()
    assert text.startswith("# pydllm") and "make demo" in text
    assert [link for pair in LINKS.findall(text) for link in pair if link and ":" not in link] == []


def test_links_of_the_readme_lead_to_a_repository(setup_script):
    text = '[a](docs/a.md) [b](https://b) [c](#c) <picture>\n<source srcset="x.png">\n'
    text += '<img src="y.png" alt="Y"></picture>'
    to = setup_script.readme_of_an_index(text, "https://r/p")
    assert to == (
        "[a](https://r/p/blob/main/docs/a.md) [b](https://b) [c](#c) <picture>\n"
        '<source srcset="https://r/p/raw/main/x.png">\n'
        '<img src="https://r/p/raw/main/y.png" alt="Y"></picture>'
    )
    assert setup_script.readme_of_an_index(text, None) == "a [b](https://b) [c](#c) Y"


def imported(folder, statement, **settings):
    """What ``statement`` prints as JSON, run away from the checkout with ``folder`` on the path."""
    done = run(sys.executable, "-c", statement, cwd=folder, PYTHONPATH=str(folder), **settings)
    return json.loads(passed(done).splitlines()[-1])


def test_wheel_imports_and_leaves_the_name_kernels_alone(built, tmp_path):
    zipfile.ZipFile(built[1]).extractall(tmp_path)
    facts = imported(
        tmp_path,
        "import importlib.util as u, json, pydllm, pydllm.kernels.rms_norm as k\n"
        "spec = u.find_spec('kernels')\n"
        "print(json.dumps([pydllm.__file__, k.__file__, spec and str(spec.origin)]))",
    )
    assert facts[0] == str(tmp_path / "pydllm/__init__.py")
    assert facts[1] == str(tmp_path / "pydllm/kernels/rms_norm.py")
    assert facts[2] is None or "pydllm" not in facts[2]


def test_the_demo_of_a_wheel_runs(built, tmp_path):
    """On the one model that a wheel holds."""
    zipfile.ZipFile(built[1]).extractall(tmp_path)
    weights = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert 0 < weights < 1.5e6
    code = "from pydllm.cli import main; main()"
    options = ("demo", "--problems", "2", "--only", "Threshold 0.9")
    done = run(sys.executable, "-c", code, *options, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert "Threshold 0.9" in passed(done)
    assert (tmp_path / "out/demo/demo.csv").read_text().count("llada-tiny") >= 1


def test_editable_install(checkout, tmp_path):
    python = tmp_path / "venv/bin/python"
    passed(run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path))
    # The new environment borrows this one's packages, but not what is installed as editable here.
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    install = (python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", ".")
    passed(run(*install, cwd=checkout, PYDLLM_BUILD_CUDA="0", PYTHONPATH=""))
    done = run(
        python,
        "-c",
        "import importlib.util as u, sys, pydllm, pydllm.kernels.rms_norm as k\n"
        "print(pydllm.__file__, k.__file__, sys.path, u.find_spec('csrc'), sep='\\n')",
        cwd=tmp_path,
        PYTHONPATH="",
    )
    package, kernel, path, csrc = passed(done).splitlines()
    assert package == str(checkout / "pydllm/__init__.py")
    assert kernel == str(checkout / "pydllm/kernels/rms_norm.py")
    assert str(checkout) not in eval(path) and csrc == "None"


def tool(name):
    """A CUDA tool that comes with Triton."""
    triton = importlib.util.find_spec("triton")
    path = triton and Path(triton.origin).parent / "backends/nvidia/bin" / name
    if not path or not path.exists():
        pytest.skip(f"needs Triton's {name}")
    return path


@pytest.mark.slow
@pytest.mark.skipif(not NVCC, reason="needs nvcc")
def test_cuda_wheel_holds_what_was_asked_for_and_needs_nothing(built, no_torch, tmp_path):
    """All of csrc/ for one architecture: no warning, no spill, no torch, no driver, no CUDA."""
    with tarfile.open(built[0]) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.glob("pydllm-*")
    settings = {"PYDLLM_BUILD_CUDA": "1", "PYDLLM_CUDA_ARCHS": "90a", "PYTHONPATH": no_torch}
    settings["NVCC_APPEND_FLAGS"] = "-Werror=all-warnings"
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path)
    passed(run(*build, cwd=source, **settings))
    (wheel,) = tmp_path.glob("*.whl")
    from pydllm import __version__

    assert re.match(rf"pydllm-{re.escape(__version__)}\+cu\d+\.sm90a-cp", wheel.name)
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)

    (library,) = installed.glob("pydllm/_C*.so")
    needed = passed(run("readelf", "-d", library, cwd=tmp_path)).splitlines()
    needed = {line.split("[")[1].rstrip("]") for line in needed if "NEEDED" in line}
    assert needed <= {
        "libstdc++.so.6",
        "libgcc_s.so.1",
        "libm.so.6",
        "libc.so.6",
        "ld-linux-x86-64.so.2",
    }

    # Loads without a GPU, and a launch says which kernel could not run and why.
    call = (
        "import json, sys\n"
        "from pydllm import _C\n"
        "before = [_C.version(), _C.archs(), [name for name in dir(_C) if name[0] != '_']]\n"
        "names = 'y residual x partial scale bias weight dtype splits eps stride_x_row'\n"
        "names += ' stride_residual_row stream'\n"
        "zeros = dict.fromkeys(names.split(), 0)\n"
        "try:\n    _C.rms_norm(rows=1, width=1, pdl=False, **zeros)\n"
        "except RuntimeError as error:\n    before.append(str(error))\n"
        "print(json.dumps(before))"
    )
    version, archs, names, error = imported(installed, call, CUDA_VISIBLE_DEVICES="")
    assert (version, archs) == (__version__, "90a")
    assert error.startswith("rms_norm: ") and "(cudaError" in error
    launchers = {path.stem for path in (ROOT / "pydllm/_backend/cuda").glob("[a-z]*.py")}
    assert launchers - {"head_stats"} <= set(names)

    listed = run(tool("cuobjdump"), "--list-elf", "--list-ptx", library, cwd=tmp_path)
    assert set(re.findall(r"sm_\w+", listed.stdout)) == {"sm_90a"}
    assert "ptx" not in listed.stdout.lower()
    usage = passed(run(tool("cuobjdump"), "-res-usage", library, cwd=tmp_path))
    kernels = re.findall(r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert len(kernels) > 20
    assert [kernel for kernel in kernels if (kernel[2], kernel[3]) != ("0", "0")] == []


def test_import_brings_in_no_compiler_and_no_optional_package():
    """What makes an import slow: of the CPU time of `import torch` it may add a quarter."""
    call = (
        "import json, sys, torch\n"
        "before = set(sys.modules)\n"
        "import pydllm\n"
        "new = set(sys.modules) - before\n"
        "print(json.dumps([len(new), sorted({name.partition('.')[0] for name in new})]))"
    )
    done = run(sys.executable, "-c", call, cwd=ROOT)
    count, packages = json.loads(passed(done).splitlines()[-1])
    assert set(packages) <= {"pydllm", "safetensors", "tokenizers"} | sys.stdlib_module_names
    assert count < 250  # 115 when this was written


def test_env_is_a_module_to_run_and_a_function_to_call():
    from pydllm import __version__

    shown = run(sys.executable, "-W", "error", "-m", "pydllm.env", "--json", cwd=ROOT)
    facts = json.loads(passed(shown))
    assert facts["pydllm"] == __version__ and facts["packages"]["torch"]
    assert facts["backends"]["torch"] is None and set(facts["backends"]) == {
        "cuda",
        "triton",
        "torch",
    }
    call = "import pydllm; first = pydllm.env(); import pydllm.env; print(first == pydllm.env())"
    assert passed(run(sys.executable, "-c", call, cwd=ROOT)) == "True\n"
