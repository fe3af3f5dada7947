"""Answers while they are decoded, drawn after every forward."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from pydllm.decoding.call import Step

if TYPE_CHECKING:
    from pydllm.models import Model

_MASK = "\N{LIGHT SHADE}"


class Watch:
    """An ``on_step`` that shows the sequences, in place on a terminal, else a line per forward.

    Tokens of the last forward stand out; a mask is a shaded cell.
    """

    def __init__(self, model: Model, console: Console) -> None:
        self._model, self._console = model, console
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Watch:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, step: Step) -> None:
        starts = step.prompt_length.tolist()
        rows = zip(step.x.tolist(), step.step_map.tolist(), starts, strict=True)
        drawn = [self._row(x[start:], written[start:]) for x, written, start in rows]
        drawing = Text("\n").join(drawn)
        if self._live is not None:
            self._live.update(Text(f"forward {step.index}\n") + drawing, refresh=True)
        else:
            self._console.print(f"{step.index:4} ", drawing, sep="", soft_wrap=True)

    def _row(self, ids: list[int], written: list[int]) -> Text:
        """Runs of masks, of tokens, and of tokens of the last forward."""
        mask, eos, newest = self._model.spec.mask_id, self._model.spec.eos_ids, max(written)
        parts: list[tuple[str, list[int]]] = []
        for token, forward in zip(ids, written, strict=True):
            kind = "mask" if token == mask or token < 0 else "old"
            if kind == "old" and forward == newest:
                kind = "new"
            if not parts or parts[-1][0] != kind:
                parts.append((kind, []))
            parts[-1][1].append(token)
            if token in eos:
                break
        styles: dict[str, Any] = {"mask": "dim", "old": "", "new": "bold green"}
        pieces = [Text(self._words(kind, part), style=styles[kind]) for kind, part in parts]
        return Text(" ").join(pieces)

    def _words(self, kind: str, ids: list[int]) -> str:
        if kind == "mask":
            return _MASK * len(ids)
        tokenizer = self._model.tokenizer
        return " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids)
