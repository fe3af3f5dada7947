"""What a perfectly trained model would do on the task: ``python -m training.oracle``.

A design of the task takes seconds to judge this way, and an hour by training. All solutions of a
problem are enumerated and equally likely, so the marginals given what stands are exact. Noise on
the logits, fixed for a problem, breaks ties as a network's preferences do. The oracle works sums
out at once, so it is an upper bound for speed. The accuracy that a decoder loses here is lost by
filling in several tokens at once, and by nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import click
import torch
from torch import Tensor

from pydllm.demo.task import (
    ANSWER_LENGTH,
    FRIENDS,
    Problem,
    held_out_problems,
    is_correct,
    vocabulary,
)

MASK, EOS = range(2)
BLOCK = 24
_WORDS = {word: index for index, word in enumerate(vocabulary())}
_INVALID = 1e-6

# How many of the masks of a block to fill in, from their confidences, largest first.
Rule = Callable[[Tensor], int]


def solutions(problem: Problem) -> Tensor:
    """Every solution, as ids ``(N, ANSWER_LENGTH)`` filled up with the end of sequence."""
    words = problem.solution.split()
    places = [place for place, word in enumerate(words) if word in FRIENDS]
    turns = [FRIENDS] if problem.in_order else permutations(FRIENDS, len(places))
    ids = torch.full((ANSWER_LENGTH,), EOS)
    ids[: len(words)] = torch.tensor([_WORDS[word] for word in words])
    rows = []
    for names in turns:
        rows.append(ids.clone())
        rows[-1][places] = torch.tensor([_WORDS[name] for name in names[: len(places)]])
    return torch.stack(rows)


class Oracle:
    """The exact model of one problem; ``spread`` is the standard deviation of the logit noise."""

    def __init__(self, problem: Problem, spread: float, noise: torch.Generator) -> None:
        self.solutions = solutions(problem)
        shape = (ANSWER_LENGTH, len(_WORDS))
        self.noise = torch.randn(shape, generator=noise).mul(spread).exp()
        self._known: dict[bytes, tuple[Tensor, Tensor]] = {}

    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The most probable token of each position of ``ids (L,)``, and its probability.

        If no solution agrees with all that stands, those that agree with most of it count.
        """
        key = ids.numpy().tobytes()
        if key not in self._known:
            agree = ((self.solutions == ids) & (ids != MASK)).sum(1)
            valid = self.solutions[agree == agree.max()]
            mass = torch.full_like(self.noise, _INVALID)
            mass.scatter_add_(1, valid.T, torch.full(valid.T.shape, 1 / len(valid)))
            mass *= self.noise
            confidence, tokens = (mass / mass.sum(1, keepdim=True)).max(1)
            self._known[key] = tokens, confidence
        return self._known[key]


def static(tokens: int) -> Rule:
    return lambda confidences: tokens


def threshold(limit: float) -> Rule:
    return lambda confidences: max(1, int((confidences > limit).sum()))


def _filled(ids: Tensor, block: slice, oracle: Oracle, state: Tensor, rule: Rule) -> Tensor:
    """``ids`` after a step that goes by the marginals of ``state``."""
    tokens, confidence = oracle(state)
    masks = (ids[block] == MASK).nonzero()[:, 0] + block.start
    order = confidence[masks].argsort(descending=True, stable=True)
    chosen = masks[order][: rule(confidence[masks][order])]
    return ids.index_copy(0, chosen, tokens[chosen])


def decode(oracle: Oracle, rule: Rule, drafts: int = 0) -> tuple[Tensor, int]:
    """Decode block by block; returns ids ``(L,)`` and the number of forwards.

    ``drafts`` is how many further steps FreeDave guesses from one forward's marginals; the next
    forward keeps those that the rule would have taken as well.
    """
    ids, forwards = torch.full((ANSWER_LENGTH,), MASK), 0
    for start in range(0, ANSWER_LENGTH, BLOCK):
        block = slice(start, start + BLOCK)
        if EOS in ids[:start]:
            ids[block] = EOS
            continue
        state, forwards = ids, forwards + 1
        while MASK in ids[block]:
            ids = _filled(ids, block, oracle, state, rule)  # the forward of state pays for it
            chain = [ids]
            while len(chain) <= drafts and MASK in chain[-1][block]:
                chain.append(_filled(chain[-1], block, oracle, state, rule))
            if MASK not in ids[block]:
                break
            forwards += 1
            for draft in chain[1:]:
                if not torch.equal(draft, _filled(ids, block, oracle, ids, rule)):
                    break
                ids = draft
            state = ids
    return ids, forwards


DECODERS: dict[str, tuple[Rule, int]] = {
    "Static(1)": (static(1), 0),
    "Static(2)": (static(2), 0),
    "Static(4)": (static(4), 0),
    "Threshold(0.9)": (threshold(0.9), 0),
    "FreeDave(8)": (static(1), 8),
}


def measure(
    problems: list[Problem], rule: Rule, drafts: int = 0, spread: float = 0.05
) -> tuple[float, float, float]:
    """Percent right, mean forwards, and mean tokens (up to the end of sequence) per forward."""
    noise, words = torch.Generator().manual_seed(0), list(_WORDS)
    right, nfe, rates = 0, 0, 0.0
    for problem in problems:
        ids, forwards = decode(Oracle(problem, spread, noise), rule, drafts)
        written = [words[i] for i in ids.tolist() if i != EOS]
        right += is_correct(problem, " ".join(written))
        nfe += forwards
        rates += (len(written) + 1) / forwards
    count = len(problems)
    return 100 * right / count, nfe / count, rates / count


@click.command()
@click.option("--problems", default=100, show_default=True, type=click.IntRange(1))
@click.option("--spread", default=0.05, show_default=True, help="Of the noise on the logits.")
def main(problems: int, spread: float) -> None:
    """Print what each decoder would get right and how many forwards it would take."""
    tasks = held_out_problems(problems)
    for name, (rule, drafts) in DECODERS.items():
        right, forwards, rate = measure(tasks, rule, drafts, spread)
        click.echo(f"{name:15} {right:5.1f} %  {forwards:5.2f} forwards  {rate:5.2f} tokens each")


if __name__ == "__main__":
    main()
