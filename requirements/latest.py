"""Run the tests of what other packages can break; print one line, versions and counts.

Everything pytest says is in ``out/test-latest.txt``. The exit status is pytest's.
"""

import datetime
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
TESTS = ("tests/integrations", "tests/models", "tests/test_packaging.py", "tests/test_setup.py")
ONLY_TOOLS = {"build", "clang-format", "mypy", "ninja", "pytest-timeout", "pytest-xdist", "ruff"}


def versions() -> str:
    """What pyproject.toml names and is installed, less what only checks or builds this package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    names = sorted({Requirement(line).name for lines in lists for line in lines} - ONLY_TOOLS)
    found = [f"Python {sys.version_info.major}.{sys.version_info.minor}"]
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def main() -> None:
    log = ROOT / "out/test-latest.txt"
    log.parent.mkdir(exist_ok=True)
    # What is slow there is nvcc, which no release of a Python package changes.
    command = [sys.executable, "-m", "pytest", "-m", "not slow", *sys.argv[1:], *TESTS]
    with log.open("w") as file:
        status = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file).returncode
    counts = log.read_text().strip().splitlines()[-1].strip("= ")
    today = datetime.date.today()
    print(f"newest versions on {today}: {versions()}: {counts} ({log.relative_to(ROOT)})")
    sys.exit(status)


if __name__ == "__main__":
    main()
