"""The command line: ``pydllm demo | compare | generate | chat | distill | aup | verify | ...``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from pydllm._backend import env as env_settings
from pydllm._backend.errors import PydllmError
from pydllm._options import BACKEND, DEVICE, JSON
from pydllm.cli.chat import chat
from pydllm.cli.generate import generate
from pydllm.demo import MODELS, SWEEPS
from pydllm.demo.aup import aup
from pydllm.demo.command import demo
from pydllm.distill.command import distill
from pydllm.integrations.code_tasks import code_eval


class _Group(click.Group):
    """Turns the library's errors into one line and exit code 1, without a traceback."""

    def invoke(self, context: click.Context) -> Any:
        try:
            if env_settings.ERROR is not None:
                raise ValueError(env_settings.ERROR)
            return super().invoke(context)
        except (PydllmError, ValueError, TypeError, OSError) as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            context.exit(130)  # 128 + SIGINT, as shells have it


class _Sweep(click.Choice):
    """A sweep, spelt as ``--algorithm`` takes it: case, ``_`` and ``-`` do not matter."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from pydllm.decoding.settings import plain_name

        same = (name for name in SWEEPS if plain_name(name) == plain_name(value))
        return super().convert(next(same, value), param, ctx)


@click.group(cls=_Group)
@click.version_option(package_name="pydllm")
def main() -> None:
    """Kernels and decoding algorithms for diffusion language models."""


@main.command()
@click.option(
    "--sweep",
    "sweeps",
    multiple=True,
    type=_Sweep(SWEEPS),
    help="Decode with settings of this algorithm from careful to fast; repeat for several.",
)
@click.option("--original", metavar="MODULE:FUNCTION", help="The decoding function to begin with.")
@click.option("--patched", metavar="MODULE:FUNCTION", help="The function to compare it with.")
@click.option("--model", "source", default="llada-tiny", show_default=True, help="Bundled, or DIR.")
@click.option(
    "--loader",
    metavar="MODULE:FUNCTION",
    help="This function is called with DIR and returns the model for both functions. It has a "
    "`device` and, where they call it, must be callable. Default: pydllm.load, made callable.",
)
@click.option("--prepare", metavar="MODULE:FUNCTION", help="Called with the model for --patched.")
@click.option("--prompts", type=click.Path(path_type=Path), help="A line each: text, or JSON.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="For both functions.")
@click.option("--set-original", "first", multiple=True, metavar="NAME=VALUE")
@click.option("--set-patched", "second", multiple=True, metavar="NAME=VALUE")
@click.option("--batch", default=1, show_default=True, help="Prompts of one length per call.")
@click.option("--repeat", default=3, show_default=True, help="Timed rounds; the median counts.")
@click.option("--strict", is_flag=True, help="Exit code 1 unless all tokens are equal.")
@click.option("--problems", default=50, show_default=True, type=click.IntRange(1, 10000))
@click.option("--seed", default=0, show_default=True, help="Which held-out problems.")
@DEVICE
@click.option("--out", default="out/compare", show_default=True, type=click.Path(path_type=Path))
@BACKEND
@JSON
def compare(
    sweeps: tuple[str, ...],
    original: str | None,
    patched: str | None,
    source: str,
    problems: int,
    seed: int,
    device: str | None,
    out: Path,
    backend: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Sweep algorithms from careful to fast: accuracy over tokens per forward, CSV and PNG. Or run
    two decoding functions on the same prompts: tokens, forwards, time, CSV.
    """
    if sweeps and not (original or patched):
        from pydllm.demo.command import sweep

        if source not in MODELS:
            raise click.BadParameter(
                f"expected one of {', '.join(MODELS)} with --sweep, got {source}",
                param_hint="--model",
            )
        return sweep(sweeps, source, problems, seed, device, out, backend, as_json)
    if sweeps or not (original and patched):
        raise click.UsageError("expected --sweep, or --original and --patched")
    from pydllm.demo.task import held_out_problems
    from pydllm.integrations.command import side_by_side

    texts = [problem.prompt for problem in held_out_problems(problems, seed)]
    if source not in MODELS and options["prompts"] is None:
        raise click.UsageError(f"expected --prompts with --model {source}, got none")
    folder = str(MODELS.get(source, source))
    rows = side_by_side((original, patched), folder, texts, device, out, as_json=as_json, **options)
    if as_json:
        click.echo(json.dumps(rows))


@main.command()
@JSON
def env(as_json: bool) -> None:
    """What is installed, which backends work, and why not."""
    from pydllm import env as environment

    if as_json:
        click.echo(json.dumps(environment.report()))
    else:
        environment.main()


@main.command()
@click.argument("source", metavar="DIR")
@DEVICE
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16", "float64"]))
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="As pydllm.load has.")
@click.option("--reference/--no-reference", default=True, help="Compare with transformers.")
@click.option("--new-tokens", default=16, show_default=True, help="Of each continuation.")
@BACKEND
@JSON
def verify(
    source: str,
    device: str | None,
    dtype: str | None,
    settings: tuple[str, ...],
    reference: bool,
    new_tokens: int,
    backend: str | None,
    as_json: bool,
) -> None:
    """Load a checkpoint, compare its forwards with transformers', print a report.

    The first thing to run on new weights, and what to attach to a bug; exit code 1 if one fails.
    """
    import torch

    from pydllm.integrations.command import read_setting
    from pydllm.models.verify import verify as run

    report = run(
        MODELS.get(source, source),
        device=device,
        dtype=None if dtype is None else getattr(torch, dtype),
        reference=reference,
        new_tokens=new_tokens,
        backend=backend,
        **dict(map(read_setting, settings)),
    )
    click.echo(json.dumps(report.as_dict()) if as_json else str(report))
    if not report.passed:
        sys.exit(1)


LM_EVAL_HELP = """\
Usage: pydllm lm-eval [ARGUMENTS OF LM-EVAL]

  lm-evaluation-harness with this package's models: its arguments, less --model. It is not
  installed here: pip install 'pydllm[eval]', then this shows its own help. Example:

  pydllm lm-eval --tasks gsm8k --batch_size 8 --model_args pretrained=DIR,algorithm=threshold"""


@main.command("lm-eval", context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def lm_eval(arguments: tuple[str, ...]) -> None:
    """lm-evaluation-harness with this package's models: its arguments, less --model."""
    try:
        from pydllm.integrations.harness import main as run
    except ImportError as error:
        if not {"--help", "-h"}.isdisjoint(arguments):
            click.echo(LM_EVAL_HELP)
            return
        raise PydllmError(
            f"lm-evaluation-harness cannot be imported ({error}): pip install 'pydllm[eval]'"
        ) from error
    run(arguments)


for command in (chat, demo, aup, code_eval, distill, generate):
    main.add_command(command)

if __name__ == "__main__":
    main()
