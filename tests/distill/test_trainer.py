import json
import re

import pytest
import torch

import pydllm
from pydllm import CheckpointError
from pydllm.distill import Recipe, extract, load_transformer, train
from pydllm.distill.run import save_student
from pydllm.distill.trainer import METRICS, STATE, SingleDevice, draw_batch
from tests.models.plain import CONFIGS, LLADA, random_plain, write_checkpoint

SMALL = LLADA | {"n_layers": 2}
RECIPE = Recipe(
    max_new_tokens=16,
    block_length=8,
    windows=(8, 16),
    batch_size=4,
    accumulation=2,
    learning_rate=3e-3,
    lora_rank=0,
)
PROMPTS = [[n, 2 * n, 7] for n in range(1, 9)]


def _teacher(tmp_path, config=SMALL):
    folder = write_checkpoint(tmp_path / "teacher", random_plain(config, dtype=torch.float32))
    trajectories = extract(
        pydllm.load(folder, device="cpu"), PROMPTS, max_new_tokens=16, block_length=8
    )
    return folder, trajectories


def _run(folder, trajectories, out, steps, recipe=RECIPE, stop=None, **options):
    out.mkdir(exist_ok=True)
    model = load_transformer(folder)
    records = train(model, trajectories, recipe, out, steps=steps, save_every=2, **options)
    losses = []
    for record in records:
        losses.append(record["loss"])
        if record["step"] == stop:
            records.close()
    return model, losses


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_a_resumed_training_has_the_same_bits(tmp_path, rank):
    if rank:
        pytest.importorskip("peft", reason="peft is not installed")
    folder, trajectories = _teacher(tmp_path)
    recipe = Recipe(**vars(RECIPE) | {"lora_rank": rank})
    torch.manual_seed(1)
    whole, losses = _run(folder, trajectories, tmp_path / "whole", 5, recipe)
    torch.manual_seed(2)
    _, before = _run(folder, trajectories, tmp_path / "parts", 5, recipe, stop=3)
    # Interrupted one step after the state of step 2 was saved; torch's random state is another.
    resumed, after = _run(folder, trajectories, tmp_path / "parts", 5, recipe)
    assert before[:2] + after == losses
    teacher = load_transformer(folder).state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
        trained = rank == 0 or (".blocks." in name and "norm" not in name)
        assert torch.equal(value, teacher[name]) != trained, name
    lines = (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]


def test_distillation_lowers_the_forwards(tmp_path):
    """A teacher that is never sure, 200 steps, and the same text in far fewer forwards."""
    folder, trajectories = _teacher(tmp_path)
    recipe = Recipe(**vars(RECIPE) | {"batch_size": 8, "accumulation": 1})
    model, losses = _run(folder, trajectories, tmp_path / "out", 200, recipe)
    save_student(model, folder, tmp_path / "out")
    decode = {"algorithm": pydllm.EntropyBound(bound=0.5, block_length=16), "max_new_tokens": 16}
    results = [
        pydllm.generate(pydllm.load(path, device="cpu"), PROMPTS, **decode)
        for path in (folder, tmp_path / "out")
    ]
    forwards = [result.nfe.float().mean().item() for result in results]
    assert forwards[1] * 3 < forwards[0], forwards
    same = [
        (sequence == ids[: len(sequence)]).float().mean().item()
        for sequence, ids in zip(results[1].sequences, trajectories.ids, strict=True)
    ]
    assert sum(same) / len(same) > 0.8
    # The last decodes blocks side by side, so a block a forward is the least there can be: 2.
    student = pydllm.load(tmp_path / "out", device="cpu")
    parallel = pydllm.generate(
        student,
        PROMPTS,
        pydllm.MultiBlock(threshold=0.5, block_length=8, cache=False),
        max_new_tokens=16,
    )
    assert parallel.nfe.float().mean() <= 3.5
    assert losses[-1] < losses[0] / 4


def test_accumulation_is_the_mean_of_its_forwards(tmp_path):
    """Of one sample each, with the whole answer as window, so that the parts are alike in size."""
    folder, trajectories = _teacher(tmp_path)
    common = vars(RECIPE) | {"windows": (16,), "ratios": (1.0, 1.0), "complement": False}
    models = []
    for size, count in ((4, 1), (1, 4)):
        recipe = Recipe(**common | {"batch_size": size, "accumulation": count, "entropy_weight": 0})
        model, _ = _run(folder, trajectories, tmp_path / f"{size}", 1, recipe)
        models.append(model.state_dict())
    for name, value in models[0].items():
        torch.testing.assert_close(models[1][name], value, rtol=1e-3, atol=1e-4)


def test_shifted_models_are_trained_on_the_row_before(tmp_path):
    folder, trajectories = _teacher(tmp_path, CONFIGS["dream"])
    recipe = Recipe(**vars(RECIPE) | {"learning_rate": 1e-2, "batch_size": 8, "accumulation": 1})
    _, losses = _run(folder, trajectories, tmp_path / "out", 40, recipe)
    assert losses[-1] < losses[0] / 2


def test_batches_are_a_function_of_their_place(tmp_path):
    _, trajectories = _teacher(tmp_path)

    def rows(step, forward=0, process=0, processes=1):
        batch, ratio, window = draw_batch(
            trajectories, RECIPE, 60, 0, (step, 10, forward, process, processes)
        )
        return sorted(batch.clean[:, 0].tolist()), ratio, window

    assert rows(0) == rows(0)
    assert rows(0)[0] + rows(0, 1)[0] != rows(1)[0] + rows(1, 1)[0]
    # One epoch is 2 forwards of 4, on one process or on two; each sees every sample once.
    assert sorted(rows(3)[0] + rows(3, 1)[0]) == list(range(1, 9))
    assert sorted(rows(3, 0, 0, 2)[0] + rows(3, 0, 1, 2)[0]) == list(range(1, 9))
    assert rows(3, 0, 0, 2)[1] != rows(3, 0, 1, 2)[1]
    assert (rows(0)[2], rows(9)[2]) == (8, 16)
    assert rows(9)[1] == 0.8


def test_accelerate_trains_the_same(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    folder, trajectories = _teacher(tmp_path)
    plain, _ = _run(folder, trajectories, tmp_path / "a", 2)
    device = accelerate.Accelerator(cpu=True)
    other, _ = _run(folder, trajectories, tmp_path / "b", 2, accelerator=device)
    for name in dir(SingleDevice):
        assert hasattr(device, name)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize(
    "name, content", [(STATE, b""), (STATE, b"PK damaged"), (METRICS, b"{\n"), (METRICS, b"{}\n")]
)
def test_a_damaged_file_is_named(tmp_path, name, content):
    folder, trajectories = _teacher(tmp_path)
    out = tmp_path / "out"
    _run(folder, trajectories, out, 2)
    (out / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(out / name))}: expected "):
        _run(folder, trajectories, out, 2)


def test_wrong_input_is_refused(tmp_path):
    folder, trajectories = _teacher(tmp_path)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="expected at least one"):
        _run(folder, trajectories[torch.tensor([], dtype=torch.int64)], out, 2)
    _run(folder, trajectories, out, 2)
    assert (out / STATE).exists()
    with pytest.raises(pydllm.CheckpointError, match="a training of 3 steps .*found one of 2"):
        _run(folder, trajectories, out, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"windows": ()}, r"windows: expected one or more ints of at least 1, got \(\)"),
        ({"windows": (4, 0)}, "windows: expected one or more"),
        ({"ratios": (0.5, 0.2)}, "ratios: expected two numbers"),
        (
            {"entropy_temperature": 0},
            r"entropy_temperature: expected a number in \[1e-6, 1e18\], got 0",
        ),
        ({"entropy_weight": float("nan")}, "entropy_weight: expected a number of at least 0"),
        ({"schedule": "linear"}, "schedule: expected constant or cosine, got 'linear'"),
        ({"batch_size": 0}, "batch_size: expected an int of at least 1, got 0"),
        ({"lora_rank": -1}, "lora_rank: expected an int of at least 0, got -1"),
        ({"warmup": 1.0}, r"warmup: expected a number in \[0, 1\), got 1.0"),
    ],
)
def test_recipes_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**change)


def test_learning_rates():
    recipe = Recipe(learning_rate=1.0, schedule="cosine", warmup=0.05)
    assert [recipe.rate(step, 100) for step in (0, 4, 5)] == [0.2, 1.0, 1.0]
    assert recipe.rate(52, 100) == pytest.approx(0.5, abs=0.02)
    assert recipe.rate(99, 100) < 0.001
    assert {Recipe().rate(step, 10) for step in range(10)} == {2e-5}
