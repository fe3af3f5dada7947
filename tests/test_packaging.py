"""Wheel, sdist and editable install, built without torch; what setup.py answers to bad input."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[1]
BUILT_FROM = ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
NVCC = shutil.which("nvcc") or (Path("/usr/local/cuda/bin/nvcc").exists() and "nvcc")


def run(*command, cwd, **settings):
    """Run with ``settings`` in the environment; returns the completed process."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_HOME"}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment | settings,
        capture_output=True,
        text=True,
    )


def passed(done):
    if "Failed to establish a new connection" in done.stdout + done.stderr:
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


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
    weights = (".safetensors", ".json", ".md")
    return {
        file
        for file in files
        if file.endswith(".py")
        or file == "pydllm/py.typed"
        or (file.startswith("pydllm/demo/weights/") and file.endswith(weights))
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
    pages = {f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md")}
    assert csrc | pages | shipped_sources() | set(BUILT_FROM) <= names
    assert not any(name.startswith(("tests/", "kernels/")) or ".so" in name for name in names)


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


@pytest.mark.skipif(not NVCC, reason="needs nvcc")
def test_cuda_wheel_is_tied_to_no_torch_and_no_driver(built, no_torch, tmp_path):
    with tarfile.open(built[0]) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.glob("pydllm-*")
    settings = {"PYDLLM_BUILD_CUDA": "1", "PYDLLM_CUDA_ARCHS": "90a", "PYTHONPATH": no_torch}
    build = (sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path)
    passed(run(*build, cwd=source, **settings))
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)

    (library,) = installed.glob("pydllm/_C*.so")
    needed = run("readelf", "-d", library, cwd=tmp_path).stdout
    needed = {line.split("[")[1].rstrip("]") for line in needed.splitlines() if "NEEDED" in line}
    allowed = {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6", "libdl.so.2"}
    allowed |= {"libpthread.so.0", "librt.so.1", "ld-linux-x86-64.so.2"}
    assert needed <= allowed, needed - allowed

    # Loads without a GPU, and a launch says which kernel could not run and why.
    call = (
        "import json, sys\n"
        "from pydllm import _C\n"
        "before = [_C.version(), _C.archs(), _C.MAX_BANNED]\n"
        "names = 'token logsumexp prob entropy margin logits banned dtype vocab banned_count '\n"
        "zeros = dict.fromkeys((names + 'stride_logits_row stream').split(), 0)\n"
        "try:\n    _C.vocab_stats(rows=1, **zeros)\n"
        "except RuntimeError as error:\n    before.append(str(error))\n"
        "print(json.dumps(before))"
    )
    version, archs, most, error = imported(installed, call, CUDA_VISIBLE_DEVICES="")
    from pydllm import __version__
    from pydllm._backend import cuda

    assert (version, archs, most) == (__version__, "90a", cuda.MAX_BANNED)
    assert error.startswith("vocab_stats: ") and "(cudaError" in error


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


@pytest.fixture
def setup_module(monkeypatch):
    """setup.py as a module, its ``setup()`` left out."""
    monkeypatch.setenv("PYDLLM_BUILD_CUDA", "0")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("pydllm_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("PYDLLM_BUILD_CUDA", "PYDLLM_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "USUAL_PLACE", Path("/nonexistent"))
    monkeypatch.setenv("PATH", "/nonexistent")
    return module


def fake_toolkit(folder, script):
    """A CUDA toolkit whose nvcc is ``script``."""
    (folder / "bin").mkdir(parents=True)
    (folder / "include").mkdir()
    (folder / "include/cuda_runtime.h").touch()
    nvcc = folder / "bin/nvcc"
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    return folder


LISTS_80_AND_90 = "printf 'sm_80\\nsm_90\\n'"

BAD_SETTINGS = {
    "mode": ({"PYDLLM_BUILD_CUDA": "maybe"}, "expected auto, 1 or 0, got 'maybe'"),
    "no nvcc": ({"PYDLLM_BUILD_CUDA": "1", "CUDA_HOME": ""}, "nvcc was not found"),
    "not a toolkit": ({"CUDA_HOME": "/etc"}, "expected a folder with bin/nvcc"),
    "no archs": ({"PYDLLM_CUDA_ARCHS": ";"}, "expected architectures separated by semicolons"),
    "not an arch": ({"PYDLLM_CUDA_ARCHS": "abc"}, "such as '80;90a;100+PTX', got 'abc'"),
    "unknown arch": ({"PYDLLM_CUDA_ARCHS": "80;200a"}, "compiles for 80, 90, got 200a"),
}


@pytest.mark.parametrize("settings, message", BAD_SETTINGS.values(), ids=BAD_SETTINGS.keys())
def test_bad_settings_get_a_sentence(setup_module, monkeypatch, tmp_path, settings, message):
    toolkit = fake_toolkit(tmp_path, LISTS_80_AND_90)
    for name, value in ({"CUDA_HOME": str(toolkit)} | settings).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as error:
        setup_module.cuda_extension()
    assert message in str(error.value)


def test_bad_setting_prints_no_traceback():
    done = run(sys.executable, "setup.py", "--version", cwd=ROOT, PYDLLM_BUILD_CUDA="maybe")
    assert done.returncode == 1
    assert done.stderr.strip() == "PYDLLM_BUILD_CUDA: expected auto, 1 or 0, got 'maybe'"


def test_without_nvcc_auto_leaves_the_kernels_out_and_says_so(setup_module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["setup.py", "bdist_wheel"])
    assert setup_module.cuda_extension() == []
    assert "no nvcc, so the CUDA kernels are left out" in capsys.readouterr().out


def test_compile_failure_is_not_silent(setup_module, monkeypatch, tmp_path, capfd):
    toolkit = fake_toolkit(tmp_path, f'[ "$1" = --list-gpu-code ] && {LISTS_80_AND_90} || exit 1')
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    (extension,) = setup_module.cuda_extension()
    assert extension.archs == ["80+PTX", "90a"]  # of the default ones, those this nvcc knows
    with pytest.raises(SystemExit, match="PYDLLM_BUILD_CUDA=0 installs without them"):
        setup_module.run(str(toolkit / "bin/nvcc"), "-c", "csrc/vocab_stats.cu")


def test_nvcc_on_path_may_be_a_script_elsewhere(setup_module, monkeypatch, tmp_path):
    toolkit = fake_toolkit(tmp_path / "real", "")
    wrapper = fake_toolkit(tmp_path / "wrapper", f"echo '#$ TOP={toolkit}/bin/..' >&2")
    (wrapper / "include/cuda_runtime.h").unlink()
    monkeypatch.setenv("PATH", str(wrapper / "bin"))
    assert setup_module.find_cuda() == toolkit
