"""Commands that the tests of packaging run."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


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
