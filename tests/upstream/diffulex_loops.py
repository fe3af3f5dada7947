"""Diffulex' multi-block decoding of SDAR (MultiBD) against ``MultiBlock(compat="diffulex")``.

Its request, blocks, sampler and the scheduler's bookkeeping are run as they are; the model is a
plain forward of all tokens, in place of the paged cache and the batch.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

import pydllm
from tests.integrations.tiny import EOS, MASK
from tests.upstream.compare import Case, Loop, Result
from tests.upstream.family_loops import ENDS, draw_batch, ended
from tests.upstream.models import LIMIT, Endless, trios
from tests.upstream.sources import Checkouts

BLOCK = 4
# What the files import of the engine, and of a package that is not needed for what runs here.
NAMES: dict[str, dict[str, Any]] = {
    "diffulex.config": {"Config": object, "DecodingThresholds": SimpleNamespace},
    "diffulex.sampling_params": {"SamplingParams": SimpleNamespace},
    "diffulex.attention": {"fetch_attn_metadata": None},
    "diffulex.attention.metadata": {"is_warming_up": lambda: False},
    "diffulex.engine.kv_cache_manager": {"AutoKVCacheManager": object},
    "diffulex.logger": {"get_logger": lambda name: SimpleNamespace(debug=lambda *a: None)},
    "diffulex.profiling": {"record_function": lambda name: contextlib.nullcontext()},
    "easydict": {"EasyDict": dict},
}


class Decoder:
    """The classes of a checkout, and one sequence decoded by them."""

    def __init__(self, checkouts: Checkouts) -> None:
        root = checkouts.root("Diffulex")
        names = ("sampler.sdar", "engine.scheduler", "engine.request")
        with _engine():
            sdar, scheduler, request = checkouts.package(
                root, *(f"diffulex.{name}" for name in names), bare=True
            )
            self.sampler = sdar.SDARSampler()
        self.scheduler, self.request = scheduler.SchedulerBase, request.DllmReq

    def run(
        self, plain: Any, prompt: list[int], option: dict[str, Any]
    ) -> tuple[list[int], int | None]:
        """New tokens, and forwards until the blocks of the first ``new`` are complete.

        Blocks are opened past that length, too, until there is an EOS, wherever it is. Then all
        that are open are completed, and the forwards are None.
        """
        limits = {"temperature": 0.0, "max_tokens": 10**6, "max_nfe": 10**6}
        limits |= {"max_repetition_run": None, "ignore_eos": False}
        request = self.request(prompt, SimpleNamespace(**limits))
        thresholds = SimpleNamespace(
            add_block_threshold=option["add_at"],
            semi_complete_threshold=option["full_at"],
            token_stability_threshold=0.0,
        )
        config = SimpleNamespace(
            block_size=BLOCK,
            buffer_size=option["buffer"],
            mask_token_id=MASK,
            decoding_thresholds=thresholds,
            eos=EOS,
            max_model_len=10**6,
        )
        request.init_multi_block(config)
        request.make_pending()
        freed = SimpleNamespace(free=lambda request: None)
        server = SimpleNamespace(
            kv_cache_manager=freed,
            running_reqs=[],
            apply_block_writes_map=lambda *given: self.scheduler.apply_block_writes_map(
                server, *given
            ),
            _logger=SimpleNamespace(debug=lambda *given: None),
        )
        end = len(prompt) + option["new"]
        stop = end + -end % BLOCK
        while not request.is_finished:
            request.step()
            prefills = request.is_prefilling
            first = (
                request.contiguous_in_cache_prefix_len if prefills else request.running_seq_start
            )
            size = len(request.running_sequence)
            logits = plain(torch.tensor(request.token_ids[: first + size]), block=BLOCK)[1][first:]
            facts = SimpleNamespace(is_prefill=[prefills], cu_seqlens_q=[0, size])
            self.sampler.fetch_attn_metadata = lambda facts=facts: facts
            zero, limit = torch.zeros(1), option["threshold"]
            output = self.sampler([request], logits, zero, threshold=limit)
            self.scheduler.postprocess(server, [request], output)
            known = request.token_ids[:stop]
            ended = EOS in request.token_ids[len(prompt) :]
            if len(known) == stop and MASK not in known and not ended:
                break
            if request.nfe > LIMIT:
                raise Endless(f"{LIMIT} forwards")
        made = request.token_ids[len(prompt) :]
        # A prompt of whole blocks is stored by a forward of its own there.
        return made, None if EOS in made else request.nfe - (len(prompt) % BLOCK == 0)


@contextlib.contextmanager
def _engine() -> Iterator[None]:
    before = set(sys.modules)
    for name, others in NAMES.items():
        module = ModuleType(name)
        vars(module).update(others)
        sys.modules.setdefault(name, module)
    try:
        yield
    finally:
        for name in set(sys.modules) - before:
            if name.startswith("diffulex") or name in NAMES:
                del sys.modules[name]


def load_diffulex(checkouts: Checkouts) -> dict[str, Loop]:
    decoder = Decoder(checkouts)
    make = trios("sdar", None, num_hidden_layers=2, block_size=BLOCK, **ENDS)

    def draw(rng: random.Random) -> Case:
        case = draw_batch(rng, make, new=rng.choice([5, 12, 24]))
        case.options["option"] = {
            "threshold": rng.choice([0.05, 0.1, 0.3, 0.6, 0.95]),
            "add_at": rng.choice([0.0, 0.1, 0.25, 0.5, 1.0]),
            "full_at": rng.choice([0.25, 0.5, 0.9, 1.0]),
            "buffer": rng.choice([1, 2, 4]),
        }
        return case

    def run_original(case: Case) -> Result:
        new, rows, forwards = case.options["new"], [], []
        for prompt in case.options["prompts"]:
            tokens, count = decoder.run(
                case.trio.plain, prompt, case.options["option"] | {"new": new}
            )
            rows.append(ended(tokens, new))
            forwards.append(count)
        known = [count for count in forwards if count is not None]
        whole = len(known) == len(forwards)
        return Result(torch.tensor(rows), sum(known) if whole else None)

    def run_ours(case: Case) -> Result:
        new, prompts = case.options["new"], case.options["prompts"]
        algorithm = pydllm.MultiBlock(
            block_length=BLOCK,
            score="confidence",
            forced="ready",
            compat="diffulex",
            **case.options["option"],
        )
        got = pydllm.generate(case.trio.own, prompts, algorithm, max_new_tokens=new)
        rows = [row[len(p) :].tolist() for row, p in zip(got.sequences, prompts, strict=True)]
        return Result(torch.tensor([ended(row, new) for row in rows]), int(got.nfe.sum()))

    return {"MultiBD": Loop(draw, run_original, run_ours)}
