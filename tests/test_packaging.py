"""Wheel, sdist and editable install, built without torch; what setup.py answers to bad input."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement

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


def test_links_of_the_readme_lead_to_a_repository(setup_module):
    text = '[a](docs/a.md) [b](https://b) [c](#c) <picture>\n<source srcset="x.png">\n'
    text += '<img src="y.png" alt="Y"></picture>'
    to = setup_module.readme_of_an_index(text, "https://r/p")
    assert to == (
        "[a](https://r/p/blob/main/docs/a.md) [b](https://b) [c](#c) <picture>\n"
        '<source srcset="https://r/p/raw/main/x.png">\n'
        '<img src="https://r/p/raw/main/y.png" alt="Y"></picture>'
    )
    assert setup_module.readme_of_an_index(text, None) == "a [b](https://b) [c](#c) Y"


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
        "names = 'y residual x weight dtype eps stride_x_row stride_residual_row stream'\n"
        "zeros = dict.fromkeys(names.split(), 0)\n"
        "try:\n    _C.rms_norm(rows=1, width=1, **zeros)\n"
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
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    monkeypatch.setattr(module, "USUAL_PLACE", Path("/nonexistent"))
    monkeypatch.setattr(module, "SYSTEM_INCLUDES", ())
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
    "not a toolkit": (
        {"CUDA_HOME": "/etc", "PYDLLM_BUILD_CUDA": "1"},
        "nvcc was not found (looked for bin/nvcc and cuda_runtime.h in CUDA_HOME=/etc)",
    ),
    "no archs": ({"PYDLLM_CUDA_ARCHS": ";"}, "expected architectures separated by semicolons"),
    "not an arch": ({"PYDLLM_CUDA_ARCHS": "abc"}, "such as '80;90a;100+PTX', got 'abc'"),
    "and which there are": ({"PYDLLM_CUDA_ARCHS": "sm_90"}, "compiles for 80, 90)"),
    "unknown arch": (
        {"PYDLLM_CUDA_ARCHS": "80;200a"},
        "compiles these kernels for 80, 90, got 200a",
    ),
    "older than the kernels": (
        {"PYDLLM_CUDA_ARCHS": "75"},
        "compiles these kernels for 80, 90, got 75",
    ),
}


@pytest.mark.parametrize("settings, message", BAD_SETTINGS.values(), ids=BAD_SETTINGS.keys())
def test_bad_settings_get_a_sentence(setup_module, monkeypatch, tmp_path, settings, message):
    toolkit = fake_toolkit(tmp_path, LISTS_80_AND_90)
    for name, value in ({"CUDA_HOME": str(toolkit)} | settings).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as error:
        setup_module.cuda_extension()
    assert message in str(error.value)


def test_archs_may_be_separated_by_spaces(setup_module, monkeypatch, tmp_path):
    toolkit = fake_toolkit(
        tmp_path, f"[ $1 = --version ] && echo release 13.1, || {LISTS_80_AND_90}"
    )
    monkeypatch.setenv("PYDLLM_CUDA_ARCHS", "80+PTX 90a,")
    found = setup_module.toolkit_in(toolkit)
    archs = setup_module.choose_archs(found)
    assert archs == ["80+PTX", "90a"]
    assert setup_module.tag(found, archs) == "cu131.sm80ptx.sm90a"


def test_the_version_of_sources_names_no_architecture(setup_module, monkeypatch, tmp_path):
    toolkit = fake_toolkit(tmp_path, LISTS_80_AND_90)
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    extensions = setup_module.cuda_extension()
    for command, tagged in (("sdist", False), ("bdist_wheel", True), ("dist_info", True)):
        monkeypatch.setattr(sys, "argv", ["setup.py", command])
        version = setup_module.version(extensions)
        assert version == setup_module.VERSION + ("+cu.sm80ptx.sm90a" if tagged else "")
    assert setup_module.version([]) == setup_module.VERSION


def test_compilers_at_a_time(setup_module, monkeypatch):
    monkeypatch.delenv("MAX_JOBS", raising=False)
    assert 1 <= setup_module.jobs() <= os.cpu_count()
    monkeypatch.setattr(setup_module, "JOB_BYTES", 2**60)
    assert setup_module.jobs() == 1
    monkeypatch.setenv("MAX_JOBS", "7")
    assert setup_module.jobs() == 7
    monkeypatch.setenv("MAX_JOBS", "all")
    with pytest.raises(SystemExit, match="MAX_JOBS: expected a number from 1, got 'all'"):
        setup_module.jobs()


@pytest.mark.parametrize("with_ninja", [True, False])
def test_only_what_changed_is_compiled_again(setup_module, monkeypatch, tmp_path, with_ninja):
    """A compiler that notes its calls: with ninja a second build makes what depends on a change."""
    ninja = shutil.which("ninja", path=os.defpath + ":/usr/local/bin")
    if with_ninja and ninja is None:
        pytest.skip("needs ninja")
    script = f"""
    [ "$1" = --list-gpu-code ] && {{ {LISTS_80_AND_90}; exit; }}
    for last; do [ "$previous" = -c ] && input=$last; [ "$previous" = -MF ] && depends=$last
      previous=$last; done
    echo ${{input:-link}} >> {tmp_path}/calls; echo > $last
    [ -z "$input" ] || echo "$last: $input {tmp_path}/header.h" > $depends"""
    toolkit = fake_toolkit(tmp_path / "toolkit", script)
    (tmp_path / "csrc").mkdir()
    for name in ("header.h", "csrc/a.cu", "csrc/b.cu"):
        (tmp_path / name).touch()
    monkeypatch.setattr(setup_module, "ROOT", tmp_path)
    monkeypatch.setattr(setup_module.shutil, "which", lambda name: ninja if with_ninja else None)
    monkeypatch.setenv("PATH", os.defpath)
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    (extension,) = setup_module.cuda_extension()
    extension.sources = ["csrc/a.cu", "csrc/b.cu"]
    command = setup_module.BuildCuda(setuptools.Distribution())
    command.build_temp, command.build_lib = str(tmp_path / "temp"), str(tmp_path / "lib")
    command.inplace, command.package = False, None
    command.extensions = [extension]

    def calls():
        (tmp_path / "calls").write_text("")
        command.build_extension(extension)
        lines = (tmp_path / "calls").read_text().splitlines()
        return sorted(Path(line).name for line in lines)

    everything = ["a.cu", "b.cu", "link"]
    assert calls() == everything
    if not with_ninja:
        assert calls() == everything
        return
    assert calls() == ["link"]
    os.utime(tmp_path / "csrc/a.cu", (2e9, 2e9))
    assert calls() == ["a.cu", "link"]
    extension.archs = ["90a"]
    assert calls() == everything


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
    found, _ = setup_module.find_cuda()
    assert found.nvcc == toolkit / "bin/nvcc" and found.include == toolkit / "include"


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX"])
def test_auto_never_stops_an_install(setup_module, monkeypatch, tmp_path, capsys, name):
    """A runtime container: CUDA_HOME has libraries and no nvcc."""
    (tmp_path / "lib64").mkdir()
    monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["setup.py", "bdist_wheel"])
    assert setup_module.cuda_extension() == []
    said = capsys.readouterr().out
    assert "the CUDA kernels are left out" in said and f"{name}={tmp_path}" in said


@pytest.mark.parametrize("name", ["CUDA_HOME", "CONDA_PREFIX"])
def test_condas_headers_are_one_folder_per_target(setup_module, monkeypatch, tmp_path, name):
    toolkit = fake_toolkit(tmp_path, LISTS_80_AND_90)
    headers = toolkit / "targets/x86_64-linux/include"
    headers.mkdir(parents=True)
    (toolkit / "include/cuda_runtime.h").rename(headers / "cuda_runtime.h")
    monkeypatch.setenv(name, str(toolkit))
    (extension,) = setup_module.cuda_extension()
    assert extension.cuda == setup_module.Toolkit(toolkit / "bin/nvcc", headers)


def test_a_distributions_nvcc_is_found(setup_module, monkeypatch, tmp_path):
    """On PATH, without a toolkit's folder around it; the headers are the system's."""
    toolkit = fake_toolkit(tmp_path / "usr", LISTS_80_AND_90)
    (toolkit / "include").rename(tmp_path / "include")
    monkeypatch.setenv("PATH", f"{toolkit / 'bin'}:{os.defpath}")
    assert setup_module.find_cuda()[0] is None
    monkeypatch.setattr(setup_module, "SYSTEM_INCLUDES", (tmp_path / "include",))
    (extension,) = setup_module.cuda_extension()
    assert extension.cuda == setup_module.Toolkit(toolkit / "bin/nvcc", tmp_path / "include")


def locks():
    return sorted(path for path in (ROOT / "requirements").glob("3.*.txt"))


def test_there_is_a_lock_for_every_python():
    makefile = (ROOT / "Makefile").read_text()
    named = re.search(r"^LOCKED := (.+)$", makefile, re.MULTILINE)[1].split()
    assert sorted(named) == [path.stem for path in locks()]
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in named
    # The workflow runs them all, and the package says so.
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    matrix = re.search(r"^ +python: \[(.+)\]$", workflow, re.MULTILINE)[1]
    assert sorted(re.findall(r'"(.+?)"', matrix)) == sorted(named)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    prefix = "Programming Language :: Python :: 3."
    claimed = [line.rpartition(" ")[2] for line in project["classifiers"] if prefix in line]
    assert sorted(claimed) == sorted(named)


@pytest.mark.parametrize("lock", locks(), ids=lambda path: path.stem)
def test_a_lock_pins_all_that_the_commands_install(lock):
    """Exact versions and nothing else: no option, no address, nothing that torch brings."""
    lines = [line for line in lock.read_text().splitlines() if not line.startswith("#")]
    pins = dict(re.fullmatch(r"([a-z0-9.-]+)==([\w.]+)", line).groups() for line in lines)
    assert len(pins) == len(lines)
    assert not any(re.match(r"torch|triton|nvidia|cuda", name) for name in pins)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for line in project["dependencies"] + extras["test"] + extras["demo"]:
        requirement = Requirement(line)
        if requirement.name not in ("torch", "triton"):
            assert requirement.specifier.contains(pins[requirement.name]), line


def test_what_is_missing_is_told_and_nothing_else(tmp_path):
    """An environment without a package, with an old one, and with one newer than the lock."""
    site, lock = tmp_path / "site", ROOT / f"requirements/{sys.version_info.major}."
    lock = Path(f"{lock}{sys.version_info.minor}.txt")
    pins = dict(line.split("==") for line in lock.read_text().splitlines() if "==" in line)
    changed = {"rich": None, "transformers": "4.2", "numpy": "999.0"}
    for name, pinned in (pins | changed).items():
        if pinned is not None:
            folder = site / f"{name.replace('-', '_')}-{pinned}.dist-info"
            folder.mkdir(parents=True)
            (folder / "METADATA").write_text(f"Name: {name}\nVersion: {pinned}\n")
    script = (
        "import runpy, sys, pip._vendor.packaging.requirements\n"
        f"sys.path[:] = [{str(site)!r}, *(p for p in sys.path if 'site-packages' not in p)]\n"
        f"runpy.run_path({str(ROOT / 'requirements/missing.py')!r}, run_name='__main__')"
    )
    told = passed(run(sys.executable, "-c", script, cwd=tmp_path)).splitlines()
    assert told == [f"rich=={pins['rich']}", f"transformers=={pins['transformers']}"]
