"""S2D2's loop for SDAR, every block verified token by token, against the autoregressive answer.

Its acceptance draws a random number for greedy tokens as well. With distributions that have all
their mass at the arg-max the draw decides nothing: what is left is autoregressive decoding.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import pydllm
from tests.integrations.tiny import EOS, MASK
from tests.models.plain import Plain
from tests.upstream.compare import Case, Loop, Result
from tests.upstream.family_loops import ENDS, answers, draw_batch, ended
from tests.upstream.models import trios
from tests.upstream.sources import Checkouts

BLOCK = 4


class Kept:
    """Keys and values of what was stored."""

    def __init__(self) -> None:
        self.layers: Any = None

    def get_seq_length(self) -> int:
        return len(self.layers[0][0]) if self.layers else 0


class Model:
    """A plain forward under the mask and at the positions that the loop asks for."""

    device = torch.device("cpu")

    def __init__(self, plain: Plain) -> None:
        self.plain = plain

    def eval(self) -> None:
        pass

    def __call__(
        self,
        ids: Tensor,
        *,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Kept,
        use_cache: bool,
        store_kv: bool,
    ) -> SimpleNamespace:
        stored = past_key_values.get_seq_length()
        seen = attention_mask.flatten(0, -3)[0] > 0
        if not seen[:, :stored].all():
            raise RuntimeError("expected rows that see all that is stored")
        old = past_key_values.layers
        own = {"at": position_ids[0], "seen": seen[:, stored:]}
        _, logits, made = self.plain(ids[0], frozen=old, **own)
        if store_kv:
            pairs = zip(old, made, strict=True) if old else ()
            joined = [tuple(map(torch.cat, zip(*pair, strict=True))) for pair in pairs]
            past_key_values.layers = joined or made
        return SimpleNamespace(logits=logits[None])


def one_hot(logits: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """In the place of a softmax: all mass at the arg-max."""
    best = logits.argmax(dim, keepdim=True)
    return torch.zeros_like(logits, dtype=dtype).scatter(dim, best, 1.0)


def load_s2d2(checkouts: Checkouts) -> dict[str, Loop]:
    path = checkouts.root("S2D2", "SDAR") / "generate_ssd_policy.py"
    others = {"F": SimpleNamespace(softmax=one_hot), "DynamicCache": Kept}
    loop = checkouts.functions(path, **others)["block_diffusion_generate"]
    make = trios("sdar", None, num_hidden_layers=2, block_size=BLOCK, silent=(MASK,), **ENDS)

    def draw(rng: random.Random) -> Case:
        case = draw_batch(rng, make, new=rng.randrange(1, 22))
        case.trio.own.spec = pydllm.models.ModelSpec(
            **{**vars(case.trio.own.spec), "causal": "masked"}
        )
        case.options["drafts"] = rng.choice([1, 3, 8])
        return case

    def run_original(case: Case) -> Result:
        new, rows = case.options["new"], []
        for prompt in case.options["prompts"]:
            x = loop(
                Model(case.trio.plain),
                torch.tensor([prompt]),
                mask_id=MASK,
                gen_length=new,
                block_length=BLOCK,
                denoising_steps=BLOCK,
                stopping_criteria_idx=[EOS],
                cache_ver=True,
            )
            rows.append(ended(x[0, len(prompt) :].tolist(), new))
        return Result(torch.tensor(rows))

    def own(algorithm: Callable[[Case], Any]) -> Callable[[Case], Result]:
        return lambda case: Result(answers(case, algorithm(case)).tokens)

    def speculative(align: bool) -> Callable[[Case], Any]:
        return lambda case: pydllm.SelfSpeculative(drafts=case.options["drafts"], align=align)

    return {
        "Autoregressive": Loop(draw, run_original, own(lambda case: pydllm.Autoregressive())),
        "SelfSpeculative": Loop(draw, run_original, own(speculative(False))),
        "SelfSpeculative(align=True)": Loop(draw, run_original, own(speculative(True))),
    }
