"""Builds pydllm; compiles csrc/ where a CUDA toolkit is found. Needs neither a GPU nor PyTorch.

PYDLLM_BUILD_CUDA  auto (default): compile csrc/ if nvcc is there; 1: it must be; 0: do not
PYDLLM_CUDA_ARCHS  e.g. "80;90a;100"; "+PTX" behind one adds code that newer GPUs can translate
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
USUAL_PLACE = Path("/usr/local/cuda")

# PTX of the oldest one: what has no code of its own (Jetson, the next generation) translates that.
DEFAULT_ARCHS = ("80+PTX", "86", "89", "90a", "100", "120")


def build_cuda() -> str:
    value = os.environ.get("PYDLLM_BUILD_CUDA", "auto")
    if value not in ("auto", "1", "0"):
        raise SystemExit(f"PYDLLM_BUILD_CUDA: expected auto, 1 or 0, got {value!r}")
    return value


def find_cuda() -> Path | None:
    """The toolkit's folder: the one that is named, the usual place, or that of the nvcc on PATH."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if folder := os.environ.get(name):
            if is_toolkit(Path(folder)):
                return Path(folder)
            raise SystemExit(
                f"{name}: expected a folder with bin/nvcc and include/cuda_runtime.h, "
                f"got {folder!r} (unset it, or set PYDLLM_BUILD_CUDA=0 to skip the CUDA kernels)"
            )
    if is_toolkit(USUAL_PLACE):
        return USUAL_PLACE
    if nvcc := shutil.which("nvcc"):
        # The nvcc on PATH can be a script or a link far from its toolkit, so ask it where that is.
        plan = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
        if found := re.search(r"^#\$ TOP=(.+)$", plan.stderr, re.MULTILINE):
            folder = Path(found[1].strip()).resolve()
            return folder if is_toolkit(folder) else None
    return None


def is_toolkit(folder: Path) -> bool:
    return (folder / "bin/nvcc").exists() and (folder / "include/cuda_runtime.h").exists()


def choose_archs(cuda: Path) -> list[str]:
    listed = subprocess.run(
        [cuda / "bin/nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True
    )
    known = re.findall(r"sm_(\d+)", listed.stdout)

    def supported(arch: str) -> bool:
        return re.sub(r"[af]?(\+PTX)?$", "", arch) in known

    value = os.environ.get("PYDLLM_CUDA_ARCHS")
    if value is None:
        return [arch for arch in DEFAULT_ARCHS if supported(arch)]
    archs = [arch.strip() for arch in value.split(";") if arch.strip()]
    bad = [arch for arch in archs if not re.fullmatch(r"\d{2,3}[af]?(\+PTX)?", arch)]
    if bad or not archs:
        raise SystemExit(
            "PYDLLM_CUDA_ARCHS: expected architectures separated by semicolons, "
            f"such as '80;90a;100+PTX', got {value!r}"
        )
    if unknown := [arch for arch in archs if not supported(arch)]:
        raise SystemExit(
            f"PYDLLM_CUDA_ARCHS: {cuda / 'bin/nvcc'} compiles for {', '.join(known)}, "
            f"got {', '.join(unknown)}"
        )
    return archs


def gencode(arch: str) -> list[str]:
    number = arch.removesuffix("+PTX")
    code = f"[sm_{number},compute_{number}]" if arch.endswith("+PTX") else f"sm_{number}"
    return ["-gencode", f"arch=compute_{number},code={code}"]


class BuildCuda(build_ext):
    """nvcc for the .cu files, the C++ compiler for the binding, the CUDA runtime linked in."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        cuda, archs = ext.cuda, ext.archs
        objects = Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        nvcc = str(cuda / "bin/nvcc")
        cxx = shlex.split(os.environ.get("CXX", "c++"))
        linked = []
        for source in ext.sources:
            built = str(objects / Path(source).with_suffix(".o").name)
            linked.append(built)
            if source.endswith(".cu"):
                codes = [flag for arch in archs for flag in gencode(arch)]
                flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
                flags += ["-Xfatbin=-compress-all", "--threads=0"]
                run(nvcc, *flags, *codes, "-c", source, "-o", built)
            else:
                version = self.distribution.get_version()
                flags = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden"]
                flags += [f'-DPYDLLM_VERSION="{version}"', f'-DPYDLLM_ARCHS="{";".join(archs)}"']
                includes = [pybind11.get_include(), str(cuda / "include"), *self.include_dirs]
                flags += [f"-I{folder}" for folder in includes]
                run(*cxx, *flags, "-c", source, "-o", built)
        libraries = ["-cudart", "static", "-Xlinker=-s"]
        run(nvcc, "-shared", *libraries, *linked, "-o", str(target))


def run(*command: str) -> None:
    print(shlex.join(command), flush=True)
    try:
        failed = subprocess.run(command).returncode
    except FileNotFoundError:
        failed = True
        print(f"{command[0]}: not found", file=sys.stderr)
    if failed:
        raise SystemExit(
            "pydllm: the CUDA kernels did not compile, see above; "
            "PYDLLM_BUILD_CUDA=0 installs without them"
        )


def cuda_extension() -> list[Extension]:
    mode = build_cuda()
    if mode == "0":
        return []
    cuda = find_cuda()
    if cuda is None:
        if mode == "1":
            raise SystemExit(
                "PYDLLM_BUILD_CUDA=1, but nvcc was not found: install the CUDA toolkit, "
                "set CUDA_HOME to it, or set PYDLLM_BUILD_CUDA=0"
            )
        if any("wheel" in argument or "build" in argument for argument in sys.argv):
            print("pydllm: no nvcc, so the CUDA kernels are left out (Triton ones are not)")
        return []
    files = sorted(f"csrc/{file.name}" for file in (ROOT / "csrc").iterdir())
    sources = [file for file in files if file.endswith((".cu", ".cpp"))]
    extension = Extension("pydllm._C", sources, depends=files)
    extension.cuda, extension.archs = cuda, choose_archs(cuda)
    return [extension]


setup(
    # kernels/ has no __init__.py (a package called "kernels" would hide Hugging Face's), so it has
    # to be named; pydllm/kernels is a link to it and becomes plain files in a wheel.
    packages=[*find_packages(include=["pydllm", "pydllm.*"]), "pydllm.kernels"],
    ext_modules=cuda_extension(),
    cmdclass={"build_ext": BuildCuda},
)
