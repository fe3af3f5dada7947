"""SGLang's JointThreshold and JointThresholdInDel, their own loop around them, against the ops step
by step and against the decoders.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import pydllm
from pydllm import ops
from tests.integrations.tiny import EOS, MASK
from tests.upstream.compare import Case, Loop, Result
from tests.upstream.family_loops import ENDS, answers, draw_batch, ended
from tests.upstream.models import trios
from tests.upstream.sources import Checkouts

BLOCK, DELETE, SPLIT = 4, 7, 8
ROWS, VOCAB = 8, 14
IDS = {"mask_id": 3, "delete_id": 9, "split_id": 5}  # of the blocks without a model
# What the files import of a server: names that stand for types, and a question about the device.
NAMES = {
    "sglang.srt.dllm.algorithm": ("get_algorithm",),
    "sglang.srt.dllm.config": ("DllmConfig",),
    "sglang.srt.layers.logits_processor": ("LogitsProcessorOutput",),
    "sglang.srt.model_executor.forward_batch_info": ("ForwardBatch",),
    "sglang.srt.model_executor.model_runner": ("ModelRunner",),
    "sglang.srt.server_args": ("ServerArgs",),
    "sglang.srt.utils": (),
}
Logits = Callable[[Tensor], Tensor]  # of the blocks ``(B, T)`` as they stand


def load_sglang(checkouts: Checkouts) -> dict[str, Loop]:
    names = ("joint_threshold", "joint_threshold_indel")
    root = checkouts.root("sglang", "python")
    with _server(root):
        joint, indel = checkouts.package(
            root,
            *(f"sglang.srt.dllm.algorithm.{name}" for name in names),
            bare=True,
        )
    kinds = {"JointThreshold": joint.Algorithm, "JointThresholdInDel": indel.Algorithm}
    loops = {}
    for name, kind in kinds.items():
        loops[f"{name}, every step"] = _steps(kind, name == "JointThresholdInDel")
        loops[name] = _answers(kind, name == "JointThresholdInDel")
    return loops


@contextlib.contextmanager
def _server(root: Path) -> Iterator[None]:
    """Modules with ``NAMES`` while the files are imported."""
    before = dict(sys.modules)
    for name, others in NAMES.items():
        module = ModuleType(name)
        vars(module).update(dict.fromkeys(others, SimpleNamespace), is_npu=lambda: False)
        module.__path__ = [str(root.joinpath(*name.split(".")))]
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in set(sys.modules) - set(before):
            if name.startswith("sglang"):
                del sys.modules[name]


class Runner:
    """The server's model: logits of the batch's blocks; keeps what each forward was given."""

    def __init__(self, logits: Logits, size: int) -> None:
        self.logits, self.size = logits, size
        self.seen: list[Tensor] = []

    def forward(self, batch: SimpleNamespace, **_: Any) -> SimpleNamespace:
        x = batch.input_ids.view(-1, self.size)
        self.seen.append(x.clone())
        output = SimpleNamespace(full_logits=self.logits(x).flatten(0, 1))
        return SimpleNamespace(logits_output=output, can_run_graph=False)


def decode(kind: type, x: Tensor, prompt: Tensor, runner: Runner, option: dict[str, Any]) -> Tensor:
    """Updates ``(B,)`` of each block, by SGLang's synchronous loop; ``x (B, T)`` in place."""
    states: list[dict[str, Any]] = []

    class Watched(kind):  # type: ignore[misc, valid-type]
        def init_step_state(self, batch: SimpleNamespace) -> list[dict[str, Any]]:
            states.extend(super().init_step_state(batch))
            return states

    names = {
        "threshold": option["threshold"],
        "edit_threshold": option["edit_threshold"],
        "max_post_edit_steps": option["max_post_steps"],
        "vectorized_decoding": False,
    }
    config = SimpleNamespace(
        algorithm_config=names,
        block_size=x.shape[1],
        mask_id=option["mask_id"],
        first_done_first_out_mode=False,
        delete_token_id=option.get("delete_id"),
        split_token_id=option.get("split_id"),
    )
    flat = x.flatten().clone()
    batch = SimpleNamespace(
        input_ids=flat,
        batch_size=len(x),
        dllm_prompt_mask=torch.arange(x.shape[1]) < prompt[:, None],
        mark_forward_metadata_ready=lambda **_: None,
    )
    Watched(config).run(runner, batch)
    x.copy_(flat.view_as(x))
    return torch.tensor([state.get("num_update_steps", len(runner.seen)) for state in states])


def _steps(kind: type, indel: bool) -> Loop:
    """Blocks whose logits are a function of the block, and of the step in every second case."""

    def draw(rng: random.Random) -> Case:
        blocks = rng.choice([1, 3, 5]) if indel else 1  # the others' forwards count for all
        ids = IDS if indel else {"mask_id": IDS["mask_id"]}
        option = ids | {
            "threshold": rng.choice([0.2, 0.5, 0.9]),
            "edit_threshold": rng.choice([0.0, 0.3, 0.6]),
            "max_post_steps": rng.choice([0, 1, 2, 3, 16]),
        }
        x = torch.full((blocks, ROWS), IDS["mask_id"])
        prompt = torch.tensor([rng.randrange(ROWS) for _ in range(blocks)])
        for row, count in zip(x, prompt.tolist(), strict=True):
            row[:count] = torch.tensor([rng.randrange(VOCAB) for _ in range(count)])
        seed, cyclic = rng.randrange(10**6), rng.random() < 0.5
        return Case(None, x, prompt, {"option": option, "seed": seed, "cyclic": cyclic})

    def logits(case: Case) -> Logits:
        steps = iter(range(10**6))

        def function(x: Tensor) -> Tensor:
            step, rows = next(steps), []
            for b, row in enumerate(x.tolist()):
                key = (case.options["seed"], b, *row, *(() if case.options["cyclic"] else (step,)))
                generator = torch.Generator().manual_seed(hash(key) % 2**62)
                made = torch.randn(ROWS, VOCAB, generator=generator, dtype=torch.float64)
                rows.append(3 * made)
            found = torch.stack(rows)
            if not indel:
                found[..., IDS["mask_id"]] = -torch.inf  # which is never predicted here
            return found

        return function

    def run_original(case: Case) -> Result:
        x, runner = case.prompt.clone(), Runner(logits(case), ROWS)
        decode(kind, x, case.mask, runner, case.options["option"])
        return Result(torch.stack([*runner.seen, x]))

    def run_ours(case: Case) -> Result:
        x, function, option = case.prompt.clone(), logits(case), case.options["option"]
        zero = torch.zeros(len(x), dtype=torch.int32)
        nfe, steps = zero.clone(), torch.full_like(x, -1, dtype=torch.int32)
        places = {
            "start": zero.clone(),
            "length": zero + ROWS,
            "editable_from": zero + case.mask.int(),
        }
        edits = ops.BlockEdits.make(len(x), ROWS, option["max_post_steps"])
        post, complete = zero.clone(), zero.bool()
        seen = []
        while not complete.all():
            seen.append(x.clone())
            found = function(x)
            if indel:
                changed = ops.edit_block(x, steps, nfe, edits, found, **places, **option).changed
                # A block that its last update changed has one forward more there.
                complete = edits.complete & (changed == 0)
                continue
            score, token = found.softmax(-1).max(-1)
            state = (nfe, post, complete, token, score)
            ops.edit_tokens(x, steps, *state, **places, **option, confirm=True)
        return Result(torch.stack([*seen, x]))

    return Loop(draw, run_original, run_ours)


def _answers(kind: type, indel: bool) -> Loop:
    """Whole answers of a tiny model: ours with a cache, in ragged batches."""
    silent = () if indel else (MASK,)
    make = trios("sdar", None, num_hidden_layers=2, block_size=BLOCK, silent=silent, **ENDS)

    def draw(rng: random.Random) -> Case:
        case = draw_batch(rng, make, new=rng.randrange(1, 17))
        case.options["option"] = {
            "threshold": rng.choice([0.05, 0.2, 0.5, 0.9]),
            "edit_threshold": rng.choice([0.0, 0.1, 0.3, 0.6]),
            "max_post_steps": rng.choice([0, 1, 3, 16]),
        }
        return case

    def run_original(case: Case) -> Result:
        new, rows, forwards = case.options["new"], [], 0
        option = case.options["option"] | {"mask_id": MASK}
        option |= {"delete_id": DELETE, "split_id": SPLIT} if indel else {}
        for prompt in case.options["prompts"]:
            length = len(prompt)
            x = torch.tensor(prompt + [MASK] * (new + -(length + new) % BLOCK))
            for low in range(length // BLOCK * BLOCK, len(x), BLOCK):
                own = slice(low, low + BLOCK)

                def logits(block: Tensor, x: Tensor = x, low: int = low) -> Tensor:
                    ids = torch.cat((x[:low], block[0]))
                    found = case.trio.plain(ids, block=BLOCK)[1][low:][None].clone()
                    if not indel:
                        found[..., MASK] = -torch.inf
                    return found

                block, given = x[own][None].clone(), torch.tensor([max(0, length - low)])
                forwards += int(decode(kind, block, given, Runner(logits, BLOCK), option))
                x[own] = block[0]
                if EOS in x[max(low, length) : min(low + BLOCK, length + new)]:
                    break
            rows.append(ended(x[length:].tolist(), new))
        return Result(torch.tensor(rows), forwards)

    def run_ours(case: Case) -> Result:
        option = case.options["option"]
        if not indel:
            algorithm = pydllm.Editing(block_length=BLOCK, compat="sglang", **option)
            return answers(case, algorithm)
        own = copy.copy(case.trio.own)
        own.spec = dataclasses.replace(own.spec, delete_id=DELETE, split_id=SPLIT)
        algorithm = pydllm.LevenshteinEditing(block_length=BLOCK, **option)
        trio = dataclasses.replace(case.trio, own=own)
        return answers(dataclasses.replace(case, trio=trio), algorithm)

    return Loop(draw, run_original, run_ours)
