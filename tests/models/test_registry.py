"""A family and an algorithm of another package: found on PYTHONPATH, used as ours are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pydllm
from pydllm.models.families import REGISTERED
from tests.models.plain import LLADA, random_plain, write_checkpoint

REPOSITORY = Path(__file__).parents[2]
FAMILY = """
from dataclasses import replace

import pydllm
from pydllm.models.families import FAMILIES

names = replace(FAMILIES["LLaDAModelLM"].names, embedding="toy.embed", head="toy.head")
pydllm.register_family("ToyDiffusion*", "LLaDAModelLM", names=names)
"""
# One token per forward, from left to right: the rule is LeftToRight's, the code is the package's.
ALGORITHM = """
from dataclasses import dataclass

import torch

from pydllm import ops
from pydllm.decoding.driver import Algorithm, Decoder, Plan
from pydllm.decoding.state import Selection, State, Window
from pydllm.decoding.step import busy, forward, statistics, write


@dataclass(frozen=True, kw_only=True)
class Toy(Algorithm, Decoder):
    def check(self, model, max_new_tokens):
        pass

    def decoder(self, call):
        return self

    def begin(self, call, prompts):
        cache = call.runner.cache("cache", call.model, len(prompts), 0)
        return State.begin(call, prompts, cache), None

    def plan(self, state, counts):
        return Plan((state.call.whole_width(state.live_prompts),))

    def step(self, state, plan):
        zero, width = torch.zeros_like(state.end), plan.key[0]
        window = Window.make(zero, state.end, state.end, width=width)
        region = Selection(state.prompt_length, state.end - state.prompt_length, width)
        stats = statistics(
            state, forward(state, window), zero, region, suppress_ids=state.call.suppress_ids
        )
        ending = ops.Ending(state.done, state.end, state.call.eos)
        write(state, stats, region, self.accept, ending=ending)
        return busy(state, zero), None

    def accept(self, stats):
        quota = torch.ones_like(stats.token[:, 0], dtype=torch.int32)
        return stats.prob, {"rule": "left_to_right", "quota": quota}
"""
PROGRAM = """
import sys
import pydllm
import toy_diffusion
from toy_diffusion.algorithm import Toy

model = pydllm.load(sys.argv[1])
got = pydllm.generate(model, [[1, 2, 3], [4, 5, 6, 7, 8]], Toy(), max_new_tokens=6)
print([ids.tolist() for ids in got.sequences], got.nfe.tolist())
"""


def test_a_package_on_the_path(tmp_path):
    package = tmp_path / "site" / "toy_diffusion"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAMILY)
    (package / "algorithm.py").write_text(ALGORITHM)
    plain = random_plain(LLADA, dtype=torch.float32)
    write_checkpoint(tmp_path / "known", plain)
    model = pydllm.load(tmp_path / "known")
    expected = pydllm.generate(
        model, [[1, 2, 3], [4, 5, 6, 7, 8]], pydllm.LeftToRight(), max_new_tokens=6
    )

    renamed = {"model.transformer.wte": "toy.embed", "model.transformer.ff_out": "toy.head"}
    plain.weights = {
        f"{renamed.get(name.removesuffix('.weight'), name.removesuffix('.weight'))}.weight": tensor
        for name, tensor in plain.weights.items()
    }
    plain.config = plain.config | {"architectures": ["ToyDiffusionLM"]}
    write_checkpoint(tmp_path / "toy", plain)
    with pytest.raises(pydllm.CheckpointError, match="expected one of .*, found 'ToyDiffusionLM'"):
        pydllm.load(tmp_path / "toy")

    path = os.pathsep.join((str(tmp_path / "site"), str(REPOSITORY)))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "toy")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sequences = [ids.tolist() for ids in expected.sequences]
    assert done.stdout.strip() == f"{sequences} {expected.nfe.tolist()}"


@pytest.mark.parametrize(
    ("architecture", "like", "changes", "error", "message"),
    [
        (3, "LlamaForCausalLM", {}, TypeError, "architecture: expected a class name, got 3"),
        ("LLaDAModelLM", "LlamaForCausalLM", {}, ValueError, "not known, got 'LLaDAModelLM'"),
        ("NewLM", "NoSuchLM", {}, ValueError, "like: expected one of .*, got 'NoSuchLM'"),
        ("NewLM", "LlamaForCausalLM", {"atention": "full"}, TypeError, "atention: expected one of"),
    ],
)
def test_bad_arguments(architecture, like, changes, error, message):
    with pytest.raises(error, match=message):
        pydllm.register_family(architecture, like, **changes)
    assert not REGISTERED
