"""The command line: ``pydllm demo | compare | generate | distill | aup | lm-eval | env``."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import click
from rich.console import Console

from pydllm._backend.errors import PydllmError
from pydllm._options import BACKEND, JSON
from pydllm.demo import VERIFIER, WEIGHTS
from pydllm.demo.aup import aup
from pydllm.demo.command import compare, demo
from pydllm.distill.command import distill


class _Group(click.Group):
    """Turns the library's errors into one line and exit code 1, without a traceback."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except (PydllmError, ValueError, TypeError) as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group)
@click.version_option(package_name="pydllm")
def main() -> None:
    """Kernels and decoding algorithms for diffusion language models."""


@main.command()
@click.option("--model", "source", help="Checkpoint folder or hub id; default: the bundled model.")
@click.option("--verifier", help="Checkpoint of APD's causal model; default: the bundled one.")
@click.option("--prompt", "prompts", multiple=True, help="Text to continue; repeat for a batch.")
@click.option("--algorithm", default="threshold", show_default=True, help="See --list-algorithms.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Its parameters.")
@click.option("--list-algorithms", is_flag=True, help="Names, parameters and defaults; then exit.")
@click.option("--max-new-tokens", default=48, show_default=True, help="The bundled model wants 48.")
@click.option("--temperature", default=0.0, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--device", help="Default: the GPU if there is one.")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16", "float64"]))
@BACKEND
@JSON
def generate(
    source: str | None,
    verifier: str | None,
    prompts: tuple[str, ...],
    algorithm: str,
    settings: tuple[str, ...],
    list_algorithms: bool,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    device: str | None,
    dtype: str | None,
    backend: str | None,
    as_json: bool,
) -> None:
    """Continue prompts (or the lines of standard input) with a model."""
    import torch

    from pydllm import decoding
    from pydllm.decoding.settings import ALGORITHMS, parameters
    from pydllm.models import load

    if list_algorithms:
        for name, kind in ALGORITHMS.items():
            defaults = {field.name: field.default for field in dataclasses.fields(kind)}
            fields = ", ".join(f"{key}={defaults[key]!r}" for key in parameters(kind))
            click.echo(f"{name}: {fields}")
        return
    options: dict[str, Any] = {
        "device": device,
        "dtype": None if dtype is None else getattr(torch, dtype),
    }
    chosen = _make_algorithm(
        algorithm, settings, lambda: load(VERIFIER if verifier is None else verifier, **options)
    )
    texts = list(prompts) or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not texts:
        raise click.UsageError("expected --prompt or lines on standard input, got neither")
    model = load(WEIGHTS if source is None else source, **options)
    started = time.perf_counter()
    with Console(stderr=True).status("decoding") as status:
        result = decoding.generate(
            model,
            texts,
            chosen,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            backend=backend,
            on_step=lambda step: status.update(f"decoding, forward {step.index}"),
        )
    seconds = time.perf_counter() - started
    for row, prompt in enumerate(texts):
        answer = None if result.text is None else result.text[row]
        if as_json:
            record = {
                "prompt": prompt,
                "text": answer,
                "ids": result.sequences[row][-max_new_tokens:].tolist(),
                "nfe": result.nfe[row].item(),
                "tokens_per_forward": round(result.tokens_per_forward[row].item(), 3),
                "step_map": result.step_map[row].tolist(),
                "seconds": round(seconds, 3),
            }
            click.echo(json.dumps(record))
        else:
            click.echo(answer)
            click.echo(
                f"[{result.nfe[row]} forwards, "
                f"{result.tokens_per_forward[row]:.2f} tokens per forward]",
                err=True,
            )


def _make_algorithm(name: str, settings: tuple[str, ...], verifier: Callable[[], Any]) -> Any:
    """Build the algorithm from ``NAME=VALUE`` strings."""
    from pydllm.decoding.settings import SettingError, make_algorithm

    pairs = (setting.partition("=") for setting in settings)
    try:
        return make_algorithm(name, {key: value for key, _, value in pairs}, verifier)
    except SettingError as error:
        raise click.BadParameter(str(error), param_hint="--algorithm, --set") from None


@main.command()
@JSON
def env(as_json: bool) -> None:
    """What is installed, which backends work, and why not."""
    from pydllm import env as environment

    if as_json:
        click.echo(json.dumps(environment.report()))
    else:
        environment.main()


@main.command("lm-eval", context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def lm_eval(arguments: tuple[str, ...]) -> None:
    """lm-evaluation-harness with this package's models: its arguments, less --model."""
    try:
        from pydllm.integrations.harness import main as run
    except ImportError as error:
        raise PydllmError(
            f"lm-evaluation-harness cannot be imported ({error}): pip install 'pydllm[eval]'"
        ) from error
    run(arguments)


for command in (demo, compare, aup, distill):
    main.add_command(command)

if __name__ == "__main__":
    main()
