"""``import pydllm`` stays cheap: what costs seconds is imported by those who use it."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch._dynamo", "triton", "transformers", "matplotlib", "lm_eval")


def test_import_brings_in_nothing_heavy():
    code = f"import sys, pydllm; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
