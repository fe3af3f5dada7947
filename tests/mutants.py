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


def assert_caught(check, source, mutants, folder):
    """``check`` passes for the kernels as they are, and fails for each mutant of them.

    Args:
        check: ``"tests.ops.test_x:function"``, called without arguments in both orders of threads;
            it calls ops with ``backend="cuda"``.
        source: the file in csrc/ that is changed.
        mutants: name -> (old, new).
        folder: that of the ``cuda_folder`` fixture.
    """
    assert_all_caught({source: (check, mutants)}, folder)


def assert_all_caught(cases, folder):
    """``assert_caught`` for several files, source -> (check, mutants), in one process."""
    runs, expected = {}, {}
    plain = emulation.build(folder)
    for source, (check, mutants) in cases.items():
        runs[source, "unchanged"] = f"{check}:{plain}"
        expected[source, "unchanged"] = SURVIVED
        for name, change in mutants.items():
            runs[source, name] = f"{check}:{emulation.build(folder, {source: change})}"
            expected[source, name] = CAUGHT
    _assert_codes(runs, expected)


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


def assert_switched_caught(check, mutants, folder):
    """``assert_caught`` for a source that takes long to compile: all mutants in one module.

    Args:
        check, folder: as of ``assert_caught``.
        mutants: name -> (file in csrc/, old, new), both expressions or both statements, which end
            in a semicolon; or a new piece that asks for MUTANT itself.
    """
    texts = {}
    for number, (file, old, new) in enumerate(mutants.values(), 1):
        text = texts.get(file) or SWITCH + (emulation.CSRC / file).read_text()
        if text.count(old) != 1:
            raise ValueError(f"{file}: expected {old!r} once, found it {text.count(old)} times")
        here = f"pydllm_mutant() == {number}"
        if "MUTANT" in new:
            switched = new.replace("MUTANT", f"({here})")
        elif old.endswith(";"):
            switched = f"if ({here}) {{ {new} }} else {{ {old} }}"
        else:
            switched = f"({here} ? ({new}) : ({old}))"
        texts[file] = text.replace(old, switched)
    built = f"{check}:{emulation.build(folder, texts=texts)}"
    runs = {"unchanged": built}
    runs |= {name: f"{built}@{number}" for number, name in enumerate(mutants, 1)}
    _assert_codes(runs, {"unchanged": SURVIVED} | dict.fromkeys(mutants, CAUGHT))


def _assert_codes(runs, expected):
    """Run ``case -> check:module`` and compare how each ended."""
    command = [sys.executable, "-c", RUN, str(ROOT), *runs.values()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    codes = dict(zip(runs, done.stdout.split(), strict=True))
    wrong = {case: code for case, code in codes.items() if code != expected[case]}
    assert not wrong, f"{wrong}\n{done.stderr[-4000:]}"
