import random

import pytest
import torch

from pydllm.distill import PRESETS, Trajectories, Window, draw_window, least_ratio, make_noisy
from pydllm.distill.masking import window_length

MASK = 99


def _trajectories(rows=4, answer=64, block=32, seed=0):
    """Random ids and, block by block, a random order of unmasking."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (rows,), generator=generator)
    steps = [
        torch.cat([b + torch.randperm(block, generator=generator) for b in range(0, answer, block)])
        for _ in range(rows)
    ]
    ids = torch.randint(0, 90, (rows, 8 + answer), generator=generator)
    return Trajectories(ids.int(), lengths.int(), torch.stack(steps).short())


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_an_aligned_window_has_the_ratio_that_was_drawn(ratio):
    trajectories = _trajectories()
    windows = [draw_window(random.Random(n), 64, 32, ratio) for n in range(4)]
    batch = make_noisy(trajectories, windows, MASK)
    assert batch.masked.sum(1).tolist() == [32 - int((1 - ratio) * 32)] * 4
    assert {window.start for window in windows} == {0, 32}


@pytest.mark.parametrize("length", [1, 7, 16, 25, 64])
def test_windows_are_partitioned_and_the_rest_is_left_alone(length):
    trajectories = _trajectories()
    rng = random.Random(length)
    windows = [draw_window(rng, 64, length, rng.random()) for _ in range(4)]
    batch = make_noisy(trajectories, windows, MASK)
    for row, window in enumerate(windows):
        first = int(trajectories.prompt_length[row])
        start, end, last = first + window.start, first + window.end, first + 64
        assert 0 <= window.start < window.end <= 64
        assert window.end - window.start == min(length, 64 - window.start)
        inside = torch.zeros(batch.clean.shape[1], dtype=torch.bool)
        inside[start:end] = True
        assert torch.equal(batch.masked[row] | batch.unmasked[row], inside)
        assert not (batch.masked[row] & batch.unmasked[row]).any()
        written = trajectories.step_map[row, window.start : window.end] < window.clean
        assert torch.equal(batch.unmasked[row, start:end], written)
        for noisy, masked in ((batch.noisy, batch.masked), (batch.complement, batch.unmasked)):
            assert torch.equal(noisy[row, :start], batch.clean[row, :start])
            assert torch.equal(noisy[row] == MASK, masked[row] | _span(noisy[row], end, last))
            kept = ~masked[row] & inside
            assert torch.equal(noisy[row, kept], batch.clean[row, kept])
    assert batch.lengths.tolist() == (trajectories.prompt_length + 64).tolist()


def _span(like, start, end):
    span = torch.zeros_like(like, dtype=torch.bool)
    span[start:end] = True
    return span


def test_the_window_is_what_the_teacher_saw():
    """Before the step at which a position was written it is a mask, from then on it is clean."""
    trajectories = _trajectories(rows=1, answer=8, block=8)
    for clean in range(9):
        batch = make_noisy(trajectories, [Window(0, 8, clean)], MASK)
        place = int(trajectories.prompt_length[0])
        masks = batch.noisy[0, place : place + 8] == MASK
        assert torch.equal(masks, trajectories.step_map[0] >= clean)


def test_curricula():
    ratios = PRESETS["llada"].ratios
    assert (least_ratio(0, ratios), least_ratio(1, ratios)) == (0.0, 0.8)
    for preset, half, later in (("dream", 20, 28), ("llada", 16, 20), ("coder", 20, 28)):
        windows = PRESETS[preset].windows
        assert window_length(0.0, windows) == 16
        assert window_length(0.5, windows) == half
        assert window_length(1.5, windows) == later
        assert window_length(len(windows) - 1 + 0.9, windows) == 32
        assert window_length(len(windows), windows) == 32
