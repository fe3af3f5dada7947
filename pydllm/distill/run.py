"""A whole distillation: checks, trajectories in shards, training, checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file

from pydllm._backend.errors import CheckpointError, PydllmError
from pydllm._backend.signatures import check_called
from pydllm._checks import check_usable
from pydllm.decoding import Static
from pydllm.decoding.prompts import encode_prompts
from pydllm.distill.prompts import Prompt, answer_checker
from pydllm.distill.published import Recorded
from pydllm.distill.recipe import Recipe
from pydllm.distill.report import plot_training
from pydllm.distill.trainer import METRICS, SingleDevice, train
from pydllm.distill.trajectories import (
    Trajectories,
    extract,
    join,
    load_trajectories,
    save_trajectories,
)
from pydllm.distill.transformer import Transformer, load_transformer
from pydllm.models import load
from pydllm.models.checkpoint import Shards
from pydllm.models.native import NativeModel

SETTINGS, TRAJECTORIES = "settings.json", "trajectories"
# Where an answer was not accepted at temperature 0.
RETRY_TEMPERATURES = (0.0, 0.1, 0.2, 0.3, 0.4)


@dataclass(frozen=True)
class Job:
    """What ``pydllm distill`` was asked for; see its options.

    ``recorded``: trajectories that exist already; there are no prompts to decode then.
    """

    teacher: Path
    prompts: list[Prompt]
    recipe: Recipe
    out: Path
    steps: int
    answer_pattern: str | None = None
    shard: int = 256
    save_every: int = 200
    seed: int = 0
    device: str | None = None
    dtype: torch.dtype | None = None
    accelerate: bool = False
    backend: str | None = None
    recorded: Recorded | None = None

    def settings(self) -> dict[str, Any]:
        """What decides the result; a folder is gone on with under the same settings alone."""
        data = json.dumps([dataclasses.astuple(prompt) for prompt in self.prompts])
        return {
            "teacher": str(self.teacher.resolve()),
            "prompts": len(self.prompts),
            "prompts_sha256": hashlib.sha256(data.encode()).hexdigest(),
            "recorded_sha256": None if self.recorded is None else _digest(self.recorded),
            "answer_pattern": self.answer_pattern,
            "shard": self.shard,
            "steps": self.steps,
            "seed": self.seed,
            "dtype": None if self.dtype is None else str(self.dtype),
            **json.loads(json.dumps(dataclasses.asdict(self.recipe))),
        }


def run(job: Job) -> Iterator[str]:
    """Do it, or go on with it, yielding a line for the user at each stage.

    Raises:
        ValueError, CheckpointError, PydllmError: before anything is written, an input that cannot
            be distilled.
    """
    accelerator = _accelerator(job)
    device = accelerator.device
    teacher, prompts = _check(job, device)
    accelerator.wait_for_everyone()  # nobody finds a folder that another has begun to fill
    if accelerator.is_main_process:
        (job.out / TRAJECTORIES).mkdir(parents=True, exist_ok=True)
        text = json.dumps(job.settings(), indent=2) + "\n"
        temporary = job.out / f"{SETTINGS}.new"
        temporary.write_text(text)
        temporary.replace(job.out / SETTINGS)  # completely there, or not at all
    accelerator.wait_for_everyone()
    trajectories = _trajectories(job, teacher, prompts, accelerator)
    del teacher
    if accelerator.is_main_process:
        count = len(job.prompts) if job.recorded is None else job.recorded.records
        yield f"{len(trajectories)} of {count} trajectories in {job.out / TRAJECTORIES}"
    # Adapters are trained in fp32 over frozen weights that need not be.
    frozen = job.dtype if job.recipe.lora_rank and job.dtype else torch.float32
    model = load_transformer(job.teacher, device=device, dtype=frozen)
    half = job.dtype if job.dtype != torch.float32 else None
    records = train(
        model,
        trajectories,
        job.recipe,
        job.out,
        steps=job.steps,
        seed=job.seed,
        save_every=job.save_every,
        autocast=half,
        accelerator=accelerator,
        backend=job.backend,
    )
    with _progress("loss {task.fields[loss]:.3f}", accelerator.is_main_process) as progress:
        bar = progress.add_task("train", total=job.steps, loss=float("nan"))
        for record in records:
            progress.update(bar, completed=int(record["step"]), loss=record["loss"])
    if not accelerator.is_main_process:
        return
    save_student(model, job.teacher, job.out)
    try:
        plot_training(job.out / METRICS, job.out / "training.png")
    except ImportError:
        yield "no picture: matplotlib is not installed (pip install 'pydllm[demo]')"
    yield f"student: {job.out}"


def save_student(model: Transformer, teacher: Path, out: Path) -> None:
    """Write the checkpoint: weights in the teacher's dtypes and names, its other files copied."""
    stored = Shards(teacher).found
    weights = {
        name: value.detach().cpu().to(stored[name].dtype).contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(weights, out / "model.new", metadata={"format": "pt"})
    (out / "model.new").rename(out / "model.safetensors")
    for path in sorted(teacher.iterdir()):
        ours = path.name == SETTINGS or path.name.endswith(".index.json")
        if path.suffix in (".json", ".jinja", ".txt") and not ours:
            shutil.copy(path, out / path.name)


def _accelerator(job: Job) -> Any:
    if not job.accelerate:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        return SingleDevice(check_usable("--device", job.device or default))
    try:
        from accelerate import Accelerator
    except ImportError:
        raise PydllmError(
            "--accelerate: several devices need accelerate (pip install 'pydllm[distill]')"
        ) from None
    if job.device not in (None, "cpu"):
        raise ValueError(f"--device: expected none with --accelerate, or cpu, got {job.device!r}")
    for function, call in {
        Accelerator: "*, cpu",
        Accelerator.prepare: "objective, optimiser",
        Accelerator.backward: "loss",
        Accelerator.no_sync: "model",
        Accelerator.clip_grad_norm_: "parameters, norm",
        Accelerator.wait_for_everyone: "",
    }.items():
        check_called("accelerate", function, call)
    return Accelerator(cpu=job.device == "cpu")


def _check(job: Job, device: torch.device) -> tuple[NativeModel, list[list[int]]]:
    """Everything that can be wrong, before anything is written; the teacher and the prompts."""
    recipe = job.recipe
    if not job.teacher.is_dir():
        raise ValueError(f"--teacher: expected a folder, got {job.teacher}, which is none")
    teacher = load(job.teacher, device=device, dtype=job.dtype)
    if teacher.spec.attention != "full":
        raise ValueError(
            f"--teacher: expected a model with full attention, got {teacher.spec.attention!r}"
        )
    if job.recorded is None:
        texts: Any = [prompt.prompt for prompt in job.prompts]
        ids = encode_prompts(teacher, texts)
    else:
        ids = _recorded_prompts(job.recorded, teacher)
    for row, given in enumerate(ids):
        if teacher.spec.mask_id in given:
            raise ValueError(f"--data: expected no mask in a prompt, got one in prompts[{row}]")
    Static(block_length=recipe.block_length, score=recipe.score)
    answer_checker(job.prompts, job.answer_pattern)
    longest = max(map(len, ids)) + recipe.max_new_tokens
    if longest > teacher.spec.max_positions:
        raise ValueError(
            f"--data: expected at most {teacher.spec.max_positions} positions with "
            f"--max-new-tokens {recipe.max_new_tokens}, got {longest}"
        )
    if recipe.lora_rank:
        try:
            import peft  # noqa: F401
        except ImportError:
            raise PydllmError(
                "--lora-rank: LoRA needs peft (pip install 'pydllm[distill]'); "
                "--lora-rank 0 trains all weights"
            ) from None
    if job.out.exists() and not job.out.is_dir():
        raise ValueError(f"--out: expected a folder, got the file {job.out}")
    if not job.out.exists() or not any(job.out.iterdir()):
        return teacher, ids
    if not (job.out / SETTINGS).is_file():
        raise ValueError(f"--out: expected a new folder or one to go on with, got {job.out}")
    before, now = _read_settings(job.out / SETTINGS), job.settings()
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        key = changed[0]
        raise ValueError(
            f"--out: {job.out} holds a distillation with other settings: expected {key} "
            f"{before.get(key)}, got {now[key]}"
        )
    return teacher, ids


def _recorded_prompts(recorded: Recorded, teacher: NativeModel) -> list[list[int]]:
    """The prompts of trajectories that fit the teacher."""
    found, vocab = recorded.trajectories, teacher.spec.vocab_size
    if len(found) == 0:
        raise ValueError(
            f"--trajectories: expected a record to train on, got {recorded.records} of which "
            f"{recorded.incorrect} are incorrect and {recorded.empty} have no trajectory"
        )
    if recorded.mask_id != teacher.spec.mask_id:
        raise ValueError(
            f"--trajectories: expected the teacher's mask {teacher.spec.mask_id}, "
            f"got {recorded.mask_id}"
        )
    if not (found.ids.min() >= 0 and found.ids.max() < vocab):
        raise ValueError(
            f"--trajectories: expected token ids in [0, {vocab}), got {int(found.ids.min())} to "
            f"{int(found.ids.max())}"
        )
    lengths = found.prompt_length.tolist()
    return [row[:length].tolist() for row, length in zip(found.ids, lengths, strict=True)]


def _digest(recorded: Recorded) -> str:
    found = recorded.trajectories
    digest = hashlib.sha256()
    for tensor in (found.ids, found.prompt_length, found.step_map):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def _trajectories(
    job: Job, teacher: NativeModel, prompts: list[list[int]], accelerator: Any
) -> Trajectories:
    """Decode the shards that are missing, each process its own; then read all of them.

    Recorded trajectories are one shard, and nothing is decoded.
    """
    if job.recorded is not None:
        path = job.out / TRAJECTORIES / "00000.safetensors"
        if accelerator.is_main_process and not path.exists():
            save_trajectories(job.recorded.trajectories, path)
        accelerator.wait_for_everyone()
        return load_trajectories(path, teacher.spec.vocab_size)
    recipe, accept = job.recipe, answer_checker(job.prompts, job.answer_pattern)
    starts = range(0, len(prompts), job.shard)
    files = [job.out / TRAJECTORIES / f"{n:05d}.safetensors" for n in range(len(starts))]
    missing = [n for n, path in enumerate(files) if not path.exists()]
    with _progress("trajectories", accelerator.is_main_process) as progress:
        bar = progress.add_task("", total=len(files), completed=len(files) - len(missing))
        for n in missing[accelerator.process_index :: accelerator.num_processes]:
            part = extract(
                teacher,
                prompts[starts[n] : starts[n] + job.shard],
                max_new_tokens=recipe.max_new_tokens,
                block_length=recipe.block_length,
                score=recipe.score,
                temperatures=RETRY_TEMPERATURES if accept else (0.0,),
                accept=None if accept is None else partial(_accept_in_shard, accept, starts[n]),
                seed=job.seed,
                backend=job.backend,
            )
            save_trajectories(part, files[n])
            progress.advance(bar)
    accelerator.wait_for_everyone()
    whole = join([load_trajectories(path, teacher.spec.vocab_size) for path in files])
    if whole.step_map.shape[1] != recipe.max_new_tokens:
        raise CheckpointError(
            f"{job.out / TRAJECTORIES}: expected answers of {recipe.max_new_tokens} tokens, "
            f"found {whole.step_map.shape[1]}"
        )
    if len(whole) == 0:
        raise ValueError("--answer-pattern: expected an accepted answer, got none")
    return whole


def _accept_in_shard(accept: Callable[[int, str], bool], first: int, row: int, text: str) -> bool:
    return accept(first + row, text)


def _progress(text: str, shown: bool) -> Progress:
    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown)
