"""What setup.py makes of its environment, and what it answers to bad input."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import setuptools

from tests.packages import ROOT, run


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
def test_bad_settings_get_a_sentence(setup_script, monkeypatch, tmp_path, settings, message):
    toolkit = fake_toolkit(tmp_path, LISTS_80_AND_90)
    for name, value in ({"CUDA_HOME": str(toolkit)} | settings).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as error:
        setup_script.cuda_extension()
    assert message in str(error.value)


def test_archs_may_be_separated_by_spaces(setup_script, monkeypatch, tmp_path):
    toolkit = fake_toolkit(
        tmp_path, f"[ $1 = --version ] && echo release 13.1, || {LISTS_80_AND_90}"
    )
    monkeypatch.setenv("PYDLLM_CUDA_ARCHS", "80+PTX 90a,")
    found = setup_script.toolkit_in(toolkit)
    archs = setup_script.choose_archs(found)
    assert archs == ["80+PTX", "90a"]
    assert setup_script.tag(found, archs) == "cu131.sm80ptx.sm90a"


def test_the_version_of_sources_names_no_architecture(setup_script, monkeypatch, tmp_path):
    toolkit = fake_toolkit(tmp_path, LISTS_80_AND_90)
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    extensions = setup_script.cuda_extension()
    for command, tagged in (("sdist", False), ("bdist_wheel", True), ("dist_info", True)):
        monkeypatch.setattr(sys, "argv", ["setup.py", command])
        version = setup_script.version(extensions)
        assert version == setup_script.VERSION + ("+cu.sm80ptx.sm90a" if tagged else "")
    assert setup_script.version([]) == setup_script.VERSION


def test_compilers_at_a_time(setup_script, monkeypatch):
    monkeypatch.delenv("MAX_JOBS", raising=False)
    assert 1 <= setup_script.jobs() <= os.cpu_count()
    monkeypatch.setattr(setup_script, "JOB_BYTES", 2**60)
    assert setup_script.jobs() == 1
    monkeypatch.setenv("MAX_JOBS", "7")
    assert setup_script.jobs() == 7
    monkeypatch.setenv("MAX_JOBS", "all")
    with pytest.raises(SystemExit, match="MAX_JOBS: expected a number from 1, got 'all'"):
        setup_script.jobs()


@pytest.mark.parametrize("with_ninja", [True, False])
def test_only_what_changed_is_compiled_again(setup_script, monkeypatch, tmp_path, with_ninja):
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
    monkeypatch.setattr(setup_script, "ROOT", tmp_path)
    monkeypatch.setattr(setup_script.shutil, "which", lambda name: ninja if with_ninja else None)
    monkeypatch.setenv("PATH", os.defpath)
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    (extension,) = setup_script.cuda_extension()
    extension.sources = ["csrc/a.cu", "csrc/b.cu"]
    command = setup_script.BuildCuda(setuptools.Distribution())
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


def test_without_nvcc_auto_leaves_the_kernels_out_and_says_so(setup_script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["setup.py", "bdist_wheel"])
    assert setup_script.cuda_extension() == []
    assert "no nvcc, so the CUDA kernels are left out" in capsys.readouterr().out


def test_compile_failure_is_not_silent(setup_script, monkeypatch, tmp_path, capfd):
    toolkit = fake_toolkit(tmp_path, f'[ "$1" = --list-gpu-code ] && {LISTS_80_AND_90} || exit 1')
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    (extension,) = setup_script.cuda_extension()
    assert extension.archs == ["80+PTX", "90a"]  # of the default ones, those this nvcc knows
    with pytest.raises(SystemExit, match="PYDLLM_BUILD_CUDA=0 installs without them"):
        setup_script.run(str(toolkit / "bin/nvcc"), "-c", "csrc/vocab_stats.cu")


def test_nvcc_on_path_may_be_a_script_elsewhere(setup_script, monkeypatch, tmp_path):
    toolkit = fake_toolkit(tmp_path / "real", "")
    wrapper = fake_toolkit(tmp_path / "wrapper", f"echo '#$ TOP={toolkit}/bin/..' >&2")
    (wrapper / "include/cuda_runtime.h").unlink()
    monkeypatch.setenv("PATH", str(wrapper / "bin"))
    found, _ = setup_script.find_cuda()
    assert found.nvcc == toolkit / "bin/nvcc" and found.include == toolkit / "include"


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX"])
def test_auto_never_stops_an_install(setup_script, monkeypatch, tmp_path, capsys, name):
    """A runtime container: CUDA_HOME has libraries and no nvcc."""
    (tmp_path / "lib64").mkdir()
    monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["setup.py", "bdist_wheel"])
    assert setup_script.cuda_extension() == []
    said = capsys.readouterr().out
    assert "the CUDA kernels are left out" in said and f"{name}={tmp_path}" in said


@pytest.mark.parametrize("name", ["CUDA_HOME", "CONDA_PREFIX"])
def test_condas_headers_are_one_folder_per_target(setup_script, monkeypatch, tmp_path, name):
    toolkit = fake_toolkit(tmp_path, LISTS_80_AND_90)
    headers = toolkit / "targets/x86_64-linux/include"
    headers.mkdir(parents=True)
    (toolkit / "include/cuda_runtime.h").rename(headers / "cuda_runtime.h")
    monkeypatch.setenv(name, str(toolkit))
    (extension,) = setup_script.cuda_extension()
    assert extension.cuda == setup_script.Toolkit(toolkit / "bin/nvcc", headers)


def test_a_distributions_nvcc_is_found(setup_script, monkeypatch, tmp_path):
    """On PATH, without a toolkit's folder around it; the headers are the system's."""
    toolkit = fake_toolkit(tmp_path / "usr", LISTS_80_AND_90)
    (toolkit / "include").rename(tmp_path / "include")
    monkeypatch.setenv("PATH", f"{toolkit / 'bin'}:{os.defpath}")
    assert setup_script.find_cuda()[0] is None
    monkeypatch.setattr(setup_script, "SYSTEM_INCLUDES", (tmp_path / "include",))
    (extension,) = setup_script.cuda_extension()
    assert extension.cuda == setup_script.Toolkit(toolkit / "bin/nvcc", tmp_path / "include")
