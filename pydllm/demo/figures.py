"""The demo's pictures, one question each, for light and for dark pages.

Colours are those of Okabe and Ito, which people with any colour vision can tell apart; every
difference that a colour shows, a marker, a hatch or a word shows as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydllm.demo.evaluate import Score
from pydllm.demo.replay import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _DPI = 8.3, 200  # inches; a page shows the picture at half its pixels
_COLUMNS = 6  # words in a line of an answer: the demo's sentences have six
# Colour and marker by the algorithm's name, as far as the first comma or space.
_STYLES = {
    "Static": ("#8c8c8c", "o"),
    "LeftToRight": ("#8c8c8c", "<"),
    "Threshold": ("#0072b2", "s"),
    "Factor": ("#56b4e9", "D"),
    "EntropyBound": ("#009e73", "^"),
    "FreeDave": ("#d55e00", "P"),
    "APD": ("#cc79a7", "X"),
    "MultiBlock": ("#e69f00", "v"),
    "SelfSpeculative": ("#b8a800", "*"),
    "Autoregressive": ("#8c8c8c", ">"),
}
_RIGHT, _WRONG = "#0072b2", "#d55e00"
_TOLERATED = 1.0  # points of accuracy below one token per step that count as equal


@dataclass(frozen=True)
class Theme:
    """Colours of the page and of the writing on it."""

    suffix: str
    page: str
    ink: str
    faint: str


THEMES = (
    Theme("", "#ffffff", "#1f2328", "#d0d7de"),
    Theme("-dark", "#0d1117", "#e6edf3", "#3d444d"),
)


def family(algorithm: str) -> str:
    """``FreeDave`` of ``FreeDave, 8 drafts``."""
    return algorithm.replace(",", " ").split()[0]


def draw_all(scores: list[Score], runs: dict[str, list[Run]], out: Path) -> list[Path]:
    """Every picture in every theme; ``runs`` are one problem's, by model.

    Raises:
        ImportError: matplotlib is not installed.
    """
    pictures: list[tuple[str, Callable[[Theme], Figure]]] = [
        ("accuracy", partial(accuracy, scores)),
        ("forwards", partial(forwards, scores)),
    ]
    for model, each in runs.items():
        pictures.append((f"order-{model}", partial(order, model, each)))
    written = []
    for name, draw in pictures:
        for theme in THEMES:
            written.append(out / f"{name}{theme.suffix}.png")
            draw(theme).savefig(written[-1], dpi=_DPI, facecolor=theme.page)
    return written


def _figure(
    rows: int, columns: int, height: float, theme: Theme, *, head: float = 0.55, foot: float = 0.0
) -> tuple[Figure, list[Axes]]:
    """A figure of the README's width and its panels, row by row.

    ``head`` and ``foot`` are inches left free for the title and for a legend.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    height += head + foot
    layout = ConstrainedLayoutEngine(rect=(0, foot / height, 1, 1 - (head + foot) / height))
    figure = Figure(figsize=(_WIDTH, height), layout=layout)
    axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axis in axes:
        axis.set_facecolor(theme.page)
        axis.tick_params(colors=theme.ink, labelsize=8)
        for side, spine in axis.spines.items():
            spine.set_color(theme.faint)
            spine.set_visible(side in ("left", "bottom"))
    return figure, axes


def _title(figure: Figure, question: str, answer: str, theme: Theme) -> None:
    inch = 1 / figure.get_figheight()
    style: dict[str, Any] = {"color": theme.ink, "va": "top", "ha": "left"}
    figure.text(0.01, 1 - 0.06 * inch, question, size=12, weight="bold", **style)
    figure.text(0.01, 1 - 0.32 * inch, answer, size=8.5, **style)


def _by_model(scores: Iterable[Score]) -> dict[str, list[Score]]:
    groups: dict[str, list[Score]] = {}
    for score in scores:
        groups.setdefault(score.model, []).append(score)
    return groups


def accuracy(scores: list[Score], theme: Theme) -> Figure:
    """Accuracy over tokens per forward, a panel per model.

    The line is the Pareto front. Points on it have names, and so has the fastest setting of each
    algorithm that is as accurate as one token per step.
    """
    from pydllm.demo.sweep import frontier

    groups = _by_model(scores)
    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    figure, axes = _figure(rows, columns, 2.7 * rows, theme, foot=0.5)
    seen: dict[str, Any] = {}
    for axis, (model, found) in zip(axes, groups.items(), strict=False):
        front = frontier(found)
        axis.step(
            [s.tokens_per_forward for s in front],
            [s.exact_percent for s in front],
            where="pre",
            color=theme.ink,
            linewidth=1,
            alpha=0.5,
            zorder=1,
        )
        for score in found:
            colour, marker = _STYLES.get(family(score.algorithm), ("#8c8c8c", "o"))
            seen[family(score.algorithm)] = axis.scatter(
                score.tokens_per_forward,
                score.exact_percent,
                s=70 if marker == "*" else 34,  # a star fills little of its size
                color=colour,
                marker=marker,
                edgecolors=theme.page,
                linewidths=0.6,
                zorder=2,
            )
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_xlim(0.5, 40)
        axis.set_ylim(-3, 132)
        axis.set_yticks(range(0, 101, 20))
        axis.set_title(model, size=10, color=theme.ink, loc="left")
        axis.grid(color=theme.faint, linewidth=0.5)
        _place_names(axis, _worth_a_name(found, front), found, theme)
    for axis in axes[len(groups) :]:
        axis.set_axis_off()
    for axis in axes[::columns]:
        axis.set_ylabel("right solutions, %", size=8, color=theme.ink)
    for axis in axes[max(0, len(groups) - columns) : len(groups)]:
        axis.set_xlabel("tokens per forward (logarithmic)", size=8, color=theme.ink)
    figure.legend(
        seen.values(),
        seen,
        loc="lower center",
        ncols=min(5, len(seen)),
        frameon=False,
        labelcolor=theme.ink,
        fontsize=8,
        handletextpad=0.2,
        columnspacing=1.2,
    )
    _title(
        figure,
        "What does a faster answer cost?",
        "Upper right is best. The line joins what no other setting beats in both.",
        theme,
    )
    return figure


def _worth_a_name(found: list[Score], front: list[Score]) -> list[Score]:
    """The front, and of each algorithm the fastest setting that loses no accuracy."""
    named = {(s.tokens_per_forward, s.exact_percent): s for s in front}
    fastest: dict[str, Score] = {}
    for score in sorted(found, key=lambda s: s.tokens_per_forward):
        if score.exact_percent >= found[0].exact_percent - _TOLERATED:
            fastest[family(score.algorithm)] = score
    for score in (found[0], *fastest.values()):
        named.setdefault((score.tokens_per_forward, score.exact_percent), score)
    return list(named.values())


def _place_names(axis: Axes, named: list[Score], found: list[Score], theme: Theme) -> None:
    """Write names beside points, each where it covers neither a point nor another name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.patheffects import withStroke
    from matplotlib.text import Text

    figure: Any = axis.figure
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    panel = axis.get_window_extent(renderer)
    taken: list[Any] = []
    at = [axis.transData.transform((s.tokens_per_forward, s.exact_percent)) for s in found]
    for score in sorted(named, key=lambda s: s.tokens_per_forward):
        for dx, dy, side in _OFFSETS:
            text = axis.annotate(
                score.algorithm,
                (score.tokens_per_forward, score.exact_percent),
                xytext=(dx, dy),
                textcoords="offset points",
                size=6.5,
                color=theme.ink,
                ha=side,
                path_effects=[withStroke(linewidth=1.5, foreground=theme.page)],
                arrowprops={"arrowstyle": "-", "color": theme.ink, "linewidth": 0.4}
                if abs(dy) > 12
                else None,
            )
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # without the line to the point
            inside = panel.x0 <= box.x0 and box.x1 <= panel.x1 and box.y1 <= panel.y1
            clear = not any(box.overlaps(other) for other in taken)
            if inside and clear and not any(box.contains(x, y) for x, y in at):
                taken.append(box)
                break
            text.remove()


# Above first, since most points worth a name are near the top; then all around.
_OFFSETS = [(0, 6, "center"), (5, -2, "left"), (-5, -2, "right"), (0, -12, "center")] + [
    (dx, dy, side)
    for dy in (15, 24, 33, -21, -30, -39, -48, -57)
    for dx, side in ((0, "center"), (6, "left"), (-6, "right"), (26, "left"), (-26, "right"))
]


def forwards(scores: list[Score], theme: Theme) -> Figure:
    """How many times fewer forwards than one token per step: settings by models."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    groups = _by_model(scores)
    kinds = list(dict.fromkeys(family(s.algorithm) for s in scores))
    known = dict.fromkeys(s.algorithm for s in scores)
    # A cache changes the time of a forward, hardly their number.
    names = [name for name in known if "cache" not in name] or list(known)
    names.sort(key=lambda name: kinds.index(family(name)))  # a family's rows are neighbours
    figure, (axis,) = _figure(1, 1, 0.4 + 0.27 * len(names), theme)
    blues = colormaps["Blues"]
    for column, found in enumerate(groups.values()):
        first, cells = found[0], {score.algorithm: score for score in found}
        for row, name in enumerate(names):
            if name not in cells:
                continue
            score = cells[name]
            fewer, lost = first.forwards / score.forwards, first.exact_percent - score.exact_percent
            good = lost <= _TOLERATED
            shade = blues(0.15 + 0.75 * min(1.0, math.log2(max(fewer, 1.0)) / 4))
            axis.add_patch(
                Rectangle(
                    (column + 0.03, row + 0.08),
                    0.94,
                    0.84,
                    facecolor=shade if good else theme.page,
                    edgecolor=shade if good else _WRONG,
                    hatch=None if good else "///",
                    linewidth=0.8,
                )
            )
            dark = sum(shade[:3]) < 1.7
            ink = theme.ink if not good else "#ffffff" if dark else "#000000"
            points = f"{lost:.0f}" if lost >= 10 else f"{lost:.1f}"
            label = f"{fewer:.1f} x" if good else f"{fewer:.1f} x, \u2212{points} points"
            box = None if good else {"facecolor": theme.page, "edgecolor": "none", "pad": 1}
            axis.text(
                column + 0.5,
                row + 0.5,
                label,
                size=7.5,
                color=ink,
                ha="center",
                va="center",
                bbox=box,
            )
    axis.set_xlim(0, len(groups))
    axis.set_ylim(len(names), 0)
    axis.xaxis.tick_top()
    heads = [f"{model}\n{found[0].forwards:.1f} forwards" for model, found in groups.items()]
    axis.set_xticks([n + 0.5 for n in range(len(groups))], heads, size=8)
    axis.set_yticks([n + 0.5 for n in range(len(names))], names, size=8)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    _title(
        figure,
        "How many times fewer forwards than one token per step?",
        "Filled: as accurate, within one point. Hatched: less accurate, by the points given.",
        theme,
    )
    return figure


def order(model: str, runs: list[Run], theme: Theme) -> Figure:
    """One answer by several algorithms; a word's colour is the forward that wrote it.

    Each panel has a scale of its own, from its first forward to its last.
    """
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    columns = min(2, len(runs))
    rows = -(-len(runs) // columns)
    lines = max(-(-len(run.words) // _COLUMNS) for run in runs)
    figure, axes = _figure(rows, columns, rows * (0.3 + 0.28 * lines), theme, head=0.75)
    colours = colormaps["cividis"]
    for axis, run in zip(axes, runs, strict=False):
        last = max(run.steps, default=0)
        for place, (word, step) in enumerate(zip(run.words, run.steps, strict=True)):
            x, y = place % _COLUMNS, place // _COLUMNS
            shade = colours(step / last if last else 0.5)
            light = 0.3 * shade[0] + 0.6 * shade[1] + 0.1 * shade[2] > 0.5
            wrong = run.wrong is not None and place in run.wrong
            axis.add_patch(
                Rectangle(
                    (x + 0.04, y + 0.06),
                    0.92,
                    0.88,
                    facecolor=shade,
                    edgecolor=_WRONG if wrong else shade,
                    linewidth=2 if wrong else 0,
                )
            )
            ink = "#000000" if light else "#ffffff"
            axis.text(x + 0.44, y + 0.5, word, size=8, color=ink, ha="center", va="center")
            axis.text(x + 0.92, y + 0.88, str(step + 1), size=5, color=ink, ha="right", va="bottom")
        axis.set_xlim(0, _COLUMNS)
        axis.set_ylim(lines, 0)
        axis.set_axis_off()
        verdict = "" if run.wrong is None else ", wrong" if run.wrong else ", right"
        count = f"{run.forwards} forward{'s' if run.forwards != 1 else ''}"
        axis.set_title(f"{run.name}: {count}{verdict}", size=9, color=theme.ink, loc="left")
    for axis in axes[len(runs) :]:
        axis.set_axis_off()
    _title(
        figure,
        f"In which order does {model} write an answer?",
        "The number is the forward that wrote the word; dark is early, light is late, for each "
        "algorithm on its own scale.\nA frame marks a wrong word.",
        theme,
    )
    return figure
