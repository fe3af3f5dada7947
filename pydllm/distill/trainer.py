"""The training of a student on its teacher's trajectories."""

from __future__ import annotations

import json
import pickle
import random
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pydllm._backend.errors import CheckpointError, PydllmError
from pydllm._backend.signatures import check_called
from pydllm.distill.loss import linear_certainty_loss
from pydllm.distill.masking import Noisy, draw_window, least_ratio, make_noisy, window_length
from pydllm.distill.recipe import Recipe
from pydllm.distill.trajectories import Trajectories
from pydllm.distill.transformer import Transformer

STATE, METRICS = "training.pt", "metrics.jsonl"


class Objective(nn.Module):
    """The loss of a noisy batch: ``(CE + CE' + w (ENT + ENT')) / 4``, as published.

    CE is the mean cross-entropy of the masked window tokens of the batch, ENT the mean entropy of
    those that are predicted already; primed ones are of the complementary masks. A part that the
    recipe leaves out is 0, and the 4 stays.
    """

    def __init__(self, model: Transformer, recipe: Recipe, backend: str | None) -> None:
        super().__init__()
        self.model, self.recipe, self.backend = model, recipe, backend

    def forward(self, batch: Noisy) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its parts; ``correct`` is the fraction of masked tokens predicted."""
        recipe, model = self.recipe, self.model
        inputs, counted = [batch.noisy], [batch.masked]
        if recipe.complement:
            inputs.append(batch.complement)
            counted.append(batch.unmasked)
        # One forward for both: half the launches, and one synchronisation on several devices.
        lengths = batch.lengths.repeat(len(inputs))
        hidden = model(torch.cat(inputs), lengths).chunk(len(inputs))
        weight, bias = model.head
        parts: dict[str, Tensor] = {}
        loss = hidden[0].new_zeros((), dtype=torch.float32)
        for name, states, rows in zip(("", "_complement"), hidden, counted, strict=False):
            target = batch.clean[rows]
            if model.spec.shift_logits:  # a position is predicted by the row before it
                states, rows = states[:, :-1], rows[:, 1:]
            losses = linear_certainty_loss(
                states[rows],
                weight,
                target,
                bias=bias,
                temperature=recipe.entropy_temperature,
                backend=self.backend,
            )
            cross_entropy, entropy = losses.means()
            loss = loss + cross_entropy
            if not name or recipe.complement_entropy:
                loss = loss + recipe.entropy_weight * entropy
            parts[f"cross_entropy{name}"], parts[f"entropy{name}"] = cross_entropy, entropy
            parts[f"correct{name}"] = losses.correct.sum() / max(1, len(target))
        return loss / 4, {name: part.detach() for name, part in parts.items()}


class SingleDevice:
    """What training asks of ``accelerate.Accelerator``, for one device and without it."""

    process_index, num_processes, is_main_process = 0, 1, True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def prepare(self, *things: Any) -> tuple[Any, ...]:
        return things

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def no_sync(self, model: nn.Module) -> Any:
        return nullcontext()

    def clip_grad_norm_(self, parameters: Any, norm: float) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, norm)

    def wait_for_everyone(self) -> None:
        pass


def add_lora(model: Transformer, rank: int) -> nn.Module:
    """Put LoRA adapters on every projection of every layer, in place; needs ``peft``.

    The published list of names misses ``attn_out``, ``ff_proj`` and ``ff_out`` of LLaDA, so that
    only four of its seven matrices were trained; here the names come from the model's family.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise PydllmError("lora_rank: LoRA needs peft (pip install 'pydllm[distill]')") from None
    check_called("peft", LoraConfig, "*, r, lora_alpha, lora_dropout, target_modules")
    check_called("peft", get_peft_model, "model, peft_config")
    config = LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=model.linear_names()
    )
    return get_peft_model(model, config)


def draw_batch(
    trajectories: Trajectories, recipe: Recipe, mask_id: int, seed: int, place: tuple[int, ...]
) -> tuple[Noisy, float, int]:
    """The noisy batch of a step, forward and process; its mean ratio and its window.

    ``place`` is (step, steps, forward, process, processes). It depends on the seed and these
    numbers alone. Every epoch shuffles the samples anew.
    """
    step, steps, forward, process, processes = place
    progress = step / max(1, steps - 1)
    length = window_length(progress * len(recipe.windows), recipe.windows)
    first = ((step * recipe.accumulation + forward) * processes + process) * recipe.batch_size
    rng = random.Random(f"{seed} {first}")
    rows = _shuffled(len(trajectories), seed, first, recipe.batch_size)
    answer = trajectories.step_map.shape[1]
    ratios, windows = [], []
    for _ in rows:
        ratios.append(rng.uniform(least_ratio(progress, recipe.ratios), recipe.ratios[1]))
        windows.append(draw_window(rng, answer, min(length, answer), ratios[-1]))
    batch = make_noisy(trajectories[torch.tensor(rows)], windows, mask_id)
    return batch, sum(ratios) / len(ratios), length


def _shuffled(samples: int, seed: int, first: int, count: int) -> list[int]:
    """Entries ``first`` to ``first + count`` of the endless sequence of shuffled epochs."""
    rows: list[int] = []
    while len(rows) < count:
        epoch, inside = divmod(first + len(rows), samples)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(samples, generator=generator)
        rows += order[inside : inside + count - len(rows)].tolist()
    return rows


def train(
    model: Transformer,
    trajectories: Trajectories,
    recipe: Recipe,
    out: Path,
    *,
    steps: int,
    seed: int = 0,
    save_every: int = 200,
    autocast: torch.dtype | None = None,
    accelerator: Any = None,
    backend: str | None = None,
) -> Iterator[dict[str, float]]:
    """Train in place (or go on from ``out``), yielding the numbers of each step.

    A state is written to ``out`` every ``save_every`` steps and after the last; a training that was
    interrupted and goes on from there ends with the same bits as one that was not.

    Args:
        model: starts as the teacher; trained in place, its LoRA adapters merged after the last
            step.
        trajectories: the teacher's.
        recipe: the hyper-parameters.
        out: an existing folder.
        steps: of the optimiser, in all.
        seed: of the order of the samples, windows and ratios, and of the adapters.
        save_every: steps between states.
        autocast: dtype of the matrix products on the device, or None.
        accelerator: an ``accelerate.Accelerator`` for several devices, or None.
        backend: as in ``pydllm.ops``.

    Raises:
        ValueError: no trajectories, or sequences longer than the model.
        CheckpointError: the state in ``out`` is of another training.
    """
    mask_id = model.spec.mask_id
    if len(trajectories) == 0 or mask_id is None:
        raise ValueError("trajectories: expected at least one, and a model with a mask id")
    longest = trajectories.ids.shape[1]
    if longest > model.spec.max_positions:
        raise ValueError(
            f"trajectories: expected at most {model.spec.max_positions} positions, got {longest}"
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = add_lora(model, recipe.lora_rank) if recipe.lora_rank else model
    if accelerator is None:
        accelerator = SingleDevice(next(model.parameters()).device)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser: Any = torch.optim.AdamW(
        trained.values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    first = _resume(out, trained, optimiser, steps)
    objective, optimiser = accelerator.prepare(Objective(model, recipe, backend), optimiser)
    device = accelerator.device
    for step in range(first, steps):
        started = time.perf_counter()
        rate = recipe.rate(step, steps)
        for group in optimiser.param_groups:
            group["lr"] = rate
        total: dict[str, Any] = {}
        for forward in range(recipe.accumulation):
            place = (step, steps, forward, accelerator.process_index, accelerator.num_processes)
            batch, ratio, window = draw_batch(trajectories, recipe, mask_id, seed, place)
            batch = Noisy(**{name: tensor.to(device) for name, tensor in vars(batch).items()})
            last = forward + 1 == recipe.accumulation
            with nullcontext() if last else accelerator.no_sync(objective):
                with torch.autocast(device.type, autocast, enabled=autocast is not None):
                    loss, parts = objective(batch)
                accelerator.backward(loss / recipe.accumulation)
            for name, value in {"loss": loss.detach(), **parts, "ratio": ratio}.items():
                total[name] = total.get(name, 0.0) + value / recipe.accumulation
        norm = accelerator.clip_grad_norm_(trained.values(), recipe.clip)
        optimiser.step()
        optimiser.zero_grad()
        record = {"step": step + 1, **{name: float(value) for name, value in total.items()}}
        record |= {"window": window, "learning_rate": rate, "gradient_norm": float(norm)}
        record["seconds"] = time.perf_counter() - started
        if accelerator.is_main_process:
            with (out / METRICS).open("a") as log:
                log.write(json.dumps(record) + "\n")
            if (step + 1) % save_every == 0 or step + 1 == steps:
                _save_state(out, trained, optimiser, step + 1, steps)
        yield record
    if recipe.lora_rank:
        adapted.merge_and_unload()  # type: ignore[operator]


def _save_state(
    out: Path, trained: dict[str, nn.Parameter], optimiser: Any, step: int, steps: int
) -> None:
    weights = {name: parameter.detach() for name, parameter in trained.items()}
    state = {"weights": weights, "optimiser": optimiser.state_dict(), "step": step, "steps": steps}
    torch.save(state, out / f"{STATE}.new")
    (out / f"{STATE}.new").rename(out / STATE)


def _resume(out: Path, trained: dict[str, nn.Parameter], optimiser: Any, steps: int) -> int:
    """Load the state in ``out``, if there is one; returns the steps done, forgets later ones."""
    if not (out / STATE).exists():
        (out / METRICS).unlink(missing_ok=True)
        return 0
    try:
        state = torch.load(out / STATE, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{out / STATE}: expected the state of a training, got a damaged file: {error}"
        ) from error
    shapes = {name: tuple(weight.shape) for name, weight in state["weights"].items()}
    if shapes != {name: tuple(p.shape) for name, p in trained.items()} or state["steps"] != steps:
        raise CheckpointError(
            f"{out / STATE}: expected the state of a training of {steps} steps of these "
            f"{len(trained)} tensors, found one of {state['steps']} steps and {len(shapes)} tensors"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(state["weights"][name])
    optimiser.load_state_dict(state["optimiser"])
    lines = (out / METRICS).read_text().splitlines() if (out / METRICS).exists() else []
    try:
        kept = [line for line in lines if json.loads(line)["step"] <= state["step"]]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{out / METRICS}: expected a JSON object a line: {error}") from error
    (out / METRICS).write_text("".join(line + "\n" for line in kept))
    return int(state["step"])
