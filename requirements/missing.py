"""Print what an environment lacks of the lock file of its Python, one requirement per line.

A package counts as missing, too, where pyproject.toml refuses the installed version.
"""

import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

HERE = Path(__file__).parent


def main() -> None:
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [Requirement(r) for r in project["dependencies"] + extras["test"] + extras["demo"]]
    accepted = {requirement.name: requirement.specifier for requirement in wanted}
    lock = HERE / f"{sys.version_info.major}.{sys.version_info.minor}.txt"
    for line in lock.read_text().splitlines():
        name = line.partition("==")[0]
        if line.startswith("#"):
            continue
        try:
            installed = version(name)
        except PackageNotFoundError:
            print(line)
            continue
        if name in accepted and not accepted[name].contains(installed, prereleases=True):
            print(line)


if __name__ == "__main__":
    main()
