"""Decode held-out problems with an algorithm and count what came out right."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from pydllm.decoding import (
    APD,
    Autoregressive,
    EntropyBound,
    Factor,
    FreeDave,
    Generation,
    LeftToRight,
    MultiBlock,
    SelfSpeculative,
    Static,
    Threshold,
    generate,
)
from pydllm.decoding.driver import Algorithm
from pydllm.demo.task import ANSWER_LENGTH, Problem, is_correct
from pydllm.models import Model

# The block length that each bundled model is decoded with; 8 is that of the model's attention.
BLOCKS = {"llada-tiny": 24, "dream-tiny": 24, "sdar-tiny": 8, "llada2-tiny": 8, "dual-tiny": 8}


@dataclass(frozen=True)
class Score:
    """One line of the demo's table.

    Attributes:
        model: name of the bundled model.
        algorithm: the algorithm with the parameters that differ from its defaults.
        exact_percent: problems whose whole solution is right, in percent.
        forwards: mean forwards of the model a problem.
        tokens_per_forward: mean over problems, tokens up to and including the end of sequence.
        tokens_per_second: those tokens over the wall time of the whole batch.
        equal_percent: problems whose tokens are those of the line that this one is compared with,
            all of them, in percent: see ``reference_of``.
        tokens_per_round: mean over problems, tokens after the first per draft and verification of
            ``SelfSpeculative``, its acceptance length; None for the others.
    """

    model: str
    algorithm: str
    exact_percent: float
    forwards: float
    tokens_per_forward: float
    tokens_per_second: float
    equal_percent: float
    tokens_per_round: float | None = None

    def as_row(self) -> dict[str, str | float | None]:
        return {k: round(v, 2) if isinstance(v, float) else v for k, v in asdict(self).items()}


def algorithms(model: str, verifier: Model | None) -> dict[str, Algorithm]:
    """The algorithms that the demo runs on a bundled model, by display name. Without a verifier,
    not APD.
    """
    block = BLOCKS[model]
    chosen: dict[str, Algorithm] = {
        "Static, 1 per step": Static(block_length=block),
        "Static, 2 per step": Static(block_length=block, tokens_per_step=2),
        "Static, 4 per step": Static(block_length=block, tokens_per_step=4),
        f"Static, {block} per step": Static(block_length=block, tokens_per_step=block),
        "Threshold 0.9": Threshold(threshold=0.9, block_length=block),
        "Threshold 0.6": Threshold(threshold=0.6, block_length=block),
        "Factor 1.0": Factor(factor=1.0, block_length=block),
        "Factor 2.0": Factor(factor=2.0, block_length=block),
        "EntropyBound 0.1": EntropyBound(bound=0.1, block_length=block),
        "EntropyBound 0.5": EntropyBound(bound=0.5, block_length=block),
        "FreeDave, 4 drafts": FreeDave(draft_steps=4, block_length=block),
        "FreeDave, 8 drafts": FreeDave(draft_steps=8, block_length=block),
    }
    if model == "dual-tiny":
        return chosen | {
            "Autoregressive": Autoregressive(),
            **{f"SelfSpeculative, {n}": SelfSpeculative(drafts=n) for n in (3, 7, 15)},
            **{
                f"SelfSpeculative 1, {n}": SelfSpeculative(drafts=n, forwards=1) for n in (3, 7, 15)
            },
        }
    if model in ("sdar-tiny", "llada2-tiny"):
        return chosen | {
            f"FreeDave pipelined, {n}": FreeDave(
                draft_steps=n, block_length=block, mode="pipelined"
            )
            for n in (4, 8)
        }
    return chosen | {
        "Static, dual cache": Static(block_length=block, cache="dual"),
        "Threshold 0.9, dual cache": Threshold(threshold=0.9, block_length=block, cache="dual"),
        "LeftToRight, 2 per step": LeftToRight(tokens_per_step=2),
        **(
            {}
            if verifier is None
            else {f"APD, mixture {r}": APD(verifier, mixture=r) for r in (0.5, 0.7, 0.9)}
        ),
        "MultiBlock, entropy 0.1": MultiBlock(threshold=0.1, block_length=block),
        "MultiBlock, entropy 0.5": MultiBlock(threshold=0.5, block_length=block),
    }


def reference_of(plan: dict[str, Algorithm], name: str) -> str:
    """The algorithm of a plan whose tokens those of another are compared with: ``Autoregressive``
    for ``SelfSpeculative``, if the plan has it, else the first.
    """
    first = next(iter(plan))
    if not isinstance(plan[name], SelfSpeculative):
        return first
    return next((key for key, other in plan.items() if isinstance(other, Autoregressive)), first)


def evaluate(
    model: Model,
    names: tuple[str, str],
    algorithm: Algorithm,
    problems: list[Problem],
    *,
    reference: list[Tensor] | None = None,
    batch_size: int = 100,
    backend: str | None = None,
    on_batch: Callable[[int], None] = lambda size: None,
) -> tuple[Score, Generation, list[Tensor]]:
    """Decode the problems in batches; ``reference`` are the sequences to compare with, ``names``
    the model's and the algorithm's.

    Returns the score, the first batch's generation, and all sequences.
    """
    started = time.perf_counter()
    generations = []
    for first in range(0, len(problems), batch_size):
        batch = problems[first : first + batch_size]
        prompts = [problem.prompt for problem in batch]
        generations.append(
            generate(model, prompts, algorithm, max_new_tokens=ANSWER_LENGTH, backend=backend)
        )
        generations[-1].expect_complete()
        on_batch(len(batch))
    seconds = time.perf_counter() - started
    texts = [text for generation in generations for text in generation.text or ()]
    right = sum(is_correct(problem, text) for problem, text in zip(problems, texts, strict=True))
    sequences = [sequence for generation in generations for sequence in generation.sequences]
    nfe = torch.cat([generation.nfe for generation in generations]).float()
    per_forward = torch.cat([generation.tokens_per_forward for generation in generations])
    score = Score(
        model=names[0],
        algorithm=names[1],
        exact_percent=100 * right / len(problems),
        forwards=nfe.mean().item(),
        tokens_per_forward=per_forward.mean().item(),
        tokens_per_second=(per_forward * nfe).sum().item() / seconds,
        equal_percent=100
        * sum(map(torch.equal, sequences, reference or sequences))
        / len(problems),
        tokens_per_round=_tokens_per_round(generations),
    )
    return score, generations[0], sequences


def _tokens_per_round(generations: list[Generation]) -> float | None:
    rounds = [generation.rounds for generation in generations if generation.rounds is not None]
    if not rounds:
        return None
    tokens = [len(new) - 1 for generation in generations for new in generation.new_tokens]
    # An answer that the prompt's forward ended has no round.
    return (torch.tensor(tokens) / torch.cat(rounds).cpu().clamp(min=1)).mean().item()
