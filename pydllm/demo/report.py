"""What the demo prints and writes: the coloured answer, tables, CSV, a frontier."""

from __future__ import annotations

import csv
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

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


NOTES = (
    'A forward is one evaluation of the diffusion model. "right %" counts solutions without a '
    'wrong word, "same %" those that equal the first line\'s token for token, of SelfSpeculative '
    "those that equal Autoregressive's. A round of SelfSpeculative is a draft and a verification; "
    "SelfSpeculative 1 does both in one forward of more rows.",
    "One token per step is fewer than one token per forward: a block is filled to its end, and "
    "what stands after EOS does not count. What APD's verifier reads is not counted either.",
    "Tokens per second are this machine's, all problems in one batch. Drafts and branches "
    "(FreeDave, MultiBlock, LeftToRight, APD) put more rows into a forward. On a CPU its time "
    "grows with its rows, so a method can take fewer forwards and more time. On a GPU a small "
    "batch waits for the weights to be read, which more rows hardly change, so fewer forwards "
    "mean less time there.",
)


def score_table(scores: list[Score], title: str) -> Table:
    """The scores in at most 80 columns. ``NOTES`` explains the columns."""
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("algorithm", no_wrap=True)
    headings = ("right\n%", "forwards", "tokens/\nforward", "tokens/\nsecond", "same\n%")
    has_rounds = any(score.tokens_per_round is not None for score in scores)
    for heading in (*headings, *(("tokens/\nround",) if has_rounds else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    for score in scores:
        rounds = "" if score.tokens_per_round is None else f"{score.tokens_per_round:.2f}"
        table.add_row(
            score.algorithm,
            f"{score.exact_percent:.1f}",
            f"{score.forwards:.1f}",
            f"{score.tokens_per_forward:.2f}",
            f"{score.tokens_per_second:.0f}",
            f"{score.equal_percent:.0f}",
            *((rounds,) if has_rounds else ()),
        )
    return table


def area_table(area: dict[str, dict[str, float]], title: str) -> Table:
    """AUP by algorithm, a column per model; nothing where a model does not run the algorithm."""
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("AUP", no_wrap=True)
    for model in area:
        table.add_column(model.replace("-tiny", "").replace("-", "\n"), justify="right")
    for name in dict.fromkeys(name for row in area.values() for name in row):
        table.add_row(name, *(f"{row[name]:.0f}" if name in row else "" for row in area.values()))
    return table


def write_csv(scores: list[Score], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(scores[0].as_row()))
        writer.writeheader()
        writer.writerows(score.as_row() for score in scores)


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
