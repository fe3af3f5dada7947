"""Running a job: the batches one after another here, or spread over Ray's actors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydllm._backend.errors import PydllmError
from pydllm._backend.signatures import check_called
from pydllm._checks import check_bool, check_choice, check_int, check_usable, describe
from pydllm.integrations.jobs.job import Job, Row, Summary, claim
from pydllm.integrations.jobs.worker import Recipe, Worker
from pydllm.models.parallel import wait_for_all_processes

ENGINES = ("process", "ray")
CALL = 4  # batches per call of generate: how often answers are written


def run_job(
    data: Path,
    out: Path,
    recipe: Recipe,
    *,
    engine: str = "process",
    batch_size: int = 16,
    workers: int | None = None,
    device: str | None = None,
    expert_parallel: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Answer the prompts of a file; run again, it goes on where it was cut off.

    Args:
        data: the prompts, see ``Job``.
        out: the folder of the answers.
        recipe: model, algorithm and the rest that decides an answer.
        engine: ``"process"``: in this process; ``"ray"``: in actors of Ray Data, one for each GPU
            (or CPU) that it gets. An actor that dies is started again and its batch repeated.
        batch_size: sequences decoded together. A call has up to ``CALL`` times that number of
            prompts: those that wait take the slots of finished ones.
        workers: actors; default: as many as Ray has GPUs, or else CPUs.
        device: of each worker; default: the GPU if there is one.
        expert_parallel: how the model is spread where processes share it, see ``pydllm.load``; not
            with Ray, whose actors each hold all of it.
        progress: called with the rows done so far and those that failed of them.

    Returns:
        What was done. A row that cannot be answered has an ``error`` in place of a text, and is
        tried again by the next run.

    Raises:
        PydllmError: the data or folder is not usable, Ray is missing, or rows stayed undone.
        ValueError: an engine or a number that is not accepted, or what the algorithm refuses.
    """
    for name, path in (("data", data), ("out", out)):
        if not isinstance(path, Path):
            raise TypeError(f"{name}: expected a Path, got {describe(path)}")
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe: expected a Recipe, got {describe(recipe)}")
    check_choice("engine", engine, ENGINES)
    check_int("batch_size", batch_size, 1)
    if workers is not None and (type(workers) is not int or workers < 1 or engine == "process"):
        raise ValueError(f"workers: expected None, or at least 1 with Ray, got {workers!r}")
    if device is not None:
        check_usable("device", device)
    check_bool("expert_parallel", expert_parallel)
    if expert_parallel and engine == "ray":
        raise ValueError("expert_parallel: expected False with Ray, whose actors share no model")
    recipe.check()
    job = Job(data, out, recipe.as_json())
    done, failed = job.resumed + len(job.unreadable), len(job.unreadable)
    if engine == "ray":
        run = _on_ray(job, recipe, batch_size, workers, device)
    else:
        batches = job.batches(CALL * batch_size)
        spread = device, expert_parallel
        worker = Worker(recipe, job.parts, batch_size, *spread) if batches else None
        job.claim()  # what the model or the algorithm refuses has left no trace
        run = (worker(batch) for batch in batches if worker is not None)
    for rows, errors in run:
        done, failed = done + rows, failed + errors
        if progress is not None:
            progress(done, failed)
    wait_for_all_processes()  # the first one has written what all of them read now
    return job.finish()


class _Actor:
    """A worker as Ray Data calls it: a dictionary in, a dictionary out."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        settings: dict[str, Any],
        batch_size: int,
        device: str | None,
    ) -> None:
        self._worker = Worker(recipe, out / "parts", batch_size, device)
        claim(out, settings)  # what the model or the algorithm refuses has left no trace

    def __call__(self, row: dict[str, Any]) -> dict[str, int]:
        rows, errors = self._worker([Row(**record) for record in row["batch"]])
        return {"rows": rows, "errors": errors}


def _on_ray(
    job: Job, recipe: Recipe, batch_size: int, workers: int | None, device: str | None
) -> Iterator[tuple[int, int]]:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise PydllmError(f"engine 'ray': {error} (pip install 'pydllm[ray]')") from error
    for function, call in {
        ray.init: "*, include_dashboard, logging_level, log_to_driver",
        ray.is_initialized: "",
        ray.cluster_resources: "",
        ray.data.from_items: "items, *, override_num_blocks",
        ray.data.ActorPoolStrategy: "*, size",
        ray.data.Dataset.map: "fn, *, fn_constructor_args, compute, num_cpus, num_gpus",
        ray.data.Dataset.iter_rows: "",
    }.items():
        check_called("ray", function, call)
    left = sum(map(len, job.batches(batch_size)))
    if not left:
        job.claim()
        return
    if not ray.is_initialized():
        ray.init(include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    have = ray.cluster_resources()
    gpus = 0 if device == "cpu" else int(have.get("GPU", 0))
    workers = min(workers or gpus or int(have["CPU"]), -(-left // batch_size))
    # Long calls, but one for each worker.
    batches = job.batches(min(CALL * batch_size, -(-left // workers)))
    # One block per call: what an actor takes at a time, and what is repeated when one dies.
    items = [{"batch": [asdict(row) for row in batch]} for batch in batches]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(
        _Actor,
        fn_constructor_args=(recipe, job.out.resolve(), job.settings, batch_size, device),
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=1,
        num_gpus=1 if gpus else 0,
    )
    for report in dataset.iter_rows():
        yield report["rows"], report["errors"]
