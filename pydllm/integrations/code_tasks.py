"""``pydllm code-eval``: pass@1 of lm-eval's code tasks, after the answers were post-processed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click

from pydllm._options import JSON
from pydllm.metrics.harness_results import SANITIZED, is_harness_results
from pydllm.metrics.programs import SECONDS, passes, program


@click.command("code-eval")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--confirm-run-unsafe-code", "confirmed", is_flag=True, help="Run what was written.")
@click.option("--seconds", default=SECONDS, show_default=True, help="Time limit of a program.")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(1))
@JSON
def code_eval(
    files: tuple[Path, ...], confirmed: bool, seconds: float, workers: int, as_json: bool
) -> None:
    """pass@1 of HumanEval and MBPP from FILES: samples_*.jsonl that lm-eval wrote (--log_samples),
    or results_*.json beside them.

    Programs are cut out of the answers as the scripts of Dream, Fast-dLLM and d3LLM do, and run
    with the tests. Writes FILE.cleaned next to each file of samples; a results file gets the
    number as a further metric, which `pydllm aup` then takes.
    """
    if not confirmed:
        raise click.UsageError(
            "expected --confirm-run-unsafe-code: programs that a model wrote are run, in processes "
            "of their own and without a sandbox"
        )
    found: dict[str, float] = {}
    for file in files:
        results = _results(file)
        samples = [(file, None)] if results is None else list(_samples(file, results))
        for path, task in samples:
            score = _evaluate(path, seconds, workers)
            found[str(path)] = score
            if results is not None and task is not None:
                results["results"][task][SANITIZED] = score
            if not as_json:
                click.echo(f"{path}: pass@1 {score:.4f}")
        if results is not None:
            temporary = file.with_suffix(".new")
            temporary.write_text(json.dumps(results, indent=2), encoding="utf-8")
            temporary.replace(file)
    if as_json:
        click.echo(json.dumps(found))


def _results(path: Path) -> dict[str, Any] | None:
    """A results file; None: another file."""
    if path.suffix != ".json":
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error
    if not is_harness_results(values):
        raise ValueError(f"{path}: expected a results file of lm-eval, got other JSON")
    return values


def _samples(path: Path, results: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    """Files of samples of the same run, and their tasks."""
    date = path.stem.removeprefix("results_")
    found = False
    for task in results["results"]:
        samples = path.with_name(f"samples_{task}_{date}.jsonl")
        if samples.is_file() and task.startswith(("humaneval", "mbpp")):
            found = True
            yield samples, task
    if not found:
        raise ValueError(
            f"{path}: expected samples_TASK_{date}.jsonl of HumanEval or MBPP beside it "
            "(--log_samples), found none"
        )


def _evaluate(path: Path, seconds: float, workers: int) -> float:
    """pass@1 of the samples; writes the programs beside them."""
    samples = _read(path)
    programs = []
    for number, sample in enumerate(samples, 1):
        try:
            programs.append(program(sample))
            if not isinstance(sample.get("target"), str):
                raise ValueError("expected tests as target, got none")
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
    tests = [sample["target"] for sample in samples]
    with ThreadPoolExecutor(workers) as pool:
        passed = list(pool.map(passes, programs, tests, [seconds] * len(tests)))
    with path.with_name(path.name + ".cleaned").open("w", encoding="utf-8") as file:
        for sample, code, good in zip(samples, programs, passed, strict=True):
            task_id = sample["doc"].get("task_id")
            row = {"task_id": task_id, "completion": [code], "pass_at_1": float(good)}
            file.write(json.dumps(row) + "\n")
    return sum(passed) / len(passed)


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        samples = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected samples of lm-eval, JSON lines, got {error}") from error
    if not samples or not all(isinstance(sample, dict) for sample in samples):
        raise ValueError(f"{path}: expected samples of lm-eval, JSON objects, got none or others")
    return samples
