"""Builds pydllm; compiles csrc/ where a CUDA toolkit is found. Needs neither a GPU nor PyTorch.

PYDLLM_BUILD_CUDA  auto (default): compile csrc/ if nvcc is there; 1: it must be; 0: do not
PYDLLM_CUDA_ARCHS  e.g. "80;90a;100"; "+PTX" after one adds code that newer GPUs can translate
MAX_JOBS           compilers at a time; default: one per core, as far as 2 GiB are free for each

With ninja on PATH only what changed is compiled again. The version of a wheel with CUDA kernels
says which toolkit compiled them for what: 0.1.0+cu130.sm90a.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
USUAL_PLACE = Path("/usr/local/cuda")
SYSTEM_INCLUDES = (Path("/usr/include"), Path("/usr/lib/cuda/include"))

OLDEST_ARCH = 80
# PTX of the oldest one: what has no code of its own (Jetson, the next generation) translates that.
DEFAULT_ARCHS = ("80+PTX", "86", "89", "90a", "100", "120")
JOB_BYTES = 2 * 2**30


def build_cuda() -> str:
    value = os.environ.get("PYDLLM_BUILD_CUDA", "auto")
    if value not in ("auto", "1", "0"):
        raise SystemExit(f"PYDLLM_BUILD_CUDA: expected auto, 1 or 0, got {value!r}")
    return value


@dataclass(frozen=True)
class Toolkit:
    """nvcc, and the folder of cuda_runtime.h."""

    nvcc: Path
    include: Path


def find_cuda() -> tuple[Toolkit | None, str]:
    """A toolkit, and where it was looked for: named folders, the usual place, the nvcc on PATH."""
    looked = []
    for name in ("CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX"):
        if folder := os.environ.get(name):
            if toolkit := toolkit_in(Path(folder)):
                return toolkit, ""
            looked.append(f"{name}={folder}")
            if name != "CONDA_PREFIX":
                return None, missing(looked)  # another one than the one that is named: no guess
    if toolkit := toolkit_in(USUAL_PLACE):
        return toolkit, ""
    looked.append(str(USUAL_PLACE))
    if nvcc := shutil.which("nvcc"):
        looked.append(nvcc)
        # The nvcc on PATH can be a script or a link far from its toolkit, so ask it where that is.
        plan = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
        found = re.search(r"^#\$ TOP=(.+)$", plan.stderr, re.MULTILINE)
        if found and (toolkit := toolkit_in(Path(found[1].strip()).resolve())):
            return toolkit, ""
        # A distribution's nvcc has its headers where the compiler looks by itself.
        for folder in SYSTEM_INCLUDES:
            if (folder / "cuda_runtime.h").exists():
                return Toolkit(Path(nvcc), folder), ""
    else:
        looked.append("PATH")
    return None, missing(looked)


def missing(looked: list[str]) -> str:
    return f"looked for bin/nvcc and cuda_runtime.h in {', '.join(looked)}"


def toolkit_in(folder: Path) -> Toolkit | None:
    """NVIDIA's layout, or conda's, whose headers are one folder per target."""
    nvcc = folder / "bin/nvcc"
    places = [folder / "include", *sorted(folder.glob("targets/*/include"))]
    include = next((place for place in places if (place / "cuda_runtime.h").exists()), None)
    return Toolkit(nvcc, include) if include is not None and nvcc.exists() else None


def choose_archs(cuda: Toolkit) -> list[str]:
    listed = subprocess.run(
        [cuda.nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True
    )
    # Older ones lack instructions that the kernels are made of.
    known = [sm for sm in re.findall(r"sm_(\d+)", listed.stdout) if int(sm) >= OLDEST_ARCH]

    def supported(arch: str) -> bool:
        return re.sub(r"[af]?(\+PTX)?$", "", arch) in known

    value = os.environ.get("PYDLLM_CUDA_ARCHS")
    if value is None:
        return [arch for arch in DEFAULT_ARCHS if supported(arch)]
    archs = [arch for arch in re.split(r"[;,\s]+", value) if arch]
    bad = [arch for arch in archs if not re.fullmatch(r"\d{2,3}[af]?(\+PTX)?", arch)]
    if bad or not archs:
        raise SystemExit(
            "PYDLLM_CUDA_ARCHS: expected architectures separated by semicolons, "
            f"such as '80;90a;100+PTX', got {value!r} "
            f"({cuda.nvcc} compiles for {', '.join(known)})"
        )
    if unknown := [arch for arch in archs if not supported(arch)]:
        raise SystemExit(
            f"PYDLLM_CUDA_ARCHS: {cuda.nvcc} compiles these kernels for "
            f"{', '.join(known)}, got {', '.join(unknown)}"
        )
    return archs


def gencode(arch: str) -> list[str]:
    number = arch.removesuffix("+PTX")
    code = f"[sm_{number},compute_{number}]" if arch.endswith("+PTX") else f"sm_{number}"
    return ["-gencode", f"arch=compute_{number},code={code}"]


def jobs() -> int:
    """How many compilers to run at a time."""
    if value := os.environ.get("MAX_JOBS"):
        if not re.fullmatch(r"[1-9]\d*", value):
            raise SystemExit(f"MAX_JOBS: expected a number from 1, got {value!r}")
        return int(value)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        memory = int(found[1]) * 1024
    except (OSError, TypeError):
        memory = JOB_BYTES
    return max(1, min(cores or 1, memory // JOB_BYTES))


@dataclass(frozen=True)
class Step:
    """One command of the build."""

    output: Path
    inputs: tuple[Path, ...]
    command: tuple[str, ...]


class BuildCuda(build_ext):
    """nvcc for the .cu files, the C++ compiler for the binding, the CUDA runtime linked in."""

    def build_extension(self, ext: Extension) -> None:
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        at_a_time = jobs()
        threads = max(1, min(len(ext.archs), at_a_time // len(ext.sources)))
        steps = [self.compile_step(ext, source, folder, threads) for source in ext.sources]
        objects = tuple(step.output for step in steps)
        # Without architectures the link step would add code of its own, for nvcc's default one.
        codes = [flag for arch in ext.archs for flag in gencode(arch.removesuffix("+PTX"))]
        link = [str(ext.cuda.nvcc), "-shared", "-cudart", "static", "-Xlinker=-s", *codes]
        link += ["-Xlinker=--as-needed", *map(str, objects), "-o", str(target)]
        steps.append(Step(target, objects, tuple(link)))
        ninja = shutil.which("ninja")
        if ninja is None:
            with ThreadPoolExecutor(max(1, at_a_time // threads)) as pool:
                list(pool.map(lambda step: run(*step.command), steps[:-1]))
            run(*steps[-1].command)
            return
        (folder / "build.ninja").write_text(ninja_file(steps))
        target.unlink(missing_ok=True)  # of another build, perhaps, and newer than the objects
        run(ninja, "-C", str(folder), "-j", str(max(1, at_a_time // threads)))

    def compile_step(self, ext: Extension, source: str, folder: Path, threads: int) -> Step:
        import pybind11

        built = folder / Path(source).with_suffix(".o").name
        depends = ["-MD", "-MF", f"{built}.d"]
        if source.endswith(".cu"):
            flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
            flags += ["-Xfatbin=-compress-all", f"--threads={threads}"]
            flags += [flag for arch in ext.archs for flag in gencode(arch)]
            command = [str(ext.cuda.nvcc), *flags]
        else:
            flags = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden"]
            flags += [f'-DPYDLLM_VERSION="{VERSION}"', f'-DPYDLLM_ARCHS="{";".join(ext.archs)}"']
            includes = [pybind11.get_include(), str(ext.cuda.include), *self.include_dirs]
            flags += [f"-I{include}" for include in includes]
            command = [*shlex.split(os.environ.get("CXX", "c++")), *flags]
        path = ROOT.resolve() / source
        command += [*depends, "-c", str(path), "-o", str(built)]
        return Step(built, (path,), tuple(command))


def ninja_file(steps: list[Step]) -> str:
    """What ninja has to know; dependencies on headers are in the files that compilers write."""

    def escaped(value: object) -> str:
        return str(value).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")

    lines = ["rule compile", "  command = $line", "  depfile = $out.d", "  deps = gcc"]
    lines += ["rule link", "  command = $line"]
    for number, step in enumerate(steps):
        rule = "link" if number == len(steps) - 1 else "compile"
        inputs = " ".join(map(escaped, step.inputs))
        lines.append(f"build {escaped(step.output)}: {rule} {inputs}")
        lines.append("  line = " + shlex.join(step.command).replace("$", "$$"))
    return "\n".join(lines) + "\n"


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
    cuda, looked = find_cuda()
    if cuda is None:
        if mode == "1":
            raise SystemExit(
                f"PYDLLM_BUILD_CUDA=1, but nvcc was not found ({looked}): install the CUDA "
                "toolkit, set CUDA_HOME to it, or set PYDLLM_BUILD_CUDA=0"
            )
        if any("wheel" in argument or "build" in argument for argument in sys.argv):
            print(
                f"pydllm: no nvcc, so the CUDA kernels are left out (Triton ones are not); {looked}"
            )
        return []
    files = sorted(f"csrc/{file.name}" for file in (ROOT / "csrc").iterdir())
    sources = [file for file in files if file.endswith((".cu", ".cpp"))]
    extension = Extension("pydllm._C", sources, depends=files)
    extension.cuda, extension.archs = cuda, choose_archs(cuda)
    return [extension]


def tag(cuda: Toolkit, archs: list[str]) -> str:
    """What a wheel's version says of its CUDA kernels: ``cu130.sm80ptx.sm90a``."""
    shown = subprocess.run([cuda.nvcc, "--version"], capture_output=True, text=True)
    found = re.search(r"release (\d+)\.(\d+)", shown.stdout)
    toolkit = f"cu{found[1]}{found[2]}" if found else "cu"
    return ".".join([toolkit, *(f"sm{arch.lower().replace('+', '')}" for arch in archs)])


def version(extensions: list[Extension]) -> str:
    # Sources are the same for all.
    if not extensions or "sdist" in sys.argv:
        return VERSION
    return f"{VERSION}+{tag(extensions[0].cuda, extensions[0].archs)}"


def readme_of_an_index(text: str, repository: str | None) -> str:
    """README.md where its neighbours are not: on the page of a package index.

    Links to files and pictures lead to the repository, or, where pyproject.toml names none, become
    their text.
    """

    def link(found: re.Match) -> str:
        shown, target = found.groups()
        if "://" in target or target.startswith("#"):
            return found.group()
        return f"[{shown}]({repository}/blob/main/{target})" if repository else shown

    def picture(found: re.Match) -> str:
        if not repository:
            return re.search(r'alt="([^"]*)"', found.group())[1]
        return re.sub(r'(src|srcset)="(?!https:)', rf'\1="{repository}/raw/main/', found.group())

    text = re.sub(r"\[([^\]]*)\]\(([^)\s]+)\)", link, text)
    return re.sub(r"<picture>.*?</picture>|<img [^>]*>", picture, text, flags=re.DOTALL)


def readme() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return readme_of_an_index(text, project.get("urls", {}).get("Repository"))


VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "pydllm/__init__.py").read_text(), re.M)[1]
EXTENSIONS = cuda_extension()

setup(
    version=version(EXTENSIONS),
    long_description=readme(),
    long_description_content_type="text/markdown",
    # kernels/ has no __init__.py (a package called "kernels" would hide Hugging Face's), so it has
    # to be named; pydllm/kernels is a link to it and becomes plain files in a wheel.
    packages=[*find_packages(include=["pydllm", "pydllm.*"]), "pydllm.kernels"],
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BuildCuda},
)
