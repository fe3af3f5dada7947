"""A decoding, token by token: which forward wrote it, and how sure the model was of it then."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pydllm.decoding import Autoregressive, Generation, SelfSpeculative
from pydllm.decoding.driver import Algorithm
from pydllm.demo.task import Problem, mistakes
from pydllm.metrics.reading import causal_rows, masked_rows
from pydllm.models import Model

_ROWS = 32  # canvases per forward


@dataclass(frozen=True)
class Run:
    """One answer of one algorithm, up to and including EOS.

    Attributes:
        name: the algorithm's.
        words: the tokens as text.
        steps: the forward that wrote each, counted from 0.
        forwards: how many the answer took.
        wrong: places of words that are wrong; None where nobody knows what is right.
        probability: what the model gave each token before the forward's tokens were written.
        entropy: of the model's distribution there, in nats. Both are None where the prompt is too
            short for the model to predict the first token.
    """

    name: str
    words: list[str]
    steps: list[int]
    forwards: int
    wrong: list[int] | None = None
    probability: list[float] | None = None
    entropy: list[float] | None = None


@dataclass(frozen=True)
class _Canvas:
    ids: Tensor  # (length,) int64
    position: Tensor  # (m,) int64, what the next forward writes


@torch.no_grad()
def replay(
    model: Model,
    generation: Generation,
    row: int,
    name: str,
    algorithm: Algorithm,
    *,
    problem: Problem | None = None,
    backend: str | None = None,
) -> Run:
    """The run of row ``row`` of what ``algorithm`` generated without guidance.

    The probability and the entropy come from a forward of the whole canvas as it stood before the
    tokens were written. A decoder that works with a cache, or on a part of the canvas, has seen
    numbers that differ from these. ``Autoregressive`` and ``SelfSpeculative`` write what a causal
    forward predicts, so theirs come from one of the answer.
    """
    answer = generation.new_tokens[row].cpu()
    prompt = generation.sequences[row].cpu()[: -generation.step_map.shape[1]]
    steps = generation.step_map[row][: len(answer)].cpu()
    words = [token_text(model, token) for token in answer.tolist()]
    wrong = None
    if problem is not None:
        text = generation.text[row] if generation.text is not None else ""
        wrong = [place for place in mistakes(problem, text) if place < len(words)]
    probability, entropy = None, None
    mask, spec = model.spec.mask_id, model.spec
    by_causal = isinstance(algorithm, Autoregressive | SelfSpeculative) and spec.causal == "shifted"
    if by_causal or spec.attention == "causal":
        rows = causal_rows(model, torch.cat((prompt, answer)), len(prompt), backend)
        probability, entropy = map(Tensor.tolist, _certainty(model, rows, answer))
    elif mask is not None and len(prompt) >= int(spec.shift_logits or spec.seeded):
        length = generation.step_map.shape[1]
        probability, entropy = _on_canvases(model, mask, prompt, answer, steps, length, backend)
    forwards = int(generation.nfe[row])
    return Run(name, words, steps.tolist(), forwards, wrong, probability, entropy)


def _certainty(model: Model, rows: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Probability of ``tokens (n,)`` and entropy, of hidden rows ``(n, hidden)``; on the CPU."""
    logits = model.head(rows).float()
    if model.spec.mask_id is not None:
        logits[:, model.spec.mask_id] = -torch.inf
    logs = F.log_softmax(logits, -1)
    probability = logs.gather(1, tokens.to(logs.device)[:, None])[:, 0].exp()
    return probability.cpu(), -(logs.exp() * logs.clamp(min=-1e4)).sum(1).cpu()


def _on_canvases(
    model: Model,
    mask: int,
    prompt: Tensor,
    answer: Tensor,
    steps: Tensor,
    length: int,
    backend: str | None,
) -> tuple[list[float], list[float]]:
    """Probability and entropy of each token of ``answer (n,)``, written at ``steps (n,)``.

    The canvas has room for ``length`` new tokens.
    """
    whole = torch.full((length,), mask)
    canvases = []
    for step in steps.unique().tolist():
        ids = whole.clone()
        ids[: len(answer)] = torch.where(steps < step, answer, mask)
        position = len(prompt) + (steps == step).nonzero()[:, 0]
        canvases.append(_Canvas(torch.cat((prompt, ids)), position))
    probability, entropy = torch.empty(len(answer)), torch.empty(len(answer))
    for first in range(0, len(canvases), _ROWS):
        some = canvases[first : first + _ROWS]
        hidden, _ = masked_rows(
            model,
            [canvas.ids for canvas in some],
            [canvas.position for canvas in some],
            [len(prompt)] * len(some),
            backend,
        )
        place = torch.cat([canvas.position for canvas in some]) - len(prompt)
        probability[place], entropy[place] = _certainty(model, hidden, answer[place])
    return probability.tolist(), entropy.tolist()


def token_text(model: Model, token: int) -> str:
    """A token as a reader sees it: without a tokenizer its id, line ends as a mark."""
    if model.tokenizer is None:
        return str(token)
    piece = model.tokenizer.id_to_token(token) or str(token)
    text = model.tokenizer.decode([token], skip_special_tokens=False).strip(" ") or piece
    return text.replace("\n", "\u21b5")
