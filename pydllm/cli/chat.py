"""``pydllm chat``: a conversation with a model in the terminal."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from pydllm._options import BACKEND, DEVICE
from pydllm.cli.sampling import read_sampling, sampling_options
from pydllm.cli.settings import fit_algorithm, read_algorithm, read_template
from pydllm.demo import WEIGHTS

# The bundled models were trained on single questions: a system prompt and the last line.
_PLAIN = (
    "{% for m in messages if m.role == 'system' %}{{ m.content }} {% endfor %}"
    "{{ messages[-1].content }}"
)
_HELP = """\
/algorithm NAME [KEY=VALUE ...]  decode with another algorithm
/system TEXT                     another system prompt, and a new conversation
/reset                           a new conversation
/history                         what was said
/help                            this
/quit                            leave; Ctrl-D does too, Ctrl-C ends an answer"""


@click.command()
@click.option("--model", "source", help="Checkpoint folder or hub id; default: the bundled model.")
@click.option("--verifier", help="Checkpoint of APD's causal model.")
@click.option("--algorithm", default="threshold", show_default=True)
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Its parameters.")
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option(
    "--template", type=click.Path(path_type=Path), help="A jinja file, instead of the model's."
)
@click.option(
    "--max-new-tokens",
    type=int,
    help="Of each answer. Default: 256 (a bundled model: 48), or what the model's positions leave.",
)
@sampling_options
@DEVICE
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16", "float64"]))
@BACKEND
def chat(
    source: str | None,
    verifier: str | None,
    algorithm: str,
    settings: tuple[str, ...],
    system: str | None,
    template: Path | None,
    max_new_tokens: int | None,
    device: str | None,
    dtype: str | None,
    backend: str | None,
    **values: Any,
) -> None:
    """Talk with a model; answers appear as they are decoded. /help lists the commands."""
    import torch

    from pydllm.models import ChatTemplate, load
    from pydllm.models.load import bundled

    options: dict[str, Any] = {
        "device": device,
        "dtype": None if dtype is None else getattr(torch, dtype),
    }

    def load_verifier() -> Any:
        if verifier is None:
            raise ValueError("--verifier: expected a checkpoint for this algorithm, got none")
        return load(verifier, **options)

    chosen = read_algorithm(algorithm, settings, load_verifier)
    name = WEIGHTS.name if source is None else source
    is_bundled = source is None or bundled(source) is not None
    model = load(WEIGHTS if source is None else source, **options)
    chosen = fit_algorithm(chosen, settings, model)
    if template is not None:
        model.chat_template = read_template(template)
    if model.chat_template is None:
        if not is_bundled:
            raise ValueError(
                f"--model: expected a checkpoint with a chat template, or --template, got {name}"
            )
        model.chat_template = ChatTemplate({"default": _PLAIN}, {})
        click.echo(f"[{name} has no chat template: the prompt is your last line, without history]")
    decoding = read_sampling(values) | {"backend": backend}
    most = 48 if is_bundled else 256
    Conversation(model, chosen, decoding, load_verifier, system, max_new_tokens, most).run()


@dataclass
class Conversation:
    """The turns so far, and how the next answer is decoded."""

    model: Any
    algorithm: Any
    options: dict[str, Any]
    verifier: Any
    system: str | None
    max_new_tokens: int | None  # None: at most `most`, and what the positions leave
    most: int
    messages: list[dict[str, str]] = field(default_factory=list)

    def run(self) -> None:
        """Read lines until the end of input."""
        self.reset()
        while (line := _read_line()) is not None:
            if not line.strip():
                continue
            if not line.startswith("/"):
                self.answer(line)
                continue
            word, _, rest = line[1:].strip().partition(" ")
            if word == "quit":
                return
            try:
                self.command(word, rest.strip())
            except (ValueError, TypeError, click.UsageError) as error:
                click.echo(f"[{error}]")

    def command(self, word: str, rest: str) -> None:
        if word == "algorithm":
            name, *settings = rest.split() or [""]
            read = read_algorithm(name, tuple(settings), self.verifier)
            self.algorithm = fit_algorithm(read, tuple(settings), self.model)
            click.echo(f"[{self.algorithm!r}]")
        elif word == "system":
            self.system = rest or None
            self.reset()
        elif word == "reset":
            self.reset()
        elif word == "history":
            for message in self.messages:
                click.echo(f"{message['role']}: {message['content']}")
        elif word == "help":
            click.echo(_HELP)
        else:
            raise ValueError(f"expected a command of /help, got /{word}")

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        given = self.system is not None
        self.messages = [{"role": "system", "content": str(self.system)}] if given else []

    def answer(self, text: str) -> None:
        """Decode and print an answer, then what it cost."""
        from pydllm.decoding import stream

        self.messages.append({"role": "user", "content": text})
        started = time.perf_counter()
        try:
            new = self.fit_new_tokens()
            pieces = stream(
                self.model, [self.messages], self.algorithm, max_new_tokens=new, **self.options
            )
            for _, piece in pieces:
                click.echo(piece, nl=False)
        except (ValueError, KeyboardInterrupt) as error:
            # Ctrl-C within a step ends the answer; between two pieces it takes the turn back.
            self.messages.pop()
            click.echo(f"[{str(error) or 'interrupted'}]")
            return
        seconds, made = time.perf_counter() - started, pieces.generation
        click.echo()
        if made is None:
            return
        self.messages.append({"role": "assistant", "content": (made.text or [""])[0]})
        tokens = len(made.new_tokens[0])
        click.echo(
            f"[{tokens} tokens, {tokens / seconds:.1f} per second, "
            f"{made.tokens_per_forward[0]:.2f} per forward, {made.nfe[0]} forwards, "
            f"{made.finish_reason[0]}]"
        )

    def fit_new_tokens(self) -> int:
        """How many tokens the next answer may have.

        Raises:
            ValueError: the conversation leaves no position, or fewer than ``--max-new-tokens``.
        """
        from pydllm.decoding.prompts import encode_prompts

        length = len(encode_prompts(self.model, [self.messages])[0])
        positions = self.model.spec.max_positions
        new = self.max_new_tokens
        if new is None:
            new = max(1, min(self.most, positions - length))
        if length + new > positions:
            fits = length < positions
            advice = "lower --max-new-tokens" if fits else "shorten the line, or /reset"
            raise ValueError(
                f"prompts: expected at most {positions} positions, got {length} of the prompt and "
                f"{new} of the answer: {advice}"
            )
        return new


def _read_line() -> str | None:
    """The next line of input; None at its end. What does not come from a terminal is repeated, so
    that the output reads as a conversation.
    """
    if sys.stdin.isatty():
        try:
            return input("> ")
        except EOFError:
            click.echo()
            return None
    line = sys.stdin.readline()
    if not line:
        return None
    click.echo(f"> {line.rstrip()}")
    return line.rstrip("\n")
