"""The lock files of each Python, and what is told of an environment that differs."""

import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.packages import ROOT, passed, run


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
