"""Likelihoods under a masked diffusion model, for evaluations that rank given answers."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pydllm._checks import check_int, check_token_id, describe
from pydllm.metrics.reading import masked_rows
from pydllm.models import Model
from pydllm.models.protocol import expect_model
from pydllm.models.spec import ModelSpec

Pair = tuple[Sequence[int], Sequence[int]]  # token ids: what is given, what is scored
# Rows of logits that are stored at a time.
_HEAD_ROWS = 256


@dataclass(frozen=True)
class _Noised:
    """A sequence with some of a target's tokens masked, and what its loss counts."""

    pair: int
    origin: int  # tokens of the context
    ids: Tensor  # (length,) int64, masks included
    position: Tensor  # (m,) int64, the masks
    target: Tensor  # (m,) int64, what stood there
    weight: float


@torch.no_grad()
def log_likelihood(
    model: Model,
    pairs: Sequence[Pair],
    *,
    samples: int = 128,
    batch_size: int = 32,
    seed: int = 0,
    backend: str | None = None,
    on_pairs: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """A lower bound on log p(target | context), estimated with ``samples`` maskings (LLaDA,
    arXiv 2502.09992, equation 6).

    With l uniform in 1..L and l of the target's L tokens masked at random, the bound is the mean of
    ``L / l * sum(log p(token | context, the rest of the target))`` over the masked tokens. The
    numbers of masks are spread evenly over the samples from a random start, as in LLaDA's
    evaluation; equal maskings are computed once. A target of one token needs one forward and is
    exact. The mask id counts as impossible, as everywhere here (that evaluation leaves it in, where
    a trained model gives it next to nothing). With a block-causal model the target's blocks are
    scored one after the other, each given those before it, so the bound is a sum over blocks.

    Args:
        model: a masked diffusion model with full or block-causal attention.
        pairs: (context, target) token ids, of any lengths. The context may be empty, but for
            shifted and seeded models.
        samples: maskings a target (or a block of it), at least 1.
        batch_size: sequences per forward.
        seed: of the maskings, in [0, 2^63). They depend on the seed and the pair's tokens, and on
            nothing else in the call.
        backend: as in ``pydllm.ops``.
        on_pairs: called with the number of pairs that were added to the queue.

    Returns:
        ``(len(pairs),)`` fp64 on the CPU, in nats; 0 for an empty target.

    Raises:
        ValueError: a causal model, one without a mask, or tokens that do not fit it.
    """
    check_pairs(model, pairs)
    check_int("samples", samples, 1)
    check_int("batch_size", batch_size, 1)
    check_int("seed", seed, 0, 2**63 - 1)

    def queue() -> Iterator[_Noised]:
        # Neighbours in a batch are of like length, so little of it is padding.
        for index in sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i]))):
            yield from _noised(model, index, pairs[index], samples, seed)
            on_pairs(1)

    total = torch.zeros(len(pairs), dtype=torch.float64)
    rows = queue()
    while batch := list(islice(rows, batch_size)):
        hidden, index = masked_rows(
            model,
            [row.ids for row in batch],
            [row.position for row in batch],
            [row.origin for row in batch],
            backend,
        )
        target = torch.cat([row.target for row in batch]).to(model.device)
        losses = []
        for part, tokens in zip(hidden.split(_HEAD_ROWS), target.split(_HEAD_ROWS), strict=True):
            logits = model.head(part)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logits[:, _mask(model)] = -torch.inf
            losses.append(F.cross_entropy(logits, tokens, reduction="none"))
        loss = torch.cat(losses).to("cpu", torch.float64)
        weight = torch.tensor([row.weight for row in batch], dtype=torch.float64)
        pair = torch.tensor([row.pair for row in batch])
        total.index_add_(0, pair[index], -loss * weight[index])
    return total


@torch.no_grad()
def matches_greedy(
    model: Model,
    pairs: Sequence[Pair],
    *,
    batch_size: int = 32,
    backend: str | None = None,
) -> Tensor:
    """Whether decoding one token per step, the most probable first, gives exactly the target.

    The target is masked as one block (with a block-causal model in its blocks), the mask id is
    never predicted, and the lowest position wins a tie. A pair is given up at its first wrong
    token.

    Args:
        model, pairs, batch_size, backend: as in ``log_likelihood``.

    Returns:
        ``(len(pairs),)`` bool on the CPU; true for an empty target.
    """
    check_pairs(model, pairs)
    check_int("batch_size", batch_size, 1)
    agrees = torch.tensor([len(target) == 0 for _, target in pairs], dtype=torch.bool)
    order = sorted((i for i in range(len(pairs)) if pairs[i][1]), key=lambda i: -len(pairs[i][1]))
    for first in range(0, len(order), batch_size):
        live = [_Guess(model, i, pairs[i]) for i in order[first : first + batch_size]]
        while live:
            live = _advance(model, live, agrees, backend)
    return agrees


class _Guess:
    """A target that greedy decoding has reached in part."""

    def __init__(self, model: Model, pair: int, tokens: Pair) -> None:
        self.pair, self.first = pair, len(tokens[0])
        self.whole = torch.tensor([*tokens[0], *tokens[1]], dtype=torch.int64)
        self.ids = self.whole.clone()
        self.hidden = list(range(self.first, len(self.whole)))  # positions
        self.ids[self.first :] = _mask(model)
        self._spec = model.spec

    @property
    def end(self) -> int:
        """Where the block of the first mask ends."""
        return _block_end(self._spec, self.first, self.hidden[0], len(self.ids))

    @property
    def position(self) -> Tensor:
        """The masks that may be written next."""
        hidden = [place for place in self.hidden if place < self.end]
        if self._spec.context == "causal" and self._spec.seeded and hidden[0] > 0:
            begins = _block_end(self._spec, self.first, hidden[0] - 1, len(self.ids))
            hidden = hidden[:1] if begins == hidden[0] else hidden  # seeded before all others
        return torch.tensor(hidden, dtype=torch.int64)


def _advance(model: Model, live: list[_Guess], agrees: Tensor, backend: str | None) -> list[_Guess]:
    """Write one token of each; those that go on."""
    hidden, index = masked_rows(
        model,
        [guess.ids[: guess.end] for guess in live],
        [guess.position for guess in live],
        [guess.first for guess in live],
        backend,
    )
    suppress_ids = torch.tensor([_mask(model)], dtype=torch.int32, device=model.device)
    stats = model.head_stats(hidden, suppress_ids=suppress_ids, backend=backend)
    probability, token = stats.prob.cpu(), stats.token.cpu()
    left = []
    for row, guess in enumerate(live):
        mine = (index == row).nonzero()[:, 0]
        chance = probability[mine]
        best = int((chance == chance.max()).nonzero()[0])
        place = int(guess.position[best])
        if token[mine[best]] != guess.whole[place]:
            continue
        guess.ids[place] = guess.whole[place]
        guess.hidden.remove(place)
        if guess.hidden:
            left.append(guess)
        else:
            agrees[guess.pair] = True
    return left


def _noised(model: Model, index: int, tokens: Pair, samples: int, seed: int) -> Iterator[_Noised]:
    context, target = (torch.tensor(list(part), dtype=torch.int64) for part in tokens)
    whole = torch.cat((context, target))
    digest = zlib.crc32(whole.numpy().tobytes(), len(context))
    generator = torch.Generator().manual_seed(seed ^ (digest << 20))
    first = len(context)
    while first < len(whole):
        end = _block_end(model.spec, len(context), first, len(whole))
        length = end - first
        for masked, repeats in zip(*_patterns(length, samples, generator), strict=True):
            position = first + masked.nonzero()[:, 0]
            ids = whole[:end].clone()
            ids[position] = _mask(model)
            weight = repeats.item() * length / (samples * len(position))
            yield _Noised(index, len(context), ids, position, whole[position], weight)
        first = end


def _patterns(length: int, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The different maskings ``(n, length)`` bool that were drawn, and how often each was."""
    if length == 1:  # every draw is the same one
        return torch.ones(1, 1, dtype=torch.bool), torch.tensor([samples])
    start = torch.randint(length, (1,), generator=generator)
    count = (start + torch.arange(samples) * length // samples) % length + 1
    rank = torch.rand(samples, length, generator=generator).argsort(1).argsort(1)
    return torch.unique(rank < count[:, None], dim=0, return_counts=True)


def _block_end(spec: ModelSpec, context: int, place: int, length: int) -> int:
    """The end of the block that position ``place`` is in, at most ``length``."""
    if spec.block_size is None:
        return length
    origin = context if spec.block_origin == "prompt" else 0
    return min(length, place + spec.block_size - (place - origin) % spec.block_size)


def _mask(model: Model) -> int:
    if model.spec.mask_id is None:
        raise ValueError("model: expected a masked diffusion model, got one without a mask id")
    return model.spec.mask_id


def check_pairs(model: Model, pairs: Any) -> None:
    """Raise TypeError or ValueError unless the model can score the pairs."""
    expect_model(model)
    spec = model.spec
    _mask(model)
    if spec.attention == "causal":
        raise ValueError("model: expected full or block-causal attention, got 'causal'")
    if not isinstance(pairs, Sequence) or isinstance(pairs, str):
        raise TypeError(f"pairs: expected a list of pairs, got {describe(pairs)}")
    for row, pair in enumerate(pairs):
        if not isinstance(pair, Sequence) or [isinstance(p, Sequence) for p in pair] != [True] * 2:
            raise TypeError(
                f"pairs[{row}]: expected (context, target), two lists of token ids, "
                f"got {describe(pair)}"
            )
        context, target = pair
        for token in (*context, *target):
            check_token_id(f"pairs[{row}]", token)
            if not 0 <= token < spec.vocab_size:
                raise ValueError(
                    f"pairs[{row}]: expected token ids in [0, {spec.vocab_size}), got {token}"
                )
            if token == spec.mask_id:
                raise ValueError(f"pairs[{row}]: expected no mask, got the mask id {token}")
        if (spec.shift_logits or spec.seeded) and not context:
            raise ValueError(
                f"pairs[{row}]: expected a context of at least one token (position i is predicted "
                "from i - 1), got none"
            )
        length = len(context) + len(target)
        if spec.max_positions is not None and length > spec.max_positions:
            raise ValueError(
                f"pairs[{row}]: expected at most {spec.max_positions} tokens, got {length}"
            )
