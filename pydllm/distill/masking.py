"""Which tokens of a trajectory are masked: windows, mask ratios, and how both change."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pydllm.distill.trajectories import Trajectories


def least_ratio(progress: float, ratios: tuple[float, float]) -> float:
    """Lower end of the mask ratios: from the first of ``ratios`` up to the second.

    ``progress`` is the part of the training that is done: 0 in its first step, 1 in its last.
    """
    low, high = ratios
    return low + (high - low) * progress


def window_length(epoch: float, lengths: Sequence[int]) -> int:
    """Tokens of a window: from ``lengths[e]`` to ``lengths[e + 1]`` in epoch e, the last constant.

    ``epoch`` counts epochs that are done, with a fraction; the result is truncated to an integer.
    """
    first = min(int(epoch), len(lengths) - 1)
    second = min(first + 1, len(lengths) - 1)
    return int(lengths[first] + (lengths[second] - lengths[first]) * (epoch - first))


@dataclass(frozen=True)
class Window:
    """Where a sample is noisy: answer positions ``[start, end)``, ``clean`` steps into the
    trajectory."""

    start: int
    end: int
    clean: int


def draw_window(rng: random.Random, answer: int, length: int, ratio: float) -> Window:
    """A window of ``length`` (the last one may be shorter), uniformly among those of the answer.

    ``clean`` is how many answer tokens the trajectory has written when the window is taken: those
    before the window, and ``int((1 - ratio) * window)`` more. Where windows and the teacher's
    blocks begin together, exactly ``window - int((1 - ratio) * window)`` of its tokens are masks.
    """
    start = length * rng.randrange(-(-answer // length))
    end = min(start + length, answer)
    return Window(start, end, start + int((1 - ratio) * (end - start)))


@dataclass(frozen=True)
class Noisy:
    """A batch to train on; ``(B, S)`` each, ``S`` the longest sequence.

    Attributes:
        clean: int64, the targets.
        noisy: int64: clean before the window, masks after it, in it what the teacher had by then.
        complement: int64, the same with the window's masks exchanged for its clean tokens.
        masked: bool, window positions that are masks in ``noisy``: those that carry its loss.
        unmasked: bool, the window's others: those that carry the loss of ``complement``.
        lengths: ``(B,)`` int64, positions in use.
    """

    clean: Tensor
    noisy: Tensor
    complement: Tensor
    masked: Tensor
    unmasked: Tensor
    lengths: Tensor


def make_noisy(trajectories: Trajectories, windows: Sequence[Window], mask_id: int) -> Noisy:
    """Mask each sample's window as its teacher had it (arXiv 2601.07568, section 3.2).

    Differs from the published builder where that one is wrong or wasteful: the state after ``j``
    steps has ``j`` tokens written, not ``j + 1``, so the mask ratio is the one that was drawn;
    there is no empty window after the last; a window can never be longer than its trajectory;
    every sample has its own window and ratio, on every device another; and what follows the answer
    is hidden from the model, where there was visible padding.
    """
    answer = trajectories.step_map.shape[1]
    prompt = trajectories.prompt_length.long()[:, None]
    lengths = prompt[:, 0] + answer
    clean = trajectories.ids[:, : int(lengths.max())].long()
    place = torch.arange(clean.shape[1]) - prompt  # in the answer; negative in the prompt
    start, end, steps = (
        torch.tensor([getattr(w, name) for w in windows])[:, None]
        for name in ("start", "end", "clean")
    )
    written = trajectories.step_map.long().gather(1, place.clamp(0, answer - 1))
    inside = (place >= start) & (place < end)
    masked, unmasked = inside & (written >= steps), inside & (written < steps)
    after = (place >= end) & (place < answer)
    noisy = clean.masked_fill(masked | after, mask_id)
    complement = clean.masked_fill(unmasked | after, mask_id)
    return Noisy(clean, noisy, complement, masked, unmasked, lengths)
