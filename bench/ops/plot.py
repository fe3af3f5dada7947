"""A roofline plot of an op: how near each shape and backend is to what the machine can do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

MARKERS = "osD^v<>Px*"
# Okabe and Ito's colours, which the colour-blind can tell apart; black is the roof's.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")


def roof(operations_per_byte: float, copy: float, matmul: float) -> float:
    """Operations a second that the machine can reach at most: of bytes, or of products."""
    return min(matmul, operations_per_byte * copy)


def draw(rows: Sequence[dict[str, Any]], copy: float, matmul: float, path: Path) -> None:
    """Draw the timed rows of one op to a file.

    Operations a second over operations per byte, under the roof of the measured copy rate and the
    measured rate of a large product. An op that only compares and moves has no operations to count:
    bytes a second over bytes then, under the copy rate.

    Args:
        rows: of ``bench.ops.run.measure``; those without a time are left out.
        copy: bytes a second.
        matmul: operations a second.
    """
    from matplotlib.figure import Figure

    timed = [row for row in rows if "ms_p50" in row]
    if not timed:
        raise ValueError("rows: expected at least one that was timed, got none")
    counts = timed[0]["operations"] is not None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()

    def x(row: dict[str, Any]) -> float:
        return row["operations"] / row["bytes"] if counts else row["bytes"]

    for number, label in enumerate(dict.fromkeys(row["backend"] for row in timed)):
        mine = [row for row in timed if row["backend"] == label]
        amount = "operations" if counts else "bytes"
        axis.plot(
            [x(row) for row in mine],
            [row[amount] / (row["ms_p50"] * 1e-3) for row in mine],
            MARKERS[number % len(MARKERS)],
            color=COLOURS[number % len(COLOURS)],
            label=label,
            alpha=0.8,
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    if counts:
        low, high = min(map(x, timed)) / 3, max(map(x, timed)) * 3
        corners = sorted({low, min(max(matmul / copy, low), high), high})
        heights = [roof(corner, copy, matmul) for corner in corners]
        axis.plot(corners, heights, color="black", label="roof")
        axis.set_xlabel("operations per byte that has to move")
        axis.set_ylabel("operations per second")
    else:
        axis.axhline(copy, color="black", label="copy rate")
        axis.set_xlabel("bytes that have to move")
        axis.set_ylabel("bytes per second")
    first = timed[0]
    axis.set_title(f"{first['op']}, {first['dtype']}: how near to the roof?", loc="left")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
