"""Bugs planted in csrc/, and whether an op's check finds them when the kernels run on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

from tests import emulation

ROOT = Path(__file__).parents[1]
SURVIVED, CAUGHT, OTHERWISE = "0", "70", "71"

# One process for all: each mutant runs in a fork of it, since some end or hang theirs.
RUN = """
import importlib, os, signal, sys, traceback
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from pydllm._backend import cuda
from tests import emulation
for argument in sys.argv[2:]:
    module, name, path = argument.split(":", 2)
    path, _, number = path.partition("@")
    os.environ["PYDLLM_MUTANT"] = number or "0"
    check = getattr(importlib.import_module(module), name)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            cuda._KERNELS = emulation.EmulatedKernels(path)
            for order in ("ascending", "descending"):
                os.environ["PYDLLM_EMULATION_ORDER"] = order
                check()
        except (AssertionError, RuntimeError, ValueError):
            os._exit(70)
        except BaseException:
            traceback.print_exc()
            os._exit(71)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(70 if code in (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGALRM) else code)
"""


# The mutant that runs, 0 for none.
SWITCH = """
#ifndef PYDLLM_MUTANT
#define PYDLLM_MUTANT
#include <cstdlib>
static int pydllm_mutant() {
  static const int number = std::atoi(std::getenv("PYDLLM_MUTANT"));
  return number;
}
#endif
"""


def assert_caught(cases, folder):
    """Each check passes for the kernels as they are, and fails for each of its mutants.

    One module holds all mutants and a switch, so that a source is compiled once.

    Args:
        cases: check -> its mutants. A check is ``"tests.ops.test_x:function"``, called without
            arguments in both orders of threads; it calls ops with ``backend="cuda"``. Mutants are
            name -> (file in csrc/, old, new): both are expressions, or both are statements, which
            end in a semicolon; or new asks for MUTANT itself.
        folder: that of the ``cuda_folder`` fixture.
    """
    texts, runs, expected = {}, {}, {}
    for check, mutants in cases.items():
        runs[check, "unchanged"] = 0
        expected[check, "unchanged"] = SURVIVED
        for name, (file, old, new) in mutants.items():
            number = len(runs)
            text = texts.get(file) or SWITCH + (emulation.CSRC / file).read_text()
            if old not in text:
                raise ValueError(f"{file} has no {old!r}")
            here = f"pydllm_mutant() == {number}"
            if "MUTANT" in new:
                switched = new.replace("MUTANT", f"({here})")
            elif old.endswith(";"):
                switched = f"if ({here}) {{ {new} }} else {{ {old} }}"
            else:
                switched = f"({here} ? ({new}) : ({old}))"
            texts[file] = text.replace(old, switched)
            runs[check, name] = number
            expected[check, name] = CAUGHT
    module = emulation.build(folder, texts)
    _assert_codes({case: f"{case[0]}:{module}@{n}" for case, n in runs.items()}, expected)


def _assert_codes(runs, expected):
    """Run ``case -> check:module`` and compare how each ended."""
    command = [sys.executable, "-c", RUN, str(ROOT), *runs.values()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    codes = dict(zip(runs, done.stdout.split(), strict=True))
    wrong = {case: code for case, code in codes.items() if code != expected[case]}
    assert not wrong, f"{wrong}\n{done.stderr[-4000:]}"
