"""The picture of a training."""

from __future__ import annotations

import json
from pathlib import Path

# Points of a curve at most; each is the mean of as many steps as that takes.
_POINTS = 200


def plot_training(metrics: Path, path: Path) -> None:
    """Loss, cross-entropy and entropy, fraction predicted, window and mask ratio over the steps."""
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    width = max(1, len(records) // _POINTS)
    groups = [records[n : n + width] for n in range(0, len(records), width)]
    steps = [group[-1]["step"] for group in groups]
    panels = {
        "loss": ("loss",),
        "nats": ("cross_entropy", "cross_entropy_complement", "entropy", "entropy_complement"),
        "predicted": ("correct", "correct_complement"),
        "window (tokens)": ("window",),
        "mask ratio": ("ratio",),
    }
    figure = Figure(figsize=(7, 10), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True)
    for axis, (label, names) in zip(axes, panels.items(), strict=True):
        for name in names:
            if name in records[0]:
                means = [sum(r[name] for r in group) / len(group) for group in groups]
                axis.plot(steps, means, label=name.replace("_", " "), linewidth=1)
        axis.set_ylabel(label)
        if len(names) > 1:
            axis.legend(fontsize="small")
    axes[-1].set_xlabel("step")
    figure.savefig(path, dpi=120)
