"""What the demo prints and writes: the coloured answer, the table, the CSV and the picture."""

from __future__ import annotations

import csv
from pathlib import Path

from rich.table import Table
from rich.text import Text

from pydllm.decoding import Generation
from pydllm.demo.evaluate import Score

# Early to late, readable on dark and light terminals; later steps wrap around to the last colour.
_COLOURS = ("#4575b4", "#5e9bc9", "#66a61e", "#b8860b", "#e6761c", "#d6433b", "#a50026")


def coloured_answer(words: list[str], steps: list[int]) -> Text:
    """The words of an answer, each in the colour of the step that wrote it and with its number."""
    last = max(steps, default=0)
    text = Text()
    for word, step in zip(words, steps, strict=True):
        shade = _COLOURS[min(len(_COLOURS) - 1, step * len(_COLOURS) // (last + 1))]
        text.append(word, style=f"bold {shade}")
        text.append(f"{_subscript(step)} ", style=shade)
    return text


def masked_answer(words: list[str], steps: list[int], upto: int) -> Text:
    """The same answer as it stood after step ``upto``: later words are still masks."""
    text = Text()
    for word, step in zip(words, steps, strict=True):
        new = "bold " if step == upto else ""
        text.append(word if step <= upto else "_" * len(word), style=new if step <= upto else "dim")
        text.append(" ")
    return text


def _subscript(number: int) -> str:
    return str(number).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


def score_table(scores: list[Score], title: str) -> Table:
    """The scores; the last column compares each answer's tokens with those of the first line."""
    table = Table(title=title)
    table.add_column("algorithm")
    for heading in ("exact %", "forwards", "tokens/forward", "tokens/s", "same tokens %"):
        table.add_column(heading, justify="right")
    for score in scores:
        table.add_row(
            score.algorithm,
            f"{score.exact_percent:.1f}",
            f"{score.forwards:.1f}",
            f"{score.tokens_per_forward:.2f}",
            f"{score.tokens_per_second:.0f}",
            f"{score.equal_percent:.0f}",
        )
    return table


def area_table(area: dict[str, dict[str, float]], title: str) -> Table:
    """AUP by algorithm, a column a model; nothing where a model does not run the algorithm."""
    table = Table(title=title)
    table.add_column("AUP")
    for model in area:
        table.add_column(model, justify="right")
    for name in dict.fromkeys(name for row in area.values() for name in row):
        table.add_row(name, *(f"{row[name]:.0f}" if name in row else "" for row in area.values()))
    return table


def write_csv(scores: list[Score], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(scores[0].as_row()))
        writer.writeheader()
        writer.writerows(score.as_row() for score in scores)


def plot_decoding_order(generations: dict[str, Generation], problems: int, path: Path) -> None:
    """One panel an algorithm: rows are problems, columns positions, colour the step that wrote."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    columns = 3
    rows = -(-len(generations) // columns)
    figure = Figure(figsize=(4.2 * columns, 1.1 + 1.6 * rows), layout="constrained")
    colours = colormaps["viridis"].with_extremes(under="white")
    last = max(g.step_map[:problems].max().item() for g in generations.values())
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for axis in axes[len(generations) :]:
        axis.set_axis_off()
    image = None
    for axis, (name, generation) in zip(axes, generations.items(), strict=False):
        steps = generation.step_map[:problems].numpy()
        image = axis.imshow(steps, aspect="auto", cmap=colours, vmin=0, vmax=last)
        axis.set_title(f"{name}: {generation.nfe[:problems].float().mean():.1f} forwards", size=9)
        axis.set_yticks([])
    figure.supxlabel("position in the answer (white: behind the end of sequence)", size=9)
    figure.supylabel("problems", size=9)
    if image is not None:
        figure.colorbar(image, ax=list(axes), label="forward that wrote the token")
    figure.savefig(path, dpi=130)


def plot_frontier(
    sweeps: dict[str, list[Score]], areas: dict[str, float], title: str, path: Path
) -> None:
    """Accuracy over tokens per forward, one colour a sweep; lines join what nothing beats."""
    from matplotlib.figure import Figure

    from pydllm.demo.sweep import frontier

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for name, scores in sweeps.items():
        best = frontier(scores)
        dots = axis.scatter(
            _speeds(scores), _percents(scores), s=18, label=f"{name}, AUP {areas[name]:.0f}"
        )
        axis.plot(_speeds(best), _percents(best), color=dots.get_facecolor()[0], linewidth=1)
    axis.set_xlabel("tokens per forward")
    axis.set_ylabel("exact answers, %")
    axis.set_title(title, size=10)
    axis.legend()
    figure.savefig(path, dpi=130)


def _speeds(scores: list[Score]) -> list[float]:
    return [score.tokens_per_forward for score in scores]


def _percents(scores: list[Score]) -> list[float]:
    return [score.exact_percent for score in scores]
